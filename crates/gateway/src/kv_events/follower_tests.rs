//! Streams of KV events, as the mock engine encodes them and as engines were recorded, through the
//! follower of [`foresee_engine::kv_events::follower`].

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};

use foresee_core::event_index::PrefixRuns;
use foresee_core::sequence;
use foresee_engine::kv_events::follower::{Follower, Received};
use foresee_engine::kv_events::{
    Attention, BlockKey, BlockRemoved, BlockStored, Event, EventBatch, Message, decode_batch,
    parse_message,
};
use foresee_mock::{Layout, encode_batch};

use crate::kv_events::event_trust::UntrustedIndex;

const BLOCK: NonZeroU32 = NonZeroU32::new(2).unwrap();

fn follower() -> Follower {
    Follower::new(BLOCK, "m".to_owned(), None)
}

fn payload(timestamp: f64, events: Vec<Event>) -> Vec<u8> {
    let batch = EventBatch {
        timestamp: Some(timestamp),
        events,
        ..EventBatch::default()
    };
    encode_batch(&batch, Layout::Map)
}

fn stored(parent: Option<u64>, hash: u64, tokens: [u32; 2]) -> Event {
    Event::Stored(BlockStored {
        hashes: vec![BlockKey(hash)],
        parent: parent.map(BlockKey),
        tokens: tokens.to_vec(),
        block_size: 2,
        ..BlockStored::default()
    })
}

fn receive(follower: &mut Follower, sequence: u64, payload: &[u8]) -> Received {
    follower.receive(&Message {
        topic: b"",
        sequence,
        payload,
    })
}

#[test]
fn stored_blocks_have_the_hashes_of_a_prompt_with_these_tokens() {
    let mut follower = follower();
    let events = vec![stored(None, 7, [1, 2]), stored(Some(7), 8, [3, 4])];
    let Received::Applied(changes) = receive(&mut follower, 0, &payload(1.0, events)) else {
        panic!("not applied");
    };
    let salt = sequence::prefix_salt("m", None, None);
    let prompt = sequence::Sequence::from_tokens(&[1, 2, 3, 4], BLOCK, salt);
    let stored = changes.iter().flat_map(|delta| delta.stored.changed());
    assert!(stored.eq(prompt.hashes().iter().copied()));
    assert!(follower.is_complete());
}

#[test]
fn a_gap_is_reported_and_can_be_skipped() {
    let mut follower = follower();
    let first = payload(1.0, vec![stored(None, 7, [1, 2])]);
    assert!(matches!(
        receive(&mut follower, 0, &first),
        Received::Applied(_)
    ));
    let third = payload(3.0, vec![stored(Some(7), 8, [3, 4])]);
    assert_eq!(receive(&mut follower, 2, &third), Received::Gap(1));
    follower.skip_to(2);
    assert!(matches!(
        receive(&mut follower, 2, &third),
        Received::Applied(_)
    ));
    assert!(!follower.is_complete());
    // A cleared cache no longer depends on the batches that were missed.
    let cleared = payload(4.0, vec![Event::Cleared { medium: None }]);
    let Received::Applied(changes) = receive(&mut follower, 3, &cleared) else {
        panic!("not applied");
    };
    assert_eq!(changes[0].removed.len(), 2);
    assert!(follower.is_complete());
}

#[test]
fn a_lower_sequence_number_is_a_repetition_or_a_new_process() {
    let mut follower = follower();
    for (sequence, hash) in [(0, 7), (1, 8)] {
        let events = vec![stored(None, hash, [hash as u32, 0])];
        receive(
            &mut follower,
            sequence,
            &payload(10.0 + sequence as f64, events),
        );
    }
    let again = payload(10.0, vec![stored(None, 7, [7, 0])]);
    assert_eq!(receive(&mut follower, 0, &again), Received::AlreadyApplied);
    let new = payload(20.0, vec![stored(None, 9, [9, 0])]);
    let Received::Restarted(changes) = receive(&mut follower, 0, &new) else {
        panic!("not restarted");
    };
    assert_eq!(changes.removed.len(), 2);
    assert!(matches!(
        receive(&mut follower, 0, &new),
        Received::Applied(_)
    ));
    assert_eq!(follower.snapshot().stored.len(), 1);
}

