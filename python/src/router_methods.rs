//! The methods of `Router`.

use std::num::NonZeroU32;
use std::path::PathBuf;

use foresee_api::explanation::explanation_json;
use foresee_api::state_file;
use foresee_core::outlier::OutlierConfig;
use foresee_core::policy::NamedPolicy;
use foresee_core::router::{CacheSource, Observed, Router as CoreRouter, RouterConfig};
use foresee_engine::conversion::Dialect;
use pyo3::prelude::*;
use pyo3::{PyTraverseError, PyVisit};
use serde_json::Value;

use crate::booking::Booking;
use crate::clock::Clock;
use crate::errors::Error;
use crate::events::EventMessage;
use crate::fleet::{Fleet, WorkerDescription};
use crate::prompt::{Content, Hints, PromptReader};
use crate::router::Router;
use crate::snapshot;

/// Number of choices after which a request fails whose worker was removed each time.
const MAX_CHOICES: u32 = 8;

/// Reads the name of an engine whose conversion of requests to chats is followed.
///
/// # Errors
/// If the name is unknown.
fn dialect(name: &str) -> Result<Dialect, Error> {
    match name {
        "vllm" => Ok(Dialect::Vllm),
        "sglang" => Ok(Dialect::Sglang),
        other => Err(Error::Choice {
            field: "engine",
            value: other.to_owned(),
            allowed: "vllm, sglang",
        }),
    }
}

/// Reads the number of tokens in a block.
///
/// # Errors
/// If it is 0.
fn block_size(tokens: u32) -> Result<NonZeroU32, Error> {
    NonZeroU32::new(tokens).ok_or_else(|| Error::Choice {
        field: "block_size",
        value: tokens.to_string(),
        allowed: "the numbers from 1 on",
    })
}

