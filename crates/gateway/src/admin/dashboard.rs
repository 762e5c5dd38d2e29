//! The dashboard: a page that shows the fleet, the decisions and their outcomes, and the part of the
//! admin API that it reads.
//!
//! A task measures the fleet once a second, whether or not a page is open, so that a page that is
//! opened can show the last hours ([`history`]). While streams are open ([`subscribers`]), it also
//! builds the state of each worker and sends what has changed. The page itself is in [`assets`].

pub(super) mod assets;
mod decisions;
mod history;
mod percentile;
mod sample;
mod status;
mod subscribers;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use foresee_api::dashboard::{FleetSample, Quality, Snapshot, Tick, WorkerStatus};
use foresee_core::router::Router;
use foresee_core::workers::WorkerSnapshot;
use foresee_engine::error::ApiError;
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use http::{HeaderMap, HeaderValue, Response};
use http_body_util::Either;
use parking_lot::Mutex;
use percent_encoding::percent_decode_str;
use serde::Serialize;
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;

use super::access::{quoted, refusal};
use super::listener::{AdminBody, ConnectionCloser};
use crate::clock::{Clock, since_epoch};
use crate::log_limit::warn_limited;
use crate::metrics::Metrics;
use crate::placement::decision_log::DecisionLog;
use crate::placement::ended_requests::EndedRequests;
use crate::reload::Reloader;
use crate::reply::{self, Body, to_json};
use crate::shutdown::ShutdownSignal;
use crate::workers::Workers;
use history::HistoryRings;
use sample::{Counts, FleetSampler};
use status::{quality, worker_status};
use subscribers::Subscribers;

/// Time between two samples.
const INTERVAL: Duration = Duration::from_secs(1);

/// Number of decisions in a snapshot.
const SNAPSHOT_DECISIONS: usize = 100;

/// Number of ticks from one comment in a stream to the next.
const TICKS_PER_PING: u64 = 15;

/// Time after which a page reconnects, in milliseconds.
const RETRY_MILLIS: u64 = 2000;

/// Requests and decisions that the placement of requests reports to the dashboard.
#[derive(Clone, Debug, Default)]
pub(crate) struct DashboardFeed {
    pub(crate) decisions: Arc<DecisionLog>,
    pub(crate) ended: Arc<EndedRequests>,
}

/// Parts of the gateway that the dashboard shows.
#[derive(Debug)]
pub(crate) struct DashboardParts {
    pub(crate) router: Router,
    pub(crate) workers: Arc<Workers>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) reloader: Arc<Reloader>,
    pub(crate) shutdown: Arc<ShutdownSignal>,
    pub(crate) clock: Clock,
}

/// The dashboard's part of the admin API.
#[derive(Debug)]
pub(crate) struct Dashboard {
    parts: DashboardParts,
    feed: DashboardFeed,
    /// Time of the start of the clock, in seconds since the Unix epoch.
    started: f64,
    subscribers: Subscribers,
    state: Mutex<State>,
}

/// State from one tick to the next.
#[derive(Debug, Default)]
struct State {
    sampler: FleetSampler,
    history: HistoryRings,
    /// Latest sample.
    sample: FleetSample,
    /// State that the subscribers have seen last.
    seen: Seen,
    ticks: u64,
}

/// State that all subscribers have seen.
#[derive(Debug, Default)]
struct Seen {
    workers: Vec<WorkerStatus>,
    quality: Quality,
    /// Number of the latest change in the log of decisions.
    log_version: u64,
}

impl Dashboard {
    /// Creates the dashboard of a gateway whose placement of requests reports to `feed`.
    pub(crate) fn new(parts: DashboardParts, feed: DashboardFeed) -> Self {
        let started = since_epoch().saturating_sub(parts.clock.now());
        Self {
            parts,
            feed,
            started: started.as_secs_f64(),
            subscribers: Subscribers::default(),
            state: Mutex::default(),
        }
    }

