//! Sends one request until a worker responds: which failures are retried on another worker, what each
//! attempt says about its worker, and when the request is given up.
//!
//! Until the first byte of a response nothing has been passed on to the client, so another worker can
//! take over, and the bookings move with the request. A retry sends the request a second time, so
//! the number of retries is bounded for each request and, by a budget, for all requests together. A
//! connection that was not established sent nothing: choosing another worker then is not a retry.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use foresee_core::batch::Batch;
use foresee_core::outlier::ExchangeResult;
use foresee_core::retry_budget::RetryBudget;
use foresee_core::router::Router;
use foresee_core::workers::WorkerId;
use foresee_engine::error::ApiError;
use http::header::{CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderMap, HeaderValue, Response, StatusCode, response};
use http_body_util::BodyExt;
use hyper::body::{Body as _, Frame};
use opentelemetry::KeyValue;
use parking_lot::Mutex;

use crate::clock::Clock;
use crate::log_limit::warn_limited;
use crate::metrics::Metrics;
use crate::placement::Placement;
use crate::placement::dispatch::announce;
use crate::placement::hints::Deadlines;
use crate::traces::request_trace::RequestTrace;
use crate::tracked_body::TrackedBody;
use crate::upstream::{
    ConnectionChoice, UpstreamBody, UpstreamClient, UpstreamError, UpstreamRequest,
};
use crate::workers::registry::WorkerRegistry;
use crate::workers::worker::Worker;

/// Maximum number of times that one request is sent again. A request that crashes engines must not
/// reach all of them.
const MAX_RETRIES: u32 = 2;

/// Retries that are allowed for each request of the last ten seconds.
const RETRY_RATIO: f64 = 0.2;

/// Retries per second that are allowed in addition, so that a quiet fleet can retry.
const RETRIES_PER_SECOND: f64 = 3.0;

/// Time to wait for connections to be closed when the system can open no more.
const LOCAL_EXHAUSTION_DELAY: Duration = Duration::from_millis(20);

/// Multiple of the predicted time to the first byte after which a worker counts as hanging.
const FIRST_BYTE_FACTOR: u32 = 10;

/// Longest `Retry-After` of a worker that is honoured.
const MAX_BACKPRESSURE: Duration = Duration::from_secs(300);

/// Parts of the gateway that the attempts of all requests share.
#[derive(Debug)]
pub(crate) struct FailoverContext {
    pub(crate) placement: Arc<Placement>,
    pub(crate) registry: Arc<WorkerRegistry>,
    pub(crate) router: Router,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) clock: Clock,
    /// Limits how many requests are sent again after a worker failed them.
    pub(crate) retry_budget: Arc<Mutex<RetryBudget>>,
    /// Maximum time from the arrival of a request until the first byte of its response.
    pub(crate) first_byte_timeout: Duration,
    /// Minimum time that one worker gets until the first byte.
    pub(crate) min_first_byte_timeout: Duration,
    /// Whether clients see the names of workers in error messages.
    pub(crate) exposes_workers: bool,
}

/// Returns the budget that all requests of a gateway share.
pub(crate) fn new_retry_budget() -> RetryBudget {
    RetryBudget::new(RETRY_RATIO, RETRIES_PER_SECOND)
}

/// Response of a worker of which nothing has been passed on yet.
#[derive(Debug)]
pub(crate) struct UpstreamResponse {
    pub(crate) worker: Arc<Worker>,
    pub(crate) response: Response<UpstreamBody>,
    /// The first frame of the body, which was read to verify that the worker produces output.
    pub(crate) first_frame: Option<Frame<Bytes>>,
    /// Prompt tokens that the worker has cached according to its KV events; `None` if the response
    /// cannot verify that number.
    pub(crate) predicted_tokens: Option<u32>,
}

