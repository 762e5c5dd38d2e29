//! What a worker's engine reports about its cache.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use parking_lot::Mutex;

/// Reports of one worker's engine.
#[derive(Debug, Default)]
pub(crate) struct EngineReports {
    /// Capacity, in engine blocks; 0 if the engine reported none.
    capacity_blocks: AtomicU32,
    /// Blocks that running requests pin; `None` if the engine is not asked or does not report it.
    pub(crate) active_blocks: Mutex<Option<u64>>,
    /// Whether a warning was logged that the engine has another number of ranks than configured.
    pub(crate) rank_warning_logged: AtomicBool,
    /// Whether a warning was logged that the engine's block size is not a multiple of the router's.
    pub(crate) block_size_warning_logged: AtomicBool,
}

impl EngineReports {
    /// Sets the capacity that the engine reported, in engine blocks.
    pub(crate) fn set_capacity_blocks(&self, blocks: u32) {
        self.capacity_blocks.store(blocks, Ordering::Relaxed);
    }

    /// Returns the capacity that the engine reported, in engine blocks.
    pub(super) fn capacity_blocks(&self) -> Option<u32> {
        let reported = self.capacity_blocks.load(Ordering::Relaxed);
        (reported > 0).then_some(reported)
    }
}
