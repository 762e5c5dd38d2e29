//! Follows the KV events of each worker that publishes them, so that the router knows its cache.
//!
//! Nothing that goes wrong here leaves a worker dark. A gap is replayed, and if it cannot be, the
//! stream carries on, marked as inexact. A connection is opened again for ever. An engine that
//! begins anew begins with an empty cache. And if there are no usable events for a while, the
//! router goes back to guessing from what it sends there (the shadow), until there are.

mod evidence;
mod follow;
mod repeats;
mod rest;
mod sockets;
mod source;
mod standing;
mod verdict;

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use foresee_core::cache::Changes;
use foresee_engine::kv_events::Message;
use tokio::time::{Instant, sleep, sleep_until};

use crate::shared::Shared;
pub(crate) use crate::subscribe::evidence::Finding;
use crate::subscribe::follow::{Follower, Received};
use crate::subscribe::rest::ReplayRest;
use crate::subscribe::sockets::{Feed, Heard, SocketError, read_message, replay};
pub(crate) use crate::subscribe::source::check_endpoint;
pub use crate::subscribe::source::{EventSource, KvEvents};
pub(crate) use crate::subscribe::standing::{Board, EventsState, Standing};
use crate::subscribe::verdict::Told;
use crate::workers::Worker;

/// Pauses between attempts to connect: they double from the first to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LAST_PAUSE: Duration = Duration::from_secs(2);

/// How long after a connection the engine is asked whether all it published has come: what it
/// sent before our subscription reached it has not.
const FIRST_CHECK: Duration = Duration::from_millis(500);

/// How often a silent engine is asked. There is no heartbeat, and the last batch before a silence
/// can be lost as any other.
const CHECK_INTERVAL: Duration = Duration::from_secs(2);

/// How often an inexact view is made anew from all the engine still has, and how long to wait if
/// that no longer reaches back to its start.
const REBUILD_INTERVAL: Duration = Duration::from_secs(5);
const HOPELESS_REBUILD_INTERVAL: Duration = Duration::from_secs(300);

/// How often a connection is made anew on which nothing comes although something should: whatever
/// keeps connections on the way may have dropped it without a word.
const REOPEN_INTERVAL: Duration = Duration::from_secs(60);

/// Checks in a row by which everything new came, until the connection counts as such.
const MOST_CHECKS_WITH_NEWS: u32 = 2;

/// Follows a worker's events until it is removed, wherever they are at the time.
pub(crate) async fn follow_events(shared: Arc<Shared>, worker: Arc<Worker>) {
    let mut sources = worker.event_source.subscribe();
    let following = async {
        loop {
            let source = sources.borrow_and_update().clone();
            stop_following(&shared, &worker);
            let followed = async {
                match &source {
                    Some(source) => follow(&shared, &worker, source).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                // The sender is as old as this worker, so waiting does not fail.
                _ = sources.changed() => {}
                () = followed => {}
            }
        }
    };
    tokio::select! {
        () = worker.until_removed() => {}
        () = following => {}
    }
    shared.metrics.forget_events(&worker.config.name);
}

/// Nothing is known of a worker's events.
fn stop_following(shared: &Shared, worker: &Worker) {
    shared.router.follow_events(worker.id, false);
    shared.metrics.forget_events(&worker.config.name);
    worker.events.change(|it| *it = Standing::default());
}

/// The model that blocks are hashed with. Says so if that does not come from a worker that answers.
async fn wait_for_model(shared: &Shared, worker: &Worker) -> String {
    let has_come_late = async {
        worker.until_asked_for_models().await;
        sleep(shared.config.events_grace).await;
    };
    tokio::select! {
        model = worker.first_model() => return model,
        () = has_come_late => {}
    }
    tracing::warn!(
        worker = %worker.config.name,
        "its KV events are not followed, as it does not say which models it serves: have it list \
         them at {}/v1/models to whoever asks, without a key",
        worker.config.url()
    );
    worker.first_model().await
}

async fn follow(shared: &Shared, worker: &Worker, source: &EventSource) {
    worker.events.change(|it| it.state = EventsState::Waiting);
    shared.metrics.events_live(&worker.config.name, false);
    let model = wait_for_model(shared, worker).await;
    let block_size = shared.config.router.block_size;
    let subscription = Subscription {
        shared,
        worker,
        source,
        follower: Follower::new(block_size, model, worker.config.rank),
        unusable_since: Some(Instant::now()),
        is_silent: false,
        replay_rest: ReplayRest::default(),
        rebuild_at: Instant::now(),
        told: None,
    };
    subscription.run().await;
}

struct Subscription<'s> {
    shared: &'s Shared,
    worker: &'s Worker,
    source: &'s EventSource,
    follower: Follower,
    /// Since when there are no usable events.
    unusable_since: Option<Instant>,
    /// None came although answers must have filled blocks, and none has since.
    is_silent: bool,
    replay_rest: ReplayRest,
    rebuild_at: Instant,
    told: Option<Told>,
}