/// Attempts to send one request.
#[derive(Debug)]
pub(crate) struct Failover<'a> {
    shared: &'a FailoverContext,
    client: &'a UpstreamClient,
    request: &'a UpstreamRequest,
    /// Workers that the request is not sent to: they failed it, or the client excluded them.
    excluded: Vec<WorkerId>,
    /// Number of requests sent so far.
    attempts: u32,
    /// Number of times that the request was sent again.
    retries: u32,
    /// Number of connections that were lost after the request was sent.
    connection_losses: u32,
    /// Maximum time from the arrival until the first byte of the response.
    max_wait: Duration,
    /// Time by the gateway's clock until which the request may wait: in the queue, for a connection
    /// and for the first byte, all attempts together.
    deadline: Duration,
    /// Time until which the request may wait in the queue.
    queue_deadline: Duration,
    /// Time that the request was queued in the router so far.
    queued_for: Duration,
    /// Spans of the request, if it is sampled.
    trace: Option<&'a mut RequestTrace>,
}

/// Why no further attempt is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NoRetry {
    /// The request changes state, or has been sent again as often as it may be.
    NotRepeatable,
    /// The retry budget is used up.
    OverBudget,
    /// No other worker can be chosen.
    NoOtherWorker,
}

impl Failover<'_> {
    /// Returns the number of requests sent so far.
    pub(crate) fn attempts(&self) -> u32 {
        self.attempts
    }

    /// Returns the time that the request was queued in the router so far.
    pub(crate) fn queued_for(&self) -> Duration {
        self.queued_for
    }
}

impl<'a> Failover<'a> {
    /// Prepares to send a request that arrived at `arrived_at`, but not to the workers in
    /// `excluded`. Adds the request to the retry budget. The first byte of the response must arrive
    /// within `first_byte_timeout` and the client's deadline, all attempts and the queue included.
    /// `trace` gets the spans of the queue and of the attempts.
    pub(crate) fn new(
        shared: &'a FailoverContext,
        client: &'a UpstreamClient,
        request: &'a UpstreamRequest,
        excluded: &[WorkerId],
        arrived_at: Duration,
        deadlines: Deadlines,
        trace: Option<&'a mut RequestTrace>,
    ) -> Self {
        let longest = shared.first_byte_timeout;
        let max_wait = deadlines
            .first_byte
            .map_or(longest, |wait| wait.min(longest));
        let max_queue_wait = deadlines.queue.map_or(max_wait, |wait| wait.min(max_wait));
        shared.retry_budget.lock().on_request(shared.clock.now());
        Self {
            shared,
            client,
            request,
            excluded: excluded.to_vec(),
            attempts: 0,
            retries: 0,
            connection_losses: 0,
            max_wait,
            deadline: arrived_at + max_wait,
            queue_deadline: arrived_at + max_queue_wait,
            queued_for: Duration::ZERO,
            trace,
        }
    }

    /// Sends the request to the booked worker. If that fails and another worker can take over,
    /// moves the bookings to the next best worker and sends it there. A 429 and a 5xx count as
    /// failures, but are returned if no other worker can take over; a response with any other
    /// status is returned as it is.
    ///
    /// # Errors
    /// Returns the error response for the client if no worker responds or the queue refuses the
    /// request. `batch` keeps its bookings until it is dropped.
    pub(crate) async fn send(&mut self, batch: &mut Batch) -> Result<UpstreamResponse, ApiError> {
        loop {
            self.wait_in_queue(batch).await?;
            let Some(worker) = self.shared.registry.get(batch.worker()) else {
                // The worker was removed after it was chosen.
                self.choose_another(batch)?;
                continue;
            };
            let limit = self.attempt_limit(batch)?;
            self.attempts += 1;
            let trace = self.trace.as_deref_mut();
            let header = trace.and_then(|trace| trace.begin_call(&worker, self.attempts));
            let attempt = self.attempt(&worker, batch, header);
            let attempt = tokio::time::timeout(limit, attempt).await;
            let error = match attempt.unwrap_or(Err(UpstreamError::TimedOut(limit))) {
                Ok(response) => match result_of_head(&response.response) {
                    ExchangeResult::Success => return Ok(response),
                    result => {
                        batch.report(result, self.shared.clock.now());
                        self.note_ejection(&worker);
                        match self.retry(batch) {
                            Ok(()) => {
                                self.fail_call(response.response.status().as_str());
                                continue;
                            }
                            // No other worker can take over: the client gets this response.
                            Err(_) => return Ok(response),
                        }
                    }
                },
                Err(error) => error,
            };
            self.fail_call(error.kind());
            self.recover(&error, &worker, batch).await?;
        }
    }

