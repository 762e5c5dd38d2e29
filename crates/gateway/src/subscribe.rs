//! Follows the KV events of each worker that publishes them, so that the router knows its cache.
//!
//! Every fault has a fallback. A gap is closed by a replay; if that fails, the stream continues and
//! is no longer exact. A lost connection is opened again, without limit. A new engine process starts
//! with an empty cache. Without usable events for a while, the router uses an estimated cache until
//! events are usable again.

mod fallback;
mod sockets;

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use foresee_core::event_index::CacheDelta;
use foresee_core::router::{CacheSource, Observed, Router};
use foresee_engine::kv_events::Message;
use foresee_engine::kv_events::follower::{Follower, Received};
use tokio::time::{Instant, sleep, sleep_until};

use crate::clock::Clock;
use crate::kv_events::replay_backoff::ReplayBackoff;
use crate::kv_events::source::EventSource;
use crate::kv_events::status::{EventSnapshot, EventsState};
use crate::log_limit::warn_limited;
use crate::metrics::Metrics;
use crate::subscribe::fallback::ReportedState;
use crate::subscribe::sockets::{Feed, FeedEvent, SocketError, read_message, replay};
use crate::workers::worker::Worker;

/// Delay before the first reconnection attempt. Each further attempt doubles it, up to
/// [`MAX_RECONNECT_DELAY`].
const INITIAL_RECONNECT_DELAY: Duration = Duration::from_millis(50);
const MAX_RECONNECT_DELAY: Duration = Duration::from_secs(2);

/// Delay between a connection and the first check for missed batches. The engine may have published
/// some before the subscription reached it.
const FIRST_CHECK_DELAY: Duration = Duration::from_millis(500);

/// Interval of checks for missed batches while no events arrive. Engines send no heartbeat, and the
/// last batch before a pause can be lost like any other.
const CHECK_INTERVAL: Duration = Duration::from_secs(2);

/// Interval of attempts to rebuild an inexact view from a complete replay.
const REBUILD_INTERVAL: Duration = Duration::from_secs(5);
/// Delay after an attempt in which the engine no longer had its first batches, or the rebuilt view
/// was inexact too.
const FAILED_REBUILD_INTERVAL: Duration = Duration::from_secs(300);

/// Age of the last event from which on a connection is replaced if events should have arrived. A
/// firewall or NAT may have dropped the connection silently.
const REOPEN_INTERVAL: Duration = Duration::from_secs(60);

/// Number of successive checks that find missed batches, after which the connection counts as broken:
/// the engine publishes, but nothing arrives.
const MAX_CHECKS_WITH_NEWS: u32 = 2;

/// Follows the KV events of workers.
#[derive(Debug)]
pub(crate) struct EventSubscriber {
    pub(crate) router: Router,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) clock: Clock,
    /// The router's block size.
    pub(crate) block_size: NonZeroU32,
    /// Time for which events may be unusable before the cache is estimated instead.
    pub(crate) grace: Duration,
}

