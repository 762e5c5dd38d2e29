//! `Booking`: one request on one worker, until it ends.

use std::sync::Arc;
use std::time::Duration;

use foresee_core::batch::Batch;
use foresee_core::booking::Booking as CoreBooking;
use foresee_core::outlier::ExchangeResult;
use foresee_core::policy::Decision;
use foresee_core::sequence::PartialBlock;
use parking_lot::Mutex;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use pyo3::{PyTraverseError, PyVisit};

use crate::errors::Error;
use crate::fleet::FleetWorker;
use crate::prompt::{PlacedContent, token_ids};
use crate::router::Router;
use crate::snapshot;

/// Everything that one routed request occupies on one worker. The end of the `with` block, a call of
/// `release`, or the garbage collector releases it.
#[pyclass(frozen, module = "foresee_router")]
#[derive(Debug)]
pub(crate) struct Booking {
    router: Py<Router>,
    content: ContentFacts,
    explanation: Option<Py<PyAny>>,
    state: Mutex<BookingState>,
}

/// What a booking keeps of the content of its request.
#[derive(Debug)]
struct ContentFacts {
    model: String,
    prompt_tokens: u32,
    text_bytes: usize,
    is_single: bool,
    end: Option<PartialBlock>,
}

/// The booked request, and where it is or was booked.
#[derive(Debug)]
struct BookingState {
    /// `None` once the booking has ended.
    batch: Option<Batch>,
    worker: Arc<FleetWorker>,
    decision: Decision,
}

impl BookingState {
    /// Returns the booked request.
    ///
    /// # Errors
    /// If the booking has ended.
    fn batch(&mut self) -> Result<&mut Batch, Error> {
        self.batch.as_mut().ok_or(Error::BookingEnded)
    }
}

impl Booking {
    /// Returns the handle of a batch that `router` has just booked on `worker` for a request of this
    /// content.
    pub(crate) fn new(
        router: Py<Router>,
        content: PlacedContent,
        batch: Batch,
        worker: Arc<FleetWorker>,
        explanation: Option<Py<PyAny>>,
    ) -> Self {
        let decision = *batch.decision();
        Self {
            router,
            content: ContentFacts {
                model: content.model,
                prompt_tokens: content.sequences.prompt_tokens,
                text_bytes: content.text_bytes,
                is_single: content.is_single,
                end: content.end,
            },
            explanation,
            state: Mutex::new(BookingState {
                batch: Some(batch),
                worker,
                decision,
            }),
        }
    }

    /// Calls `report` with the booked request and the time, without the interpreter's lock.
    fn with_batch<T: Send>(
        &self,
        py: Python<'_>,
        report: impl FnOnce(&mut Batch, Duration) -> Result<T, Error> + Send,
    ) -> PyResult<T> {
        let time = self.router.get().clock.at_call(py)?;
        let reported = py.detach(|| report(self.state.lock().batch()?, time.now()));
        Ok(reported?)
    }

    /// Calls `report` with the booking of a choice and the time, without the interpreter's lock.
    fn with_choice(
        &self,
        py: Python<'_>,
        choice: usize,
        report: impl FnOnce(&mut CoreBooking, Duration) + Send,
    ) -> PyResult<()> {
        self.with_batch(py, |batch, now| {
            let booking = batch.booking(choice).ok_or(Error::Choices(choice))?;
            report(booking, now);
            Ok(())
        })
    }

    /// Takes the booked request out, which ends the booking.
    fn take(&self) -> Option<Batch> {
        self.state.lock().batch.take()
    }
}

#[pymethods]
impl Booking {
    /// Name of the worker.
    #[getter]
    fn worker(&self) -> String {
        self.state.lock().worker.name.clone()
    }

    /// Number of prompt tokens.
    #[getter]
    fn prompt_tokens(&self) -> u32 {
        self.content.prompt_tokens
    }

    /// Number of prompt tokens that the worker is predicted to have cached.
    #[getter]
    fn overlap_tokens(&self) -> u32 {
        let block_size = self.router.get().reader.block_size.get();
        self.overlap_blocks().saturating_mul(block_size)
    }

    /// Number of leading blocks that the worker is predicted to have cached.
    #[getter]
    fn overlap_blocks(&self) -> u32 {
        self.state.lock().decision.cost.overlap_blocks
    }

