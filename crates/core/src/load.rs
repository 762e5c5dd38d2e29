//! The load of a worker, as the policies see it.

/// Sum of a worker's bookings.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Load {
    /// Blocks that dispatched requests pin; shared ones count once.
    pub(crate) active_blocks: u64,
    /// Blocks that the requests queued for the worker will pin in addition.
    pub(crate) queued_blocks: u64,
    /// Prompt and output tokens of all requests, shared ones counted each time: what a decode step
    /// reads.
    pub(crate) context_tokens: u64,
    /// Number of requests, dispatched and queued.
    pub(crate) requests: u32,
    /// Hash of the worker's name, for consistent hashing. It does not change when other workers are
    /// added or removed.
    pub(crate) name_hash: u64,
}

impl Load {
    /// Returns the blocks that the bookings of the worker pin or will pin.
    pub(crate) fn projected_blocks(&self) -> u64 {
        self.active_blocks + self.queued_blocks
    }
}
