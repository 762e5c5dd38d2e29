//! The load of the fleet, and how many workers it needs: the signal that an autoscaler follows.

use std::num::NonZeroU32;
use std::time::Duration;

use foresee_core::workers::{WorkerSnapshot, WorkerState};
use foresee_core::{DemandForecast, LatencyLimits, sustainable_rate};
use parking_lot::Mutex;

/// Objectives of the fleet, and how early its size is forecast.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AutoscalingConfig {
    /// Limit for the time to first token of 95 % of the requests.
    pub slo_ttft: Duration,
    /// Limit for the mean time between two output tokens.
    pub slo_itl: Duration,
    /// Time after which the load is forecast: about the time in which a worker starts.
    pub horizon: Duration,
}

impl Default for AutoscalingConfig {
    fn default() -> Self {
        Self {
            slo_ttft: Duration::from_secs(2),
            slo_itl: Duration::from_millis(60),
            horizon: Duration::from_secs(60),
        }
    }
}

/// Load of the fleet.
#[derive(Debug)]
pub(crate) struct FleetDemand {
    forecast: Mutex<DemandForecast>,
    config: AutoscalingConfig,
    /// The router's block size.
    block_size: NonZeroU32,
}

/// Size that the fleet should have.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct FleetNeed {
    /// Requests per second after the horizon.
    pub(crate) requests_per_second: f64,
    /// Number of workers that this load needs, not rounded.
    pub(crate) workers: f64,
    /// Requests per second that each worker sustains within the limits, in the order of the workers.
    /// Empty before the first response has ended.
    pub(crate) sustained: Vec<f64>,
}

impl FleetDemand {
    /// Creates the load of a fleet that has served no request.
    pub(crate) fn new(config: AutoscalingConfig, block_size: NonZeroU32) -> Self {
        Self {
            forecast: Mutex::default(),
            config,
            block_size,
        }
    }

    /// Counts a request that arrives `now`, also if it is refused because no worker is free.
    pub(crate) fn observe_arrival(&self, now: Duration) {
        self.forecast.lock().observe_arrival(now);
    }

    /// Adds the lengths of a request that has ended. `cached_tokens` of its prompt were not computed.
    pub(crate) fn observe_lengths(
        &self,
        prompt_tokens: u32,
        cached_tokens: u32,
        output_tokens: u32,
    ) {
        let new_tokens = prompt_tokens.saturating_sub(cached_tokens);
        let mut forecast = self.forecast.lock();
        forecast.observe_lengths(prompt_tokens, new_tokens, output_tokens);
    }

    /// Returns the size that a fleet of workers like `workers` should have. Workers that cannot be
    /// chosen count for what a worker sustains, because they may be of the same kind. Before the first
    /// response has ended, this is the number of healthy workers if any request has arrived, because
    /// nothing speaks for another number.
    pub(crate) fn need(&self, workers: &[WorkerSnapshot], now: Duration) -> FleetNeed {
        let mut forecast = self.forecast.lock();
        let requests_per_second = forecast.requests_per_second(now, self.config.horizon);
        let lengths = forecast.mean_lengths();
        drop(forecast);
        let (Some(lengths), false) = (lengths, workers.is_empty()) else {
            let healthy = workers
                .iter()
                .filter(|worker| worker.state == WorkerState::Healthy);
            let healthy = healthy.count() as f64;
            return FleetNeed {
                requests_per_second,
                workers: if requests_per_second > 0.0 {
                    healthy
                } else {
                    0.0
                },
                sustained: Vec::new(),
            };
        };
        let limits = LatencyLimits {
            ttft: Some(self.config.slo_ttft.as_secs_f64()),
            itl: Some(self.config.slo_itl.as_secs_f64()),
        };
        let block_size = f64::from(self.block_size.get());
        let sustained: Vec<f64> = workers
            .iter()
            .map(|worker| {
                let capacity_tokens = f64::from(worker.capacity_blocks) * block_size;
                sustainable_rate(&worker.latency, capacity_tokens, &lengths, &limits)
            })
            .collect();
        let mean = sustained.iter().sum::<f64>() / sustained.len() as f64;
        FleetNeed {
            requests_per_second,
            workers: requests_per_second / mean,
            sustained,
        }
    }
}
