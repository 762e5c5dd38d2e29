//! Decoding of each field and each layout.

use foresee_engine::kv_events::{
    Adapter, Attention, BlockExtra, BlockKey, BlockStored, DecodeError, Event, EventBatch,
    ExtraKey, Medium, decode_batch,
};
use rmpv::Value;

use super::recorded::hex;
use super::written::{decode, decode_one, encode, list, map, remove, removed, store, stored};

#[test]
fn a_digest_and_a_number_of_a_block_give_the_same_key() {
    // Digest and number of one block, both from vLLM 0.32 with different configurations.
    let digest = hex("ae4c3415e47e72b40b9807072eb7d9c277984f823ce11558315b36d6392713b6");
    assert_eq!(
        BlockKey::from_digest(&digest),
        BlockKey(0x315b_36d6_3927_13b6)
    );
    let digest = hex("0dce53382768a0fd6d1e8e9bd98c3f9a");
    assert_eq!(
        BlockKey::from_digest(&digest),
        BlockKey(7_862_878_799_456_386_970)
    );
    assert_eq!(BlockKey::from_digest(&[1, 2]), BlockKey(0x0102));
}

#[test]
fn absent_fields_have_their_defaults() {
    let expected = BlockStored {
        hashes: vec![BlockKey(7), BlockKey(8)],
        tokens: vec![1, 2, 3, 4],
        block_size: 2,
        ..BlockStored::default()
    };
    assert_eq!(stored(store([])), expected);
    let null = || Value::Nil;
    let nulls = store([
        ("parent_block_hash", null()),
        ("lora_id", null()),
        ("lora_name", null()),
        ("cache_salt", null()),
        ("medium", null()),
        ("extra_keys", null()),
        ("group_idx", null()),
        ("kv_cache_spec_kind", null()),
        ("kv_cache_spec_sliding_window", null()),
    ]);
    assert_eq!(stored(nulls), expected);
    let offloaded = map([
        ("block_hashes", list([7])),
        ("medium", "CPU".into()),
        ("token_ids", Value::Nil),
        ("type", "BlockStored".into()),
    ]);
    let expected = BlockStored {
        hashes: vec![BlockKey(7)],
        medium: Medium::Host,
        ..BlockStored::default()
    };
    assert_eq!(stored(offloaded), expected);
}

#[test]
fn unknown_fields_and_events_are_ignored() {
    let deep = map([(
        "a",
        list([list([1]), Value::F64(0.5), Value::Ext(1, vec![2])]),
    )]);
    let mut event = store([("session_id", "s".into()), ("novel", deep)]);
    if let Value::Map(fields) = &mut event {
        fields.insert(0, (Value::from(5), list([5])));
    }
    assert_eq!(stored(event), stored(store([])));
    let long = list(
        [
            Value::from("BlockRemoved"),
            list([7]),
            "GPU".into(),
            0.into(),
        ]
        .into_iter()
        .chain([list([1]), "more".into()]),
    );
    let Event::Removed(event) = decode_one(long) else {
        panic!();
    };
    assert_eq!((event.hashes, event.group), (vec![BlockKey(7)], Some(0)));

    let batch = decode([
        remove(1),
        list([Value::from("BlockMoved"), 5.into()]),
        remove(2),
    ]);
    assert_eq!(batch.events, [removed(1), removed(2)]);
    assert_eq!((batch.unknown, batch.malformed), (1, 0));
}

#[test]
fn a_batch_can_be_a_map() {
    let bytes = encode(&map([
        ("data_parallel_rank", 2.into()),
        ("novel", list([1])),
        ("events", list([remove(1)])),
        ("ts", 7.into()),
    ]));
    let expected = EventBatch {
        timestamp: Some(7.0),
        events: vec![removed(1)],
        data_parallel_rank: Some(2),
        ..EventBatch::default()
    };
    assert_eq!(decode_batch(&bytes), Ok(expected));
}

