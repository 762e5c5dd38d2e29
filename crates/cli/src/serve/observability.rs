//! The flags of `serve` for what it reports: logs, traces, metrics and what it keeps.

use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, ValueEnum};
use foresee_gateway::{AutoscalingConfig, CollectorUrl, GatewayConfig, MetricsCompat, TraceConfig};

use crate::flags::DEFAULTS;
use crate::values::{Fraction, duration, positive_duration};

/// Reports in addition to the router's own metrics.
#[derive(Args, Debug)]
#[command(next_help_heading = "Observability")]
pub(crate) struct ObservabilityArgs {
    /// Sets the time between two reads of each engine's /metrics [default: never]
    ///
    /// The engines' own load is then exported next to the prediction. Routing does not use it.
    #[arg(
        long,
        value_parser = positive_duration,
        value_name = "DURATION",
        env = "FORESEE_ENGINE_METRICS_INTERVAL"
    )]
    engine_metrics_interval: Option<humantime::Duration>,
    /// Appends a line for each completed request to a file, for `foresee replay run --trace`
    ///
    /// A line contains times, lengths, and the hashes of the prompt's blocks, without any text.
    #[arg(long, value_name = "FILE", env = "FORESEE_RECORD")]
    record: Option<PathBuf>,
    /// Appends a line of JSON for each request to a file, when the request has ended; - is the
    /// standard output
    ///
    /// A line contains times, lengths and outcomes, and no text of prompts or outputs. A reload opens
    /// the file again, so that it can be rotated.
    #[arg(long, value_name = "FILE", env = "FORESEE_ACCESS_LOG")]
    access_log: Option<PathBuf>,
    /// Sets the fraction of the requests that succeed which the access log has a line of
    ///
    /// Requests that fail or are refused always have a line.
    #[arg(
        long,
        default_value_t = Fraction(DEFAULTS.access_log_sample_ratio),
        value_name = "FRACTION",
        env = "FORESEE_ACCESS_LOG_SAMPLE_RATIO"
    )]
    access_log_sample_ratio: Fraction,
    /// Keeps learned speeds and output lengths in a file, so that a restart does not lose them
    ///
    /// The file is written every five minutes and at the shutdown. It contains no text of requests.
    #[arg(long, value_name = "FILE", env = "FORESEE_STATE")]
    state: Option<PathBuf>,
    /// Sends spans of requests to the OpenTelemetry collector with this base URL, as in
    /// http://localhost:4318 [default: OTEL_EXPORTER_OTLP_ENDPOINT]
    ///
    /// The protocol is OTLP over HTTP with protobuf. The other variables of OpenTelemetry are read as
    /// well: OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER,
    /// OTEL_EXPORTER_OTLP_HEADERS, OTEL_EXPORTER_OTLP_CERTIFICATE and OTEL_SDK_DISABLED. Without a
    /// collector, headers of traces are passed on unchanged.
    #[arg(long, value_name = "URL", env = "FORESEE_OTLP_ENDPOINT")]
    otlp_endpoint: Option<CollectorUrl>,
    /// Sets the fraction of requests that are traced, of those whose caller has not decided
    /// [default: OTEL_TRACES_SAMPLER, or 1]
    #[arg(long, value_name = "FRACTION", env = "FORESEE_TRACE_SAMPLE_RATIO")]
    trace_sample_ratio: Option<Fraction>,
    /// Adds the names of another program's metrics to /metrics, with the same numbers
    #[arg(long, value_name = "PROGRAM", env = "FORESEE_METRICS_COMPAT")]
    metrics_compat: Option<Compat>,
    /// Sets the time to first token that 95 % of the requests should get, for the metric of the workers
    /// needed
    #[arg(
        long,
        default_value_t = DEFAULTS.autoscaling.slo_ttft.into(),
        value_name = "DURATION",
        value_parser = positive_duration,
        env = "FORESEE_SLO_TTFT"
    )]
    slo_ttft: humantime::Duration,
    /// Sets the mean time between output tokens that requests should get, for the metric of the workers
    /// needed
    #[arg(
        long,
        default_value_t = DEFAULTS.autoscaling.slo_itl.into(),
        value_name = "DURATION",
        value_parser = positive_duration,
        env = "FORESEE_SLO_ITL"
    )]
    slo_itl: humantime::Duration,
    /// Sets how long before it arrives a load is forecast, for the metric of the workers needed: the
    /// time in which a worker starts
    #[arg(
        long,
        default_value_t = DEFAULTS.autoscaling.horizon.into(),
        value_name = "DURATION",
        value_parser = duration,
        env = "FORESEE_SCALE_HORIZON"
    )]
    scale_horizon: humantime::Duration,
    /// Where traces are sent to, with the variables of OpenTelemetry.
    #[arg(skip)]
    traces: Option<TraceConfig>,
}

/// Program whose names of metrics the router has as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Compat {
    /// llm-d's endpoint picker: names that begin with llm_d_epp_
    LlmD,
}

impl ObservabilityArgs {
    /// Reads the variables of OpenTelemetry.
    ///
    /// # Errors
    /// If they name a collector that cannot be used.
    pub(super) fn resolve(mut self) -> Result<Self, clap::Error> {
        let endpoint = self.otlp_endpoint.clone();
        let traces = TraceConfig::from_variables(endpoint, |name| std::env::var(name).ok());
        let traces = traces.map_err(|error| {
            let mut command = crate::Cli::command();
            let message = format!("in the variables of OpenTelemetry: {error}");
            command.error(ErrorKind::InvalidValue, message)
        })?;
        self.traces = traces.map(|traces| TraceConfig {
            sample_ratio: self.trace_sample_ratio.map(|Fraction(ratio)| ratio),
            ..traces
        });
        Ok(self)
    }

    /// Puts these settings into `config`. Call [`resolve`](Self::resolve) first.
    pub(super) fn apply(self, config: &mut GatewayConfig) {
        config.engine_metrics_interval = self.engine_metrics_interval.map(Into::into);
        config.record = self.record;
        config.access_log = self.access_log;
        config.access_log_sample_ratio = self.access_log_sample_ratio.0;
        config.state = self.state;
        config.traces = self.traces;
        config.metrics_compat = self.metrics_compat.map(|Compat::LlmD| MetricsCompat::LlmD);
        config.autoscaling = AutoscalingConfig {
            slo_ttft: self.slo_ttft.into(),
            slo_itl: self.slo_itl.into(),
            horizon: self.scale_horizon.into(),
        };
    }
}
