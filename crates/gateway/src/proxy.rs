//! Public listener: finds what a request calls, routes it, sends it to a worker and passes the response
//! on.
//!
//! Only inference paths reach a worker: those of the [path table](foresee_engine::paths), and those
//! that the operator adds. Every other path is a 404, so that the control paths of engines are never
//! reachable.

use std::sync::Arc;
use std::time::Duration;

use foresee_api::headers as api_headers;
use foresee_engine::error::ApiError;
use foresee_engine::paths::{self, BodyFormat};
use foresee_engine::request::Endpoint;
use http::header::{ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, UPGRADE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response};
use http_body_util::Either;
use hyper::body::{Body as _, Incoming};
use opentelemetry::KeyValue;

use crate::access_log::{AccessEntry, AccessLog, PlacedFields};
use crate::client_headers::ClientHeaders;
use crate::clock::Clock;
use crate::connection_state::{ConnectionHandle, Peer};
use crate::failover::{Failover, FailoverContext, UpstreamResponse};
use crate::keys::{Key, KeyRing, remove_keys};
use crate::metrics::{Metrics, Outcome};
use crate::model_renaming::RenamedBody;
use crate::own_responses::OwnResponses;
use crate::pass_through::PassThroughPath;
use crate::placement::Placement;
use crate::placement::parsed_request::BodyForm;
use crate::placement::placed_request::PlacedRequest;
use crate::placement::response_observer::ResponseForm;
use crate::reply::{self, Body};
use crate::request_body::{RequestBodies, RequestBody};
use crate::request_ids::RequestIds;
use crate::shutdown::{SHUTTING_DOWN, shutting_down};
use crate::traces::Traces;
use crate::traces::request_trace::RequestTrace;
use crate::tracked_body::{ResponseLimits, TrackedBody, form_of_body};
use crate::upstream::{UpstreamClient, UpstreamRequest, strip_hop_by_hop};

/// Request header with a session of the client, whose requests share a worker.
const SESSION_HEADER: &str = "x-session-id";

/// Inference that a request calls.
#[derive(Debug)]
struct Call {
    endpoint: Endpoint,
    body: BodyFormat,
    /// Whether the response is JSON, or a stream of it, that is observed for output and usage. Streams of
    /// other calls are observed as far as they can be read.
    is_observed: bool,
    /// Whether the request computes a result and changes nothing else, so that it may be sent again.
    is_repeatable: bool,
    /// Id of the stored response that the path names.
    response_id: Option<String>,
    /// Path that was matched, without parts that vary; `None` for the operator's paths.
    route: Option<&'static str>,
}

/// Findings about a request that its response needs.
#[derive(Debug)]
struct RequestNotes {
    /// Key of the request, if it has one.
    key: Option<Arc<Key>>,
    /// Line of the access log, if there is one.
    entry: Option<AccessEntry>,
    /// Spans of the request, if it is sampled.
    trace: Option<Box<RequestTrace>>,
}

impl RequestNotes {
    /// Ends the line and the spans of a request that no worker's response has taken over.
    fn respond(&mut self, outcome: Outcome, status: u16, code: Option<&'static str>) {
        if let Some(mut entry) = self.entry.take() {
            entry.respond(outcome, status, code);
        }
        if let Some(mut trace) = self.trace.take() {
            trace.respond(outcome, status, code);
        }
    }
}

/// Guard of a request without a response. Dropping it while it has metrics counts the request as one
/// whose client left.
#[derive(Debug)]
struct OutcomeGuard<'m>(Option<&'m Metrics>);

impl Drop for OutcomeGuard<'_> {
    fn drop(&mut self) {
        if let Some(metrics) = self.0 {
            metrics.record_outcome(Outcome::ClientLeft);
        }
    }
}

