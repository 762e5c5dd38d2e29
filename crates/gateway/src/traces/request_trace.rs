//! The spans of one sampled request.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use foresee_engine::request::Endpoint;
use http::header::USER_AGENT;
use http::{HeaderValue, Method, Request};
use opentelemetry::trace::{Span as _, SpanKind, Status, TraceContextExt, Tracer as _};
use opentelemetry::{Context, KeyValue};
use opentelemetry_sdk::trace::{SdkTracer, Span};

use crate::completion::Completion;
use crate::connection_state::Peer;
use crate::metrics::{Exemplar, Outcome};
use crate::placement::parsed_request::ParsedRequest;
use crate::traces::gen_ai::{operation, request_attributes, shortened};
use crate::traces::response_facts::ResponseFacts;
use crate::traces::traceparent::traceparent;
use crate::workers::worker::Worker;

/// Attributes of a request that has arrived.
#[derive(Debug)]
pub(super) struct ServerRequest(Vec<KeyValue>);

impl ServerRequest {
    /// Returns the attributes of a request whose path matched `route`.
    pub(super) fn new<B>(request: &Request<B>, route: Option<&str>) -> Self {
        let text = |value: &str| shortened(value);
        let mut attributes = vec![
            KeyValue::new(
                "http.request.method",
                method_name(request.method()).to_owned(),
            ),
            KeyValue::new("url.path", text(request.uri().path())),
        ];
        attributes.extend(route.map(|route| KeyValue::new("http.route", route.to_owned())));
        if let Some(peer) = request.extensions().get::<Peer>() {
            let address = peer.address.ip().to_canonical().to_string();
            attributes.push(KeyValue::new("client.address", address));
        }
        let agent = request.headers().get(USER_AGENT);
        if let Some(agent) = agent.and_then(|agent| agent.to_str().ok()) {
            attributes.push(KeyValue::new("user_agent.original", text(agent)));
        }
        Self(attributes)
    }
}

/// What a response shows when it has ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ResponseEnd<'a> {
    pub(crate) completion: &'a Completion,
    /// Prompt tokens that the gateway counted.
    pub(crate) prompt_tokens: u32,
    /// Time from the arrival of the request to its first token.
    pub(crate) ttft: Option<Duration>,
}

/// The spans of one sampled request. Dropping it before [`respond`](Self::respond) or
/// [`complete`](Self::complete) ends the spans as those of a client that left.
#[derive(Debug)]
pub(crate) struct RequestTrace {
    tracer: SdkTracer,
    server: Span,
    /// Context in which the spans below that of the server begin.
    below_server: Context,
    /// Span of the attempt at a worker that is running.
    call: Option<Span>,
    /// Name of the spans of attempts.
    call_name: String,
    /// Attributes of the spans of attempts that follow from the request.
    call_attributes: Vec<KeyValue>,
    /// When the attempt began.
    call_began: SystemTime,
    /// When the first data of the response arrived.
    first_data: Option<SystemTime>,
    facts: ResponseFacts,
    has_ended: bool,
}

impl RequestTrace {
    /// Returns the trace of a request with the span of the server.
    pub(super) fn new(tracer: SdkTracer, mut server: Span, request: &ServerRequest) -> Self {
        server.set_attributes(request.0.iter().cloned());
        let below_server = Context::new().with_remote_span_context(server.span_context().clone());
        Self {
            tracer,
            server,
            below_server,
            call: None,
            call_name: String::new(),
            call_attributes: Vec::new(),
            call_began: SystemTime::UNIX_EPOCH,
            first_data: None,
            facts: ResponseFacts::default(),
            has_ended: false,
        }
    }

    /// Returns the trace id.
    pub(crate) fn trace_id(&self) -> String {
        self.server.span_context().trace_id().to_string()
    }

    /// Returns the id of the server's span.
    pub(crate) fn span_id(&self) -> String {
        self.server.span_context().span_id().to_string()
    }

    /// Returns the label by which an observation of a histogram names this trace.
    pub(crate) fn exemplar(&self) -> Exemplar {
        [("trace_id", self.trace_id())]
    }

    /// Adds a span of `duration` that ends now.
    pub(crate) fn add_step(
        &mut self,
        name: &'static str,
        duration: Duration,
        attributes: Vec<KeyValue>,
    ) {
        let now = SystemTime::now();
        let builder = self.tracer.span_builder(name);
        let builder = builder
            .with_kind(SpanKind::Internal)
            .with_start_time(now.checked_sub(duration).unwrap_or(now))
            .with_attributes(attributes);
        let mut span = self.tracer.build_with_context(builder, &self.below_server);
        span.end_with_timestamp(now);
    }

    /// Keeps what the spans of attempts say about the request.
    pub(crate) fn describe_calls(
        &mut self,
        endpoint: Endpoint,
        parsed: &ParsedRequest,
        body: &Bytes,
    ) {
        self.call_name = match operation(endpoint) {
            Some(operation) => format!("{operation} {}", shortened(&parsed.model)),
            None => "POST".to_owned(),
        };
        self.call_attributes = request_attributes(endpoint, parsed, body);
    }

