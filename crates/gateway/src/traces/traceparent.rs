//! The headers of the W3C's trace context.

use http::{HeaderMap, HeaderValue};
use opentelemetry::trace::SpanContext;

/// Header with the trace id, the id of the caller's span and the sampling flag.
const TRACEPARENT: &str = "traceparent";

/// Header with data of tracing systems, which belongs to [`TRACEPARENT`].
const TRACESTATE: &str = "tracestate";

/// Replaces what the headers say about the caller by a span without a caller.
pub(super) fn replace_caller(headers: &mut HeaderMap, span: &SpanContext) {
    headers.remove(TRACESTATE);
    if let Some(value) = traceparent(span) {
        headers.insert(TRACEPARENT, value);
    }
}

/// Returns the value of the header `traceparent` for requests of a span.
pub(super) fn traceparent(span: &SpanContext) -> Option<HeaderValue> {
    let (trace, id, flags) = (span.trace_id(), span.span_id(), span.trace_flags());
    let value = format!("00-{trace}-{id}-{:02x}", flags.to_u8());
    HeaderValue::try_from(value).ok()
}

#[cfg(test)]
mod tests {
    use opentelemetry::trace::{SpanId, TraceFlags, TraceId, TraceState};

    use super::*;

    #[test]
    fn a_traceparent_has_the_ids_and_the_flag() {
        let span = |flags| {
            let (trace, id) = (TraceId::from(0xab << 100), SpanId::from(7));
            SpanContext::new(trace, id, flags, false, TraceState::default())
        };
        assert_eq!(
            traceparent(&span(TraceFlags::SAMPLED)).unwrap(),
            "00-00000ab0000000000000000000000000-0000000000000007-01"
        );
        let unsampled = traceparent(&span(TraceFlags::default())).unwrap();
        assert!(unsampled.to_str().unwrap().ends_with("-00"));
    }
}