/// The proxy: a front end on [`placement`](crate::placement) that sends the requests of OpenAI's and
/// other inference APIs, and passes the responses on.
#[derive(Debug)]
pub(crate) struct Proxy {
    pub(crate) placement: Arc<Placement>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) clock: Clock,
    pub(crate) own_responses: OwnResponses,
    pub(crate) client_headers: ClientHeaders,
    pub(crate) failover: FailoverContext,
    /// Keys of clients.
    pub(crate) keys: Arc<KeyRing>,
    /// Writer of the access log, if there is one.
    pub(crate) access_log: Option<Arc<AccessLog>>,
    /// Source of spans, if there is a collector.
    pub(crate) traces: Option<Arc<Traces>>,
    /// Name of the policy, for spans.
    pub(crate) policy: Arc<str>,
    /// Reader of request bodies, which counts their bytes.
    pub(crate) bodies: Arc<RequestBodies>,
    pub(crate) request_ids: Arc<RequestIds>,
    pub(crate) limits: Arc<ResponseLimits>,
    /// Paths that reach a worker in addition to the inference paths.
    pub(crate) pass_through: Vec<PassThroughPath>,
    /// Maximum time in which a worker accepts a connection.
    pub(crate) connect_timeout: Duration,
    /// Whether clients see the names of workers in a response header.
    pub(crate) exposes_workers: bool,
}

impl Proxy {
    /// Creates the client for the requests of one I/O thread.
    pub(crate) fn new_client(&self) -> UpstreamClient {
        UpstreamClient::new(self.connect_timeout)
    }

    /// Handles one request to the public API. `client` is that of the I/O thread. Errors become
    /// responses in the shape of the API that the request called. Counts the outcome of each error
    /// response, and of a client that leaves before its response begins; [`TrackedBody`] counts the
    /// responses of workers. The response has the `x-request-id` of the worker, of the client or a
    /// new one.
    pub(crate) async fn handle(
        self: Arc<Self>,
        client: Arc<UpstreamClient>,
        mut request: Request<Incoming>,
    ) -> Response<Body> {
        let request_id = self.request_ids.next();
        let client_request_id = request.headers().get("x-request-id").cloned();
        let call = self.find_call(&request);
        let endpoint = call.as_ref().map_or(Endpoint::Other, |call| call.endpoint);
        let mut guard = OutcomeGuard(Some(&self.metrics));
        let trace = self.traces.as_ref().and_then(|traces| {
            let call = call.as_ref().ok();
            traces.begin(&mut request, call.and_then(|call| call.route))
        });
        let log = self.access_log.as_ref();
        let mut entry = log.map(|log| log.begin(&request, &request_id));
        if let (Some(entry), Some(trace)) = (&mut entry, &trace) {
            entry.set_trace(trace.trace_id(), trace.span_id());
        }
        let mut notes = RequestNotes {
            key: None,
            entry,
            trace,
        };
        let connection = request.extensions().get::<ConnectionHandle>();
        let result = if connection.is_some_and(ConnectionHandle::is_too_late) {
            Err(shutting_down())
        } else {
            let handled = self.try_handle(&client, request, call, request_id.clone(), &mut notes);
            self.limits.shutdown.unless_aborting(handled).await
        };
        guard.0 = None;
        let mut response = match result {
            Ok(response) => {
                notes.respond(Outcome::Ok, response.status().as_u16(), None);
                response
            }
            Err(error) => {
                let outcome = match error.status {
                    _ if error.code == Some(SHUTTING_DOWN) => Outcome::ShutDown,
                    503 => Outcome::Unavailable,
                    500.. if error.status != 501 => Outcome::WorkerFailed,
                    _ => Outcome::Refused,
                };
                self.metrics.record_outcome(outcome);
                notes.respond(outcome, error.status, error.code);
                reply::error(endpoint, &error)
            }
        };
        let headers = response.headers_mut();
        if let Some(key) = notes.key {
            self.keys.add_limit_headers(&key, headers);
        }
        let sent_id = headers
            .entry("x-request-id")
            .or_insert(client_request_id.unwrap_or(request_id))
            .clone();
        // Anthropic's clients read the id from this header.
        if matches!(endpoint, Endpoint::Messages | Endpoint::MessagesCountTokens) {
            headers.entry("request-id").or_insert(sent_id);
        }
        response
    }