#[test]
fn a_batch_without_events_is_an_error() {
    let error = |value: Value| decode_batch(&encode(&value)).unwrap_err();
    assert_eq!(decode_batch(&[]), Err(DecodeError::NotABatch));
    assert_eq!(error(5.into()), DecodeError::NotABatch);
    assert_eq!(error(list([1])), DecodeError::NoEvents);
    assert_eq!(error(list([1, 2])), DecodeError::NoEvents);
    assert_eq!(error(map([("ts", 1.into())])), DecodeError::NoEvents);
    assert_eq!(error(map([("events", Value::Nil)])), DecodeError::NoEvents);
}

#[test]
fn token_pairs_yield_the_first_of_each_and_the_next_token() {
    let pairs = list((1..=4).map(|token| list([token, token + 1])));
    let event = stored(store([("token_ids", pairs)]));
    assert_eq!(
        (event.tokens, event.next_token),
        (vec![1, 2, 3, 4], Some(5))
    );
    for mixed in [
        list([list([1, 2]), 2.into()]),
        list([1.into(), list([1, 2])]),
        list([list([1, 2, 3])]),
    ] {
        assert_eq!(decode([store([("token_ids", mixed)])]).malformed, 1);
    }
}

#[test]
fn token_ids_of_all_sizes_are_decoded() {
    let ids = [0, 127, 128, 255, 256, 65_535, 65_536, u64::from(u32::MAX)];
    let event = stored(store([("token_ids", list(ids))]));
    assert_eq!(event.tokens, ids.map(|id| id as u32));
    let odd = list([
        Value::from(-1),
        Value::from(1_u64 << 40 | 5),
        Value::from(2),
    ]);
    assert_eq!(stored(store([("token_ids", odd)])).tokens, [u32::MAX, 5, 2]);
}

#[test]
fn signed_hashes_keep_their_bits() {
    let hashes = list([i64::MIN, -1, 0, i64::MAX]);
    let event = stored(store([
        ("block_hashes", hashes),
        ("parent_block_hash", (-2).into()),
    ]));
    let keys = [1 << 63, u64::MAX, 0, u64::MAX >> 1].map(BlockKey);
    assert_eq!(event.hashes, keys);
    assert_eq!(event.parent, Some(BlockKey(u64::MAX - 1)));
}

#[test]
fn blocks_have_tokens_only_if_all_counts_match() {
    let event = stored(store([]));
    let blocks: Vec<_> = event.blocks().unwrap().collect();
    assert_eq!(blocks, [(BlockKey(7), &[1, 2][..]), (BlockKey(8), &[3, 4])]);
    for (name, value) in [
        ("block_size", Value::from(0)),
        ("block_size", Value::from(4)),
        ("token_ids", list([1, 2, 3])),
        ("block_hashes", list([8])),
    ] {
        assert!(stored(store([(name, value)])).blocks().is_none(), "{name}");
    }
}

#[test]
fn media_and_attention_kinds_are_distinguished() {
    let medium = |name: &str| stored(store([("medium", name.into())])).medium;
    let names = ["GPU", "cpu", "CPU_PINNED", "DISK", "EXTERNAL", "TAPE"];
    let media = [
        Medium::Gpu,
        Medium::Host,
        Medium::Host,
        Medium::Disk,
        Medium::External,
        Medium::Other,
    ];
    assert_eq!(names.map(medium), media);
    let attention = |kind: &str| stored(store([("kv_cache_spec_kind", kind.into())])).attention;
    let kinds = [
        "full_attention",
        "mla_attention",
        "sliding_window",
        "mamba",
        "novel",
    ];
    let expected = [
        Attention::Full,
        Attention::Full,
        Attention::Other,
        Attention::Other,
        Attention::Other,
    ];
    assert_eq!(kinds.map(attention), expected);
    let cleared = list([Value::from("AllBlocksCleared"), "DISK".into()]);
    let medium = Some(Medium::Disk);
    assert_eq!(decode_one(cleared), Event::Cleared { medium });
}

