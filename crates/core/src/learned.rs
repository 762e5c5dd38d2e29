//! Knowledge that a router has learned from its traffic, as a plain value that can be stored and given
//! to another router.

pub use foresee_forecast::{
    InvalidLearned, LearnedLatency, LearnedLengths, LearnedPhase, LearnedSpeed, LengthBin,
};
use serde::{Deserialize, Serialize};

/// Knowledge that a router has learned: speeds of models and workers, and lengths of outputs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Learned {
    /// Latency models, by the name of the model that the workers run.
    pub models: Vec<LearnedModel>,
    /// Speeds of workers.
    pub workers: Vec<LearnedWorker>,
    /// Output lengths.
    pub output_lengths: LearnedLengths,
}

/// Latency model of the workers of one model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LearnedModel {
    /// Name of the model.
    pub model: String,
    /// Latency of the model.
    pub latency: LearnedLatency,
}

/// Speed of one worker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LearnedWorker {
    /// Name of the worker.
    pub worker: String,
    /// Name of the model that it runs.
    pub model: String,
    /// Speed of the worker.
    pub speed: LearnedSpeed,
}
