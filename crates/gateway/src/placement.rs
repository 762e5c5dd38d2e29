//! Placement of a request: read its body, tokenise and hash its prompts, choose a worker and book the
//! request there, observe the response, release the booking.
//!
//! Nothing here knows sockets or HTTP: a front end passes bytes in, sends the request itself, and
//! passes bytes of the response, or reports, in. All front ends use it in the same way:
//!
//! ```text
//! let mut parsed = placement.read(endpoint, form, body, session).await?; // read, tokenise, hash
//! parsed.hints = hints;                                             // said beside the body
//! placement.apply_affinity(&mut parsed, response_id);
//! let mut placed = placement.place(endpoint, parsed, arrived_at)?;  // choose and book
//! placement.wait_in_queue(&mut placed.batch, &excluded, max_wait, None).await?;
//! let predicted = announce(&worker, &mut placed.batch, full_report_mode);
//! // … the front end sends the request to the worker, and its response begins …
//! let context = placement.begin_response(placed, worker, predicted, request_id);
//! let mut observer = ResponseObserver::new(form, outcome, context);
//! observer.on_data(&data);                                          // or `on_report`
//! observer.end();                                                   // or `fail`, or a mere drop
//! ```
//!
//! Whatever happens, dropping the placed request or the observer releases everything.

pub(crate) mod affinity;
mod cache_feedback;
mod completion_log;
pub(crate) mod decision_log;
pub(crate) mod dispatch;
mod drain_rate;
mod dry_run;
pub(crate) mod ended_requests;
pub(crate) mod hints;
pub(crate) mod parsed_request;
pub(crate) mod placed_request;
mod reader;
mod refusals;
pub(crate) mod request_context;
pub(crate) mod response_observer;
pub(crate) mod tokenization;

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use foresee_core::batch::Batch;
use foresee_core::router::{Explanation, RouteError, Router};
use foresee_core::text_ratios::TextRatios;
use foresee_core::workers::WorkerId;
use foresee_engine::error::ApiError;
use foresee_engine::request::Endpoint;

use crate::clock::Clock;
use crate::fleet_demand::FleetDemand;
use crate::metrics::{Exemplar, Metrics};
use crate::parse_pool::ParsePool;
use crate::recorder::Recorder;
use crate::workers::model_names::ModelNames;
use crate::workers::registry::WorkerRegistry;
use crate::workers::worker::Worker;
use affinity::Affinity;
use decision_log::DecisionLog;
use dispatch::QueueWait;
use drain_rate::DrainRate;
use dry_run::DryRun;
use ended_requests::EndedRequests;
use parsed_request::{BodyForm, ParsedRequest};
use placed_request::PlacedRequest;
use reader::RequestReader;
use refusals::Refusals;
use request_context::{Observation, RequestContext};
use tokenization::PromptTokenizer;

/// Settings of placement, and what it reads and writes beside requests.
#[derive(Debug)]
pub(crate) struct PlacementConfig {
    /// The router's block size.
    pub(crate) block_size: NonZeroU32,
    /// Whether the router has a queue.
    pub(crate) has_queue: bool,
    /// Maximum size of a decompressed body.
    pub(crate) max_body_bytes: usize,
    /// Whether workers share cached blocks between requests, unless their descriptions say otherwise.
    pub(crate) prefix_caching: bool,
    /// Whether clients see the names of workers in error messages.
    pub(crate) exposes_workers: bool,
    /// Time between two health checks of a worker.
    pub(crate) probe_interval: Duration,
    /// Tokenizer of `--tokenizer`; without one, prompts are matched as text.
    pub(crate) tokenizer: Option<PromptTokenizer>,
    /// Whether decisions are compared with those of the least predicted delay.
    pub(crate) dry_run: bool,
    /// Writer of `--record`.
    pub(crate) recorder: Option<Arc<Recorder>>,
    /// Load of the fleet, for autoscaling.
    pub(crate) demand: Arc<FleetDemand>,
    /// Log of decisions, if the dashboard shows them.
    pub(crate) decision_log: Option<Arc<DecisionLog>>,
    /// Requests that ended, if the dashboard shows them.
    pub(crate) ended_requests: Option<Arc<EndedRequests>>,
}

