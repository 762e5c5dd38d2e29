//! Error responses to requests that the gateway cannot place: what is said, with which status, and
//! when the client should try again.
//!
//! A 429 says that there is capacity, but others use it now. A 503 says that no worker can serve. Both
//! say when to try again if waiting helps. No text names a worker or an address.

use std::sync::Arc;
use std::time::Duration;

use foresee_core::router::RouteError;
use foresee_engine::error::ApiError;

use crate::clock::Clock;
use crate::placement::drain_rate::DrainRate;
use crate::workers::model_names::ModelNames;
use crate::workers::registry::WorkerRegistry;

/// State of the workers and of the queue, as error responses describe it.
#[derive(Debug)]
pub(super) struct Refusals {
    pub(super) registry: Arc<WorkerRegistry>,
    /// Names of models that clients can use.
    pub(super) names: Arc<ModelNames>,
    /// Rate at which queued requests are dispatched.
    pub(super) drain_rate: DrainRate,
    pub(super) clock: Clock,
    /// Time between two health checks of a worker.
    pub(super) probe_interval: Duration,
}

impl Refusals {
    /// Returns the response to a request for which no worker was chosen.
    pub(super) fn refusal(&self, error: &RouteError) -> ApiError {
        match error {
            RouteError::UnknownModel(model) => ApiError::model_not_found(model, &self.names.all()),
            RouteError::NoWorker(_) => ApiError::no_worker(
                "No worker that serves this model can take requests now. Try again shortly.",
                Some(self.until_next_check()),
            ),
            RouteError::Backpressure { retry_after } => ApiError::capacity_exceeded(
                "The engines refuse further requests at present. Try again shortly.",
                Some(*retry_after),
            ),
            RouteError::QueueFull { limit } => ApiError::capacity_exceeded(
                format!("The queue is full: {limit} requests are waiting. Try again shortly."),
                Some(self.drain_rate.retry_after(*limit, self.clock.now())),
            ),
            RouteError::TooManyPrompts { .. } | RouteError::BlockSizeMismatch { .. } => {
                ApiError::bad_request(format!("The request cannot be routed: {error}."), None)
            }
        }
    }

    /// Returns the response to a request for which this machine has no free connection.
    pub(super) fn out_of_connections(&self) -> ApiError {
        ApiError::no_worker(
            "The router has no free connection. Try again shortly.",
            Some(self.until_next_check()),
        )
    }

    /// Returns the time until the next health check of any worker, after which a worker may be
    /// available again.
    fn until_next_check(&self) -> Duration {
        let next = self.registry.until_next_check();
        next.unwrap_or(self.probe_interval)
    }
}