    /// Costs for which the worker was chosen.
    #[getter]
    fn costs<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let decision = self.state.lock().decision;
        snapshot::costs(py, &decision)
    }

    /// Costs on all workers as they were just before the choice.
    #[getter]
    fn explanation(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        let explanation = self.explanation.as_ref();
        explanation.map(|explanation| explanation.clone_ref(py))
    }

    /// Predicted time to first token, in seconds.
    #[getter]
    fn predicted_ttft(&self, py: Python<'_>) -> PyResult<f64> {
        self.with_batch(py, |batch, _| Ok(batch.predicted_ttft().as_secs_f64()))
    }

    /// Number of outputs that the engine generates, each with a booking of its own.
    #[getter]
    fn choices(&self, py: Python<'_>) -> PyResult<usize> {
        self.with_batch(py, |batch, _| Ok(batch.prompt_count()))
    }

    /// Whether the booking has ended.
    #[getter]
    fn ended(&self) -> bool {
        self.state.lock().batch.is_none()
    }

    /// Reports that the first token of a choice has arrived.
    #[pyo3(signature = (choice = 0))]
    fn first_token(&self, py: Python<'_>, choice: usize) -> PyResult<()> {
        self.with_choice(py, choice, |booking, now| booking.on_first_token(now))
    }

    /// Reports `count` further tokens of a choice, the first one included.
    #[pyo3(signature = (count, choice = 0))]
    fn tokens(&self, py: Python<'_>, count: u32, choice: usize) -> PyResult<()> {
        self.with_choice(py, choice, |booking, now| booking.on_tokens(count, now))
    }

    /// Reports the `usage` of a response.
    #[pyo3(signature = (*, prompt_tokens = None, completion_tokens = None, cached_tokens = None))]
    fn usage(
        &self,
        py: Python<'_>,
        prompt_tokens: Option<u32>,
        completion_tokens: Option<u32>,
        cached_tokens: Option<u32>,
    ) -> PyResult<()> {
        let (content, router) = (&self.content, self.router.get());
        self.with_batch(py, |batch, now| {
            let has_one_choice = batch.prompt_count() == 1;
            if let Some(booking) = batch.booking(0).filter(|_| has_one_choice) {
                if let Some(total) = completion_tokens {
                    booking.set_output_tokens(total, now);
                }
                if let Some(cached) = cached_tokens.filter(|_| content.is_single) {
                    booking.on_cached_tokens(cached);
                }
            }
            if let Some(tokens) = prompt_tokens {
                let ratios = &router.reader.text_ratios;
                ratios.observe(&content.model, content.text_bytes, tokens);
            }
            Ok(())
        })
    }

    /// Sets the output tokens that the worker has cached after a prompt of tokens.
    fn output(&self, py: Python<'_>, tokens: &Bound<'_, PyAny>) -> PyResult<()> {
        let tokens = token_ids("tokens", tokens)?;
        self.with_batch(py, |batch, _| {
            let end = self.content.end.as_ref();
            let (Some(end), Some(booking)) = (end, batch.booking(0)) else {
                return Err(Error::Unsupported(
                    "the prompt was not routed by its tokens, so tokens cannot follow it",
                ));
            };
            let extended = booking.prompt().extended_with_tokens(end, &tokens);
            booking.set_output_sequence(extended);
            Ok(())
        })
    }

    /// Reports how the worker handled the request.
    #[pyo3(signature = (result, *, retry_after = None))]
    fn report(&self, py: Python<'_>, result: &str, retry_after: Option<f64>) -> PyResult<()> {
        let result = exchange_result(result, retry_after)?;
        self.with_batch(py, |batch, now| {
            batch.report(result, now);
            Ok(())
        })
    }

    /// Books the request on another worker.
    #[pyo3(signature = (*, exclude = Vec::new()))]
    fn reroute(&self, py: Python<'_>, exclude: Vec<String>) -> PyResult<()> {
        let time = self.router.get().clock.at_call(py)?;
        let fleet = &self.router.get().fleet;
        let rerouted = py.detach(|| {
            let excluded = fleet.ids(&exclude)?;
            let mut state = self.state.lock();
            let batch = state.batch()?;
            batch.reroute(&excluded, time.now())?;
            let (worker, decision) = (batch.worker(), *batch.decision());
            if let Some(worker) = fleet.by_id(worker) {
                state.worker = worker;
            }
            state.decision = decision;
            Ok::<(), Error>(())
        });
        Ok(rerouted?)
    }

    /// Releases a request that ended normally, and learns from it.
    #[pyo3(signature = (choice = None))]
    fn complete(&self, py: Python<'_>, choice: Option<usize>) -> PyResult<()> {
        if let Some(choice) = choice {
            return self.with_batch(py, |batch, now| {
                batch.booking(choice).ok_or(Error::Choices(choice))?;
                batch.complete_prompt(choice, now);
                Ok(())
            });
        }
        let time = self.router.get().clock.at_call(py)?;
        let completed = py.detach(|| {
            let batch = self.take().ok_or(Error::BookingEnded)?;
            batch.complete(time.now());
            Ok::<(), Error>(())
        });
        Ok(completed?)
    }

    /// Releases the request. Has no effect if it has ended.
    fn release(&self, py: Python<'_>) {
        py.detach(|| drop(self.take()));
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    /// Completes the request or, after an exception, releases it.
    fn __exit__(
        &self,
        py: Python<'_>,
        exception_type: &Bound<'_, PyAny>,
        _exception: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) -> PyResult<bool> {
        if exception_type.is_none() && !self.ended() {
            self.complete(py, None)?;
        } else {
            self.release(py);
        }
        Ok(false)
    }

    /// Shows the garbage collector what the booking refers to.
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.router)?;
        visit.call(&self.explanation)
    }

    fn __repr__(&self) -> String {
        let state = self.state.lock();
        let ended = if state.batch.is_none() { ", ended" } else { "" };
        format!(
            "<Booking of {} tokens on '{}'{ended}>",
            self.content.prompt_tokens, state.worker.name
        )
    }
}

/// Reads the result of an exchange by its name.
///
/// # Errors
/// If the name is unknown, or `retry_after` is not a number of seconds.
fn exchange_result(name: &str, retry_after: Option<f64>) -> Result<ExchangeResult, Error> {
    match name {
        "success" => Ok(ExchangeResult::Success),
        "failure" => Ok(ExchangeResult::Failure),
        "soft_failure" => Ok(ExchangeResult::SoftFailure),
        "backpressure" => {
            let seconds = |value: f64| {
                let invalid = |_| Error::Seconds {
                    field: "retry_after",
                    value,
                };
                Duration::try_from_secs_f64(value).map_err(invalid)
            };
            let retry_after = retry_after.map(seconds).transpose()?;
            Ok(ExchangeResult::Backpressure { retry_after })
        }
        other => Err(Error::Choice {
            field: "result",
            value: other.to_owned(),
            allowed: "success, failure, soft_failure, backpressure",
        }),
    }
}
