//! From the booking of a request to its dispatch: the wait in the router's queue, and the notes in the
//! worker's event status that precede the sending.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use foresee_core::batch::Batch;
use foresee_core::policy::Decision;
use foresee_core::router::RouteError;
use foresee_core::workers::WorkerId;
use foresee_engine::error::ApiError;

use crate::clock::Clock;
use crate::metrics::{Exemplar, Metrics};
use crate::placement::refusals::Refusals;
use crate::workers::worker::Worker;

/// The wait in the router's queue.
#[derive(Debug)]
pub(super) struct QueueWait {
    pub(super) refusals: Arc<Refusals>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) clock: Clock,
    /// Whether the router has a queue.
    pub(super) has_queue: bool,
}

impl QueueWait {
    /// Waits until the router dispatches the request to its worker. Returns immediately if the
    /// router has no queue. Meanwhile the router can move the booking to another worker that is not
    /// excluded. Fails with a 429 after `max_wait` or once the request has lost its place in a full
    /// queue, and with a 503 once no worker can take the request. Records and returns the waiting
    /// time of a dispatched request, also if it was not queued; `exemplar` names its trace, if it is
    /// sampled.
    pub(super) async fn until_dispatched(
        &self,
        batch: &mut Batch,
        excluded: &[WorkerId],
        max_wait: Duration,
        exemplar: Option<Exemplar>,
    ) -> Result<Duration, ApiError> {
        if !self.has_queue {
            return Ok(Duration::ZERO);
        }
        let started = self.clock.now();
        let mut poll =
            |context: &mut Context<'_>| batch.poll_dispatch(context, excluded, self.clock.now());
        let dispatched = match poll_fn(|context| Poll::Ready(poll(context))).await {
            Poll::Ready(dispatched) => dispatched,
            Poll::Pending => {
                let dispatched = tokio::time::timeout(max_wait, poll_fn(poll)).await;
                let dispatched = dispatched.map_err(|_| {
                    let queued = self.clock.now().saturating_sub(started).as_secs_f64();
                    ApiError::queue_timeout(format!(
                        "The request was queued for {queued:.1} s and no worker could take it."
                    ))
                })?;
                if dispatched.is_ok() {
                    self.refusals.drain_rate.record(self.clock.now());
                }
                dispatched
            }
        };
        dispatched.map_err(|error| {
            if matches!(error, RouteError::QueueFull { .. }) {
                self.metrics.queue_displaced.inc();
            }
            self.refusals.refusal(&error)
        })?;
        let queued_for = self.clock.now().saturating_sub(started);
        self.metrics.observe_queue_time(queued_for, exemplar);
        Ok(queued_for)
    }
}

/// Announces to the event status of `worker` that the batch is about to be sent there. Returns the
/// number of prompt tokens that the worker has cached according to its KV events; `None` if the
/// response cannot verify it. `full_report_mode` says whether the request asks the engine to list
/// cached blocks.
pub(crate) fn announce(worker: &Worker, batch: &mut Batch, full_report_mode: bool) -> Option<u32> {
    if full_report_mode {
        worker.events.request_block_listing();
    }
    let predicted_tokens = predicted_cached_tokens(worker, batch);
    if let Some(booking) = batch.booking(0) {
        worker.events.note_sent(booking.prompt());
    }
    predicted_tokens
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