/// Places requests on the workers of one router.
#[derive(Debug)]
pub(crate) struct Placement {
    router: Router,
    registry: Arc<WorkerRegistry>,
    metrics: Arc<Metrics>,
    clock: Clock,
    reader: Arc<RequestReader>,
    refusals: Arc<Refusals>,
    queue: QueueWait,
    observation: Arc<Observation>,
    /// Comparison of the decisions, if they are compared.
    dry_run: Option<DryRun>,
    /// Log of decisions, if they are logged.
    decision_log: Option<Arc<DecisionLog>>,
}

impl Placement {
    /// Creates the placement of requests on the workers of `router`, which `registry` describes.
    pub(crate) fn new(
        config: PlacementConfig,
        router: Router,
        registry: Arc<WorkerRegistry>,
        names: Arc<ModelNames>,
        parse_pool: Arc<ParsePool>,
        metrics: Arc<Metrics>,
        clock: Clock,
    ) -> Self {
        let tokenizer = config.tokenizer.map(Arc::new);
        let text_ratios = Arc::new(TextRatios::default());
        let affinity = Arc::new(Affinity::default());
        let refusals = Arc::new(Refusals {
            registry: Arc::clone(&registry),
            names: Arc::clone(&names),
            drain_rate: DrainRate::default(),
            clock,
            probe_interval: config.probe_interval,
        });
        let dry_run = config.dry_run.then(|| DryRun {
            metrics: Arc::clone(&metrics),
        });
        Self {
            registry: Arc::clone(&registry),
            dry_run,
            decision_log: config.decision_log,
            reader: Arc::new(RequestReader {
                registry: Arc::clone(&registry),
                names,
                affinity: Arc::clone(&affinity),
                clock,
                tokenizer: tokenizer.clone(),
                text_ratios: Arc::clone(&text_ratios),
                parse_pool: Arc::clone(&parse_pool),
                metrics: Arc::clone(&metrics),
                block_size: config.block_size,
                max_body_bytes: config.max_body_bytes,
            }),
            queue: QueueWait {
                refusals: Arc::clone(&refusals),
                metrics: Arc::clone(&metrics),
                clock,
                has_queue: config.has_queue,
            },
            observation: Arc::new(Observation {
                router: router.clone(),
                clock,
                metrics: Arc::clone(&metrics),
                parse_pool,
                affinity,
                text_ratios,
                tokenizer,
                recorder: config.recorder,
                demand: config.demand,
                ended_requests: config.ended_requests,
                block_size: config.block_size,
                prefix_caching: config.prefix_caching,
                exposes_workers: config.exposes_workers,
            }),
            router,
            metrics,
            clock,
            refusals,
        }
    }

    /// Reads a request's body as `form` says how: parses JSON, and takes only the model's name from a
    /// multipart body. A request without a body is routed by load alone. The hints of the result are
    /// empty. `session` is that of the request beside its body, and takes precedence over that of the
    /// body.
    ///
    /// # Errors
    /// Returns the error response for the client if the body is invalid, its content coding is not
    /// supported, or the parse pool is overloaded.
    pub(crate) async fn read(
        &self,
        endpoint: Endpoint,
        form: BodyForm,
        body: Bytes,
        session: Option<&[u8]>,
    ) -> Result<ParsedRequest, ApiError> {
        self.reader.read(endpoint, form, body, session).await
    }

    /// Sets the worker that a parsed request has to go to, and the one that it prefers, by what
    /// workers remember of earlier requests: see [`Affinity::apply`].
    pub(crate) fn apply_affinity(&self, parsed: &mut ParsedRequest, response_id: Option<&str>) {
        let affinity = &self.observation.affinity;
        affinity.apply(parsed, response_id, self.clock.now());
        // The worker can have been removed; the engine that gets the request then responds for itself.
        let is_present = |id: &WorkerId| self.registry.get(*id).is_some();
        parsed.only_worker = parsed.only_worker.filter(is_present);
        parsed.preferred_worker = parsed.preferred_worker.filter(is_present);
    }

    /// Returns the tokens of a request: all its prompts, and the outputs that are expected of it.
    pub(crate) fn expected_tokens(&self, endpoint: Endpoint, parsed: &ParsedRequest) -> u64 {
        let prompt = u64::from(parsed.sequences.prompt_tokens);
        if !endpoint.generates() {
            return prompt;
        }
        let outputs = 1 + parsed.sequences.rest.len() as u64;
        let output = self.router.expected_output_tokens(&parsed.request());
        prompt + outputs * u64::from(output)
    }