#[test]
fn undecodable_batches_and_unsupported_block_sizes_are_faults() {
    let mut follower = follower();
    for sequence in 0..3 {
        assert_eq!(follower.fault(), None);
        receive(&mut follower, sequence, b"no batch");
    }
    assert!(follower.fault().unwrap().contains("cannot be decoded"));
    receive(&mut follower, 3, &payload(1.0, vec![]));
    assert_eq!(follower.fault(), None);

    let odd = Event::Stored(BlockStored {
        hashes: vec![BlockKey(1)],
        tokens: vec![1, 2, 3],
        block_size: 3,
        ..BlockStored::default()
    });
    receive(&mut follower, 4, &payload(2.0, vec![odd]));
    assert!(
        follower
            .fault()
            .unwrap()
            .contains("block size 3 is not a multiple")
    );
}

fn batch_of(rank: u32, hash: u64) -> Vec<u8> {
    let batch = EventBatch {
        timestamp: Some(1.0),
        events: vec![stored(None, hash, [hash as u32, 0])],
        data_parallel_rank: Some(rank),
        ..EventBatch::default()
    };
    encode_batch(&batch, Layout::Map)
}

#[test]
fn batches_of_another_rank_are_a_fault_and_are_not_applied() {
    let mut rank_1_follower = Follower::new(BLOCK, "m".to_owned(), Some(1));
    assert_eq!(
        receive(&mut rank_1_follower, 0, &batch_of(0, 7)),
        Received::AlreadyApplied
    );
    assert!(rank_1_follower.snapshot().stored.is_empty());
    assert!(
        rank_1_follower
            .fault()
            .unwrap()
            .contains("rank 0 where rank 1")
    );

    let mut any_rank_follower = follower();
    for (rank, sequence) in [(3, 0), (4, 0), (4, 1)] {
        receive(
            &mut any_rank_follower,
            sequence,
            &batch_of(rank, 7 + u64::from(rank)),
        );
    }
    assert_eq!(any_rank_follower.snapshot().stored.len(), 1);
    assert!(
        any_rank_follower
            .fault()
            .unwrap()
            .contains("rank 4 where rank 3")
    );
}

/// A stored block of an engine with this block size and KV cache group.
fn stored_as(block_size: u32, group: Option<u32>) -> Event {
    Event::Stored(BlockStored {
        hashes: vec![BlockKey(7)],
        tokens: (0..block_size).collect(),
        block_size,
        group,
        ..BlockStored::default()
    })
}

/// The next process at the same address may be another release or have another configuration.
#[test]
fn a_new_process_may_differ_in_block_size_and_groups() {
    for (before, after, engine_block_ratio) in [
        ((2, None), (2, Some(0)), 1),
        ((2, Some(1)), (2, None), 1),
        ((2, None), (4, None), 2),
        ((4, None), (2, None), 1),
        ((3, None), (2, None), 1),
    ] {
        let mut follower = follower();
        receive(
            &mut follower,
            0,
            &payload(1.0, vec![stored_as(before.0, before.1)]),
        );
        let contents = follower.snapshot();
        let removed = follower.clear();
        assert_eq!(removed.removed, contents.stored);
        assert_eq!(
            removed.engine_block_ratio, contents.engine_block_ratio,
            "removed with the ratio of the store"
        );
        receive(
            &mut follower,
            0,
            &payload(2.0, vec![stored_as(after.0, after.1)]),
        );
        assert_eq!(follower.fault(), None, "{before:?}, {after:?}");
        assert!(follower.is_complete(), "{before:?}, {after:?}");
        let contents = follower.snapshot();
        assert_eq!(
            (contents.stored.len(), contents.engine_block_ratio),
            (1, engine_block_ratio)
        );
        assert_eq!(follower.engine_block_size(), after.0);
    }
}

