//! Who is alive: a probe per worker, at an interval and whenever a request finds it failing.
//!
//! Probes are not requests: they are booked nowhere and never count as load.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{HeaderMap, Method};
use http_body_util::{BodyExt, Limited};

use crate::forward::{ForwardError, Message};
use crate::introduction::{learn_what_it_serves, learn_where_its_events_are};
use crate::shared::Shared;
use crate::workers::Worker;

/// Probes in a row that must fail before a worker is taken out, so that one slow answer is not
/// an outage. A refused connection takes it out at once, by the request that meets it.
const FAILURES_UNTIL_OUT: u32 = 2;

/// Every so many probes the models are asked for again: adapters come and go.
const PROBES_PER_LOOK_AT_MODELS: u32 = 10;

/// How often a worker that has come, perhaps as another than it was, is asked where its events
/// are, if it does not answer in time.
const MOST_QUESTIONS: u32 = 3;

/// Least time between two probes, however many requests ask for one: failures in a row shall be
/// more than one moment.
const PROBE_GAP: Duration = Duration::from_millis(10);

const MAX_PROBE_BYTES: usize = 4 << 20;

/// Probes `worker` until it is removed.
pub(crate) async fn watch_worker(shared: Arc<Shared>, worker: Arc<Worker>) {
    let mut failures = 0;
    let mut successes = 0;
    let mut questions_left = MOST_QUESTIONS;
    let mut first_model = None;
    loop {
        tokio::time::sleep(PROBE_GAP).await;
        let asked_at = shared.clock.now();
        let answer = get(&shared, &worker, "/health").await;
        let name = &worker.config.name;
        if answer.is_ok() {
            let is_back = worker.is_back();
            if is_back {
                tracing::info!(worker = %name, "worker was away: its cache counts as empty");
                shared.router.forget_cache(worker.id);
                questions_left = MOST_QUESTIONS;
            }
            let mut serves_another = false;
            if is_back || successes % PROBES_PER_LOOK_AT_MODELS == 0 {
                learn_what_it_serves(&shared, &worker).await;
                if let Some(model) = worker.tells_first_model() {
                    serves_another = first_model.as_ref().is_some_and(|it| *it != model);
                    first_model = Some(model);
                }
            }
            // One that failed may have lost connections without anybody having said so.
            if is_back || serves_another || failures >= FAILURES_UNTIL_OUT {
                worker.resubscribe.notify_one();
            }
            if questions_left > 0 {
                let is_answered = learn_where_its_events_are(&shared, &worker).await;
                questions_left = if is_answered { 0 } else { questions_left - 1 };
            }
            shared.router.set_healthy(worker.id, true);
            if successes == 0 {
                tracing::info!(worker = %name, "worker is healthy");
            }
            (failures, successes) = (0, successes + 1);
        } else if answer == Err(NoAnswer::Late) && worker.heard_at() > asked_at {
            // Too busy to answer a probe, and not too busy to serve.
            tracing::debug!(worker = %name, "probe is late, but streams come through");
        } else {
            if answer == Err(NoAnswer::Absent) {
                worker.is_absent();
            }
            let label = [("worker", name.clone())];
            shared.metrics.probe_failures.get_or_create(&label).inc();
            (failures, successes) = (failures + 1, 0);
            questions_left = MOST_QUESTIONS;
            if failures == FAILURES_UNTIL_OUT {
                tracing::warn!(worker = %name, "worker is unhealthy: its probe fails");
            }
            if failures >= FAILURES_UNTIL_OUT {
                shared.router.set_healthy(worker.id, false);
            }
        }
        tokio::select! {
            () = worker.until_removed() => return,
            () = worker.suspect.notified() => {}
            () = tokio::time::sleep(shared.config.probe_interval) => {}
        }
    }
}

/// Why a probe has no answer to show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoAnswer {
    /// None came in time.
    Late,
    /// Nobody listens there.
    Absent,
    /// The connection failed, or the answer was no success.
    Bad,
}

/// The body of a successful answer in time; nothing else counts.
pub(crate) async fn get(
    shared: &Shared,
    worker: &Worker,
    path: &'static str,
) -> Result<Bytes, NoAnswer> {
    let message = Message {
        method: Method::GET,
        path: PathAndQuery::from_static(path),
        headers: HeaderMap::new(),
        body: Bytes::new(),
        may_repeat: true,
        lists_cached: false,
    };
    let answered = async {
        let sent = shared.probes.send(worker, &message).await;
        let response = sent.map_err(|error| match error {
            ForwardError::Unreached(_) | ForwardError::Exhausted(_) => NoAnswer::Late,
            ForwardError::Absent(_) => NoAnswer::Absent,
            _ => NoAnswer::Bad,
        })?;
        if !response.status().is_success() {
            return Err(NoAnswer::Bad);
        }
        let body = Limited::new(response.into_body(), MAX_PROBE_BYTES).collect();
        Ok(body.await.map_err(|_| NoAnswer::Bad)?.to_bytes())
    };
    let limit = shared
        .config
        .connect_timeout
        .max(Duration::from_millis(100));
    let in_time = tokio::time::timeout(limit, answered).await;
    in_time.unwrap_or(Err(NoAnswer::Late))
}
