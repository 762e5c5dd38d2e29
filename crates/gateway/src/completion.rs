//! How a response ended, for the metrics, the recording and the log.

use std::time::Duration;

use foresee_engine::usage::Usage;

use crate::metrics::Outcome;

/// How a response ended.
#[derive(Debug)]
pub(crate) struct Completion {
    pub(crate) outcome: Outcome,
    /// Token counts that the engine reported; `None` in a field that it did not report.
    pub(crate) usage: Usage,
    /// Output tokens observed, of all choices.
    pub(crate) output_tokens: u32,
    /// Output tokens observed of each choice; empty for a single choice, or if the choices could not
    /// be distinguished.
    pub(crate) output_tokens_by_choice: Vec<u32>,
    /// When the first output token arrived, by the gateway's clock; `None` if that was not observed.
    pub(crate) first_token: Option<Duration>,
    /// When the latest output tokens arrived; `None` if that was not observed.
    pub(crate) last_token: Option<Duration>,
    /// Longest time between two arrivals of output tokens.
    pub(crate) longest_gap: Duration,
    /// Bytes of the response's body.
    pub(crate) bytes: u64,
}