#[test]
fn the_first_batch_of_a_new_connection_may_come_from_another_rank() {
    let mut any_rank_follower = follower();
    receive(&mut any_rank_follower, 0, &batch_of(3, 7));
    any_rank_follower.on_connected();
    let restarted = receive(&mut any_rank_follower, 0, &batch_of(4, 8));
    assert!(matches!(restarted, Received::Restarted(delta) if delta.removed.len() == 1));
    receive(&mut any_rank_follower, 0, &batch_of(4, 8));
    assert_eq!(
        (
            any_rank_follower.fault(),
            any_rank_follower.snapshot().stored.len()
        ),
        (None, 1)
    );
    receive(&mut any_rank_follower, 1, &batch_of(3, 9));
    assert!(
        any_rank_follower
            .fault()
            .unwrap()
            .contains("rank 3 where rank 4")
    );

    // A worker with a configured rank accepts only that one.
    let mut rank_1_follower = Follower::new(BLOCK, "m".to_owned(), Some(1));
    receive(&mut rank_1_follower, 0, &batch_of(0, 7));
    for rank in [0, 1] {
        rank_1_follower.on_connected();
        assert_eq!(rank_1_follower.fault(), None);
        receive(&mut rank_1_follower, 0, &batch_of(rank, 8));
        assert_eq!(rank_1_follower.fault().is_some(), rank == 0);
    }
    rank_1_follower.clear();
    receive(&mut rank_1_follower, 0, &batch_of(0, 7));
    assert!(
        rank_1_follower.fault().is_some(),
        "the configured rank stays"
    );
}

/// Returns messages that were recorded from real engines, and those in the folder that the
/// environment variable `FORESEE_KV_CAPTURES` names.
fn recordings() -> Vec<(PathBuf, Vec<u8>)> {
    let ours = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/tests/kv_events/recorded");
    let additional = std::env::var_os("FORESEE_KV_CAPTURES").map(PathBuf::from);
    let mut folders: Vec<PathBuf> = std::iter::once(ours).chain(additional).collect();
    let mut recordings = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.to_string_lossy().ends_with(".stream.bin") {
                let bytes = std::fs::read(&path).unwrap();
                recordings.push((path, bytes));
            }
        }
    }
    recordings
}

/// Reads a recording into messages of frames: the number of frames as `u32`, then for each frame its
/// length as `u32` and its bytes.
fn messages(mut rest: &[u8]) -> Vec<Vec<Vec<u8>>> {
    let mut take = |length: Option<usize>| {
        let length = length.unwrap_or(4);
        let (taken, after) = rest.split_at_checked(length)?;
        rest = after;
        Some(taken.to_vec())
    };
    let number = |bytes: Vec<u8>| u32::from_be_bytes(bytes.try_into().unwrap()) as usize;
    let mut messages = Vec::new();
    while let Some(frames) = take(None) {
        let frames = (0..number(frames)).map(|_| {
            let length = take(None).map(number);
            take(length).unwrap()
        });
        messages.push(frames.collect());
    }
    messages
}

#[test]
fn recorded_streams_leave_the_blocks_that_were_stored_and_not_removed() {
    let recordings = recordings();
    assert!(recordings.len() >= 2);
    for (path, bytes) in recordings {
        let mut follower = Follower::new(NonZeroU32::MIN, "m".to_owned(), None);
        let mut counts = HashMap::<BlockKey, i64>::new();
        let mut followed_group = None;
        for frames in messages(&bytes) {
            let message = parse_message(&frames).unwrap();
            if let Received::Gap(_) = follower.receive(&message) {
                follower.skip_to(message.sequence);
                assert!(matches!(follower.receive(&message), Received::Applied(_)));
            }
            for event in decode_batch(message.payload).unwrap().events {
                match event {
                    Event::Stored(stored)
                        if stored.attention != Attention::Other
                            && *followed_group.get_or_insert(stored.group) == stored.group =>
                    {
                        let hashes = stored.hashes.into_iter();
                        hashes.for_each(|hash| *counts.entry(hash).or_default() += 1);
                    }
                    Event::Removed(removed) if followed_group == Some(removed.group) => {
                        let hashes = removed.hashes.into_iter();
                        hashes.for_each(|hash| *counts.entry(hash).or_default() -= 1);
                    }
                    Event::Cleared { .. } => counts.clear(),
                    _ => {}
                }
            }
        }
        assert_eq!(follower.fault(), None, "{}", path.display());
        let left = counts.values().filter(|count| **count > 0).count();
        eprintln!(
            "{}: {left} blocks expected, {} in the view, complete: {}",
            path.display(),
            follower.cached_blocks(),
            follower.is_complete()
        );
        if follower.is_complete() {
            assert_eq!(follower.cached_blocks(), left, "{}", path.display());
        }
    }
}

