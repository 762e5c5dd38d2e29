//! What a replay is of, and why there can be none.

use std::num::NonZeroU32;

use foresee_core::fleet::WorkerError;
use foresee_core::router::{ConfigError, RouteError, RouterConfig};

use crate::engine::EngineConfig;
use crate::knowledge::Knowledge;
use crate::lab::Contender;
use crate::prompt::mix;
use crate::schedule::FleetChange;
use crate::slo::Slo;

/// A fleet and its router.
#[derive(Clone, Debug)]
pub struct ReplayConfig {
    /// The router's settings.
    pub router: RouterConfig,
    /// The workers, one engine each. Their block sizes are multiples of the router's.
    pub engines: Vec<EngineConfig>,
    /// Whether the router is told how many blocks each worker has.
    pub capacity_known: bool,
    /// Who chooses; `None` for the router, as its settings say.
    pub contender: Option<Contender>,
    /// What tells the router what engines cache.
    pub knowledge: Knowledge,
    /// What happens to workers.
    pub changes: Vec<FleetChange>,
    /// What counts as served well.
    pub slo: Slo,
    /// Whether each worker's active blocks over time are kept.
    pub keep_active_blocks: bool,
}

impl ReplayConfig {
    /// `workers` equal engines whose step times vary independently.
    #[must_use]
    pub fn uniform(router: RouterConfig, engine: &EngineConfig, workers: u32) -> Self {
        let one = Self {
            router,
            engines: vec![engine.clone()],
            capacity_known: true,
            contender: None,
            knowledge: Knowledge::default(),
            changes: Vec::new(),
            slo: Slo::default(),
            keep_active_blocks: false,
        };
        one.with_workers(workers)
    }

    /// The same with so many engines like its first, whose step times vary independently.
    #[must_use]
    pub fn with_workers(&self, workers: u32) -> Self {
        let first = self.engines.first().cloned();
        let engines = first.into_iter().flat_map(|engine| {
            (0..workers).map(move |worker| EngineConfig {
                seed: engine.seed.wrapping_add(u64::from(worker)),
                ..engine.clone()
            })
        });
        Self {
            engines: engines.collect(),
            ..self.clone()
        }
    }

    /// The same with other random choices and other noise; the same for 0.
    #[must_use]
    pub fn with_seed(&self, seed: u64) -> Self {
        let mut config = self.clone();
        if seed > 0 {
            config.router.seed = mix(config.router.seed ^ mix(seed));
            for engine in &mut config.engines {
                engine.seed = mix(engine.seed ^ mix(seed));
            }
        }
        config
    }
}

/// Why a replay cannot be run.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum ReplayError {
    /// A setting of the router.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A worker cannot be added.
    #[error(transparent)]
    Worker(#[from] WorkerError),
    /// A request found no worker.
    #[error(transparent)]
    Route(#[from] RouteError),
    /// Prefixes would never match.
    #[error(
        "an engine has blocks of {engine} tokens, which is no multiple of the router's {router}: \
         set --block-size to it, or to a part of it"
    )]
    BlockSize {
        /// The engine's.
        engine: NonZeroU32,
        /// The router's.
        router: NonZeroU32,
    },
    /// Something is to happen to a worker that there is not.
    #[error("a fleet change is about worker {worker}, and there are {workers}, counted from 0")]
    NoSuchWorker {
        /// The worker.
        worker: usize,
        /// How many there are.
        workers: usize,
    },
    /// Batches are lost that often.
    #[error("event-loss is {loss}: it must be a share from 0 to 1")]
    Loss {
        /// The share asked for.
        loss: f64,
    },
}
