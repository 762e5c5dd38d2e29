//! KV events of an engine, decoded and applied to a cache view.

use std::num::NonZeroU32;

use foresee_core::event_index::{CacheView, StoredBlocks};
use foresee_engine::kv_events::{BlockKey, Event, decode_batch, parse_message, parse_replay};

/// The router's block size, which divides the block sizes of the recorded engines.
const BLOCK_SIZE: NonZeroU32 = NonZeroU32::new(4).expect("not zero");

/// Length of the frames into which the bytes of a message are divided.
const FRAME_BYTES: usize = 9;

/// Checks an event batch. Panics if it has more values than bytes can contain, or reserves more
/// memory, or if a cache view has a block left after it was cleared.
pub fn check(bytes: &[u8]) {
    let frames: Vec<&[u8]> = bytes.chunks(FRAME_BYTES).collect();
    let _ = (parse_message(&frames), parse_replay(&frames));
    let Ok(batch) = decode_batch(bytes) else {
        return;
    };
    let mut values = batch.malformed as usize + batch.unknown as usize;
    let mut view = CacheView::new(BLOCK_SIZE);
    // Events are applied twice, so that removed blocks and orphans of the first pass occur again.
    for event in batch.events.iter().chain(&batch.events) {
        match event {
            Event::Stored(stored) => {
                values += stored.hashes.len() + stored.tokens.len() + stored.extras.len();
                let reserved = stored.tokens.capacity().max(stored.hashes.capacity());
                assert!(reserved <= bytes.len());
                let hashes: Vec<u64> = stored.hashes.iter().map(|&BlockKey(hash)| hash).collect();
                view.store(&StoredBlocks {
                    parent: stored.parent.map(|BlockKey(hash)| hash),
                    engine_hashes: &hashes,
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
}