impl EventSubscriber {
    /// Follows a worker's events until the worker is removed, and starts anew whenever its event
    /// source changes. Without a source, the cache is estimated.
    pub(crate) async fn follow(self: Arc<Self>, worker: Arc<Worker>) {
        let mut sources = worker.event_source.subscribe();
        let following = async {
            loop {
                let source = sources.borrow_and_update().clone();
                stop_following(&self, &worker);
                let subscription = async {
                    match &source {
                        Some(source) => follow(&self, &worker, source).await,
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    // The worker owns the sender, so waiting does not fail.
                    _ = sources.changed() => {}
                    () = subscription => {}
                }
            }
        };
        tokio::select! {
            () = worker.until_removed() => {}
            () = following => {}
        }
        self.metrics.remove_events_live(&worker.config.name);
    }
}

/// Switches the router to the estimated cache and resets the status of the worker's events. The
/// trust in the events is kept: after a revocation, the events of another source are untrusted too.
fn stop_following(subscriber: &EventSubscriber, worker: &Worker) {
    subscriber
        .router
        .set_cache_source(worker.id, CacheSource::Estimated);
    subscriber.metrics.remove_events_live(&worker.config.name);
    worker
        .events
        .change(|snapshot| *snapshot = EventSnapshot::default());
}

/// Waits for the worker's base model, whose name is part of its block hashes. Logs a warning if the
/// worker was asked for its models and has not listed any within `events_grace`. There is no time
/// limit.
async fn wait_for_model(subscriber: &EventSubscriber, worker: &Worker) -> String {
    let overdue = async {
        worker.models.until_asked().await;
        sleep(subscriber.grace).await;
    };
    tokio::select! {
        model = worker.models.first() => return model,
        () = overdue => {}
    }
    warn_limited!(
        key: &worker.config.name, worker = %worker.config.name,
        "ignoring KV events: GET {}/v1/models returned no models. The model name is needed to match \
         blocks; set --worker-api-key-file if the engine requires an API key",
        worker.config.url()
    );
    worker.models.first().await
}

/// Follows the events at `source` until the future is dropped. Waits for the worker's base model
/// first.
async fn follow(subscriber: &EventSubscriber, worker: &Worker, source: &EventSource) {
    worker
        .events
        .change(|snapshot| snapshot.state = EventsState::Waiting);
    subscriber
        .metrics
        .set_events_live(&worker.config.name, false);
    let model = wait_for_model(subscriber, worker).await;
    let block_size = subscriber.block_size;
    let subscription = Subscription {
        subscriber,
        worker,
        source,
        follower: Follower::new(block_size, model, worker.config.rank),
        unusable_since: Some(Instant::now()),
        is_silent: false,
        replay_backoff: ReplayBackoff::default(),
        rebuild_at: Instant::now(),
        reported_state: None,
    };
    subscription.run().await;
}

/// A subscription to one worker's events at one source.
struct Subscription<'s> {
    subscriber: &'s EventSubscriber,
    worker: &'s Worker,
    source: &'s EventSource,
    /// State of the event stream.
    follower: Follower,
    /// Since when events do not arrive or cannot be applied; `None` while they do.
    unusable_since: Option<Instant>,
    /// Whether no event has arrived since requests must have filled blocks without causing any.
    is_silent: bool,
    /// Back-off of the replay socket.
    replay_backoff: ReplayBackoff,
    /// When an inexact view may be rebuilt next.
    rebuild_at: Instant,
    /// State that was last logged.
    reported_state: Option<ReportedState>,
}