#[test]
fn an_announced_prompt_of_one_block_counts_again_and_listed_blocks_do_not() {
    let mut follower = follower();
    let block = || payload(1.0, vec![stored(None, 7, [1, 2])]);
    let removed = payload(
        1.0,
        vec![Event::Removed(BlockRemoved {
            hashes: vec![BlockKey(7)],
            ..BlockRemoved::default()
        })],
    );
    receive(&mut follower, 0, &block());
    follower.undo_repeated_stores();
    let salt = sequence::prefix_salt("m", None, None);
    let prompt = sequence::Sequence::from_tokens(&[1, 2], BLOCK, salt);
    follower.expect(prompt.hashes()[0]);
    // The first repetition is the prompt itself, the second a listing.
    receive(&mut follower, 1, &block());
    receive(&mut follower, 2, &block());
    receive(&mut follower, 3, &removed);
    assert_eq!(
        follower.snapshot().stored,
        PrefixRuns::from_sequence(prompt.hashes())
    );
    receive(&mut follower, 4, &removed);
    assert!(follower.snapshot().stored.is_empty());
}

/// Reported cache hit of a recorded request.
#[derive(serde::Deserialize)]
struct RecordedHit {
    /// Number of event batches before the request was sent.
    batches: usize,
    cached_tokens: u32,
    /// Token ids.
    prompt: Vec<u32>,
}

/// Replays the events of a vLLM 0.32 with 23 blocks. Some of its requests asked it to list the cached
/// blocks that they found (`kv_cache_report_mode: full`). The follower enters full report mode before
/// request `full_report_from`. Returns the requests whose cache hit was predicted wrong.
fn wrong_predictions(full_report_from: Option<usize>) -> Vec<usize> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../engine/tests/kv_events/recorded/full_report");
    let stream = std::fs::read(folder.join("full.stream.bin")).unwrap();
    let hits = std::fs::read(folder.join("found.json")).unwrap();
    let hits: Vec<RecordedHit> = serde_json::from_slice(&hits).unwrap();
    assert!(hits.len() >= 70);
    let engine_block = NonZeroU32::new(32).unwrap();
    let mut follower = Follower::new(engine_block, "m".to_owned(), None);
    let mut index = UntrustedIndex::default();
    let mut messages = messages(&stream).into_iter();
    let mut applied = 0;
    let mut wrong = Vec::new();
    for (number, hit) in hits.iter().enumerate() {
        for frames in messages.by_ref().take(hit.batches - applied) {
            let message = parse_message(&frames).unwrap();
            let Received::Applied(changes) = follower.receive(&message) else {
                panic!("batch {} was not applied", message.sequence);
            };
            changes.iter().for_each(|delta| index.update(delta));
        }
        applied = hit.batches;
        if full_report_from == Some(number) {
            let changes = follower.undo_repeated_stores();
            changes.iter().for_each(|delta| index.update(delta));
        }
        let salt = sequence::prefix_salt("m", None, None);
        let prompt = sequence::Sequence::from_tokens(&hit.prompt, engine_block, salt);
        let predicted = index
            .cached_blocks(prompt.hashes())
            .min(prompt.max_reusable_blocks());
        if predicted * 32 != hit.cached_tokens {
            wrong.push(number);
        }
    }
    assert!(full_report_from.is_some() || follower.is_overfull(23));
    assert!(full_report_from.is_none() || !follower.is_overfull(23));
    wrong
}

#[test]
fn listings_of_cached_blocks_do_not_count_as_stores() {
    let without_mode = wrong_predictions(None);
    assert!(without_mode.len() >= 3, "{without_mode:?}");
    assert_eq!(wrong_predictions(Some(0)), Vec::<usize>::new());
    // Entering the mode late undoes the listings that were counted before.
    let late = wrong_predictions(Some(40));
    assert!(late.iter().all(|number| *number < 40), "{late:?}");
    assert!(!late.is_empty());
}