impl Subscription<'_> {
    async fn run(mut self) {
        let mut pause = FIRST_PAUSE;
        loop {
            self.set_state(EventsState::Connecting);
            match Feed::open(self.source).await {
                Ok(feed) => {
                    pause = FIRST_PAUSE;
                    self.listen(feed).await;
                }
                Err(error) => tracing::debug!(
                    worker = %self.worker.config.name, source = %self.source, %error,
                    "cannot subscribe to KV events"
                ),
            }
            self.is_unusable("there is no connection");
            sleep(pause).await;
            pause = (pause * 2).min(LAST_PAUSE);
        }
    }

    /// Follows a socket until its connection is lost, or seems to be.
    async fn listen(&mut self, mut feed: Feed) {
        let grace = self.shared.config.events_grace;
        let mut connected = false;
        let (mut heard_at, mut checks_with_news) = (Instant::now(), 0);
        let mut check_at = Instant::now() + grace;
        loop {
            let heard = tokio::select! {
                heard = feed.next() => Some(heard),
                () = self.worker.resubscribe.notified() => return,
                () = self.worker.events.weighed.notified() => {
                    if self.heed_answers() {
                        return;
                    }
                    continue;
                }
                () = sleep_until(check_at) => None,
            };
            match heard {
                Some(Heard::Connected) => {
                    connected = true;
                    self.replay_rest.end();
                    self.look_at_worker();
                    self.catch_up().await;
                    self.judge();
                    check_at = Instant::now() + FIRST_CHECK;
                }
                Some(Heard::Disconnected) => {
                    connected = false;
                    self.set_state(EventsState::Connecting);
                    self.unusable_since.get_or_insert_with(Instant::now);
                    if !self.source.binds {
                        return;
                    }
                    check_at = Instant::now() + grace;
                }
                Some(Heard::Frames(frames)) => {
                    (heard_at, checks_with_news) = (Instant::now(), 0);
                    self.take(&frames).await;
                    self.rebuild().await;
                    self.judge();
                    check_at = Instant::now() + CHECK_INTERVAL;
                }
                None if connected => {
                    let before = self.follower.last();
                    self.catch_up().await;
                    let has_news = self.follower.last() != before;
                    checks_with_news = if has_news { checks_with_news + 1 } else { 0 };
                    self.rebuild().await;
                    self.judge();
                    let waits_in_vain = self.is_doubted() && heard_at.elapsed() >= REOPEN_INTERVAL;
                    if waits_in_vain || checks_with_news >= MOST_CHECKS_WITH_NEWS {
                        return;
                    }
                    check_at = Instant::now() + CHECK_INTERVAL;
                }
                None => {
                    self.is_unusable("nobody has connected");
                    check_at = Instant::now() + grace.max(FIRST_CHECK);
                }
            }
        }
    }

    /// The worker may have come back without its cache, or with another model.
    fn look_at_worker(&mut self) {
        self.follower.is_connected();
        if self.worker.lost_its_cache() {
            let was_heard = self.follower.last().is_some();
            let removed = self.follower.clear();
            if was_heard {
                self.has_restarted(&removed);
            }
        }
        let models = self.worker.models.read();
        let Some((model, _)) = models.first() else {
            return;
        };
        if model != self.follower.model() {
            let removed = self.follower.clear();
            self.follower = self.follower.anew(model.clone());
            self.tell_router(&removed, None);
        }
    }

    /// Applies a live message, after whatever is missing before it.
    async fn take(&mut self, frames: &[Bytes]) {
        // Before the batches that those requests cause.
        for prompt in self.worker.events.take_sent() {
            self.follower.expect(prompt);
        }
        let asked = self.worker.events.were_lists_asked_for();
        if asked && !self.follower.has_lists() {
            self.take_back_repeats("requests ask for lists of what is cached");
        }
        let Some(message) = read_message(frames) else {
            return;
        };
        let mut may_replay = true;
        loop {
            match self.follower.receive(&message) {
                Received::Applied(changes) => {
                    self.applied(&changes, Some(self.shared.clock.now()));
                    self.note_lag();
                    return;
                }
                Received::Known => return,
                Received::Restarted(removed) => self.has_restarted(&removed),
                Received::Gap(from) if may_replay => {
                    may_replay = false;
                    // Having come late is no loss on the way.
                    if self.follower.last().is_some() {
                        self.count_gap();
                    }
                    self.replay_from(from).await;
                }
                Received::Gap(from) => self.skip(from, message.sequence),
            }
        }
    }

    /// Asks for what the engine published since the last batch applied, or all it still has.
    ///
    /// The last batch itself is asked for again: if the answer begins with it, the engine is the
    /// one it was, and if not, its cache is another.
    async fn catch_up(&mut self) {
        let last = self.follower.last();
        let from = last.map_or(0, |last| last.sequence);
        let before = self.follower.last();
        let Some(count) = self.replay_from(from).await else {
            return;
        };
        let restarted = before.is_some() && self.follower.last().is_none();
        if before.is_some() && count == 0 {
            let removed = self.follower.clear();
            self.has_restarted(&removed);
            self.replay_from(0).await;
        } else if restarted {
            self.replay_from(0).await;
        }
    }

    /// Makes an inexact view anew, if the engine still has all it published.
    async fn rebuild(&mut self) {
        let Some(endpoint) = self.source.replay.as_deref() else {
            return;
        };
        let now = Instant::now();
        if self.follower.is_exact() || now < self.rebuild_at || !self.replay_rest.is_over(now) {
            return;
        }
        let mut anew = self.follower.anew(self.follower.model().to_owned());
        let mut is_whole = true;
        let replayed = replay(endpoint, 0, |message| {
            is_whole = matches!(
                anew.receive(message),
                Received::Applied(_) | Received::Known
            );
            is_whole
        });
        let replayed = replayed.await;
        self.rebuild_at = Instant::now() + REBUILD_INTERVAL;
        if self.count_of(replayed).is_none() {
            return;
        }
        if !is_whole || !anew.is_exact() {
            self.rebuild_at = Instant::now() + HOPELESS_REBUILD_INTERVAL;
            return;
        }
        // A cleared cache on the way ends what is known of lists, not that they are asked for.
        if self.follower.has_lists() && !anew.has_lists() {
            anew.take_back_repeats();
        }
        let before = std::mem::replace(&mut self.follower, anew);
        let Changes { added, stride, .. } = before.contents();
        self.tell_router(
            &Changes {
                removed: added,
                stride,
                ..Changes::default()
            },
            None,
        );
        self.tell_router(&self.follower.contents(), None);
        let last = self.follower.last();
        self.worker.events.change(|it| {
            it.exact = true;
            it.last_sequence = last.map(|last| last.sequence);
        });
        tracing::info!(
            worker = %self.worker.config.name,
            "all KV events were replayed: what is known of this cache is exact again"
        );
    }

    /// Replays from a number on. Returns how many batches came; `None` if the worker has no
    /// replay, or it fails. If it turns out that the engine has restarted, nothing is applied.
    async fn replay_from(&mut self, from: u64) -> Option<usize> {
        let endpoint = self.source.replay.as_deref()?;
        if !self.replay_rest.is_over(Instant::now()) {
            return None;
        }
        let replayed = replay(endpoint, from, |message| self.take_replayed(message)).await;
        self.count_of(replayed)
    }

    /// How many batches a replay brought, if it worked. One that failed rests from now on.
    fn count_of(&mut self, replayed: Result<usize, SocketError>) -> Option<usize> {
        let (worker, replay) = (&self.worker.config.name, &self.source.replay);
        match replayed {
            Ok(count) => {
                if self.replay_rest.worked() {
                    tracing::info!(%worker, ?replay, "KV events can be replayed again");
                }
                Some(count)
            }
            Err(error) => {
                if self.replay_rest.failed(Instant::now()) {
                    tracing::warn!(%worker, ?replay, %error, "KV events cannot be replayed");
                } else {
                    tracing::debug!(%worker, ?replay, %error, "KV events still cannot be replayed");
                }
                None
            }
        }
    }

    /// Returns whether further batches are wanted.
    fn take_replayed(&mut self, message: &Message<'_>) -> bool {
        loop {
            match self.follower.receive(message) {
                Received::Applied(changes) => self.applied(&changes, None),
                Received::Known => {}
                Received::Restarted(removed) => {
                    self.has_restarted(&removed);
                    return false;
                }
                // The engine keeps only so many.
                Received::Gap(from) => {
                    self.skip(from, message.sequence);
                    continue;
                }
            }
            return true;
        }
    }

    fn applied(&mut self, changes: &[Changes], just_now: Option<Duration>) {
        self.is_silent = false;
        for changes in changes {
            self.tell_router(changes, just_now);
        }
        let (block_size, now) = (self.follower.engine_block_size(), self.shared.clock.now());
        let events = &self.worker.events;
        events.set_engine_block_size(block_size);
        events.with_evidence(|it| it.heard(block_size, now));
        let label = [("worker", self.worker.config.name.clone())];
        let metrics = &self.shared.metrics;
        metrics.kv_event_batches.get_or_create(&label).inc();
        let (last, exact) = (self.follower.last(), self.follower.is_exact());
        let has_lists = self.follower.has_lists();
        self.worker.events.change(|it| {
            it.batches += 1;
            it.last_sequence = last.map(|last| last.sequence);
            it.exact = exact;
            it.has_lists = has_lists;
        });
        if !has_lists
            && let Some(capacity) = self.worker.capacity_blocks()
            && self.follower.is_overfull(capacity)
        {
            self.take_back_repeats("more was stored than the engine has blocks");
        }
    }

    /// Stores that say again what is known were lists, and are not counted any longer.
    fn take_back_repeats(&mut self, why: &str) {
        for changes in self.follower.take_back_repeats() {
            self.tell_router(&changes, None);
        }
        self.worker.events.change(|it| it.has_lists = true);
        tracing::info!(
            worker = %self.worker.config.name, why,
            "the engine lists cached blocks among its KV events: those count once"
        );
    }

    fn note_lag(&self) {
        let sent = self.follower.last().and_then(|last| last.timestamp);
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        if let (Some(sent), Ok(now)) = (sent, now) {
            let lag = (now.as_secs_f64() - sent).max(0.0);
            self.worker.events.change(|it| it.lag_seconds = Some(lag));
        }
    }

    /// Tells what has changed `just_now`, or else at some time before.
    fn tell_router(&self, changes: &Changes, just_now: Option<Duration>) {
        self.worker.events.update_claims(changes);
        let router = &self.shared.router;
        router.update_cache(self.worker.id, changes, just_now);
    }

    fn count_gap(&self) {
        let label = [("worker", self.worker.config.name.clone())];
        let metrics = &self.shared.metrics;
        metrics.kv_event_gaps.get_or_create(&label).inc();
        self.worker.events.change(|it| it.gaps += 1);
    }

    fn skip(&mut self, from: u64, to: u64) {
        let joins = self.follower.last().is_none();
        if let Some(forgotten) = self.follower.skip_to(to) {
            self.tell_router(&forgotten, None);
        }
        let worker = &self.worker.config.name;
        if joins {
            tracing::info!(
                %worker, first = to,
                "KV events before this one are not to be had: blocks cached before count as absent"
            );
            return;
        }
        let already = self.worker.events.read().lost > 0;
        self.worker.events.change(|it| it.lost += 1);
        if already {
            tracing::debug!(%worker, from, to, "KV events are lost");
        } else {
            tracing::warn!(
                %worker, from, to,
                "KV events are lost and cannot be replayed: what is known of this cache is no \
                 longer exact"
            );
        }
    }

    fn has_restarted(&self, removed: &Changes) {
        self.tell_router(removed, None);
        self.worker.events.change(|it| {
            it.last_sequence = None;
            it.exact = true;
        });
        tracing::info!(
            worker = %self.worker.config.name,
            "the engine has been restarted: its cache counts as empty"
        );
    }

    fn set_state(&self, state: EventsState) {
        self.worker.events.change(|it| it.state = state);
    }
}
