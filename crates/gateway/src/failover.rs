//! Sends one request until a worker responds: which failures are retried on another worker, which mark
//! a worker as failed, and when the request is given up.
//!
//! Until the first byte of a response nothing has been passed on to the client, so another worker can
//! take over, and the bookings move with the request.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use foresee_core::batch::Batch;
use foresee_core::policy::Decision;
use foresee_core::router::RouteError;
use foresee_core::workers::WorkerId;
use foresee_engine::error::ApiError;
use http::{Response, StatusCode};
use http_body_util::BodyExt;
use hyper::body::{Body as _, Frame, Incoming};

use crate::gateway_state::GatewayState;
use crate::log_limit::warn_limited;
use crate::tracked_body::TrackedBody;
use crate::upstream::{UpstreamClient, UpstreamError, UpstreamRequest};
use crate::workers::Worker;

/// Maximum number of workers that may lose the connection over one request. A request that crashes
/// engines must not reach all of them.
const MAX_CONNECTION_LOSSES: usize = 3;

/// Time to wait for connections to be closed when the system can open no more.
const LOCAL_EXHAUSTION_DELAY: Duration = Duration::from_millis(20);

/// Value of `Retry-After` if no worker is available.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Response of a worker of which nothing has been passed on yet.
#[derive(Debug)]
pub(crate) struct UpstreamResponse {
    pub(crate) worker: Arc<Worker>,
    pub(crate) response: Response<Incoming>,
    /// The first frame of a stream, which was read to verify that the worker produces output.
    pub(crate) first_frame: Option<Frame<Bytes>>,
    /// Prompt tokens that the worker has cached according to its KV events; `None` if the response
    /// cannot verify that number.
    pub(crate) predicted_tokens: Option<u32>,
}

/// Attempts to send one request.
#[derive(Debug)]
pub(crate) struct Failover<'a> {
    shared: &'a GatewayState,
    client: &'a UpstreamClient,
    request: &'a UpstreamRequest,
    /// Workers that the request is not sent to: they failed it, or the client excluded them.
    excluded: Vec<WorkerId>,
    /// Number of requests sent so far.
    attempts: u32,
    /// Number of connections that were lost after the request was sent.
    connection_losses: usize,
    /// Time by the gateway's clock until which the request may wait in the queue or for a
    /// connection.
    deadline: Duration,
}

impl<'a> Failover<'a> {
    /// Prepares to send `request`, but not to the workers in `excluded`. The time that the request
    /// may spend in the queue and waiting for a free connection, `first_byte_timeout`, begins now.
    pub(crate) fn new(
        shared: &'a GatewayState,
        client: &'a UpstreamClient,
        request: &'a UpstreamRequest,
        excluded: &[WorkerId],
    ) -> Self {
        Self {
            shared,
            client,
            request,
            excluded: excluded.to_vec(),
            attempts: 0,
            connection_losses: 0,
            deadline: shared.clock.now() + shared.config.first_byte_timeout,
        }
    }

    /// Sends the request to the booked worker. If that fails and another worker can take over,
    /// moves the bookings to the next best worker and sends it there. A 503 counts as a failure,
    /// but is returned if no other worker can take over; a response with any other status is
    /// returned as it is.
    ///
    /// # Errors
    /// Returns the error response for the client if no worker responds or the queue refuses the
    /// request. `batch` keeps its bookings until it is dropped.
    pub(crate) async fn send(&mut self, batch: &mut Batch) -> Result<UpstreamResponse, ApiError> {
        loop {
            self.wait_in_queue(batch).await?;
            let Some(worker) = self.shared.workers.get(batch.worker()) else {
                // The worker was removed after it was chosen.
                self.retry_elsewhere(batch).map_err(no_worker)?;
                continue;
            };
            let limit = self.shared.config.first_byte_timeout;
            self.attempts += 1;
            let attempt = tokio::time::timeout(limit, self.attempt(&worker, batch)).await;
            match attempt.unwrap_or(Err(UpstreamError::TimedOut(limit))) {
                // The worker cannot serve now. If no other worker can, the client gets its response.
                Ok(response) if response.response.status() == StatusCode::SERVICE_UNAVAILABLE => {
                    worker.probe_now.notify_one();
                    if self.retry_elsewhere(batch).is_err() {
                        return Ok(response);
                    }
                }
                Ok(response) => return Ok(response),
                Err(error) => self.recover(error, &worker, batch).await?,
            }
        }
    }

