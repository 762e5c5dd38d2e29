//! Records which output a response left in its worker's cache, before its bookings are released.
//!
//! KV events report the cached output themselves, so the text of an output is collected only for
//! workers whose cache is estimated.

use std::sync::Arc;

use foresee_engine::output_text::{OutputEnd, OutputText};

use crate::placement::request_context::RequestContext;
use crate::placement::tokenization::MAX_INLINE_TOKENIZE_BYTES;

impl RequestContext {
    /// Returns whether the text of the output should be collected: the worker shares blocks between
    /// requests, its cache is estimated, and the output's place in the prompt's sequence is known.
    pub(crate) fn wants_text(&self) -> bool {
        let config = &self.worker.config;
        let caches_prefixes = config.prefix_caching.unwrap_or(self.shared.prefix_caching);
        caches_prefixes && self.continuation.is_some() && !self.worker.events.read().followed
    }

    /// Releases the bookings of the request, whose output ended as `end` says. `output` is its text
    /// as far as it was collected. A long output is tokenised in the pool for parsing first. In that
    /// case the bookings are released after this function has returned; as abandoned, if the pool
    /// is busy. Without a text, no output is stored.
    pub(crate) fn release_bookings(self, output: Option<OutputText>, end: OutputEnd) {
        let Some(output) = output.filter(|output| !output.text().is_empty()) else {
            return self.end_bookings(end);
        };
        let needs_tokenizer = self
            .continuation
            .as_ref()
            .is_some_and(|continuation| continuation.is_token_based());
        if !needs_tokenizer || output.text().len() <= MAX_INLINE_TOKENIZE_BYTES {
            return self.store_output(&output, end);
        }
        // Outside a runtime the gateway has stopped, and no later request can use the output.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        let shared = Arc::clone(&self.shared);
        runtime.spawn(async move {
            let storing = shared
                .parse_pool
                .run(move || self.store_output(&output, end));
            if let Err(error) = storing.await {
                tracing::debug!(%error, "an output was not stored in the estimated cache");
            }
        });
    }

    /// Appends the output to the sequence of the booking's prompt, then releases the bookings. If
    /// the place of the output in the sequence is unknown, only releases them. Tokenises on this
    /// thread.
    fn store_output(mut self, output: &OutputText, end: OutputEnd) {
        let tokenizer = self.shared.tokenizer.as_ref();
        let tokenizer = tokenizer.and_then(|tokenizer| tokenizer.tokenizer(&self.model));
        if let (Some(continuation), Some(booking)) = (&self.continuation, self.batch.booking(0)) {
            let prompt = booking.prompt();
            if let Some(sequence) = continuation.sequence(prompt, output, end, tokenizer) {
                booking.set_output_sequence(sequence);
            }
        }
        self.end_bookings(end);
    }

    /// Releases the bookings: as complete, or as abandoned by dropping them.
    fn end_bookings(self, end: OutputEnd) {
        match end {
            OutputEnd::Complete(_) => self.batch.complete(self.shared.clock.now()),
            OutputEnd::Abandoned => drop(self.batch),
        }
    }
}