    /// Returns how the request would be routed now, with the costs of all candidates. Books nothing.
    /// If no worker can be chosen, fails with the response for the client.
    pub(crate) fn explain(&self, parsed: &ParsedRequest) -> Result<Explanation, ApiError> {
        let now = self.clock.now();
        self.router
            .explain_batch(&parsed.request(), &parsed.sequences.rest, now)
            .map_err(|error| self.refusal(&error))
    }

    /// Chooses a worker and books the request there, all prompts and outputs as one batch. With a
    /// queue, the request is not dispatched yet: [`wait_in_queue`](Self::wait_in_queue) waits for
    /// that. Counts the prompt tokens and the duration of the decision. If no worker can be chosen,
    /// fails with the response for the client, and books and counts nothing. `arrived_at` is a time
    /// of the gateway's clock.
    pub(crate) fn place(
        &self,
        endpoint: Endpoint,
        parsed: ParsedRequest,
        arrived_at: Duration,
    ) -> Result<PlacedRequest, ApiError> {
        self.observation.demand.observe_arrival(arrived_at);
        let log = self.decision_log.as_ref();
        let log = log.filter(|log| log.is_due(&parsed, self.clock.now()));
        let is_explained = self.dry_run.is_some() || log.is_some();
        // Without a candidate, the decision fails as well.
        let explanation = is_explained.then(|| self.explain(&parsed).ok()).flatten();
        let started = self.clock.now();
        let batch = self
            .router
            .route_batch(&parsed.request(), &parsed.sequences.rest, started)
            .map_err(|error| self.refusal(&error))?;
        let duration = self.clock.now().saturating_sub(started);
        if let Some((dry_run, explanation)) = self.dry_run.as_ref().zip(explanation.as_ref()) {
            dry_run.compare(explanation, batch.worker());
        }
        let decision = log.zip(explanation).map(|(log, explanation)| {
            let output_tokens = self.router.expected_output_tokens(&parsed.request());
            log.record(&parsed, explanation, &batch, output_tokens, started)
        });
        let metrics = &self.metrics;
        metrics
            .decision_duration_seconds
            .observe(duration.as_secs_f64());
        metrics
            .prompt_tokens
            .inc_by(parsed.sequences.prompt_tokens.into());
        Ok(PlacedRequest {
            endpoint,
            arrived_at,
            parsed,
            batch,
            key: None,
            access: None,
            trace: None,
            decided_in: duration,
            queued_for: Duration::ZERO,
            decision,
        })
    }

    /// Waits until the router dispatches the request to its worker. Returns immediately if the
    /// router has no queue. Meanwhile the router can move the booking to another worker that is not
    /// excluded. Fails with a 429 after `max_wait`, and with a 503 once no worker can take the
    /// request. Returns the time that it waited; `exemplar` names its trace, if it is sampled.
    pub(crate) async fn wait_in_queue(
        &self,
        batch: &mut Batch,
        excluded: &[WorkerId],
        max_wait: Duration,
        exemplar: Option<Exemplar>,
    ) -> Result<Duration, ApiError> {
        self.queue
            .until_dispatched(batch, excluded, max_wait, exemplar)
            .await
    }

    /// Returns what the observation of the response of `worker` needs: see
    /// [`PlacedRequest::into_context`].
    pub(crate) fn begin_response(
        &self,
        placed: PlacedRequest,
        worker: Arc<Worker>,
        predicted_tokens: Option<u32>,
        request_id: String,
    ) -> RequestContext {
        placed.into_context(&self.observation, worker, predicted_tokens, request_id)
    }

    /// Returns the load of the fleet.
    pub(crate) fn demand(&self) -> &FleetDemand {
        &self.observation.demand
    }

    /// Returns the learned bytes per token of each model.
    pub(crate) fn text_ratios(&self) -> &TextRatios {
        &self.observation.text_ratios
    }

    /// Returns whether requests can be queued in the router.
    pub(crate) fn has_queue(&self) -> bool {
        self.queue.has_queue
    }

    /// Returns the response to a request for which no worker was chosen.
    pub(crate) fn refusal(&self, error: &RouteError) -> ApiError {
        self.refusals.refusal(error)
    }

    /// Returns the response to a request for which this machine has no free connection.
    pub(crate) fn out_of_connections(&self) -> ApiError {
        self.refusals.out_of_connections()
    }
}