    /// Samples the fleet in intervals, and sends changes to subscribers, until `stopped` is true. Then
    /// all streams end.
    pub(crate) async fn sample_in_intervals(self: Arc<Self>, mut stopped: watch::Receiver<bool>) {
        let mut ticks = tokio::time::interval(INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = stopped.wait_for(|stopped| *stopped) => break,
                _ = ticks.tick() => self.tick(),
            }
        }
        self.subscribers.clear();
    }

    /// Handles `GET path`; `None` if the path is not one of the dashboard's.
    pub(super) fn respond(
        &self,
        path: &str,
        query: Option<&str>,
        headers: &HeaderMap,
        connection: Option<ConnectionCloser>,
    ) -> Option<Result<Response<AdminBody>, ApiError>> {
        if let Some(file) = assets::respond(path, headers) {
            return Some(Ok(file.map(Either::Left)));
        }
        let whole = |response: Response<Body>| response.map(Either::Left);
        Some(match path {
            "/admin/snapshot" => Ok(whole(json(&self.snapshot()))),
            "/admin/stream" => self.stream(connection),
            "/admin/history" => self.history(query).map(whole),
            "/admin/decisions" => self.decisions(query).map(whole),
            path => {
                let id = path.strip_prefix("/admin/decisions/")?;
                self.decision(id).map(whole)
            }
        })
    }

    /// Samples the fleet, and sends what has changed.
    fn tick(&self) {
        let parts = &self.parts;
        let now = parts.clock.now();
        let time = self.started + now.as_secs_f64();
        let workers = parts.router.workers(now);
        let ended = self.feed.ended.take();
        let counts = Counts::read(&parts.metrics);
        let mut state = self.state.lock();
        let state = &mut *state;
        let measured = state.sampler.measure(now, time, &workers, &ended, counts);
        state.sample = measured.sample;
        state
            .history
            .push(measured.sample, &workers, &measured.ttft, &measured.itl);
        state.ticks += 1;
        if self.subscribers.is_empty() {
            return;
        }
        let tick = self.changes(state, time, &workers);
        let ping = match state.ticks.is_multiple_of(TICKS_PER_PING) {
            true => ": ping\n\n",
            false => "",
        };
        let event = format!(
            "{ping}id: {}\nevent: tick\ndata: {}\n\n",
            state.ticks,
            to_json(&tick)
        );
        let shed = self.subscribers.send(&Bytes::from(event), now);
        if shed > 0 {
            warn_limited!(key: "", streams = shed, "closed streams of the dashboard that were not read");
        }
    }

    /// Returns what has changed since the last call, and remembers the present state.
    fn changes(&self, state: &mut State, time: f64, workers: &[WorkerSnapshot]) -> Tick {
        let present = self.statuses(&state.sampler, workers);
        let seen = std::mem::take(&mut state.seen.workers).into_iter();
        let mut before: HashMap<_, _> = seen.map(|status| (status.name.clone(), status)).collect();
        let changed = present
            .iter()
            .filter(|status| before.remove(&status.name).as_ref() != Some(status));
        let changed = changed.cloned().collect();
        state.seen.workers = present;
        let quality = self.quality(workers);
        let is_new = quality != state.seen.quality;
        state.seen.quality = quality;
        let (decisions, version) = self.feed.decisions.changed_since(state.seen.log_version);
        state.seen.log_version = version;
        Tick {
            time,
            notices: self.notices(),
            sample: state.sample,
            quality: is_new.then(|| state.seen.quality.clone()),
            workers: changed,
            removed: before.into_keys().collect(),
            decisions: decisions.iter().map(decisions::summary).collect(),
        }
    }

    /// Returns the present state.
    fn snapshot(&self) -> Snapshot {
        let state = self.state.lock();
        let now = self.parts.clock.now();
        let workers = self.parts.router.workers(now);
        let statuses = self.statuses(&state.sampler, &workers);
        self.snapshot_of(state.sample, now, &workers, statuses)
    }

    /// Returns the snapshot with this sample and these workers.
    fn snapshot_of(
        &self,
        sample: FleetSample,
        now: Duration,
        workers: &[WorkerSnapshot],
        statuses: Vec<WorkerStatus>,
    ) -> Snapshot {
        let (policy, queue, block_size) = self.parts.reloader.in_force(|config| {
            let router = &config.router;
            let queue = router.queue_order.map(|order| order.to_string());
            (router.policy.to_string(), queue, router.block_size.get())
        });
        let mut models: Vec<String> = workers
            .iter()
            .flat_map(|worker| worker.models.iter().cloned())
            .collect();
        models.sort_unstable();
        models.dedup();
        let recent = self.feed.decisions.latest(SNAPSHOT_DECISIONS);
        Snapshot {
            time: self.started + now.as_secs_f64(),
            started: self.started,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            policy,
            queue,
            block_size,
            notices: self.notices(),
            models,
            sample,
            quality: self.quality(workers),
            workers: statuses,
            decisions: recent.iter().map(decisions::summary).collect(),
        }
    }

    /// Opens a stream, whose first event is a snapshot. Fails with a 429 if there are too many.
    fn stream(
        &self,
        connection: Option<ConnectionCloser>,
    ) -> Result<Response<AdminBody>, ApiError> {
        // Locked until the subscriber is added, so that it misses no tick.
        let mut state = self.state.lock();
        if !self.subscribers.has_room() {
            let message = "Too many dashboards are open. Close one of them.";
            return Err(ApiError::overloaded(message, Duration::from_secs(5)));
        }
        let now = self.parts.clock.now();
        let workers = self.parts.router.workers(now);
        if self.subscribers.is_empty() {
            state.seen = Seen {
                workers: self.statuses(&state.sampler, &workers),
                quality: self.quality(&workers),
                log_version: self.feed.decisions.changed_since(u64::MAX).1,
            };
        }
        // The changes of the next tick are those since then.
        let statuses = state.seen.workers.clone();
        let snapshot = self.snapshot_of(state.sample, now, &workers, statuses);
        let first = format!(
            ": connected\nretry: {RETRY_MILLIS}\nid: {}\nevent: snapshot\ndata: {}\n\n",
            state.ticks,
            to_json(&snapshot)
        );
        let viewer = self.feed.decisions.watch();
        let stream = self.subscribers.add(first.into(), connection, viewer, now);
        drop(state);
        let mut response = Response::new(Either::Right(stream));
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        // A proxy in front must not buffer the events.
        headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
        Ok(response)
    }

    /// Returns the past of the fleet later than `since`, or of the `worker` that the query names.
    fn history(&self, query: Option<&str>) -> Result<Response<Body>, ApiError> {
        let mut since = f64::NEG_INFINITY;
        let mut worker = None;
        for (name, value) in parameters(query) {
            match name {
                "since" => since = number(name, value)?,
                "worker" => worker = Some(percent_decode_str(value).decode_utf8_lossy()),
                _ => return Err(unknown_parameter("since` and `worker")),
            }
        }
        let state = self.state.lock();
        let Some(name) = worker else {
            let history = state.history.of_fleet(since);
            drop(state);
            return Ok(json(&history));
        };
        let series = state.history.of_worker(&name).ok_or_else(|| {
            let message = format!("There is no history of a worker named `{}`.", quoted(&name));
            refusal(404, "worker_not_found", message)
        })?;
        drop(state);
        Ok(json(&foresee_api::dashboard::History {
            workers: vec![series],
            ..Default::default()
        }))
    }

    /// Returns the recorded decisions after the one that the query names, with all candidates.
    fn decisions(&self, query: Option<&str>) -> Result<Response<Body>, ApiError> {
        let mut after = 0;
        for (name, value) in parameters(query) {
            match name {
                "after" => after = number(name, value)?,
                _ => return Err(unknown_parameter("after")),
            }
        }
        Ok(json(&decisions::decisions_after(
            &self.feed.decisions,
            after,
        )))
    }

    /// Returns one recorded decision, with all candidates.
    fn decision(&self, id: &str) -> Result<Response<Body>, ApiError> {
        let entry = id.parse().ok().and_then(|id| self.feed.decisions.get(id));
        let entry = entry.ok_or_else(|| {
            let message = format!(
                "There is no decision `{}`. Only the latest are kept; `GET /admin/decisions` lists \
                 them.",
                quoted(id)
            );
            refusal(404, "decision_not_found", message)
        })?;
        Ok(json(&decisions::with_candidates(&entry)))
    }

    /// Returns the state of each worker.
    fn statuses(&self, sampler: &FleetSampler, workers: &[WorkerSnapshot]) -> Vec<WorkerStatus> {
        let registry = self.parts.workers.registry();
        let status = |snapshot: &WorkerSnapshot| {
            let worker = registry.get(snapshot.id);
            worker_status(snapshot, worker.as_deref(), sampler.hits(snapshot.id))
        };
        workers.iter().map(status).collect()
    }

    /// Returns the quality of the predictions.
    fn quality(&self, workers: &[WorkerSnapshot]) -> Quality {
        let lengths = self.parts.router.output_length_accuracy();
        quality(
            workers,
            lengths,
            self.parts.metrics.overlap_prediction_counts(),
        )
    }

    /// Returns the problems of the router itself, as sentences.
    fn notices(&self) -> Vec<String> {
        let mut notices = Vec::new();
        if self.parts.shutdown.has_begun() {
            notices.push("The router is shutting down.".to_owned());
        }
        if self.parts.metrics.config_last_reload_successful.get() == 0 {
            notices.push(
                "The latest reload of the configuration failed; the previous one is in force. The \
                 log has the error."
                    .to_owned(),
            );
        }
        notices
    }
}

/// Returns the parameters of a query. A parameter without `=` has an empty value.
fn parameters(query: Option<&str>) -> impl Iterator<Item = (&str, &str)> {
    let parts = query.unwrap_or("").split('&');
    let parts = parts.filter(|part| !part.is_empty());
    parts.map(|part| part.split_once('=').unwrap_or((part, "")))
}

/// Parses the value of a parameter. Fails with a 400.
fn number<T: std::str::FromStr>(name: &str, value: &str) -> Result<T, ApiError> {
    let parsed = value.parse().ok();
    parsed.ok_or_else(|| ApiError::bad_request(format!("`{name}` must be a number."), None))
}

/// Returns the error for a parameter other than the `known` ones.
fn unknown_parameter(known: &str) -> ApiError {
    ApiError::bad_request(format!("The only parameters are `{known}`."), None)
}

/// Returns a response with a value as JSON, which is not cached.
fn json(value: &impl Serialize) -> Response<Body> {
    let mut response = reply::serialized(value);
    let no_store = HeaderValue::from_static("no-store");
    response.headers_mut().insert(CACHE_CONTROL, no_store);
    response
}
