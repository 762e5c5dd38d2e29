//! State of the requests in an engine, for the simulation of its future by the oracle.

use foresee_core::sequence::SequenceHash;

use super::{Engine, RequestProgress};

/// Progress and remaining work of a request in an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestState {
    /// Id of the request.
    pub id: u64,
    /// `true` if the request is running, `false` if it waits for admission.
    pub running: bool,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Output tokens generated so far.
    pub generated: u32,
    /// Output tokens to generate.
    pub remaining: u32,
    /// Running: tokens of prompt and output whose KV is computed. Waiting: tokens that the request
    /// would find cached if it were admitted now.
    pub computed: u32,
    /// Tokens that the current step adds to `computed`.
    pub scheduled: u32,
    /// Blocks allocated for the request.
    pub blocks: u32,
}

impl Engine {
    /// Iterates over the states of all requests in the engine: running requests in the order of
    /// admission, then waiting requests in the order of service.
    pub fn request_states(&self) -> impl Iterator<Item = RequestState> {
        let state = |progress: &RequestProgress, running| RequestState {
            id: progress.request.id,
            running,
            prompt_tokens: progress.request.prompt_tokens,
            generated: progress.generated,
            remaining: progress.request.output_tokens - progress.generated,
            computed: if running {
                progress.computed
            } else {
                self.cached_tokens(&progress.request.hashes, progress.known())
            },
            scheduled: progress.scheduled,
            blocks: progress.blocks.len() as u32,
        };
        let running = self.running.iter();
        let running = running.map(move |progress| state(progress, true));
        let waiting = self.waiting.iter();
        let waiting = waiting.map(move |progress| state(progress, false));
        running.chain(waiting)
    }

    /// Returns how many of the `tokens` tokens of a sequence with these hashes are cached. At least
    /// one token is left to compute. `hashes` are those of the engine's blocks. 0 without prefix
    /// caching.
    #[must_use]
    pub fn cached_tokens(&self, hashes: &[SequenceHash], tokens: u32) -> u32 {
        self.cached_blocks(hashes, tokens) as u32 * self.config.block_size.get()
    }
}