    /// Waits in the router's queue until the deadline for that, and notes how long.
    async fn wait_in_queue(&mut self, batch: &mut Batch) -> Result<(), ApiError> {
        let placement = &self.shared.placement;
        let started = self.shared.clock.now();
        let max_wait = self.queue_deadline.saturating_sub(started);
        let exemplar = self.trace.as_deref().map(RequestTrace::exemplar);
        let waited = placement
            .wait_in_queue(batch, &self.excluded, max_wait, exemplar)
            .await;
        if let Some(trace) = self.trace.as_deref_mut().filter(|_| placement.has_queue()) {
            let lasted = self.shared.clock.now().saturating_sub(started);
            let error = waited.as_ref().err().and_then(|error| error.code);
            let error = error.map(|code| KeyValue::new("error.type", code));
            trace.add_step("foresee.queue", lasted, error.into_iter().collect());
        }
        self.queued_for += waited?;
        Ok(())
    }

    /// Ends the span of an attempt that failed, if the request is sampled.
    fn fail_call(&mut self, error_type: &str) {
        if let Some(trace) = self.trace.as_deref_mut() {
            trace.fail_call(error_type);
        }
    }

    /// Returns how long the next attempt may take until its first byte: a multiple of the predicted
    /// time, within bounds, and not beyond the deadline of the request. Fails with a 504 if the
    /// deadline has passed.
    fn attempt_limit(&self, batch: &Batch) -> Result<Duration, ApiError> {
        let left = self.deadline.saturating_sub(self.shared.clock.now());
        if left.is_zero() {
            return Err(self.timed_out());
        }
        let Some(predicted) = batch.predicted_first_byte() else {
            return Ok(left);
        };
        let limit = predicted.saturating_mul(FIRST_BYTE_FACTOR);
        Ok(limit.max(self.shared.min_first_byte_timeout).min(left))
    }

    /// Sends the request to `worker` once. Waits for the head of the response and, if the response
    /// is a success, for the first frame of its body: engines send the head before they do anything
    /// that can fail. Announces the request to the worker's event status first. After a lost
    /// connection, a new connection is used. `traceparent` names the span of the attempt, if the
    /// request is sampled. The caller sets the time limit.
    async fn attempt(
        &self,
        worker: &Arc<Worker>,
        batch: &mut Batch,
        traceparent: Option<HeaderValue>,
    ) -> Result<UpstreamResponse, UpstreamError> {
        let predicted_tokens = announce(worker, batch, self.request.full_report_mode);
        let connection = match self.connection_losses {
            0 => ConnectionChoice::IdleOrNew,
            _ => ConnectionChoice::New,
        };
        let sent = self
            .client
            .send(worker, self.request, connection, traceparent);
        let response = sent.await?;
        let (head, mut body) = response.into_parts();
        let is_stream = TrackedBody::is_stream(&head);
        let has_stream = is_stream && !body.is_end_stream();
        let first_frame = if has_stream || self.must_have_body(&head) {
            read_first_frame(&head, &mut body, is_stream).await?
        } else {
            None
        };
        Ok(UpstreamResponse {
            worker: Arc::clone(worker),
            response: Response::from_parts(head, body),
            first_frame,
            predicted_tokens,
        })
    }

    /// Returns whether a response with this head is unusable without a body: a success of a request
    /// whose result is the body.
    fn must_have_body(&self, head: &response::Parts) -> bool {
        self.request.expects_result && head.status == StatusCode::OK
    }

    /// Prepares the next attempt after `error`. If this machine has no free connection, waits and
    /// keeps the worker. Otherwise reports the failure to the router, requests a health check of
    /// `worker`, and books `batch` on the worker of the next attempt. Fails with the client's error
    /// response if there is no further attempt.
    async fn recover(
        &mut self,
        error: &UpstreamError,
        worker: &Worker,
        batch: &mut Batch,
    ) -> Result<(), ApiError> {
        match error {
            UpstreamError::LocalExhaustion(_) => {
                return self.wait_for_local_resources(error).await;
            }
            UpstreamError::Unsendable(_) => {
                let message = format!("The request {error}.");
                return Err(ApiError::bad_request(message, None));
            }
            // The client's patience ended, which says nothing about the worker.
            UpstreamError::TimedOut(_) if self.is_past_deadline() => return Err(self.timed_out()),
            _ => {}
        }
        let name = &worker.config.name;
        let attempt = self.attempts;
        batch.report(ExchangeResult::Failure, self.shared.clock.now());
        self.note_ejection(worker);
        worker.probe_now.notify_one();
        let recovered = self.retry_after(error, worker, batch);
        match &recovered {
            Ok(()) => warn_limited!(
                key: name, worker = %name, attempt, %error,
                "upstream request failed; retrying"
            ),
            Err(_) => warn_limited!(
                key: name, worker = %name, attempt, %error,
                "upstream request failed; no further attempt"
            ),
        }
        recovered
    }