    /// Responds to the model list and to `GET /health` itself, and books and sends every request
    /// that calls an inference path. `call` is the inference that the path names, and `request_id` is
    /// used unless the client sent an id. Adds to `notes` what it finds out; their entry of the log
    /// goes to the response of a worker.
    ///
    /// # Errors
    /// Returns the error response for the client: the key is refused or has reached a limit, the path
    /// is not served, the body or a hint is invalid, or no worker responded.
    async fn try_handle(
        &self,
        client: &UpstreamClient,
        request: Request<Incoming>,
        call: Result<Call, ApiError>,
        request_id: HeaderValue,
        notes: &mut RequestNotes,
    ) -> Result<Response<Body>, ApiError> {
        let arrived_at = self.clock.now();
        let (mut head, body) = request.into_parts();
        refuse_upgrade(&head.headers)?;
        if !is_health_check(&head) {
            notes.key = self.keys.authenticate(&head.headers)?;
        }
        let RequestNotes { key, entry, trace } = notes;
        let allowed = key.as_deref();
        if let (Some(entry), Some(key)) = (entry.as_mut(), allowed) {
            entry.set_key(&key.config.id, &key.config.tenant);
        }
        if let Some(response) = self.own_responses.respond(&head, allowed)? {
            return Ok(response);
        }
        let call = call?;
        let started = key.clone().map(|key| self.keys.start(key));
        let mut key_guard = started.transpose()?;
        // The permit lives as long as the body: until the response begins.
        let RequestBody {
            bytes: body,
            mut permit,
        } = self.bodies.read(&head, body).await?;
        let form = body_form(&call, &head.headers);
        let session = session_of(&head.headers);
        let reading_since = self.clock.now();
        let mut parsed = self
            .placement
            .read(call.endpoint, form, body.clone(), session)
            .await?;
        if let Some(rewrite) = &parsed.rewrite {
            permit.extend_to(body.len() + rewrite.body.len())?;
        }
        if let Some(trace) = trace {
            let lasted = self.clock.now().saturating_sub(reading_since);
            trace.add_step("foresee.tokenize", lasted, Vec::new());
            trace.describe_calls(call.endpoint, &parsed, &body);
        }
        if let Some(guard) = &mut key_guard {
            // A request for a stored response names no model.
            if call.response_id.is_none() {
                self.keys
                    .check_model(&guard.key, parsed.requested_model())?;
            }
            let tokens = self.placement.expected_tokens(call.endpoint, &parsed);
            self.keys.reserve_tokens(guard, tokens as f64)?;
        }
        parsed.hints = self.client_headers.hints(&head.headers, allowed)?;
        if let Some(entry) = entry.as_mut() {
            entry.set_body(body.len(), &parsed);
        }
        self.placement
            .apply_affinity(&mut parsed, call.response_id.as_deref());
        let mut placed = self.placement.place(call.endpoint, parsed, arrived_at)?;
        placed.key = key_guard;
        if let Some(trace) = trace {
            self.trace_decision(trace, &placed);
        }
        let deadlines = placed.parsed.hints.deadlines;
        if let Some(max_wait) = deadlines.first_byte {
            let elapsed = self.clock.now().saturating_sub(arrived_at);
            let result = placed.check_deadline(max_wait.saturating_sub(elapsed));
            result.inspect_err(|_| {
                self.metrics.deadlines_unreachable.inc();
            })?;
        }
        let peer = head.extensions.get::<Peer>().copied();
        // Before the router adds its own headers, which a client could list in `Connection`.
        strip_hop_by_hop(&mut head.headers);
        self.client_headers
            .forward(&mut head.headers, peer, call.is_observed);
        if allowed.is_some() {
            remove_keys(&mut head.headers);
        }
        let body = match &placed.parsed.rewrite {
            Some(rewrite) => {
                // The new body is not compressed, and the response's model is renamed.
                for header in [CONTENT_ENCODING, CONTENT_LENGTH, ACCEPT_ENCODING] {
                    head.headers.remove(header);
                }
                rewrite.body.clone()
            }
            None => body.clone(),
        };
        let mut upstream_request = UpstreamRequest::new(head, body, request_id, call.is_repeatable);
        upstream_request.full_report_mode = placed.parsed.full_report_mode;
        upstream_request.expects_result = call.is_observed;
        upstream_request.needs_worker_key = allowed.is_some();
        let excluded = &placed.parsed.hints.excluded_workers;
        let mut failover = Failover::new(
            &self.failover,
            client,
            &upstream_request,
            excluded,
            arrived_at,
            deadlines,
            trace.as_deref_mut(),
        );
        let response = failover.send(&mut placed.batch).await;
        let attempts = failover.attempts();
        placed.queued_for = failover.queued_for();
        let response = response.inspect_err(|_| {
            if let Some(entry) = entry.as_mut().filter(|_| attempts > 0) {
                let worker = self.failover.registry.get(placed.batch.worker());
                let name = worker.as_ref().map(|worker| worker.config.name.as_str());
                entry.set_failed(attempts, name);
            }
        })?;
        let status = response.response.status().as_u16();
        placed.trace = trace.take();
        if let Some(trace) = &mut placed.trace {
            trace.set_status(status);
        }
        let request_id = upstream_request.request_id();
        placed.access = entry.take().map(|mut entry| {
            entry.set_placed(&PlacedFields {
                worker: &response.worker.config.name,
                status,
                attempts,
                predicted_cached_tokens: placed.overlap_tokens(),
                predicted_ttft: placed.batch.predicted_ttft(),
                queued_for: placed.queued_for,
                decided_in: placed.decided_in,
            });
            Box::new(entry)
        });
        Ok(self.pass_through(response, placed, &request_id))
    }

