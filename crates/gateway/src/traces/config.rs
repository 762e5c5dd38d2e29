//! Settings of traces: the collector that they are sent to, and how many requests are sampled.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use http::Uri;

use crate::tls::TlsError;

/// Path of traces below the base URL of a collector.
const TRACES_PATH: &str = "/v1/traces";

/// Where traces are sent to, and how many requests are sampled.
#[derive(Clone, Debug, PartialEq)]
pub struct TraceConfig {
    /// Address of the collector.
    pub endpoint: CollectorUrl,
    /// Fraction of the requests that are sampled, of those whose caller has not decided. `None` for
    /// the sampler of `OTEL_TRACES_SAMPLER`, which samples all of them by default.
    pub sample_ratio: Option<f64>,
    /// File in PEM with the authorities that sign the collector's certificate; `None` for those that
    /// the system trusts.
    pub ca: Option<PathBuf>,
    /// Maximum time of one export, attempts after failures included.
    pub timeout: Duration,
}

impl TraceConfig {
    /// Returns the settings for the collector at `endpoint`, with the defaults of the others.
    #[must_use]
    pub fn new(endpoint: CollectorUrl) -> Self {
        Self {
            endpoint,
            sample_ratio: None,
            ca: None,
            timeout: Duration::from_secs(10),
        }
    }

    /// Returns the settings of OpenTelemetry's variables; `None` if they name no collector, or switch
    /// traces off. `variable` returns the value of a variable that is set. `endpoint` is used in place
    /// of the variables of the endpoint.
    ///
    /// The variables `OTEL_EXPORTER_OTLP_HEADERS`, `OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES`,
    /// `OTEL_TRACES_SAMPLER` and `OTEL_TRACES_SAMPLER_ARG` are read when the gateway starts.
    ///
    /// # Errors
    /// Fails if the endpoint is no URL, the timeout no number, or the protocol not `http/protobuf`.
    pub fn from_variables(
        endpoint: Option<CollectorUrl>,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Option<Self>, InvalidCollector> {
        let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
        let specific = |suffix: &str| {
            let traces = variable(&format!("OTEL_EXPORTER_OTLP_TRACES_{suffix}"));
            traces.or_else(|| variable(&format!("OTEL_EXPORTER_OTLP_{suffix}")))
        };
        let is_off = variable("OTEL_SDK_DISABLED")
            .is_some_and(|value| value.eq_ignore_ascii_case("true"))
            || variable("OTEL_TRACES_EXPORTER").is_some_and(|exporter| exporter == "none");
        let whole = variable("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT");
        let base = variable("OTEL_EXPORTER_OTLP_ENDPOINT");
        let endpoint = match (endpoint, whole, base) {
            (Some(endpoint), _, _) => endpoint,
            _ if is_off => return Ok(None),
            (None, Some(whole), _) => CollectorUrl::whole(&whole)?,
            (None, None, Some(base)) => base.parse()?,
            (None, None, None) => return Ok(None),
        };
        if let Some(protocol) = specific("PROTOCOL").filter(|value| value != "http/protobuf") {
            return Err(InvalidCollector::Protocol(protocol));
        }
        let defaults = Self::new(endpoint);
        let milliseconds = specific("TIMEOUT").map(|value| match value.parse() {
            Ok(0) | Err(_) => Err(InvalidCollector::Timeout(value)),
            Ok(milliseconds) => Ok(milliseconds),
        });
        let milliseconds = milliseconds.transpose()?;
        Ok(Some(Self {
            ca: specific("CERTIFICATE").map(PathBuf::from),
            timeout: milliseconds.map_or(defaults.timeout, Duration::from_millis),
            ..defaults
        }))
    }
}

/// URL to which traces are sent. Its text form is that of a base URL, to which `/v1/traces` is added.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CollectorUrl(String);

impl CollectorUrl {
    /// Returns the URL of `text` as it is.
    ///
    /// # Errors
    /// Fails if the text is not a URL of HTTP, or has a password.
    pub fn whole(text: &str) -> Result<Self, InvalidCollector> {
        let invalid = || InvalidCollector::Url;
        let url: Uri = text.trim().parse().map_err(|_| invalid())?;
        let is_http = matches!(url.scheme_str(), Some("http" | "https"));
        let authority = url.authority().filter(|_| is_http).ok_or_else(invalid)?;
        if authority.as_str().contains('@') {
            return Err(InvalidCollector::Password);
        }
        Ok(Self(text.trim().to_owned()))
    }

