//! Switches a worker's cache source between its KV events and the estimated cache.
//!
//! The router uses events while they arrive, can be applied, and agree with responses. Otherwise it
//! falls back to an estimated cache, until they do so again.

use foresee_core::router::{CacheSource, Observed};
use tokio::time::Instant;

use crate::kv_events::event_trust::{DistrustReason, EventTrust};
use crate::kv_events::status::EventsState;
use crate::log_limit::warn_limited;
use crate::subscribe::Subscription;

/// The state of a subscription that was last logged, so that it is logged once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReportedState {
    /// Events are used.
    Live,
    /// Events do not arrive or cannot be applied.
    Unusable,
    /// Responses contradicted the events.
    Untrusted,
}

impl Subscription<'_> {
    /// Sets the state of the event stream after a message, a connection or a check. Switches the
    /// router to the events if they are usable and trusted, and falls back to the estimated cache
    /// if they have been unusable for long enough. Untrusted events remain unused.
    pub(super) fn update_trust(&mut self) {
        if let Some(fault) = self.follower.fault() {
            self.set_state(EventsState::Faulty);
            self.fall_back_if_stale(&fault);
            return;
        }
        if self.is_silent {
            self.set_state(EventsState::Silent);
            self.fall_back_if_stale(
                "subscribed but received no KV events, although recent requests must have filled \
                 blocks; check the endpoint and topic of kv-events",
            );
            return;
        }
        self.unusable_since = None;
        if self.worker.events.with_trust(|trust| trust.is_revoked()) {
            self.set_state(EventsState::Untrusted);
            return;
        }
        self.set_state(EventsState::Live);
        if self.reported_state == Some(ReportedState::Live) {
            return;
        }
        let name = &self.worker.config.name;
        if !self.worker.events.read().followed {
            let router = &self.subscriber.router;
            router.set_cache_source(self.worker.id, CacheSource::Events);
            let now = self.subscriber.clock.now();
            self.worker.events.with_trust(|trust| trust.begin(now));
            self.send_delta(&self.follower.snapshot(), Observed::Replayed);
        }
        let is_complete = self.follower.is_complete();
        self.worker.events.change(|snapshot| {
            snapshot.followed = true;
            snapshot.is_complete = is_complete;
        });
        self.subscriber.metrics.set_events_live(name, true);
        tracing::info!(worker = %name, source = %self.source, "using KV events");
        self.reported_state = Some(ReportedState::Live);
    }

    /// Switches the router to the estimated cache if events have been unusable for `events_grace`.
    /// If they were usable until now, only starts that period. Has no effect after an earlier
    /// switch, until events are used again. `reason` goes to the log.
    pub(super) fn fall_back_if_stale(&mut self, reason: &str) {
        let since = *self.unusable_since.get_or_insert_with(Instant::now);
        let grace = self.subscriber.grace;
        if self.reported_state == Some(ReportedState::Unusable) || since.elapsed() < grace {
            return;
        }
        let name = &self.worker.config.name;
        let router = &self.subscriber.router;
        router.set_cache_source(self.worker.id, CacheSource::Estimated);
        self.worker
            .events
            .change(|snapshot| snapshot.followed = false);
        self.worker.events.with_trust(EventTrust::suspend);
        self.subscriber.metrics.set_events_live(name, false);
        warn_limited!(
            key: name, worker = %name, source = %self.source, reason, unusable_for = ?since.elapsed(),
            "no usable KV events; using estimated cache contents"
        );
        self.reported_state = Some(ReportedState::Unusable);
    }

    /// Returns whether the events are not used because responses speak against them.
    pub(super) fn is_untrusted(&self) -> bool {
        self.is_silent || self.worker.events.with_trust(|trust| trust.is_revoked())
    }

    /// Acts on the evidence that responses gave: undoes repeated stores, revokes trust or restores
    /// it. Returns whether a new connection may help: the evidence is that no events arrive. Has no
    /// effect if there is no new evidence.
    pub(super) fn apply_hit_checks(&mut self) -> bool {
        let events = &self.worker.events;
        match events.take_reason() {
            // Listings that were counted as stores may be the whole difference.
            Some(DistrustReason::Wrong) if self.follower.has_uncertain_stores() => {
                self.undo_repeated_stores("responses report fewer cached blocks");
                let now = self.subscriber.clock.now();
                self.worker.events.with_trust(|trust| trust.begin(now));
            }
            Some(DistrustReason::NoEvents) => {
                self.is_silent = true;
                self.update_trust();
                return true;
            }
            Some(reason) => {
                self.distrust(reason);
                return reason == DistrustReason::Silent;
            }
            None if events.with_trust(|trust| trust.is_restored()) => self.restore_trust(),
            None => {}
        }
        false
    }

    /// Revokes trust in the events and switches the router to the estimated cache. A complete
    /// replay may correct the events, so one is requested as soon as possible. `reason` goes only
    /// to the log.
    fn distrust(&mut self, reason: DistrustReason) {
        let (worker, name) = (self.worker, &self.worker.config.name);
        worker.events.with_trust(EventTrust::revoke);
        worker
            .events
            .set_untrusted_index(Some(&self.follower.snapshot()));
        self.follower.mark_uncertain();
        self.rebuild_at = Instant::now();
        let router = &self.subscriber.router;
        router.set_cache_source(worker.id, CacheSource::Estimated);
        worker.events.change(|snapshot| {
            snapshot.state = EventsState::Untrusted;
            snapshot.followed = false;
            snapshot.is_complete = false;
            snapshot.untrusted += 1;
        });
        self.subscriber.metrics.set_events_live(name, false);
        let label = [("worker", name.clone())];
        let metrics = &self.subscriber.metrics;
        metrics.kv_events_untrusted.get_or_create(&label).inc();
        let reason = match reason {
            DistrustReason::Silent | DistrustReason::NoEvents => {
                "no events arrive, and responses report other cache hits than the last events imply"
            }
            DistrustReason::Wrong => {
                "most recent responses report other cache hits than events imply"
            }
        };
        warn_limited!(
            key: name, worker = %name, source = %self.source, reason,
            "KV events contradict cached_tokens in responses; ignoring events until they agree again"
        );
        self.reported_state = Some(ReportedState::Untrusted);
    }

    /// Ends the distrust of events that have agreed with responses for long enough. The router uses
    /// them again unless they are faulty or do not arrive.
    fn restore_trust(&mut self) {
        let events = &self.worker.events;
        events.set_untrusted_index(None);
        events.with_trust(EventTrust::restore);
        tracing::info!(
            worker = %self.worker.config.name,
            "KV events agree with responses again; trusting them"
        );
        self.update_trust();
    }
}