    /// Adds the span of the decision to the trace of a sampled request.
    fn trace_decision(&self, trace: &mut RequestTrace, placed: &PlacedRequest) {
        let worker = self.failover.registry.get(placed.batch.worker());
        let decision = placed.batch.decision();
        let block_size = placed.parsed.sequences.first.block_size().get();
        let best_tokens = decision.best_overlap_blocks.saturating_mul(block_size);
        let prompt_tokens = placed.parsed.sequences.prompt_tokens;
        let mut attributes = vec![
            KeyValue::new("foresee.policy", Arc::clone(&self.policy)),
            KeyValue::new("foresee.prompt_tokens", i64::from(prompt_tokens)),
            KeyValue::new("foresee.overlap_tokens", i64::from(placed.overlap_tokens())),
            KeyValue::new("foresee.best_overlap_tokens", i64::from(best_tokens)),
            KeyValue::new(
                "foresee.predicted_ttft",
                placed.batch.predicted_ttft().as_secs_f64(),
            ),
        ];
        let name = worker.map(|worker| worker.config.name.clone());
        attributes.extend(name.map(|name| KeyValue::new("foresee.worker", name)));
        trace.add_step("foresee.route", placed.decided_in, attributes);
    }

    /// Returns the inference that a request calls.
    ///
    /// # Errors
    /// Fails with a 404 if the path is neither in the path table nor one of the operator's, and with
    /// a 405 if only the method is not.
    fn find_call(&self, request: &Request<Incoming>) -> Result<Call, ApiError> {
        let (method, path) = (request.method().as_str(), request.uri().path());
        if let Some(found) = paths::find(method, path) {
            return Ok(Call {
                endpoint: found.endpoint,
                body: found.body,
                is_observed: found.body == BodyFormat::Json,
                is_repeatable: found.is_repeatable,
                response_id: found.response_id.map(str::to_owned),
                route: Some(found.route),
            });
        }
        if self.pass_through.iter().any(|added| added.matches(path)) {
            return Ok(Call {
                endpoint: Endpoint::Other,
                body: BodyFormat::None,
                is_observed: false,
                is_repeatable: false,
                response_id: None,
                route: None,
            });
        }
        Err(match paths::allowed_method(path) {
            Some(allowed) => ApiError::method_not_allowed(method, path, allowed),
            None => ApiError::path_not_found(method, path),
        })
    }