    /// Chooses the worker of the next attempt after `worker` failed with `error`. Marks a worker
    /// that refused the connection as unhealthy and its cache as lost. `Ok` means that `batch` is
    /// booked there: on another worker or, after the first lost connection, possibly on the same
    /// one. Fails with the client's error response if the request must not be sent again or no
    /// worker is left.
    fn retry_after(
        &mut self,
        error: &UpstreamError,
        worker: &Worker,
        batch: &mut Batch,
    ) -> Result<(), ApiError> {
        match error {
            UpstreamError::ConnectionRefused(_) => {
                worker.liveness.mark_gone();
                self.shared.router.set_healthy(worker.id, false);
                self.choose_another(batch)
            }
            // The delay may be this machine's, so the health check decides about the worker.
            UpstreamError::Unreachable(_) => self.choose_another(batch),
            _ => {
                let is_loss = matches!(error, UpstreamError::ConnectionLost(_));
                self.connection_losses += u32::from(is_loss);
                match self.retry(batch) {
                    Ok(()) => Ok(()),
                    // The worker may have closed an idle connection just as the request was sent.
                    // If it is the only worker, it gets a second attempt, on a fresh connection.
                    Err(NoRetry::NoOtherWorker) if is_loss && self.connection_losses == 1 => Ok(()),
                    Err(reason) => Err(self.worker_failed(worker, error, reason)),
                }
            }
        }
    }

    /// Moves the bookings to another worker to send the request again, within the retry budget.
    /// Counts the retry. If it fails, the bookings stay where they are, but the worker remains
    /// excluded.
    fn retry(&mut self, batch: &mut Batch) -> Result<(), NoRetry> {
        if !self.request.is_repeatable || self.retries == MAX_RETRIES {
            return Err(NoRetry::NotRepeatable);
        }
        let now = self.shared.clock.now();
        // Not locked while the bookings move: every request uses the budget.
        if !self.shared.retry_budget.lock().try_retry(now) {
            self.shared.metrics.retries_over_budget.inc();
            return Err(NoRetry::OverBudget);
        }
        self.excluded.push(batch.worker());
        if batch.reroute(&self.excluded, now).is_err() {
            self.shared.retry_budget.lock().return_retry(now);
            return Err(NoRetry::NoOtherWorker);
        }
        self.retries += 1;
        self.shared.metrics.retries.inc();
        Ok(())
    }

    /// Excludes the booked worker, to which nothing was sent, and moves the bookings to the best of
    /// the others. If no other worker can be chosen, fails with the client's error response, and
    /// the bookings stay where they are.
    fn choose_another(&mut self, batch: &mut Batch) -> Result<(), ApiError> {
        self.excluded.push(batch.worker());
        let moved = batch.reroute(&self.excluded, self.shared.clock.now());
        moved.map_err(|error| self.shared.placement.refusal(&error))
    }

    /// Waits for connections of this process to be closed. The request keeps its booking. Waits for
    /// a fixed time, whether or not a connection was closed. Fails with a 503 once the deadline has
    /// passed.
    async fn wait_for_local_resources(&self, error: &UpstreamError) -> Result<(), ApiError> {
        if self.is_past_deadline() {
            return Err(self.shared.placement.out_of_connections());
        }
        tracing::debug!(%error, "out of connections; waiting for others to be closed");
        tokio::time::sleep(LOCAL_EXHAUSTION_DELAY).await;
        Ok(())
    }

    /// Notes whether the router has ejected the worker because of its latest failure.
    fn note_ejection(&self, worker: &Worker) {
        worker.note_ejection(&self.shared.router, &self.shared.metrics);
    }

