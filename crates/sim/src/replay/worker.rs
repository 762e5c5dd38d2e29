//! A worker of the replay.

use std::num::NonZeroU32;

use foresee_core::workers::WorkerId;

use super::config::ReplayError;
use crate::engine::{Engine, EngineConfig, Step};

/// A worker of the replay: an engine and its current step.
pub(super) struct Worker {
    /// Id in the router; `None` before the worker joins the fleet.
    pub(super) id: Option<WorkerId>,
    pub(super) engine: Engine,
    /// The step that the engine computes; `None` while the engine is idle.
    pub(super) step: Option<Step>,
    /// Speed relative to the engine's step-time model.
    pub(super) speed: f64,
    /// Engine block size ÷ router block size.
    pub(super) engine_block_ratio: NonZeroU32,
    /// Number of requests sent to the engine.
    pub(super) requests: u64,
}

/// Returns a worker that has not joined the fleet. `has_events` selects whether its engine records
/// cache events.
///
/// # Errors
/// If the engine's block size is no multiple of the router's.
pub(super) fn new_worker(
    engine: &EngineConfig,
    has_events: bool,
    block_size: NonZeroU32,
) -> Result<Worker, ReplayError> {
    let ratio = NonZeroU32::new(engine.block_size.get() / block_size);
    let ratio = ratio.filter(|_| engine.block_size.get() % block_size == 0);
    Ok(Worker {
        id: None,
        engine_block_ratio: ratio.ok_or(ReplayError::BlockSize {
            engine: engine.block_size,
            router: block_size,
        })?,
        engine: Engine::new(EngineConfig {
            cache_events: has_events,
            ..engine.clone()
        }),
        step: None,
        speed: 1.0,
        requests: 0,
    })
}
