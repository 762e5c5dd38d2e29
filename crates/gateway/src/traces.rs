//! Traces: for each sampled request a tree of spans, which a task of its own sends to an OpenTelemetry
//! collector.
//!
//! The spans of a request are in a [`RequestTrace`], which goes along with it: the span of the server,
//! below it those of reading, placing and queueing the request, and one for each attempt at a worker.
//! A worker gets the id of its attempt's span, so that its own spans join the trace. No span has text
//! of a prompt or an output.
//!
//! Finished spans go into a bounded queue. If the collector is slow or down, spans are dropped and
//! counted; requests never wait.

mod collector_client;
pub(crate) mod config;
mod exporter;
mod gen_ai;
pub(crate) mod request_trace;
mod response_facts;
mod traceparent;

use std::fmt;
use std::time::Duration;

use http::Request;
use opentelemetry::trace::{
    Span as _, SpanKind, TraceContextExt, Tracer as _, TracerProvider as _,
};
use opentelemetry::{Context, InstrumentationScope};
use opentelemetry_http::HeaderExtractor;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{Sampler, SdkTracer, SdkTracerProvider};

use crate::metrics::Metrics;
use config::{TraceConfig, TraceError};
use exporter::Exporter;
use request_trace::{RequestTrace, ServerRequest, method_name};
use traceparent::replace_caller;

/// Name of the service, unless `OTEL_SERVICE_NAME` or `OTEL_RESOURCE_ATTRIBUTES` has one.
const SERVICE_NAME: &str = "foresee";

/// Source of the spans of all requests.
pub(crate) struct Traces {
    tracer: SdkTracer,
    exporter: Exporter,
    propagator: TraceContextPropagator,
}

impl fmt::Debug for Traces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Traces").finish_non_exhaustive()
    }
}

impl Traces {
    /// Starts the task that sends spans to the collector of `config`. Attributes of the resource, and
    /// the sampler unless `config` has a ratio, are those of the variables `OTEL_*`. Must run inside
    /// a tokio runtime, which sends the spans.
    ///
    /// # Errors
    /// Fails if a client for the collector cannot be built.
    pub(crate) fn start(config: &TraceConfig, metrics: &Metrics) -> Result<Self, TraceError> {
        let resource = resource();
        let (exporter, processor) = Exporter::start(config, &resource, metrics)?;
        let mut provider = SdkTracerProvider::builder()
            .with_resource(resource)
            .with_span_processor(processor);
        if let Some(ratio) = config.sample_ratio {
            let sampler = Sampler::TraceIdRatioBased(ratio);
            provider = provider.with_sampler(Sampler::ParentBased(Box::new(sampler)));
        }
        let scope = InstrumentationScope::builder("foresee")
            .with_version(env!("CARGO_PKG_VERSION"))
            .build();
        Ok(Self {
            tracer: provider.build().tracer_with_scope(scope),
            exporter,
            propagator: TraceContextPropagator::new(),
        })
    }

    /// Begins the trace of a request that has just arrived, or continues its caller's. `None` if the
    /// request is not sampled. `route` is the path that was matched, without parts that vary.
    ///
    /// Changes the headers, which the worker gets: a request without a valid `traceparent` gets one,
    /// so that an engine does not decide differently about sampling, and loses its `tracestate`. The
    /// caller's `traceparent` stays; [`RequestTrace::begin_call`] replaces it for each attempt.
    pub(crate) fn begin<B>(
        &self,
        request: &mut Request<B>,
        route: Option<&str>,
    ) -> Option<Box<RequestTrace>> {
        let extractor = HeaderExtractor(request.headers());
        let parent = self.propagator_context(&extractor);
        let method = method_name(request.method());
        let name = match route {
            Some(route) => format!("{method} {route}"),
            None => method.to_owned(),
        };
        let builder = self.tracer.span_builder(name).with_kind(SpanKind::Server);
        let span = self.tracer.build_with_context(builder, &parent);
        if !parent.span().span_context().is_valid() {
            replace_caller(request.headers_mut(), span.span_context());
        }
        span.is_recording().then(|| {
            let request = ServerRequest::new(request, route);
            Box::new(RequestTrace::new(self.tracer.clone(), span, &request))
        })
    }

    /// Returns the context of a request's caller; an empty one if the headers name none.
    fn propagator_context(&self, headers: &HeaderExtractor<'_>) -> Context {
        use opentelemetry::propagation::TextMapPropagator as _;
        self.propagator
            .extract_with_context(&Context::new(), headers)
    }

    /// Sends the spans that are still queued, for at most `limit`. Spans that end later are dropped.
    pub(crate) async fn finish(&self, limit: Duration) {
        self.exporter.finish(limit).await;
    }
}

/// Returns the attributes of this process: those of the variables, and the name of the service.
fn resource() -> Resource {
    let variable = |name| std::env::var(name).unwrap_or_default();
    let is_named = !variable("OTEL_SERVICE_NAME").is_empty()
        || variable("OTEL_RESOURCE_ATTRIBUTES").contains("service.name=");
    let builder = Resource::builder();
    match is_named {
        true => builder.build(),
        false => builder.with_service_name(SERVICE_NAME).build(),
    }
}