impl Subscription<'_> {
    /// Connects, follows the events until the connection is lost, and starts again. Never returns.
    async fn run(mut self) {
        let mut delay = INITIAL_RECONNECT_DELAY;
        loop {
            self.set_state(EventsState::Connecting);
            match Feed::open(self.source).await {
                Ok(feed) => {
                    delay = INITIAL_RECONNECT_DELAY;
                    self.listen(feed).await;
                    self.fall_back_if_stale("connection to the event socket was lost");
                }
                Err(error) => {
                    tracing::debug!(
                        worker = %self.worker.config.name, source = %self.source, %error,
                        "cannot connect to the KV event socket"
                    );
                    self.fall_back_if_stale(&format!(
                        "cannot connect to the event socket: {error}"
                    ));
                }
            }
            sleep(delay).await;
            delay = (delay * 2).min(MAX_RECONNECT_DELAY);
        }
    }

    /// Applies what arrives on `feed`. Returns when its connection is lost, seems to be, or has to
    /// be replaced. A socket that binds waits for the next connection instead of returning when one
    /// is lost.
    async fn listen(&mut self, mut feed: Feed) {
        let grace = self.subscriber.grace;
        // A socket that binds can have a new connection before it has noticed the end of the old one.
        let mut connections: u32 = 0;
        let (mut last_event_at, mut checks_with_news) = (Instant::now(), 0);
        let mut check_at = Instant::now() + grace;
        loop {
            let event = tokio::select! {
                event = feed.next() => Some(event),
                () = self.worker.resubscribe.notified() => return,
                () = self.worker.events.hit_checked.notified() => {
                    if self.apply_hit_checks() {
                        return;
                    }
                    continue;
                }
                () = sleep_until(check_at) => None,
            };
            match event {
                Some(FeedEvent::Connected) => {
                    connections = connections.saturating_add(1);
                    self.replay_backoff.reset();
                    self.refresh_worker_info();
                    self.catch_up().await;
                    self.update_trust();
                    check_at = Instant::now() + FIRST_CHECK_DELAY;
                }
                Some(FeedEvent::Disconnected) => {
                    connections = connections.saturating_sub(1);
                    if connections > 0 {
                        continue;
                    }
                    self.set_state(EventsState::Connecting);
                    self.unusable_since.get_or_insert_with(Instant::now);
                    if !self.source.binds {
                        return;
                    }
                    check_at = Instant::now() + grace;
                }
                Some(FeedEvent::Frames(frames)) => {
                    (last_event_at, checks_with_news) = (Instant::now(), 0);
                    self.apply_live(&frames).await;
                    self.rebuild().await;
                    self.update_trust();
                    check_at = Instant::now() + CHECK_INTERVAL;
                }
                None if connections > 0 => {
                    let before = self.follower.last();
                    self.catch_up().await;
                    let has_news = self.follower.last() != before;
                    checks_with_news = if has_news { checks_with_news + 1 } else { 0 };
                    self.rebuild().await;
                    self.update_trust();
                    let seems_dead =
                        self.is_untrusted() && last_event_at.elapsed() >= REOPEN_INTERVAL;
                    if seems_dead || checks_with_news >= MAX_CHECKS_WITH_NEWS {
                        return;
                    }
                    check_at = Instant::now() + CHECK_INTERVAL;
                }
                None => {
                    self.fall_back_if_stale("no engine has connected to the event socket");
                    check_at = Instant::now() + grace.max(FIRST_CHECK_DELAY);
                }
            }
        }
    }

    /// Prepares the view for a new connection: clears it if the worker lost its cache or serves
    /// another model. Without known models, the model is not compared.
    fn refresh_worker_info(&mut self) {
        self.follower.on_connected();
        if self.worker.liveness.take_cache_lost() {
            let had_events = self.follower.last().is_some();
            let removed = self.follower.clear();
            if had_events {
                self.handle_restart(&removed);
            }
        }
        let models = self.worker.models.read();
        let Some((model, _)) = models.first() else {
            return;
        };
        if model != self.follower.model() {
            let removed = self.follower.clear();
            self.follower = self.follower.for_new_process(model.clone());
            self.send_delta(&removed, Observed::Replayed);
        }
    }

    /// Applies a live message. If batches are missing before it, they are replayed first, or
    /// skipped if that fails. Frames that are not an event batch are ignored.
    async fn apply_live(&mut self, frames: &[Bytes]) {
        // Announced before the batches that these requests cause are applied.
        for prompt in self.worker.events.take_sent() {
            self.follower.expect(prompt);
        }
        let listing_requested = self.worker.events.take_listing_requested();
        if listing_requested && !self.follower.is_full_report() {
            self.undo_repeated_stores("requests ask for a list of cached blocks");
        }
        let Some(message) = read_message(frames) else {
            return;
        };
        let mut may_replay = true;
        loop {
            match self.follower.receive(&message) {
                Received::Applied(changes) => {
                    self.publish_delta(&changes, Observed::Live(self.subscriber.clock.now()));
                    self.note_lag();
                    return;
                }
                Received::AlreadyApplied => return,
                Received::Restarted(removed) => self.handle_restart(&removed),
                Received::Gap(from) if may_replay => {
                    may_replay = false;
                    // Joining a stream late is not a gap.
                    if self.follower.last().is_some() {
                        self.count_gap();
                    }
                    self.replay_from(from).await;
                }
                Received::Gap(from) => self.skip(from, message.sequence),
            }
        }
    }

    /// Replays what the engine published since the last batch that was applied, or all that it
    /// still has. Has no effect if nothing can be replayed.
    ///
    /// The last batch is requested again: if the replay begins with it, the engine process is still
    /// the same; if not, another process with another cache has taken its place.
    async fn catch_up(&mut self) {
        let before = self.follower.last();
        let from = before.map_or(0, |last| last.sequence);
        let Some(count) = self.replay_from(from).await else {
            return;
        };
        let restarted = before.is_some() && self.follower.last().is_none();
        if before.is_some() && count == 0 {
            let removed = self.follower.clear();
            self.handle_restart(&removed);
            self.replay_from(0).await;
        } else if restarted {
            self.replay_from(0).await;
        }
    }

    /// Replaces an inexact view by one from a complete replay, if the engine still has all batches.
    /// Has no effect if the view is exact, the worker has no replay socket, or the next attempt is
    /// not due. A failed attempt leaves the view as it is.
    async fn rebuild(&mut self) {
        let Some(endpoint) = self.source.replay.as_deref() else {
            return;
        };
        let now = Instant::now();
        if self.follower.is_complete()
            || now < self.rebuild_at
            || !self.replay_backoff.is_elapsed(now)
        {
            return;
        }
        let model = self.follower.model().to_owned();
        let mut rebuilt = self.follower.for_new_process(model);
        let mut is_contiguous = true;
        let replayed = replay(endpoint, 0, |message| {
            is_contiguous = matches!(
                rebuilt.receive(message),
                Received::Applied(_) | Received::AlreadyApplied
            );
            is_contiguous
        });
        let replayed = replayed.await;
        self.rebuild_at = Instant::now() + REBUILD_INTERVAL;
        if self.replayed_count(replayed).is_none() {
            return;
        }
        if !is_contiguous || !rebuilt.is_complete() {
            self.rebuild_at = Instant::now() + FAILED_REBUILD_INTERVAL;
            return;
        }
        // A cleared cache within the replay ends full report mode, but requests still ask for
        // listings.
        if self.follower.is_full_report() && !rebuilt.is_full_report() {
            rebuilt.undo_repeated_stores();
        }
        let previous = std::mem::replace(&mut self.follower, rebuilt).snapshot();
        let removed = CacheDelta {
            removed: previous.stored,
            engine_block_ratio: previous.engine_block_ratio,
            ..CacheDelta::default()
        };
        self.send_delta(&removed, Observed::Replayed);
        self.send_delta(&self.follower.snapshot(), Observed::Replayed);
        let last = self.follower.last();
        self.worker.events.change(|snapshot| {
            snapshot.is_complete = true;
            snapshot.last_sequence = last.map(|last| last.sequence);
        });
        tracing::info!(
            worker = %self.worker.config.name,
            "replayed all KV events; the contents of this worker's cache are exact again"
        );
    }

    /// Replays the batches from sequence number `from` on. Returns how many were received, or `None`
    /// if the worker has no replay socket, its back-off has not elapsed, or the replay failed. If it
    /// turns out that the engine has restarted, no batch is applied.
    async fn replay_from(&mut self, from: u64) -> Option<usize> {
        let endpoint = self.source.replay.as_deref()?;
        if !self.replay_backoff.is_elapsed(Instant::now()) {
            return None;
        }
        let replayed = replay(endpoint, from, |message| self.apply_replayed(message)).await;
        self.replayed_count(replayed)
    }

    /// Returns the number of batches of a replay that succeeded. After one that failed, starts a
    /// back-off and returns `None`. Logs the first failure and the recovery.
    fn replayed_count(&mut self, replayed: Result<usize, SocketError>) -> Option<usize> {
        let (worker, replay) = (&self.worker.config.name, &self.source.replay);
        match replayed {
            Ok(count) => {
                if self.replay_backoff.on_success() {
                    tracing::info!(%worker, ?replay, "replay of KV events works again");
                }
                Some(count)
            }
            Err(error) => {
                if self.replay_backoff.on_failure(Instant::now()) {
                    warn_limited!(
                        key: worker, %worker, ?replay, %error,
                        "replay of KV events failed; retrying later, and gaps cannot be closed \
                         until then"
                    );
                } else {
                    tracing::debug!(%worker, ?replay, %error, "replay of KV events failed again");
                }
                None
            }
        }
    }

    /// Applies one batch of a replay. Returns whether further batches are useful: `false` if the
    /// batch showed that the engine restarted. Then the view is empty and the batch was not
    /// applied.
    fn apply_replayed(&mut self, message: &Message<'_>) -> bool {
        loop {
            match self.follower.receive(message) {
                Received::Applied(changes) => self.publish_delta(&changes, Observed::Replayed),
                Received::AlreadyApplied => {}
                Received::Restarted(removed) => {
                    self.handle_restart(&removed);
                    return false;
                }
                // The engine no longer has the batches in between.
                Received::Gap(from) => {
                    self.skip(from, message.sequence);
                    continue;
                }
            }
            return true;
        }
    }

    /// Sends the changes of one batch, which the follower has applied, to the router and updates
    /// status, trust and metrics. A batch without changes counts too. Enters full report mode if
    /// the view then contains more blocks than the engine has.
    fn publish_delta(&mut self, changes: &[CacheDelta], observed: Observed) {
        self.is_silent = false;
        for delta in changes {
            self.send_delta(delta, observed);
        }
        if changes.is_empty() {
            self.send_delta(&CacheDelta::default(), observed);
        }
        let (block_size, now) = (
            self.follower.engine_block_size(),
            self.subscriber.clock.now(),
        );
        let events = &self.worker.events;
        events.set_engine_block_size(block_size);
        events.with_trust(|trust| trust.on_event(block_size, now));
        let label = [("worker", self.worker.config.name.clone())];
        let metrics = &self.subscriber.metrics;
        metrics.kv_event_batches.get_or_create(&label).inc();
        let (last, is_complete) = (self.follower.last(), self.follower.is_complete());
        let full_report_mode = self.follower.is_full_report();
        self.worker.events.change(|snapshot| {
            snapshot.batches += 1;
            snapshot.last_sequence = last.map(|last| last.sequence);
            snapshot.is_complete = is_complete;
            snapshot.full_report_mode = full_report_mode;
        });
        if !full_report_mode
            && let Some(capacity) = self.worker.capacity_blocks()
            && self.follower.is_overfull(capacity)
        {
            self.undo_repeated_stores("more blocks were stored than the engine has");
        }
    }

    /// Enters full report mode: takes back stores that were listings of cached blocks, and ignores
    /// later ones. `reason` goes to the log.
    fn undo_repeated_stores(&mut self, reason: &str) {
        for delta in self.follower.undo_repeated_stores() {
            self.send_delta(&delta, Observed::Replayed);
        }
        self.worker
            .events
            .change(|snapshot| snapshot.full_report_mode = true);
        tracing::info!(
            worker = %self.worker.config.name, reason,
            "engine lists cached blocks among its KV events; counting such blocks once"
        );
    }

    /// Records the age of the last batch in seconds, by the engine's and this machine's clock. Has
    /// no effect if the engine sends no time. A batch from the future has age 0.
    fn note_lag(&self) {
        let published = self.follower.last().and_then(|last| last.timestamp);
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        if let (Some(published), Ok(now)) = (published, now) {
            let lag = (now.as_secs_f64() - published).max(0.0);
            self.worker
                .events
                .change(|snapshot| snapshot.lag_seconds = Some(lag));
        }
    }

    /// Applies changes to the router's index and, while events are untrusted, to the index that
    /// checks them.
    fn send_delta(&self, delta: &CacheDelta, observed: Observed) {
        self.worker.events.update_untrusted_index(delta);
        let router = &self.subscriber.router;
        router.apply_cache_delta(self.worker.id, delta, observed);
    }

    /// Counts that batches were missing.
    fn count_gap(&self) {
        let label = [("worker", self.worker.config.name.clone())];
        let metrics = &self.subscriber.metrics;
        metrics.kv_event_gaps.get_or_create(&label).inc();
        self.worker.events.change(|snapshot| snapshot.gaps += 1);
    }

    /// Continues at batch `to` without the batches from `from` on, which cannot be replayed. Counts
    /// a loss and logs a warning, unless no batch was applied before. `from` is used only for the
    /// log.
    fn skip(&mut self, from: u64, to: u64) {
        let joins_late = self.follower.last().is_none();
        if let Some(removed) = self.follower.skip_to(to) {
            self.send_delta(&removed, Observed::Replayed);
        }
        let worker = &self.worker.config.name;
        if joins_late {
            tracing::info!(
                %worker, sequence = to,
                "joined the event stream late; earlier events are unavailable, so blocks cached \
                 before are unknown"
            );
            return;
        }
        self.worker.events.change(|snapshot| snapshot.lost += 1);
        warn_limited!(
            key: worker, %worker, first_missing = from, next = to,
            "KV events were lost and cannot be replayed; the contents of this worker's cache are no \
             longer exact"
        );
    }

    /// Reports to the router and the status that the engine was replaced by another process.
    /// `removed` are all blocks of the view, which the follower has cleared before.
    fn handle_restart(&self, removed: &CacheDelta) {
        self.send_delta(removed, Observed::Replayed);
        self.worker.events.change(|snapshot| {
            snapshot.last_sequence = None;
            snapshot.is_complete = true;
        });
        tracing::info!(
            worker = %self.worker.config.name,
            "engine restarted; clearing its cache state"
        );
    }

    /// Sets the state that the admin API shows.
    fn set_state(&self, state: EventsState) {
        self.worker.events.change(|snapshot| snapshot.state = state);
    }
}
