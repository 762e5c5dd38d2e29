//! What is learned from watching streams: how long a worker takes, and how long answers are.
//!
//! All of it is learned while requests pass, sample by sample, and bounded.

pub(crate) mod lengths;
pub(crate) mod pace;
mod regression;
