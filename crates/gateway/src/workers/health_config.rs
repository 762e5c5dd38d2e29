//! Settings of health checks.

use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;
use std::time::Duration;

use http::Method;
use http::uri::PathAndQuery;

/// Request, thresholds and time limit of health checks. The time between two checks is
/// `GatewayConfig::probe_interval`.
#[derive(Clone, Debug, PartialEq)]
pub struct HealthConfig {
    /// Path of workers whose description has none.
    pub path: HealthPath,
    /// Method of the request.
    pub method: HealthMethod,
    /// Number of successful checks in a row that make a worker healthy again. The first time, one is
    /// enough.
    pub healthy_threshold: NonZeroU32,
    /// Number of failed checks in a row that make a worker unhealthy, so that one slow response is
    /// not an outage. A request whose connection is refused makes a worker unhealthy immediately.
    pub unhealthy_threshold: NonZeroU32,
    /// Maximum time of a check, and of each query of models, metrics and event sources, from the
    /// connection to the end of the response.
    pub timeout: Duration,
}

impl Default for HealthConfig {
    fn default() -> Self {
        Self {
            path: HealthPath::default(),
            method: HealthMethod::Get,
            healthy_threshold: NonZeroU32::MIN,
            unhealthy_threshold: NonZeroU32::MIN.saturating_add(1),
            timeout: Duration::from_secs(2),
        }
    }
}

/// Path of a worker's health checks, or none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HealthPath {
    /// The server has no health check. The worker counts as healthy until a request fails to connect,
    /// and again after a TCP connection was accepted.
    None,
    /// The path, which is appended to the worker's URL.
    Path(PathAndQuery),
}

/// Text of [`HealthPath::None`].
const NO_PATH: &str = "none";

impl Default for HealthPath {
    fn default() -> Self {
        Self::Path(PathAndQuery::from_static("/health"))
    }
}

impl FromStr for HealthPath {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == NO_PATH {
            return Ok(Self::None);
        }
        if !text.starts_with('/') {
            return Err(format!(
                "`{text}` is not a path; write /PATH, or none for a server without a health check"
            ));
        }
        let path = text.parse();
        path.map(Self::Path)
            .map_err(|error| format!("`{text}` is not a path: {error}"))
    }
}

impl fmt::Display for HealthPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str(NO_PATH),
            Self::Path(path) => f.write_str(path.as_str()),
        }
    }
}

/// Method of a health check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HealthMethod {
    /// `GET`.
    Get,
    /// `HEAD`, which has no response body.
    Head,
    /// `POST` with an empty body.
    Post,
}

impl HealthMethod {
    /// All methods with their names.
    pub const ALL: [(Self, &str); 3] = [
        (Self::Get, "GET"),
        (Self::Head, "HEAD"),
        (Self::Post, "POST"),
    ];

    /// Returns the HTTP method.
    pub(crate) fn as_http(self) -> Method {
        match self {
            Self::Get => Method::GET,
            Self::Head => Method::HEAD,
            Self::Post => Method::POST,
        }
    }
}

impl fmt::Display for HealthMethod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_http().as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_health_path_is_a_path_or_none() {
        for text in ["none", "/", "/ping?full=1"] {
            let path: HealthPath = text.parse().unwrap();
            assert_eq!(path.to_string(), text);
        }
        for text in ["", "ping", "http://a/b", "/a b"] {
            assert!(text.parse::<HealthPath>().is_err(), "{text}");
        }
    }
}