    /// Returns the text of the URL, its path included.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for CollectorUrl {
    type Err = InvalidCollector;

    fn from_str(base: &str) -> Result<Self, InvalidCollector> {
        let base = base.trim().trim_end_matches('/');
        match base.ends_with(TRACES_PATH) {
            true => Self::whole(base),
            false => Self::whole(&format!("{base}{TRACES_PATH}")),
        }
    }
}

/// Error for settings of a collector that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidCollector {
    /// The text is not a URL.
    #[error("write the URL of a collector, as in http://localhost:4318")]
    Url,
    /// The URL has a user name or a password, which would be logged.
    #[error(
        "a collector's URL must not have a user name or password: set OTEL_EXPORTER_OTLP_HEADERS"
    )]
    Password,
    /// The time of an export is not a number of milliseconds above 0.
    #[error("OTEL_EXPORTER_OTLP_TIMEOUT {0:?} is not a number of milliseconds above 0")]
    Timeout(String),
    /// The protocol is not that of the gateway.
    #[error(
        "OTEL_EXPORTER_OTLP_PROTOCOL {0:?} is not supported: use http/protobuf, which collectors \
         receive at port 4318"
    )]
    Protocol(String),
}

/// Error for a collector to which no client can be built.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The file of authorities cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The exporter refuses its settings.
    #[error("cannot send traces: {0}")]
    Exporter(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(variables: &[(&str, &str)]) -> Result<Option<TraceConfig>, InvalidCollector> {
        TraceConfig::from_variables(None, |name| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn the_variables_name_a_collector_or_switch_traces_off() {
        let base = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318/");
        let whole = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "https://c/otlp");
        let url = |variables: &[_]| config(variables).unwrap().unwrap().endpoint;
        assert_eq!(url(&[base]).as_str(), "http://collector:4318/v1/traces");
        assert_eq!(url(&[base, whole]).as_str(), "https://c/otlp");
        assert_eq!(config(&[]), Ok(None));
        for off in [
            ("OTEL_SDK_DISABLED", "true"),
            ("OTEL_TRACES_EXPORTER", "none"),
        ] {
            assert_eq!(config(&[base, off]), Ok(None));
        }
        let given = "http://here/v1/traces".parse().unwrap();
        let given = TraceConfig::from_variables(Some(given), |_| None)
            .unwrap()
            .unwrap();
        assert_eq!(given.endpoint.as_str(), "http://here/v1/traces");
        let timeout = ("OTEL_EXPORTER_OTLP_TIMEOUT", "250");
        let timeout = config(&[base, timeout]).unwrap().unwrap().timeout;
        assert_eq!(timeout, Duration::from_millis(250));
    }

    #[test]
    fn a_collector_that_cannot_be_used_is_refused() {
        let base = |text| config(&[("OTEL_EXPORTER_OTLP_ENDPOINT", text)]).unwrap_err();
        assert_eq!(base("collector:4317"), InvalidCollector::Url);
        let secret = base("http://user:secret@collector");
        assert!(!secret.to_string().contains("secret"), "{secret}");
        let grpc = [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ];
        for timeout in ["10s", "0", "-1"] {
            let variables = [
                ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c"),
                ("OTEL_EXPORTER_OTLP_TIMEOUT", timeout),
            ];
            let error = config(&variables).unwrap_err();
            assert_eq!(error, InvalidCollector::Timeout(timeout.to_owned()));
        }
        let error = config(&grpc).unwrap_err().to_string();
        assert!(error.contains("4318"), "{error}");
    }
}