    /// Returns the client's response: the worker's, with the gateway's headers and a body that
    /// reports its tokens to the bookings. Removes hop-by-hop headers and counts the predicted
    /// overlap. `request_id` is used only in log lines.
    fn pass_through(
        &self,
        upstream: UpstreamResponse,
        mut placed: PlacedRequest,
        request_id: &HeaderValue,
    ) -> Response<Body> {
        let (mut head, body) = upstream.response.into_parts();
        strip_hop_by_hop(&mut head.headers);
        let headers = &mut head.headers;
        let has_body = upstream.first_frame.is_some() || !body.is_end_stream();
        if has_body && form_of_body(headers) == ResponseForm::Events {
            // A stream that fails gets an error event, which would be cut off at this length.
            headers.remove(CONTENT_LENGTH);
        }
        headers.remove(api_headers::WORKER);
        if self.exposes_workers {
            headers.insert(api_headers::WORKER, upstream.worker.header.clone());
        }
        headers.insert(api_headers::OVERLAP_TOKENS, placed.overlap_tokens().into());
        let request_id = String::from_utf8_lossy(request_id.as_bytes()).into_owned();
        let rewrite = placed.parsed.rewrite.take();
        let model = rewrite.as_ref().map(|_| placed.parsed.model.clone());
        let context = self.placement.begin_response(
            placed,
            upstream.worker,
            upstream.predicted_tokens,
            request_id,
        );
        let body = TrackedBody::new(&head, body, upstream.first_frame, context, &self.limits);
        let body = match rewrite.zip(model) {
            Some((rewrite, model)) => RenamedBody::renamed(&mut head, body, &model, &rewrite.alias),
            None => RenamedBody::unchanged(body),
        };
        Response::from_parts(head, Either::Right(body))
    }
}

/// Refuses a request for a WebSocket, which the gateway does not tunnel. Other upgrades, such as
/// `h2c`, are offers that a server may ignore.
fn refuse_upgrade(headers: &HeaderMap) -> Result<(), ApiError> {
    let is_websocket = |value: &HeaderValue| {
        let mut protocols = value.as_bytes().split(|&byte| byte == b',');
        protocols.any(|protocol| protocol.trim_ascii().eq_ignore_ascii_case(b"websocket"))
    };
    if headers.get_all(UPGRADE).iter().any(is_websocket) {
        return Err(ApiError::upgrade_not_supported(
            "The router does not tunnel WebSocket connections. Use an HTTP API of the engine.",
        ));
    }
    Ok(())
}

/// Returns whether the request asks for the gateway's health, which needs no key.
fn is_health_check(head: &http::request::Parts) -> bool {
    head.method == Method::GET && head.uri.path() == "/health"
}

/// Returns how the body of a call is encoded. The coding `identity` means none.
fn body_form(call: &Call, headers: &HeaderMap) -> BodyForm {
    let text = |name: HeaderName| {
        let value = headers.get(name)?.to_str().ok()?;
        Some(value.trim().to_owned())
    };
    let coding = text(CONTENT_ENCODING);
    BodyForm {
        format: call.body,
        content_type: text(CONTENT_TYPE).unwrap_or_default(),
        coding: coding.filter(|coding| !coding.is_empty() && coding != "identity"),
    }
}

/// Returns the session that a client names in a header.
fn session_of(headers: &HeaderMap) -> Option<&[u8]> {
    headers.get(SESSION_HEADER).map(HeaderValue::as_bytes)
}
