//! What an engine still has to do, told to whoever rolls it forward.

use foresee_core::sequence::SequenceHash;

use super::{Engine, Progress};

/// A request in an engine, and all that decides how long it stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// The request's id.
    pub id: u64,
    /// Whether it runs, rather than waits.
    pub running: bool,
    /// Prompt length.
    pub prompt_tokens: u32,
    /// Output tokens generated.
    pub generated: u32,
    /// Output tokens to come.
    pub left: u32,
    /// Tokens of prompt and output whose KV it has; while it waits, would have from the cache.
    pub computed: u32,
    /// Tokens the step under way adds to `computed`.
    pub scheduled: u32,
    /// Blocks it holds.
    pub blocks: u32,
}

impl Engine {
    /// Every request in the engine: the running in order of admission, then the waiting in
    /// order of service.
    pub fn work(&self) -> impl Iterator<Item = Work> {
        let told = |progress: &Progress, running| Work {
            id: progress.request.id,
            running,
            prompt_tokens: progress.request.prompt_tokens,
            generated: progress.generated,
            left: progress.request.output_tokens - progress.generated,
            computed: if running {
                progress.computed
            } else {
                self.cached_tokens(&progress.request.hashes, progress.known())
            },
            scheduled: progress.scheduled,
            blocks: progress.blocks.len() as u32,
        };
        let running = self.running.iter().map(move |it| told(it, true));
        let waiting = self.waiting.iter().map(move |it| told(it, false));
        running.chain(waiting)
    }

    /// Of `tokens` tokens with these hashes, those the cache would spare now.
    #[must_use]
    pub fn cached_tokens(&self, hashes: &[SequenceHash], tokens: u32) -> u32 {
        self.cached_depth(hashes, tokens) as u32 * self.config.block_size.get()
    }
}