#[test]
fn adapters_without_a_name_are_not_the_base_model() {
    let adapter = |id: Value| stored(store([("lora_id", id)])).adapter;
    assert_eq!(adapter(1.into()), Adapter::Unnamed);
    assert_eq!(adapter("f00d".into()), Adapter::Unnamed);
    assert_eq!(adapter(0.into()), Adapter::Base);
    let named = store([("lora_id", 1.into()), ("lora_name", "a".into())]);
    assert_eq!(stored(named).adapter, Adapter::Named("a".into()));
}

#[test]
fn extra_keys_are_adapter_then_media_then_salt() {
    let media = || list([Value::from("pic"), (-3).into()]);
    let embeddings = || Value::Binary(vec![9]);
    let keys = || {
        list([
            list([Value::from("lora-a"), media(), "salt".into(), embeddings()]),
            list([Value::from("lora-a"), media()]),
            Value::Nil,
        ])
    };
    let extra = |block, key| BlockExtra { block, key };
    let media_key = || ExtraKey::Media {
        id: "pic".into(),
        offset: -3,
    };
    let embeddings_key = || ExtraKey::Encoded(encode(&embeddings()).into());
    let event = stored(store([
        ("lora_name", "lora-a".into()),
        ("extra_keys", keys()),
    ]));
    assert_eq!(event.cache_salt.as_deref(), Some("salt"));
    assert_eq!(event.adapter, Adapter::Named("lora-a".into()));
    let expected = [
        extra(0, media_key()),
        extra(0, embeddings_key()),
        extra(1, media_key()),
    ];
    assert_eq!(event.extras, expected);

    // Only the first block of a sequence has a salt.
    let event = stored(store([
        ("parent_block_hash", 6.into()),
        ("extra_keys", list([list(["pic"])])),
    ]));
    assert_eq!(event.cache_salt, None);
    assert_eq!(event.extras, [extra(0, ExtraKey::Text("pic".into()))]);

    // Extra keys of an unknown form are kept in their encoded form.
    let event = stored(store([(
        "extra_keys",
        list([5.into(), list([list([1, 2])])]),
    )]));
    let expected = [
        extra(0, ExtraKey::Encoded([5].into())),
        extra(1, ExtraKey::Encoded([0x92, 1, 2].into())),
    ];
    assert_eq!(event.extras, expected);
    let event = stored(store([("cache_salt", "top".into())]));
    assert_eq!(event.cache_salt.as_deref(), Some("top"));
}

#[test]
fn an_invalid_event_is_skipped_without_the_others() {
    let bad = [
        Value::Nil,
        list::<Value>([]),
        map([]),
        list(["BlockRemoved"]),
        map([("block_hashes", list([1]))]),
        map([("type", 5.into()), ("block_hashes", list([1]))]),
        map([("type", "BlockRemoved".into())]),
        store([("block_hashes", "text".into())]),
        store([("block_hashes", list([Value::Nil]))]),
        store([("block_hashes", list([Value::Binary(vec![])]))]),
        store([("parent_block_hash", "text".into())]),
        store([("token_ids", list([Value::F64(1.0)]))]),
        store([("block_size", (-1).into())]),
        store([("medium", 5.into())]),
        store([("lora_name", 5.into())]),
        store([("group_idx", "0".into())]),
        store([("extra_keys", 5.into())]),
    ];
    for event in bad {
        let batch = decode([remove(1), event.clone(), remove(2)]);
        assert_eq!(batch.events, [removed(1), removed(2)], "{event}");
        assert_eq!((batch.malformed, batch.unknown), (1, 0), "{event}");
        assert_eq!(
            (batch.data_parallel_rank, batch.truncated),
            (Some(3), false)
        );
    }
}

#[test]
fn the_order_of_fields_does_not_matter() {
    let event = store([
        ("parent_block_hash", 6.into()),
        ("lora_name", "lora-a".into()),
        ("extra_keys", list([list(["lora-a", "pic"])])),
    ]);
    let expected = stored(event.clone());
    let Value::Map(mut fields) = event else {
        unreachable!();
    };
    for _ in 0..fields.len() {
        fields.rotate_left(1);
        assert_eq!(stored(Value::Map(fields.clone())), expected);
        let reversed = fields.iter().rev().cloned().collect();
        assert_eq!(stored(Value::Map(reversed)), expected);
    }
}
