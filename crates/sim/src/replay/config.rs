//! The configuration of a replay, and its errors.

use std::num::NonZeroU32;
use std::time::Duration;

use foresee_core::router::{ConfigError, RouteError, RouterConfig};
use foresee_core::workers::WorkerError;

use crate::baselines::PolicySpec;
use crate::cache_signal::CacheSignal;
use crate::engine::EngineConfig;
use crate::faults::WorkerFault;
use crate::fleet_changes::FleetChange;
use crate::prompt::mix;
use crate::slo::Slo;

/// The configuration of a replay: a fleet and its router.
#[derive(Clone, Debug)]
pub struct ReplayConfig {
    /// The router's settings.
    pub router: RouterConfig,
    /// The engine of each worker. Its block size must be a multiple of the router's.
    pub engines: Vec<EngineConfig>,
    /// Whether the router gets the number of KV blocks of each worker.
    pub reports_capacity: bool,
    /// The policy that chooses workers; `None` for the policy in `router`.
    pub policy: Option<PolicySpec>,
    /// The router's source of knowledge about the engines' caches.
    pub cache_signal: CacheSignal,
    /// Whether the router knows the length of each output when the request arrives.
    pub known_output_lengths: bool,
    /// Changes of the fleet during the replay.
    pub changes: Vec<FleetChange>,
    /// Faults of workers during the replay. Only for the router's own policies.
    pub faults: Vec<WorkerFault>,
    /// No request is sent later than this after the first; `None` for no limit.
    pub duration: Option<Duration>,
    /// Limits that decide which requests count as goodput.
    pub slo: Slo,
    /// Whether the outcome has each worker's active blocks over time.
    pub keep_active_blocks: bool,
}

impl ReplayConfig {
    /// Returns a configuration with `workers` engines that differ only in the noise of their step
    /// times. The policy is that of `router`. The workers report their capacity and send KV events
    /// without lag or loss. Fleet changes, faults and a limit of duration are absent, and the SLO is
    /// the default.
    #[must_use]
    pub fn uniform(router: RouterConfig, engine: &EngineConfig, workers: u32) -> Self {
        let single = Self {
            router,
            engines: vec![engine.clone()],
            reports_capacity: true,
            policy: None,
            cache_signal: CacheSignal::default(),
            known_output_lengths: false,
            changes: Vec::new(),
            faults: Vec::new(),
            duration: None,
            slo: Slo::default(),
            keep_active_blocks: false,
        };
        single.with_workers(workers)
    }

    /// Returns this configuration with `workers` copies of the first engine, which differ only in
    /// the noise of their step times. Without engines, the result has none either. Fleet changes
    /// are kept, although they may name workers that no longer exist.
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

    /// Returns this configuration with other random seeds for the router and for each engine. Each
    /// new seed is derived from the current one and `seed`. Seed 0 changes nothing.
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

/// The reason why a replay cannot be run.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum ReplayError {
    /// A setting of the router is invalid.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A worker cannot be added.
    #[error(transparent)]
    Worker(#[from] WorkerError),
    /// A request found no worker.
    #[error(transparent)]
    Route(#[from] RouteError),
    /// An engine's block size is no multiple of the router's, so prefixes would never match.
    #[error(
        "the engine's block size of {engine} tokens is no multiple of the router's, {router}: \
         set --block-size to {engine} or a divisor of it"
    )]
    BlockSize {
        /// Tokens per block of the engine.
        engine: NonZeroU32,
        /// Tokens per block of the router.
        router: NonZeroU32,
    },
    /// A fleet change or a fault names a worker that does not exist.
    #[error(
        "fleet change or fault of worker {worker}: there are {workers} workers, counted from 0"
    )]
    NoSuchWorker {
        /// Index of the worker.
        worker: usize,
        /// Number of workers.
        workers: usize,
    },
    /// Worker faults are combined with a policy that is not one of the router's own.
    #[error("worker faults are simulated for the router's own policies only: change --policy")]
    FaultsUnderBaseline,
    /// The fraction of lost event batches is out of range.
    #[error("the event loss is {loss}: it must be from 0 to 1")]
    Loss {
        /// The invalid fraction.
        loss: f64,
    },
}