    /// Returns whether the request may wait no longer.
    fn is_past_deadline(&self) -> bool {
        self.shared.clock.now() >= self.deadline
    }

    /// Returns the response to a request whose deadline has passed.
    fn timed_out(&self) -> ApiError {
        let limit = self.max_wait;
        ApiError::timed_out(format!(
            "No response began within {limit:?} (--first-byte-timeout, or the deadline of the \
             request)."
        ))
    }

    /// Returns the response to a request that `worker` failed with `error` and that is not sent
    /// again for `reason`. Names the worker only if clients may see workers.
    fn worker_failed(&self, worker: &Worker, error: &UpstreamError, reason: NoRetry) -> ApiError {
        let failed = match error {
            UpstreamError::TimedOut(_) => "The worker did not begin its response in time",
            _ => "The worker failed before its response began",
        };
        let why = match reason {
            NoRetry::NotRepeatable => "the request is not sent again",
            NoRetry::OverBudget => "too many requests are being sent again already",
            NoRetry::NoOtherWorker => "no other worker can take over",
        };
        let mut message = format!("{failed}, and {why}.");
        if self.shared.exposes_workers {
            message += &format!(" Worker {}: {error}.", worker.config.name);
        }
        match error {
            UpstreamError::TimedOut(_) => ApiError::timed_out(message),
            _ => ApiError::bad_gateway(message),
        }
    }
}

/// Returns what the head of a response says about its worker. A 4xx other than 429 is the client's
/// error, and a 501 says that the engine does not have the function.
fn result_of_head(response: &Response<UpstreamBody>) -> ExchangeResult {
    match response.status() {
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
            ExchangeResult::Backpressure {
                retry_after: retry_after(response.headers()),
            }
        }
        StatusCode::NOT_IMPLEMENTED | StatusCode::HTTP_VERSION_NOT_SUPPORTED => {
            ExchangeResult::Success
        }
        status if status.is_server_error() => ExchangeResult::Failure,
        _ => ExchangeResult::Success,
    }
}

/// Returns the `Retry-After` of a response if it is a number of seconds, at most
/// [`MAX_BACKPRESSURE`]. A date is ignored.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get(RETRY_AFTER)?.to_str().ok()?;
    let seconds = value.trim().parse().ok()?;
    Some(Duration::from_secs(seconds).min(MAX_BACKPRESSURE))
}

/// Reads the first frame of a response that has to have a body.
///
/// # Errors
/// If the connection is lost or the body is empty, or if it is not of the type that the head says:
/// an error page of a web server, or a JSON type without JSON.
async fn read_first_frame(
    head: &response::Parts,
    body: &mut UpstreamBody,
    is_stream: bool,
) -> Result<Option<Frame<Bytes>>, UpstreamError> {
    let frame = match body.frame().await {
        Some(Ok(frame)) => frame,
        Some(Err(error)) => return Err(UpstreamError::connection_lost(&error)),
        None => return Err(UpstreamError::UnusableResponse("its body is empty")),
    };
    let content_type = head.headers.get(CONTENT_TYPE);
    let content_type = content_type.map_or(&b""[..], |value| value.as_bytes());
    if content_type.starts_with(b"text/html") {
        return Err(UpstreamError::UnusableResponse("it is a web page"));
    }
    let is_json = !is_stream && content_type.starts_with(b"application/json");
    let first_byte = frame
        .data_ref()
        .and_then(|data| data.trim_ascii_start().first().copied());
    if is_json && first_byte.is_some_and(|byte| !b"{[".contains(&byte)) {
        return Err(UpstreamError::UnusableResponse("its body is not JSON"));
    }
    Ok(Some(frame))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_retry_after_is_a_bounded_number_of_seconds_or_ignored(
            text in prop_oneof!["[ ]?[0-9]{1,25}[ ]?", "[ -~]{0,30}"],
        ) {
            let headers = HeaderMap::from_iter([(RETRY_AFTER, HeaderValue::from_str(&text).unwrap())]);
            let seconds: Option<u64> = text.trim().parse().ok();
            let expected = seconds.map(|seconds| Duration::from_secs(seconds).min(MAX_BACKPRESSURE));
            prop_assert_eq!(retry_after(&headers), expected);
        }
    }
}