// Python's keywords are arguments here.
#[allow(clippy::too_many_arguments)]
#[pymethods]
impl Router {
    #[new]
    #[pyo3(signature = (
        workers = Vec::new(), *, policy = "marginal-delay", block_size = 16, overlap_weight = 1.0,
        ttft_weight = 1.0, temperature = 0.0, seed = 0, eject_failing = true, engine = "vllm",
        tokenizer = None, state = None, clock = None
    ))]
    fn new(
        py: Python<'_>,
        workers: Vec<Bound<'_, PyAny>>,
        policy: &str,
        block_size: u32,
        overlap_weight: f64,
        ttft_weight: f64,
        temperature: f64,
        seed: u64,
        eject_failing: bool,
        engine: &str,
        tokenizer: Option<PathBuf>,
        state: Option<PathBuf>,
        clock: Option<Py<PyAny>>,
    ) -> PyResult<Self> {
        let workers = workers.iter().map(WorkerDescription::read);
        let workers = workers.collect::<PyResult<Vec<_>>>()?;
        let block_size = self::block_size(block_size)?;
        let config = RouterConfig {
            policy: policy.parse::<NamedPolicy>().map_err(Error::from)?,
            overlap_weight,
            ttft_weight,
            temperature,
            block_size,
            // The library has no queue: its caller sends each request at once.
            queue_order: None,
            outlier: match eject_failing {
                true => OutlierConfig::default(),
                false => OutlierConfig::disabled(),
            },
            queue_limit: None,
            seed,
        };
        let dialect = dialect(engine)?;
        let created = py.detach(|| {
            let core = CoreRouter::new(config)?;
            let reader = PromptReader::new(block_size, dialect, tokenizer.as_deref())?;
            let fleet = Fleet::default();
            if let Some(state) = state.filter(|state| state.exists()) {
                state_file::read(&state, &core, &reader.text_ratios)?;
            }
            for worker in workers {
                fleet.add(&core, worker)?;
            }
            Ok::<_, Error>((core, reader, fleet))
        });
        let (core, reader, fleet) = created?;
        Ok(Self {
            core,
            reader,
            fleet,
            clock: Clock::new(clock),
        })
    }

    /// Adds a worker, which can be chosen at once.
    fn add_worker(&self, py: Python<'_>, worker: &Bound<'_, PyAny>) -> PyResult<()> {
        let worker = WorkerDescription::read(worker)?;
        Ok(py.detach(|| self.fleet.add(&self.core, worker))?)
    }

    /// Removes a worker with all its bookings.
    fn remove_worker(&self, py: Python<'_>, worker: &str) -> PyResult<()> {
        Ok(py.detach(|| self.fleet.remove(&self.core, worker))?)
    }

    /// Sets whether a worker can be chosen.
    fn set_healthy(&self, py: Python<'_>, worker: &str, healthy: bool) -> PyResult<()> {
        let worker = self.fleet.get(worker)?;
        py.detach(|| self.core.set_healthy(worker.id, healthy));
        Ok(())
    }

    /// Sets whether a worker only finishes the requests that it has.
    fn set_draining(&self, py: Python<'_>, worker: &str, draining: bool) -> PyResult<()> {
        let worker = self.fleet.get(worker)?;
        py.detach(|| self.core.set_draining(worker.id, draining));
        Ok(())
    }

    /// Sets the number of KV blocks of a worker, in blocks of the router.
    fn set_capacity(&self, py: Python<'_>, worker: &str, blocks: u32) -> PyResult<()> {
        let worker = self.fleet.get(worker)?;
        py.detach(|| self.core.set_capacity(worker.id, blocks));
        Ok(())
    }

    /// Chooses a worker for a request and books the request there.
    #[pyo3(signature = (
        *, tokens = None, text = None, body = None, path = "/v1/chat/completions", model = None,
        max_tokens = None, expected_output_tokens = None, tools = None, stream = None,
        cache_salt = None, exclude = Vec::new(), explain = false
    ))]
    fn route(
        slf: &Bound<'_, Self>,
        py: Python<'_>,
        tokens: Option<&Bound<'_, PyAny>>,
        text: Option<&str>,
        body: Option<&[u8]>,
        path: &str,
        model: Option<&str>,
        max_tokens: Option<u32>,
        expected_output_tokens: Option<u32>,
        tools: Option<bool>,
        stream: Option<bool>,
        cache_salt: Option<&str>,
        exclude: Vec<String>,
        explain: bool,
    ) -> PyResult<Booking> {
        let router = slf.get();
        let content = Content::new(tokens, text, body, path)?;
        let hints = Hints {
            model,
            max_tokens,
            expected_output_tokens,
            has_tools: tools,
            is_streaming: stream,
            cache_salt,
        };
        let time = router.clock.at_call(py)?;
        let fleet = &router.fleet;
        let booked = py.detach(|| {
            let excluded = fleet.ids(&exclude)?;
            let content = router.reader.read(content, &hints, fleet.only_model())?;
            let (request, further) = (content.request(&excluded), &content.sequences.rest);
            let now = time.now();
            let explanation = match explain {
                true => Some(router.core.explain_batch(&request, further, now)?),
                false => None,
            };
            let mut booked = None;
            for _ in 0..MAX_CHOICES {
                let batch = router.core.route_batch(&request, further, now)?;
                // The worker can have been removed since it was chosen.
                booked = fleet.by_id(batch.worker()).map(|worker| (batch, worker));
                if booked.is_some() {
                    break;
                }
            }
            let (batch, worker) = booked.ok_or(Error::RemovedMeanwhile)?;
            if let Some(events) = worker.events.lock().as_mut() {
                events.on_sent(&content.sequences.first);
            }
            Ok::<_, Error>((content, batch, worker, explanation))
        });
        let (content, batch, worker, explanation) = booked?;
        let explanation = explanation.map(|explanation| {
            let explanation = snapshot::to_python(py, &explanation_json(&explanation));
            explanation.map(Bound::unbind)
        });
        let explanation = explanation.transpose()?;
        Ok(Booking::new(
            slf.clone().unbind(),
            content,
            batch,
            worker,
            explanation,
        ))
    }

    /// Returns how a request would be routed now, with the costs on all workers. Books nothing.
    #[pyo3(signature = (
        *, tokens = None, text = None, body = None, path = "/v1/chat/completions", model = None,
        max_tokens = None, expected_output_tokens = None, tools = None, stream = None,
        cache_salt = None, exclude = Vec::new()
    ))]
    fn explain<'py>(
        &self,
        py: Python<'py>,
        tokens: Option<&Bound<'py, PyAny>>,
        text: Option<&str>,
        body: Option<&[u8]>,
        path: &str,
        model: Option<&str>,
        max_tokens: Option<u32>,
        expected_output_tokens: Option<u32>,
        tools: Option<bool>,
        stream: Option<bool>,
        cache_salt: Option<&str>,
        exclude: Vec<String>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let content = Content::new(tokens, text, body, path)?;
        let hints = Hints {
            model,
            max_tokens,
            expected_output_tokens,
            has_tools: tools,
            is_streaming: stream,
            cache_salt,
        };
        let time = self.clock.at_call(py)?;
        let fleet = &self.fleet;
        let explained = py.detach(|| {
            let excluded = fleet.ids(&exclude)?;
            let content = self.reader.read(content, &hints, fleet.only_model())?;
            let (request, further) = (content.request(&excluded), &content.sequences.rest);
            let explanation = self.core.explain_batch(&request, further, time.now())?;
            Ok::<_, Error>(explanation_json(&explanation))
        });
        snapshot::to_python(py, &explained?)
    }

    /// Applies a message of a worker's KV events.
    #[pyo3(signature = (worker, payload, sequence = None, *, replayed = false, skip_missing = false))]
    fn apply_events(
        &self,
        py: Python<'_>,
        worker: &str,
        payload: &[u8],
        sequence: Option<u64>,
        replayed: bool,
        skip_missing: bool,
    ) -> PyResult<Option<u64>> {
        let time = self.clock.at_call(py)?;
        let applied = py.detach(|| {
            let worker = self.fleet.get(worker)?;
            let mut events = worker.events.lock();
            let stream = match events.take() {
                Some(stream) => stream,
                None => worker.new_events(self.reader.block_size)?,
            };
            let message = EventMessage {
                payload,
                sequence,
                skips_missing: skip_missing,
                observed: match replayed {
                    true => Observed::Replayed,
                    false => Observed::Live(time.now()),
                },
            };
            events.insert(stream).apply(&self.core, worker.id, message)
        });
        Ok(applied?)
    }

    /// Forgets a worker's KV events. Its cache is estimated until the next message.
    fn stop_events(&self, py: Python<'_>, worker: &str) -> PyResult<()> {
        let worker = self.fleet.get(worker)?;
        py.detach(|| {
            let mut events = worker.events.lock();
            *events = None;
            self.core
                .set_cache_source(worker.id, CacheSource::Estimated);
        });
        Ok(())
    }

    /// Forgets what a worker has cached, because its engine restarted.
    fn clear_cache(&self, py: Python<'_>, worker: &str) -> PyResult<()> {
        let worker = self.fleet.get(worker)?;
        py.detach(|| self.core.clear_cache(worker.id));
        Ok(())
    }

    /// Returns the state of all workers.
    fn snapshot<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let time = self.clock.at_call(py)?;
        let workers = py.detach(|| {
            let workers = self.core.workers(time.now());
            let described = workers.iter().map(|worker| {
                let fleet_worker = self.fleet.by_id(worker.id);
                let is_exact = fleet_worker.is_some_and(|worker| {
                    let events = worker.events.lock();
                    events.as_ref().is_some_and(|events| events.is_exact())
                });
                snapshot::worker_json(worker, is_exact)
            });
            Value::Array(described.collect())
        });
        snapshot::to_python(py, &workers)
    }

    /// Shows the garbage collector what the router refers to.
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(self.clock.function())
    }

    /// Number of bookings on all workers.
    #[getter]
    fn booking_count(&self, py: Python<'_>) -> usize {
        py.detach(|| self.core.booking_count())
    }

    /// Writes what was learned to a file.
    fn save(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        let written = py.detach(|| state_file::write(&path, &self.core, &self.reader.text_ratios));
        Ok(written.map_err(Error::from)?)
    }

    /// Reads what was learned from a file.
    fn load(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        let read = py.detach(|| {
            if !self.fleet.is_empty() {
                return Err(Error::LoadedLate);
            }
            state_file::read(&path, &self.core, &self.reader.text_ratios)?;
            Ok(())
        });
        Ok(read?)
    }
}
