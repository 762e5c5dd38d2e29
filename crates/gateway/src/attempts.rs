//! One request, sent until a worker answers: which failures are tried elsewhere, which blame the
//! worker, and when to give up.
//!
//! Until the first byte of an answer nothing has been passed on, so another worker can take
//! over, and what is booked moves with the request.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use foresee_core::batch::Batch;
use foresee_core::choose::Decision;
use foresee_core::fleet::WorkerId;
use foresee_core::router::RouteError;
use foresee_engine::error::ApiError;
use http::{Response, StatusCode};
use http_body_util::BodyExt;
use hyper::body::{Body as _, Frame, Incoming};

use crate::forward::{ForwardError, Forwarder, Message};
use crate::shared::Shared;
use crate::watch::Watched;
use crate::workers::Worker;

/// Workers that may break a connection over one request before it is given up: a request that
/// kills engines must not visit them all.
const MAX_BROKEN: usize = 3;

/// Time for connections to end when no more can be opened.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(20);

const RETRY_AFTER: Duration = Duration::from_secs(1);

/// An answer of which nothing has been passed on yet.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) worker: Arc<Worker>,
    pub(crate) response: Response<Incoming>,
    /// The first piece of a stream, read to see that the worker lives.
    pub(crate) first: Option<Frame<Bytes>>,
    /// Tokens of the prompt that KV events say the worker has cached, if the answer can tell
    /// whether they are right.
    pub(crate) foretold: Option<u32>,
}

/// The attempts to have one message answered.
#[derive(Debug)]
pub(crate) struct Attempts<'a> {
    shared: &'a Shared,
    forwarder: &'a Forwarder,
    message: &'a Message,
    /// Workers that are not asked: they failed, or the client ruled them out.
    excluded: Vec<WorkerId>,
    /// Connections that broke with the request on its way.
    broken: usize,
    deadline: Duration,
}

impl<'a> Attempts<'a> {
    pub(crate) fn new(
        shared: &'a Shared,
        forwarder: &'a Forwarder,
        message: &'a Message,
        ruled_out: &[WorkerId],
    ) -> Self {
        Self {
            shared,
            forwarder,
            message,
            excluded: ruled_out.to_vec(),
            broken: 0,
            deadline: shared.clock.now() + shared.config.first_byte_timeout,
        }
    }

    /// Sends the message to the booked worker and, as long as that helps, to the next best one.
    pub(crate) async fn until_answered(&mut self, batch: &mut Batch) -> Result<Answer, ApiError> {
        loop {
            self.until_sent(batch).await?;
            let Some(worker) = self.shared.workers.get(batch.worker()) else {
                // Removed since it was chosen.
                self.move_on(batch).map_err(no_worker)?;
                continue;
            };
            let limit = self.shared.config.first_byte_timeout;
            let attempt = tokio::time::timeout(limit, self.attempt(&worker, batch)).await;
            match attempt.unwrap_or(Err(ForwardError::TimedOut(limit))) {
                // It cannot serve now. If nobody else can, its answer says why.
                Ok(answer) if answer.response.status() == StatusCode::SERVICE_UNAVAILABLE => {
                    worker.suspect.notify_one();
                    if self.move_on(batch).is_err() {
                        return Ok(answer);
                    }
                }
                Ok(answer) => return Ok(answer),
                Err(error) => self.recover(error, &worker, batch).await?,
            }
        }
    }

