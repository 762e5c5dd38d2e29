//! Faults of a running mock engine, set over HTTP: slow steps and failing requests.

use foresee_engine::error::ApiError;
use serde::Deserialize;

/// State of a mock engine's faults; the default has none.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Fault {
    /// Factor by which each step of the engine takes longer; 1 in a healthy engine.
    pub(crate) slowdown: f64,
    /// Whether inference requests get status 500. Health checks still succeed, and running requests
    /// continue.
    pub(crate) failing: bool,
}

impl Default for Fault {
    fn default() -> Self {
        Self {
            slowdown: 1.0,
            failing: false,
        }
    }
}

impl Fault {
    /// Parses a JSON object. A field that is missing has its healthy value.
    ///
    /// # Errors
    /// If the body is not such an object, or the slowdown is not from 0.001 to 1000.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let fault: Self = serde_json::from_slice(body)
            .map_err(|error| ApiError::bad_request(error.to_string(), None))?;
        // A range contains no NaN.
        if !(0.001..=1000.0).contains(&fault.slowdown) {
            let message = "slowdown must be from 0.001 to 1000.";
            return Err(ApiError::bad_request(message, Some("slowdown")));
        }
        Ok(fault)
    }

    /// Returns an error with status 500 if requests are to fail.
    pub(crate) fn check(&self) -> Result<(), ApiError> {
        match self.failing {
            true => Err(ApiError {
                status: 500,
                ..ApiError::bad_gateway("The engine fails all requests, as requested by /fault.")
            }),
            false => Ok(()),
        }
    }
}
