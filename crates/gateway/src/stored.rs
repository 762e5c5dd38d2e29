//! What an answer leaves in its worker's cache, told to its booking before that goes.
//!
//! Events tell that themselves, so the text of an answer is collected only for workers without.

use std::sync::Arc;

use foresee_engine::answer::{Answer, End};

use crate::proxy::TOKENIZED_IN_PLACE;
use crate::watch::Watch;

impl Watch {
    /// Whether the answer's text would be of use.
    pub(crate) fn wants_text(&self) -> bool {
        let config = &self.worker.config;
        let shares = config
            .prefix_caching
            .unwrap_or(self.shared.config.prefix_caching);
        shares && self.continuation.is_some() && !self.worker.events.read().followed
    }

    /// Lets go of what is booked. The `answer`, as far as it was collected, came to this end.
    pub(crate) fn let_go(self, answer: Option<Answer>, end: End) {
        let Some(answer) = answer.filter(|answer| !answer.text().is_empty()) else {
            return self.end_bookings(end);
        };
        let is_of_tokens = self
            .continuation
            .as_ref()
            .is_some_and(|it| it.is_of_tokens());
        if !is_of_tokens || answer.text().len() <= TOKENIZED_IN_PLACE {
            return self.store(&answer, end);
        }
        // Outside of a runtime there is nobody left to ask for what is stored.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        runtime.spawn(async move {
            let shared = Arc::clone(&self.shared);
            let permit = match &shared.tokens {
                Some(tokens) => tokens.permit().await,
                None => None,
            };
            tokio::task::spawn_blocking(move || {
                let _permit = permit;
                self.store(&answer, end);
            });
        });
    }

    fn store(mut self, answer: &Answer, end: End) {
        let tokens = self.shared.tokens.as_ref();
        let tokenizer = tokens.and_then(|tokens| tokens.tokenizer(&self.model));
        if let (Some(continuation), Some(booking)) = (&self.continuation, self.batch.booking(0)) {
            let prompt = booking.sequence();
            if let Some(sequence) = continuation.sequence(prompt, answer, end, tokenizer) {
                booking.answered(sequence);
            }
        }
        self.end_bookings(end);
    }

    fn end_bookings(self, end: End) {
        match end {
            End::Whole(_) => self.batch.finish(self.shared.clock.now()),
            End::Abandoned => drop(self.batch),
        }
    }
}