    /// Waits until the router dispatches the request to its worker. Returns immediately if the
    /// router has no queue. Meanwhile the router can move the booking to another worker that is not
    /// excluded. Fails with a 503 if the queue is full or the deadline passes. Records the waiting
    /// time of a dispatched request, also if it was not queued.
    async fn wait_in_queue(&self, batch: &mut Batch) -> Result<(), ApiError> {
        let shared = self.shared;
        if shared.config.router.queue_order.is_none() {
            return Ok(());
        }
        let started = shared.clock.now();
        let mut poll = |context: &mut Context<'_>| {
            batch.poll_dispatch(context, &self.excluded, shared.clock.now())
        };
        if poll_fn(|context| Poll::Ready(poll(context)))
            .await
            .is_pending()
        {
            let limit = shared.config.queue_limit.unwrap_or(usize::MAX);
            if shared.router.queued_requests() > limit {
                return Err(unavailable(format!(
                    "The queue is full: {limit} requests are waiting (--queue-limit). Try again shortly."
                )));
            }
            let max_wait = self.deadline.saturating_sub(started);
            let dispatched = tokio::time::timeout(max_wait, poll_fn(poll)).await;
            dispatched.map_err(|_| {
                let seconds = max_wait.as_secs();
                unavailable(format!(
                    "The request was queued for {seconds} s and no worker could take it."
                ))
            })?;
        }
        let queued_for = shared.clock.now().saturating_sub(started);
        shared
            .metrics
            .queue_duration_seconds
            .observe(queued_for.as_secs_f64());
        Ok(())
    }

    /// Sends the request to `worker` once. Waits for the head of the response and, if it is a
    /// stream, for its first frame: engines send the head before they do anything that can fail.
    /// Announces the request to the worker's event status first. After a lost connection, a new
    /// connection is used. A stream without any frame counts as a lost connection. The caller sets
    /// the time limit.
    async fn attempt(
        &self,
        worker: &Arc<Worker>,
        batch: &mut Batch,
    ) -> Result<UpstreamResponse, UpstreamError> {
        if self.request.full_report_mode {
            worker.events.request_block_listing();
        }
        let predicted_tokens = predicted_cached_tokens(worker, batch);
        if let Some(booking) = batch.booking(0) {
            worker.events.note_sent(booking.prompt());
        }
        let response = if self.connection_losses == 0 {
            self.client.send(worker, self.request).await?
        } else {
            self.client
                .send_on_fresh_connection(worker, self.request)
                .await?
        };
        let (head, mut body) = response.into_parts();
        let mut first_frame = None;
        if TrackedBody::is_stream(&head) && !body.is_end_stream() {
            first_frame = match body.frame().await {
                Some(Ok(frame)) => Some(frame),
                Some(Err(error)) => return Err(UpstreamError::connection_lost(&error)),
                None => {
                    return Err(UpstreamError::ConnectionLost(
                        "the stream was empty".to_owned(),
                    ));
                }
            };
        }
        Ok(UpstreamResponse {
            worker: Arc::clone(worker),
            response: Response::from_parts(head, body),
            first_frame,
            predicted_tokens,
        })
    }

    /// Prepares the next attempt after `error`. If this machine has no free connection, waits and
    /// keeps the worker. Otherwise requests a health check of `worker`, and books `batch` on the
    /// worker of the next attempt. Fails with the client's error response if there is no further
    /// attempt.
    async fn recover(
        &mut self,
        error: UpstreamError,
        worker: &Worker,
        batch: &mut Batch,
    ) -> Result<(), ApiError> {
        if let UpstreamError::LocalExhaustion(_) = error {
            return self.wait_for_local_resources(&error).await;
        }
        let name = &worker.config.name;
        let attempt = self.attempts;
        worker.probe_now.notify_one();
        let recovered = self.retry_after(&error, worker, batch);
        if recovered.is_ok() {
            warn_limited!(
                key: name, worker = %name, attempt, %error,
                "upstream request failed; retrying"
            );
        } else {
            warn_limited!(
                key: name, worker = %name, attempt, %error,
                "upstream request failed; no further attempt"
            );
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
        let name = &worker.config.name;
        match error {
            UpstreamError::Unsendable(_) | UpstreamError::LocalExhaustion(_) => {
                let message = format!("The request {error}.");
                Err(ApiError::bad_request(message, None))
            }
            UpstreamError::TimedOut(_) => Err(ApiError::timed_out(format!(
                "Worker {name} failed: {error}."
            ))),
            UpstreamError::ConnectionRefused(_) => {
                worker.mark_gone();
                self.shared.router.set_healthy(worker.id, false);
                self.retry_elsewhere(batch).map_err(no_worker)
            }
            // The delay may be this machine's, so the health check decides about the worker.
            UpstreamError::Unreachable(_) => self.retry_elsewhere(batch).map_err(no_worker),
            UpstreamError::ConnectionLost(_) => {
                self.connection_losses += 1;
                let may_repeat =
                    self.request.is_repeatable && self.connection_losses < MAX_CONNECTION_LOSSES;
                if may_repeat && self.retry_elsewhere(batch).is_ok() {
                    return Ok(());
                }
                // The worker may have closed an idle connection just as the request was sent. If it
                // is the only worker, it gets a second attempt, on a fresh connection.
                if may_repeat && self.connection_losses == 1 {
                    return Ok(());
                }
                let message =
                    format!("Worker {name} failed ({error}) and no other worker took over.");
                Err(ApiError::bad_gateway(message))
            }
        }
    }

    /// Waits for connections of this process to be closed. The request keeps its booking. Waits for
    /// a fixed time, whether or not a connection was closed. Fails with a 503 once the deadline has
    /// passed.
    async fn wait_for_local_resources(&self, error: &UpstreamError) -> Result<(), ApiError> {
        if self.shared.clock.now() >= self.deadline {
            let message = format!("The router is out of connections: {error}.");
            return Err(unavailable(message));
        }
        tracing::debug!(%error, "out of connections; waiting for others to be closed");
        tokio::time::sleep(LOCAL_EXHAUSTION_DELAY).await;
        Ok(())
    }

    /// Excludes the booked worker and moves the bookings to the best of the others. Counts a retry.
    /// If no other worker can be chosen, fails and the bookings stay where they are, but the worker
    /// remains excluded.
    fn retry_elsewhere(&mut self, batch: &mut Batch) -> Result<(), RouteError> {
        self.excluded.push(batch.worker());
        batch.reroute(&self.excluded, self.shared.clock.now())?;
        self.shared.metrics.retries.inc();
        Ok(())
    }
}

