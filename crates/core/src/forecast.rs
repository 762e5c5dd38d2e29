//! Forecasts learned from traffic: how fast a worker is, and how long outputs are.
//!
//! All models are learned online, sample by sample, while requests pass. Their memory is bounded.

pub(crate) mod latency;
pub(crate) mod latency_model;
pub(crate) mod output_length;
mod regression;