    /// Begins the span of an attempt at `worker`, the first one being number 1. Returns the value of
    /// the header `traceparent` of its request.
    pub(crate) fn begin_call(&mut self, worker: &Worker, attempt: u32) -> Option<HeaderValue> {
        let provider = ["vllm", "sglang"]
            .into_iter()
            .find(|engine| worker.models.is_owned_by(engine));
        let mut attributes = self.call_attributes.clone();
        attributes.extend([
            KeyValue::new("gen_ai.provider.name", provider.unwrap_or("openai")),
            KeyValue::new("server.address", worker.config.host().to_owned()),
            KeyValue::new("server.port", i64::from(worker.config.port())),
            KeyValue::new("foresee.worker", worker.config.name.clone()),
            KeyValue::new("foresee.attempt", i64::from(attempt)),
        ]);
        let builder = self.tracer.span_builder(self.call_name.clone());
        self.call_began = SystemTime::now();
        let builder = builder
            .with_kind(SpanKind::Client)
            .with_start_time(self.call_began)
            .with_attributes(attributes);
        let span = self.tracer.build_with_context(builder, &self.below_server);
        let header = traceparent(span.span_context());
        self.call = Some(span);
        header
    }

    /// Ends the span of an attempt that failed. `error_type` is one of a few words, or a status.
    pub(crate) fn fail_call(&mut self, error_type: &str) {
        if let Some(mut call) = self.call.take() {
            fail(&mut call, error_type);
        }
    }

    /// Observes data of the worker's response.
    pub(crate) fn on_data(&mut self, data: &Bytes) {
        self.first_data.get_or_insert_with(SystemTime::now);
        self.facts.observe(data);
    }

    /// Adds the status of the worker's response to both spans.
    pub(crate) fn set_status(&mut self, status: u16) {
        for span in self.call.iter_mut().chain([&mut self.server]) {
            span.set_attribute(KeyValue::new(
                "http.response.status_code",
                i64::from(status),
            ));
        }
    }

    /// Ends the spans of a request to which the gateway responds itself.
    pub(crate) fn respond(&mut self, outcome: Outcome, status: u16, code: Option<&'static str>) {
        self.set_status(status);
        let error = (outcome != Outcome::Ok).then(|| match code {
            Some(code) => code.to_owned(),
            None => status.to_string(),
        });
        self.end(outcome, error.as_deref());
    }

    /// Ends the spans of a request whose response has ended.
    pub(crate) fn complete(&mut self, end: &ResponseEnd<'_>) {
        let Completion { outcome, usage, .. } = end.completion;
        if let Some(call) = &mut self.call {
            let waited = self.first_data;
            let waited = waited.and_then(|at| at.duration_since(self.call_began).ok());
            let input = usage.prompt_tokens.unwrap_or(end.prompt_tokens);
            let output = usage.completion_tokens;
            let output = output.unwrap_or(end.completion.output_tokens);
            let counts = [
                ("gen_ai.usage.input_tokens", Some(input)),
                ("gen_ai.usage.output_tokens", Some(output)),
                ("gen_ai.usage.cache_read.input_tokens", usage.cached_tokens),
            ];
            for (name, count) in counts {
                let count = count.map(i64::from);
                call.set_attributes(count.map(|count| KeyValue::new(name, count)));
            }
            let name = "gen_ai.response.time_to_first_chunk";
            call.set_attributes(waited.map(|waited| KeyValue::new(name, waited.as_secs_f64())));
            call.set_attributes(self.facts.attributes());
        }
        let ttft = end.ttft.map(|ttft| ttft.as_secs_f64());
        let name = "foresee.ttft";
        self.server
            .set_attributes(ttft.map(|ttft| KeyValue::new(name, ttft)));
        let error = (*outcome != Outcome::Ok).then_some(outcome.as_str());
        self.end(*outcome, error);
    }

    /// Ends all spans, once.
    fn end(&mut self, outcome: Outcome, error_type: Option<&str>) {
        if std::mem::replace(&mut self.has_ended, true) {
            return;
        }
        let call = self.call.take();
        self.server
            .set_attribute(KeyValue::new("foresee.outcome", outcome.as_str()));
        if let Some(error_type) = error_type {
            if let Some(mut call) = call {
                fail(&mut call, error_type);
            }
            let error_type = KeyValue::new("error.type", error_type.to_owned());
            self.server.set_attribute(error_type);
            // A request that its client got wrong is not an error of this server.
            if !matches!(outcome, Outcome::Refused | Outcome::ClientLeft) {
                self.server.set_status(Status::error(outcome.as_str()));
            }
        }
        self.server.end();
    }
}

impl Drop for RequestTrace {
    fn drop(&mut self) {
        let outcome = Outcome::ClientLeft;
        self.end(outcome, Some(outcome.as_str()));
    }
}

/// Returns the name of a method in spans: `_OTHER` for one that HTTP does not define, by OpenTelemetry's
/// conventions.
pub(super) fn method_name(method: &Method) -> &str {
    let known = [
        Method::GET,
        Method::HEAD,
        Method::POST,
        Method::PUT,
        Method::DELETE,
        Method::CONNECT,
        Method::OPTIONS,
        Method::TRACE,
        Method::PATCH,
    ];
    match known.contains(method) {
        true => method.as_str(),
        false => "_OTHER",
    }
}

/// Ends a span as that of an error.
fn fail(span: &mut Span, error_type: &str) {
    span.set_attribute(KeyValue::new("error.type", error_type.to_owned()));
    span.set_status(Status::error(error_type.to_owned()));
    span.end();
}