/// Returns the number of prompt tokens that the worker has cached according to its KV events,
/// trusted or not. Returns `None` if the response cannot verify it: the worker has no event source,
/// there are several prompts, or the number depends on requests that run at the same time.
fn predicted_cached_tokens(worker: &Worker, batch: &mut Batch) -> Option<u32> {
    if worker.event_source.borrow().is_none() || batch.prompt_count() > 1 {
        return None;
    }
    let Decision {
        cost, prefix_match, ..
    } = *batch.decision();
    let prompt = batch.booking(0)?.prompt();
    let matched = || prefix_match.cached_blocks.min(prompt.max_reusable_blocks());
    let blocks = worker.events.predict(prompt).unwrap_or_else(matched);
    // Requests with a common prefix find blocks depending on which of them starts first, and a
    // request that waits for memory finds only the blocks that others have not evicted.
    let capacity = worker.capacity_blocks().unwrap_or(u32::MAX);
    let is_certain =
        prefix_match.active_blocks <= blocks && cost.active_blocks <= u64::from(capacity);
    is_certain.then(|| blocks.saturating_mul(prompt.block_size().get()))
}

/// Returns the error response to a request that no worker can take: `model_not_found` if no worker
/// serves the model, and otherwise a 503 with `Retry-After`.
pub(crate) fn no_worker(error: RouteError) -> ApiError {
    match error {
        RouteError::UnknownModel(model) => ApiError::model_not_found(&model),
        RouteError::NoWorker(_) => {
            unavailable(format!("{error}: none is healthy. Try again shortly."))
        }
    }
}

/// Returns a 503 with `Retry-After`.
fn unavailable(message: String) -> ApiError {
    ApiError {
        retry_after: Some(RETRY_AFTER),
        ..ApiError::unavailable(message)
    }
}
