//! Whether the events that come are usable and believed, so that the router follows them.

use tokio::time::Instant;

use crate::subscribe::Subscription;
use crate::subscribe::evidence::{Evidence, Reason};
use crate::subscribe::standing::EventsState;

/// What was said last in the log about a subscription, so that it is said once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Told {
    Live,
    Unusable,
    Mistrusted,
}

impl Subscription<'_> {
    /// Says whether events are usable, now that something came.
    pub(super) fn judge(&mut self) {
        if let Some(fault) = self.follower.fault() {
            self.set_state(EventsState::Faulty);
            self.is_unusable(&fault);
            return;
        }
        if self.is_silent {
            self.set_state(EventsState::Silent);
            self.is_unusable(
                "none come, although answers must have filled blocks: endpoint and topic should be \
                 the engine's",
            );
            return;
        }
        self.unusable_since = None;
        if self.worker.events.with_evidence(|it| it.is_lost()) {
            self.set_state(EventsState::Mistrusted);
            return;
        }
        self.set_state(EventsState::Live);
        if self.told == Some(Told::Live) {
            return;
        }
        let name = &self.worker.config.name;
        if !self.worker.events.read().followed {
            let router = &self.shared.router;
            router.follow_events(self.worker.id, true);
            let now = self.shared.clock.now();
            self.worker.events.with_evidence(|it| it.begin(now));
            self.tell_router(&self.follower.contents(), None);
        }
        let exact = self.follower.is_exact();
        self.worker.events.change(|it| {
            it.followed = true;
            it.exact = exact;
        });
        self.shared.metrics.events_live(name, true);
        tracing::info!(worker = %name, source = %self.source, "KV events are followed");
        self.told = Some(Told::Live);
    }

    /// Gives up on events, for now, if they have been unusable for long.
    pub(super) fn is_unusable(&mut self, why: &str) {
        let since = *self.unusable_since.get_or_insert_with(Instant::now);
        if self.told == Some(Told::Unusable) || since.elapsed() < self.shared.config.events_grace {
            return;
        }
        let name = &self.worker.config.name;
        self.shared.router.follow_events(self.worker.id, false);
        self.worker.events.change(|it| it.followed = false);
        self.worker.events.with_evidence(Evidence::rest);
        self.shared.metrics.events_live(name, false);
        tracing::warn!(
            worker = %name, source = %self.source, why,
            "no usable KV events: its cache is guessed from what is sent there"
        );
        self.told = Some(Told::Unusable);
    }

    /// Whether answers are why the events are not believed.
    pub(super) fn is_doubted(&self) -> bool {
        self.is_silent || self.worker.events.with_evidence(|it| it.is_lost())
    }

    /// Looks at what answers say about the events. Returns whether another connection may help.
    pub(super) fn heed_answers(&mut self) -> bool {
        let events = &self.worker.events;
        match events.take_reason() {
            // It may be no more than that.
            Some(Reason::Wrong) if self.follower.has_stores_in_doubt() => {
                self.take_back_repeats("answers report less in its cache");
                let now = self.shared.clock.now();
                self.worker.events.with_evidence(|it| it.begin(now));
            }
            Some(Reason::Unheard) => {
                self.is_silent = true;
                self.judge();
                return true;
            }
            Some(reason) => {
                self.mistrust(reason);
                return reason == Reason::Silent;
            }
            None if events.with_evidence(|it| it.is_won_back()) => self.trust_again(),
            None => {}
        }
        false
    }

    /// Believes the events no longer, until they would have been right for a while.
    fn mistrust(&mut self, reason: Reason) {
        let (worker, name) = (self.worker, &self.worker.config.name);
        worker.events.with_evidence(Evidence::lose);
        worker.events.set_claims(Some(&self.follower.contents()));
        // If all of them can be had again, that may put it right.
        self.follower.doubt();
        self.rebuild_at = Instant::now();
        self.shared.router.follow_events(worker.id, false);
        worker.events.change(|it| {
            it.state = EventsState::Mistrusted;
            it.followed = false;
            it.exact = false;
            it.mistrusted += 1;
        });
        self.shared.metrics.events_live(name, false);
        let label = [("worker", name.clone())];
        let metrics = &self.shared.metrics;
        metrics.kv_events_mistrusted.get_or_create(&label).inc();
        let what = match reason {
            Reason::Silent | Reason::Unheard => {
                "no KV events come, and answers report another cache"
            }
            Reason::Wrong => "answers report another cache than KV events do",
        };
        tracing::warn!(
            worker = %name, source = %self.source,
            "{what}: they are not believed, and its cache is guessed from what is sent there"
        );
        self.told = Some(Told::Mistrusted);
    }

    fn trust_again(&mut self) {
        let events = &self.worker.events;
        events.set_claims(None);
        events.with_evidence(Evidence::rest_assured);
        tracing::info!(
            worker = %self.worker.config.name,
            "KV events have been right again for a while: they are believed"
        );
        self.judge();
    }
}