    /// Waits until the booked worker has room, where the router lets requests wait.
    async fn until_sent(&self, batch: &mut Batch) -> Result<(), ApiError> {
        let shared = self.shared;
        if shared.config.router.queue.is_none() {
            return Ok(());
        }
        let began = shared.clock.now();
        let mut poll = |context: &mut Context<'_>| {
            batch.poll_sent(context, &self.excluded, shared.clock.now())
        };
        if poll_fn(|context| Poll::Ready(poll(context)))
            .await
            .is_pending()
        {
            let limit = shared.config.queue_limit.unwrap_or(usize::MAX);
            if shared.router.held_requests() > limit {
                return Err(unavailable(format!(
                    "{limit} requests wait already, which is the limit (--queue-limit). Try again shortly."
                )));
            }
            let patience = self.deadline.saturating_sub(began);
            let sent = tokio::time::timeout(patience, poll_fn(poll)).await;
            sent.map_err(|_| {
                let waited = patience.as_secs();
                unavailable(format!("No worker had room within {waited} s."))
            })?;
        }
        let took = shared.clock.now().saturating_sub(began);
        shared.metrics.queue_duration.observe(took.as_secs_f64());
        Ok(())
    }

    /// Waits for the head of the answer and, if it is a stream, for its first piece: engines send
    /// the head before they have done anything that could fail.
    async fn attempt(
        &self,
        worker: &Arc<Worker>,
        batch: &mut Batch,
    ) -> Result<Answer, ForwardError> {
        if self.message.lists_cached {
            worker.events.lists_are_asked_for();
        }
        let foretold = foretold(worker, batch);
        if let Some(booking) = batch.booking(0) {
            worker.events.is_sent(booking.sequence());
        }
        let response = if self.broken == 0 {
            self.forwarder.send(worker, self.message).await?
        } else {
            self.forwarder.send_apart(worker, self.message).await?
        };
        let (head, mut body) = response.into_parts();
        let mut first = None;
        if Watched::is_stream(&head) && !body.is_end_stream() {
            first = match body.frame().await {
                Some(Ok(frame)) => Some(frame),
                Some(Err(error)) => return Err(ForwardError::broken(&error)),
                None => return Err(ForwardError::Broken("the stream was empty".to_owned())),
            };
        }
        Ok(Answer {
            worker: Arc::clone(worker),
            response: Response::from_parts(head, body),
            first,
            foretold,
        })
    }

    /// Prepares the next attempt after `error`, or says why there is none.
    async fn recover(
        &mut self,
        error: ForwardError,
        worker: &Worker,
        batch: &mut Batch,
    ) -> Result<(), ApiError> {
        let name = &worker.config.name;
        if let ForwardError::Exhausted(_) = error {
            return self.wait_for_room(&error).await;
        }
        tracing::warn!(worker = %name, %error, "worker gave no answer");
        worker.suspect.notify_one();
        match error {
            ForwardError::Malformed(_) | ForwardError::Exhausted(_) => {
                let message = format!("The request {error}.");
                Err(ApiError::bad_request(message, None))
            }
            ForwardError::TimedOut(_) => {
                Err(ApiError::timed_out(format!("Worker {name} gave {error}.")))
            }
            ForwardError::Absent(_) => {
                worker.is_absent();
                self.shared.router.set_healthy(worker.id, false);
                self.move_on(batch).map_err(no_worker)
            }
            // Late, perhaps because this machine is busy: the probe shall decide.
            ForwardError::Unreached(_) => self.move_on(batch).map_err(no_worker),
            ForwardError::Broken(_) => {
                self.broken += 1;
                let may_repeat = self.message.may_repeat && self.broken < MAX_BROKEN;
                if may_repeat && self.move_on(batch).is_ok() {
                    return Ok(());
                }
                // A connection kept open may have been closed just then. A lone worker gets a
                // second chance, over a new one.
                if may_repeat && self.broken == 1 {
                    return Ok(());
                }
                let message = format!("Worker {name} failed ({error}) and no other took over.");
                Err(ApiError::bad_gateway(message))
            }
        }
    }

    /// Connections that end make room, and the request keeps its place.
    async fn wait_for_room(&self, error: &ForwardError) -> Result<(), ApiError> {
        if self.shared.clock.now() >= self.deadline {
            let message = format!("The router is out of connections: {error}.");
            return Err(unavailable(message));
        }
        tracing::debug!(%error, "waiting for connections to end");
        tokio::time::sleep(EXHAUSTED_PAUSE).await;
        Ok(())
    }

    /// Moves the bookings to the best worker that has not failed.
    fn move_on(&mut self, batch: &mut Batch) -> Result<(), RouteError> {
        self.excluded.push(batch.worker());
        batch.reroute(&self.excluded, self.shared.clock.now())?;
        self.shared.metrics.retries.inc();
        Ok(())
    }
}

/// Tokens of a single prompt that the worker's KV events say it has cached, if they can be held
/// against what it will report.
fn foretold(worker: &Worker, batch: &mut Batch) -> Option<u32> {
    if worker.event_source.borrow().is_none() || batch.prompts() > 1 {
        return None;
    }
    let Decision { cost, depth, .. } = *batch.decision();
    let prompt = batch.booking(0)?.sequence();
    let believed = || depth.cached.min(prompt.reusable_blocks());
    let blocks = worker.events.foretell(prompt).unwrap_or_else(believed);
    // What a sibling finds depends on which of them starts first, and a request that waits for
    // blocks finds what the others left.
    let capacity = worker.capacity_blocks().unwrap_or(u32::MAX);
    let is_certain = depth.active <= blocks && cost.active_blocks <= u64::from(capacity);
    is_certain.then(|| blocks.saturating_mul(prompt.block_size().get()))
}

/// The answer to a request that no worker can take.
pub(crate) fn no_worker(error: RouteError) -> ApiError {
    match error {
        RouteError::UnknownModel(model) => ApiError::model_not_found(&model),
        RouteError::NoWorker(_) => {
            unavailable(format!("{error}: none is healthy. Try again shortly."))
        }
    }
}

fn unavailable(message: String) -> ApiError {
    ApiError {
        retry_after: Some(RETRY_AFTER),
        ..ApiError::unavailable(message)
    }
}
