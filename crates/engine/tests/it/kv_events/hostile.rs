//! Invalid bytes: the decoder does not panic, and takes time and memory in proportion to their
//! length.

use foresee_engine::kv_events::{Event, decode_batch, parse_message, parse_replay};
use proptest::prelude::*;
use rmpv::Value;

use super::recorded::payloads;
use super::written::{decode, encode, remove, removed};

#[test]
fn a_truncated_batch_yields_the_events_before_the_cut() {
    for payload in payloads() {
        let whole = decode_batch(&payload).unwrap();
        for cut in 0..payload.len() {
            let Ok(batch) = decode_batch(&payload[..cut]) else {
                continue;
            };
            assert!(batch.truncated);
            assert!(whole.events.starts_with(&batch.events));
        }
    }
}

#[test]
fn claimed_lengths_allocate_no_memory() {
    const HUGE: [&[u8]; 6] = [
        &[0xdd, 0xff, 0xff, 0xff, 0xff],
        &[0xdf, 0xff, 0xff, 0xff, 0xff],
        &[0xc6, 0xff, 0xff, 0xff, 0xff],
        &[0xdb, 0xff, 0xff, 0xff, 0xff],
        &[0xc9, 0xff, 0xff, 0xff, 0xff],
        &[0xdc, 0xff, 0xff],
    ];
    for payload in payloads() {
        for position in 0..payload.len() {
            for huge in HUGE {
                let mut bytes = payload[..position].to_vec();
                bytes.extend(huge);
                bytes.extend(&payload[position..]);
                check_is_bounded(&bytes);
            }
        }
    }
}

#[test]
fn deep_nesting_does_not_overflow_the_stack() {
    const DEPTH: usize = 4_000_000;
    let mut bytes = vec![0x92, 0x00, 0x92];
    bytes.extend(vec![0x91; DEPTH]);
    bytes.push(0x00);
    bytes.extend(encode(&remove(1)));
    let batch = decode_batch(&bytes).unwrap();
    assert_eq!((batch.events, batch.malformed), (vec![removed(1)], 1));
    assert!(!batch.truncated);
}

/// Decodes a payload and checks that the result is not larger than the payload.
fn check_is_bounded(payload: &[u8]) {
    let Ok(batch) = decode_batch(payload) else {
        return;
    };
    let mut values = batch.malformed as usize + batch.unknown as usize;
    for event in &batch.events {
        values += 1;
        match event {
            Event::Stored(stored) => {
                values += stored.hashes.len() + stored.tokens.len() + stored.extras.len();
                assert!(stored.tokens.capacity() <= payload.len());
                assert!(stored.hashes.capacity() <= payload.len());
            }
            Event::Removed(removed) => values += removed.hashes.len(),
            Event::Cleared { .. } => {}
        }
    }
    assert!(values <= payload.len());
}

fn any_value() -> impl Strategy<Value = Value> {
    let scalar = prop_oneof![
        Just(Value::Nil),
        any::<bool>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[a-z]{0,4}".prop_map(Value::from),
        prop::collection::vec(any::<u8>(), 0..40).prop_map(Value::Binary),
        prop_oneof![
            Just("BlockStored"),
            Just("BlockRemoved"),
            Just("AllBlocksCleared"),
            Just("type"),
            Just("block_hashes"),
            Just("token_ids"),
            Just("extra_keys"),
        ]
        .prop_map(Value::from),
    ];
    scalar.prop_recursive(4, 64, 8, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..8).prop_map(Value::Array),
            prop::collection::vec((inner.clone(), inner), 0..8).prop_map(Value::Map),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 2_000,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn no_bytes_cause_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        check_is_bounded(&bytes);
        check_is_bounded(&[&[0x92, 0x00][..], &bytes].concat());
        check_is_bounded(&[&[0x92, 0x00, 0x91, 0x85][..], &bytes].concat());
        let frames: Vec<_> = bytes.chunks(8).collect();
        let _ = (parse_message(&frames), parse_replay(&frames));
    }

    #[test]
    fn no_changed_recording_causes_a_panic(
        index in any::<prop::sample::Index>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let payloads = payloads();
        let mut payload = payloads[index.index(payloads.len())].clone();
        for (position, byte) in changes {
            let position = position.index(payload.len());
            payload[position] = byte;
        }
        check_is_bounded(&payload);
    }

    #[test]
    fn invalid_events_do_not_affect_valid_ones(
        invalid in prop::collection::vec(any_value(), 0..4),
        positions in prop::collection::vec(0_usize..4, 4),
    ) {
        let mut events: Vec<_> = (0..3).map(remove).collect();
        for (event, position) in invalid.iter().zip(positions) {
            events.insert(position.min(events.len()), event.clone());
        }
        let count = events.len();
        let batch = decode(events);
        prop_assert_eq!(batch.events.len() + (batch.malformed + batch.unknown) as usize, count);
        let mut valid = (0..3).map(removed).peekable();
        for event in &batch.events {
            valid.next_if_eq(event);
        }
        prop_assert_eq!(valid.count(), 0);
        prop_assert!(!batch.truncated);
    }
}
