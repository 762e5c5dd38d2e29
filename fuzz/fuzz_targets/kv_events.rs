//! Whatever bytes an engine sends, reading them and following them does no harm: no panic, and no
//! more of anything than the bytes can have said.
//!
//! `cargo fuzz run kv_events -s none`, on a stable toolchain too.

#![no_main]

use std::num::NonZeroU32;

use foresee_core::cache::{CacheView, StoredBlocks};
use foresee_engine::kv_events::{BlockKey, Event, decode_batch, parse_message, parse_replay};
use libfuzzer_sys::fuzz_target;

/// Divides the block sizes that recorded engines have.
const BLOCK_SIZE: NonZeroU32 = NonZeroU32::new(4).unwrap();

fuzz_target!(|bytes: &[u8]| {
    let frames: Vec<&[u8]> = bytes.chunks(9).collect();
    let _ = (parse_message(&frames), parse_replay(&frames));
    let Ok(batch) = decode_batch(bytes) else {
        return;
    };
    let mut values = batch.malformed as usize + batch.unknown as usize;
    let mut view = CacheView::new(BLOCK_SIZE);
    // Twice: what was removed or parked the first time is met again.
    for event in batch.events.iter().chain(&batch.events) {
        match event {
            Event::Stored(stored) => {
                values += stored.hashes.len() + stored.tokens.len() + stored.extras.len();
                let held = stored.tokens.capacity().max(stored.hashes.capacity());
                assert!(held <= bytes.len());
                let hashes: Vec<u64> = stored.hashes.iter().map(|&BlockKey(hash)| hash).collect();
                view.store(&StoredBlocks {
                    parent: stored.parent.map(|BlockKey(hash)| hash),
                    hashes: &hashes,
                    tokens: &stored.tokens,
                    block_size: stored.block_size,
                    salt: 0,
                });
            }
            Event::Removed(removed) => {
                values += removed.hashes.len();
                let hashes: Vec<u64> = removed.hashes.iter().map(|&BlockKey(hash)| hash).collect();
                view.remove(&hashes);
            }
            Event::Cleared { .. } => drop(view.clear()),
        }
        assert!(view.len() <= bytes.len());
    }
    assert!(values <= 2 * bytes.len());
    assert!(view.clear().removed.len() <= bytes.len());
    assert!(view.is_empty());
});
