//! Forecasts for LLM engines: how long will this request take on this worker?
//!
//! A router that knows the answer before it sends a request can compare workers in seconds. This
//! crate learns the parts of the answer from the traffic, sample by sample, while requests pass:
//!
//! | question | type | learned from |
//! |---|---|---|
//! | How long does a worker take to compute a prompt, and how long does one decode step take? | [`LatencyEstimator`] and [`SharedLatencyModel`], which together give a [`LatencyModel`] | the times at which tokens arrive |
//! | How many tokens will an output still have? | [`OutputLengthModel`] | the lengths of outputs that ended |
//! | How many requests arrive per second, and how much of the worker's time do their prefills take? | [`ArrivalRate`] | the times at which requests are sent |
//! | How many requests will arrive at the whole fleet, and how many workers do they need? | [`DemandForecast`] and [`sustainable_rate`] | arrivals, and the lengths of requests that ended |
//!
//! The memory of every model is bounded, and old samples are forgotten, so the forecasts follow a
//! worker that becomes slower and traffic that changes.
//!
//! The crate does no I/O, reads no clock and draws no random number. An instant is a [`Duration`]
//! since an epoch that the caller chooses, the same one in every call.
//!
//! [`Duration`]: std::time::Duration
//!
//! # Order of reading
//!
//! 1. [`LatencyModel`]: the six coefficients of one worker, and the [`PrefillWork`] to which they
//!    apply. A prompt of `s` tokens whose last `p` tokens are to be computed takes `prefill_base +
//!    prefill_per_token × p + prefill_per_attention_pair × p (s − p/2)` seconds. A step that decodes
//!    `n` requests with `c` tokens of context takes `decode_base + decode_per_request × n +
//!    decode_per_context_token × c` seconds.
//! 2. The module `regression`: how coefficients are found. Recursive least squares on relative
//!    errors, with forgetting, robust against outliers, and with no negative coefficient.
//! 3. [`LatencyEstimator`]: which observations of a worker are samples, and what similar workers
//!    learn from each other.
//! 4. [`OutputLengthModel`]: how many tokens an output has left, given how many it has already.
//! 5. [`ArrivalRate`]: what a worker's time will be spent on soon.
//! 6. [`DemandForecast`] and [`sustainable_rate`]: how large the fleet has to be.
//!
//! # Example
//!
//! ```
//! use std::time::Duration;
//! use foresee_forecast::{LatencyEstimator, OutputLengthModel, PrefillWork, SharedLatencyModel};
//!
//! let mut shared = SharedLatencyModel::default(); // of all workers with the same model and GPU
//! let mut worker = LatencyEstimator::default();
//! // Prompts of different lengths, one at a time, each computed in 30 ms + 50 µs per token.
//! let mut now = Duration::ZERO;
//! for tokens in (0..200).map(|index| 500 + 37 * (index % 100)) {
//!     let sent_at = now;
//!     now += Duration::from_secs_f64(0.03 + 5e-5 * f64::from(tokens));
//!     let work = PrefillWork::new(tokens, tokens);
//!     worker.observe_first_token(&mut shared, work, sent_at, false, now);
//! }
//! let model = worker.latency_model(&shared, now);
//! // A prompt of 4,000 tokens, of which the last 1,000 are to be computed.
//! let seconds = model.prefill_seconds(1.0, PrefillWork::new(1000, 4000));
//! assert!((0.07..0.09).contains(&seconds), "{seconds}");
//!
//! let mut lengths = OutputLengthModel::default();
//! let class = 7; // requests that are alike, such as those with the same `max_tokens`
//! for _ in 0..100 {
//!     lengths.observe(class, 200, false);
//! }
//! assert!((45..=55).contains(&lengths.remaining(class, 150, None)));
//! ```

mod arrival_rate;
mod demand;
mod fleet_size;
mod latency;
mod latency_model;
mod learned;
mod output_length;
mod regression;

pub use arrival_rate::{ArrivalRate, ArrivalRates};
pub use demand::DemandForecast;
pub use fleet_size::{LatencyLimits, MeanLengths, sustainable_rate};
pub use latency::{LatencyEstimator, SharedLatencyModel, SpeedFactors, WeightedFactor};
pub use latency_model::{LatencyAccuracy, LatencyModel, MAX_ATTENTION_TOKENS, PrefillWork};
pub use learned::{
    InvalidLearned, LearnedLatency, LearnedLengths, LearnedPhase, LearnedSpeed, LengthBin,
};
pub use output_length::{LengthClass, OutputLengthAccuracy, OutputLengthModel};

/// The example of the README, which is a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
