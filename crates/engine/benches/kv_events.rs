//! Benchmarks of KV event decoding: `cargo bench -p foresee-engine --bench kv_events`.
//!
//! An item is a block operation: one block stored or removed. Blocks have 16 tokens from a
//! vocabulary of 128,000. Low ids are more frequent than high ones, as in text.

#![allow(clippy::unwrap_used, missing_docs)]

use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use foresee_engine::kv_events::decode_batch;
use rmpv::Value;

fn main() {
    divan::main();
}

/// Tokens per block.
const BLOCK_SIZE: u64 = 16;
/// Number of token ids.
const VOCABULARY: u64 = 128_000;

/// A pseudorandom number generator (SplitMix64).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut number = self.0;
        number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        number ^ (number >> 31)
    }

    /// Returns a token id, the product of two uniform numbers: half of all ids are in the lowest
    /// fifth of the vocabulary.
    fn token(&mut self) -> u64 {
        self.next() % VOCABULARY * (self.next() % VOCABULARY) / VOCABULARY
    }

    fn hashes(&mut self, count: u64) -> Value {
        Value::Array((0..count).map(|_| self.next().into()).collect())
    }

    /// Returns the fields of vLLM's `BlockStored`, in order.
    fn stored(&mut self, blocks: u64) -> [(&'static str, Value); 12] {
        let tokens = (0..blocks * BLOCK_SIZE)
            .map(|_| self.token().into())
            .collect();
        [
            ("type", "BlockStored".into()),
            ("block_hashes", self.hashes(blocks)),
            ("parent_block_hash", self.next().into()),
            ("token_ids", Value::Array(tokens)),
            ("block_size", BLOCK_SIZE.into()),
            ("lora_id", Value::Nil),
            ("medium", "GPU".into()),
            ("lora_name", Value::Nil),
            (
                "extra_keys",
                Value::Array((0..blocks).map(|_| Value::Nil).collect()),
            ),
            ("group_idx", 0.into()),
            ("kv_cache_spec_kind", "full_attention".into()),
            ("kv_cache_spec_sliding_window", Value::Nil),
        ]
    }

    /// Returns the fields of vLLM's `BlockRemoved` for one block, in order.
    fn removed(&mut self) -> [(&'static str, Value); 4] {
        [
            ("type", "BlockRemoved".into()),
            ("block_hashes", self.hashes(1)),
            ("medium", "GPU".into()),
            ("group_idx", 0.into()),
        ]
    }
}

fn as_map<const N: usize>(fields: [(&str, Value); N]) -> Value {
    let fields = fields.into_iter().map(|(name, value)| (name.into(), value));
    Value::Map(fields.collect())
}

fn as_array<const N: usize>(fields: [(&str, Value); N]) -> Value {
    Value::Array(fields.into_iter().map(|(_, value)| value).collect())
}

/// Measures the decoding of batches with the events that `events` generates. Each batch contains
/// `block_ops` block operations.
fn decode(
    bencher: Bencher<'_, '_>,
    block_ops: u64,
    mut events: impl FnMut(&mut Numbers) -> Vec<Value>,
) {
    // With a single batch, branch prediction would adapt to its tokens.
    const BATCHES: usize = 64;
    let mut numbers = Numbers(1);
    let payloads: Vec<Vec<u8>> = (0..BATCHES)
        .map(|_| {
            let events = Value::Array(events(&mut numbers));
            let batch = Value::Array(vec![1.5.into(), events, 0.into()]);
            let mut payload = Vec::new();
            rmpv::encode::write_value(&mut payload, &batch).unwrap();
            payload
        })
        .collect();
    let bytes: usize = payloads.iter().map(Vec::len).sum();
    bencher
        .counter(ItemsCount::new(block_ops * BATCHES as u64))
        .counter(BytesCount::new(bytes))
        .bench(|| {
            for payload in &payloads {
                divan::black_box_drop(decode_batch(divan::black_box(payload)));
            }
        });
}

/// One event stores a prompt of 4,096 tokens, encoded as a map.
#[divan::bench]
fn prompt_as_map(bencher: Bencher<'_, '_>) {
    decode(bencher, 256, |numbers| vec![as_map(numbers.stored(256))]);
}

/// One event stores a prompt of 4,096 tokens, encoded as an array.
#[divan::bench]
fn prompt_as_array(bencher: Bencher<'_, '_>) {
    decode(bencher, 256, |numbers| vec![as_array(numbers.stored(256))]);
}

/// Each of 64 running requests fills a block; events are encoded as maps.
#[divan::bench]
fn output_as_maps(bencher: Bencher<'_, '_>) {
    decode(bencher, 64, |numbers| {
        (0..64).map(|_| as_map(numbers.stored(1))).collect()
    });
}

/// Each of 64 running requests fills a block; events are encoded as arrays.
#[divan::bench]
fn output_as_arrays(bencher: Bencher<'_, '_>) {
    decode(bencher, 64, |numbers| {
        (0..64).map(|_| as_array(numbers.stored(1))).collect()
    });
}

/// 256 blocks are removed, each by an event of its own as in vLLM.
#[divan::bench]
fn removals_as_maps(bencher: Bencher<'_, '_>) {
    decode(bencher, 256, |numbers| {
        (0..256).map(|_| as_map(numbers.removed())).collect()
    });
}

/// A full cache stores four prompts of 1,024 tokens and one block of each of 64 outputs, and
/// removes as many blocks.
#[divan::bench]
fn full_cache_as_maps(bencher: Bencher<'_, '_>) {
    decode(bencher, 640, |numbers| {
        let mut events = Vec::new();
        events.extend((0..320).map(|_| as_map(numbers.removed())));
        events.extend((0..4).map(|_| as_map(numbers.stored(64))));
        events.extend((0..64).map(|_| as_map(numbers.stored(1))));
        events
    });
}
