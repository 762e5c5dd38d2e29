//! Capacity of a policy: the highest arrival rate, or the smallest number of workers, at which a
//! required fraction of the requests meets the SLO.
//!
//! The search doubles (or halves) its value until the target is missed (or met), then bisects. Each
//! step replays all of the traffic, and stops as soon as too many requests have missed the SLO.

use std::ops::ControlFlow;
use std::sync::Arc;

use serde::Serialize;

use crate::baselines::PolicySpec;
use crate::compare::on_threads;
use crate::hashed_workload::HashedWorkload;
use crate::replay::{ReplayConfig, ReplayError, run_while};
use crate::slo::Slo;
use crate::workload::{InvalidRate, Workload};

/// Quantity that a search maximises or minimises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Highest arrival rate, as a multiple of the traffic's own rate, to within one part in 64.
    Rate,
    /// Smallest number of workers, all of them like the first one of the configuration.
    Workers,
}

/// Capacity of each policy under one workload.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Capacity {
    /// Name of the workload.
    pub workload: String,
    /// Number of workers; `None` if it was the target of the search.
    pub workers: Option<usize>,
    /// Limits that a request must meet.
    pub slo: Slo,
    /// Fraction of the requests, over all seeds, that must meet the SLO.
    pub target: f64,
    /// Results in the order of the given policies.
    pub results: Vec<CapacityResult>,
}

/// Capacity of one policy.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CapacityResult {
    /// Name of the policy.
    pub policy: String,
    /// Highest rate, as a multiple of the traffic's own rate; 0 if the target is missed at every
    /// rate. `None` if the search was for workers.
    pub rate: Option<f64>,
    /// Highest rate, in requests per second. `None` if the search was for workers.
    pub requests_per_second: Option<f64>,
    /// Smallest number of workers. `None` if no number suffices, or if the search was for a rate.
    pub workers: Option<u32>,
}

/// Reason why a search cannot be run.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum CapacityError {
    /// The workload has no arrival rate: all requests arrive at once, or when others end.
    #[error("workload {workload} has no arrival rate: set --rps, or replay a trace")]
    NoRate {
        /// Name of the workload.
        workload: String,
    },
    /// The required fraction of requests is not above 0 and at most 1.
    #[error("the fraction of requests within the SLO must be above 0 and at most 1, got {target}")]
    Target {
        /// Given fraction.
        target: f64,
    },
    /// Fleet changes were given, which refer to workers by index, in a search that changes the
    /// number of workers.
    #[error("fleet changes cannot be used when searching for the smallest number of workers")]
    Changes,
    /// A rate of the search is not valid.
    #[error(transparent)]
    Rate(#[from] InvalidRate),
    /// A replay of the search failed.
    #[error(transparent)]
    Replay(#[from] ReplayError),
}

/// Bound of a search: rates from 1/1024 to 1,024 times the traffic's own, and up to 1,024 times the
/// configured number of workers.
const MAX_SEARCH_FACTOR: u32 = 1024;

/// Finds the capacity of each of `policies` under `traffic`, which has one entry for each seed.
///
/// `fraction` of the requests must meet the SLO. Up to `threads` policies are searched at a time.
/// The policy of `config` is ignored. A search for workers starts at the number of engines of
/// `config` and copies its first engine. `on_step` is called on the thread of the search after all
/// seeds were replayed at one rate or number of workers, with the index of the policy, the rate or
/// the number of workers, and whether the fraction was reached.
///
/// # Errors
/// If `fraction` is not above 0 and at most 1, if no workload has a rate in a search for a rate, if
/// `config` has fleet changes in a search for workers, or if a replay fails.
pub fn find(
    config: &ReplayConfig,
    policies: &[PolicySpec],
    traffic: &[Arc<HashedWorkload>],
    target: Target,
    fraction: f64,
    threads: usize,
    on_step: &(dyn Fn(usize, f64, bool) + Sync),
) -> Result<Capacity, CapacityError> {
    if !(fraction > 0.0 && fraction <= 1.0) {
        return Err(CapacityError::Target { target: fraction });
    }
    let workloads = || traffic.iter().map(|traffic| traffic.workload());
    let name = workloads().next().map(|workload| workload.name.clone());
    let name = name.unwrap_or_default();
    if target == Target::Rate && !workloads().any(Workload::has_rate) {
        return Err(CapacityError::NoRate { workload: name });
    }
    if target == Target::Workers && !config.changes.is_empty() {
        return Err(CapacityError::Changes);
    }
    let own_rate = mean_rate(traffic);
    let results = on_threads(threads, policies.len(), &|index| {
        let mut config = config.clone();
        config.policy = Some(policies[index].clone());
        let search = Search {
            config: &config,
            traffic,
            fraction,
        };
        let mut result = CapacityResult {
            policy: policies[index].to_string(),
            rate: None,
            requests_per_second: None,
            workers: None,
        };
        match target {
            Target::Rate => {
                let on_step = |rate, is_met| on_step(index, rate, is_met);
                let rate = search.highest_rate(&on_step)?;
                result.rate = Some(rate);
                result.requests_per_second = Some(rate * own_rate);
            }
            Target::Workers => {
                let on_step = |workers: u32, is_met| on_step(index, f64::from(workers), is_met);
                result.workers = search.fewest_workers(&on_step)?;
            }
        }
        Ok(result)
    });
    Ok(Capacity {
        workload: name,
        workers: (target == Target::Rate).then_some(config.engines.len()),
        slo: config.slo,
        target: fraction,
        results: results.into_iter().collect::<Result<_, CapacityError>>()?,
    })
}

/// Returns the mean rate of the traffic of all seeds together in requests per second: all requests,
/// over the time from the first to the last arrival at a fixed time.
fn mean_rate(traffic: &[Arc<HashedWorkload>]) -> f64 {
    let (mut requests, mut seconds) = (0, 0.0);
    for traffic in traffic {
        requests += traffic.workload().requests.len();
        seconds += traffic.workload().arrivals_span().as_secs_f64();
    }
    requests as f64 / f64::max(seconds, 1e-9)
}

/// Search for the capacity of one policy.
struct Search<'a> {
    config: &'a ReplayConfig,
    /// Workload of each seed.
    traffic: &'a [Arc<HashedWorkload>],
    /// Fraction of the requests that must meet the SLO.
    fraction: f64,
}

impl Search<'_> {
    /// Returns the highest rate at which the target is met, as a multiple of the traffic's own
    /// rate; 0 if there is none. Assumes that a lower rate misses the SLO less often. The result is
    /// less than 2 × [`MAX_SEARCH_FACTOR`], and 0 below 1 / [`MAX_SEARCH_FACTOR`].
    fn highest_rate(&self, on_step: &dyn Fn(f64, bool)) -> Result<f64, CapacityError> {
        let is_met_at = |rate: f64| {
            let traffic = self.traffic.iter().map(|traffic| traffic.at_rate(rate));
            let traffic: Vec<HashedWorkload> = traffic.collect::<Result<_, _>>()?;
            let is_met = self.meets_target(self.config, traffic.iter())?;
            on_step(rate, is_met);
            Ok::<bool, CapacityError>(is_met)
        };
        let max_rate = f64::from(MAX_SEARCH_FACTOR);
        let (mut low, mut high) = if is_met_at(1.0)? {
            (1.0, 2.0)
        } else {
            (0.5, 1.0)
        };
        while low >= 1.0 && high <= max_rate && is_met_at(high)? {
            (low, high) = (high, high * 2.0);
        }
        while low < 1.0 && !is_met_at(low)? {
            (low, high) = (low / 2.0, low);
            if low < 1.0 / max_rate {
                return Ok(0.0);
            }
        }
        while high - low > low / 64.0 {
            let middle = f64::midpoint(low, high);
            if is_met_at(middle)? {
                low = middle;
            } else {
                high = middle;
            }
        }
        Ok(low)
    }

    /// Returns the smallest number of workers with which the target is met; `None` if
    /// [`MAX_SEARCH_FACTOR`] times the configured number does not suffice. Assumes that more
    /// workers miss the SLO less often.
    fn fewest_workers(&self, on_step: &dyn Fn(u32, bool)) -> Result<Option<u32>, CapacityError> {
        let is_met_with = |workers: u32| {
            let config = self.config.with_workers(workers);
            let is_met = self.meets_target(&config, self.traffic.iter().map(Arc::as_ref))?;
            on_step(workers, is_met);
            Ok::<bool, CapacityError>(is_met)
        };
        let mut enough = self.config.engines.len().max(1) as u32;
        let max_workers = enough.saturating_mul(MAX_SEARCH_FACTOR);
        let mut too_few = 0;
        while !is_met_with(enough)? {
            too_few = enough;
            enough = enough.saturating_mul(2);
            if enough > max_workers {
                return Ok(None);
            }
        }
        while enough - too_few > 1 {
            let middle = too_few.midpoint(enough);
            if is_met_with(middle)? {
                enough = middle;
            } else {
                too_few = middle;
            }
        }
        Ok(Some(enough))
    }

    /// Replays all of the traffic, and returns whether the required fraction of its requests met
    /// the SLO. Stops early once the fraction cannot be reached any more. The position of a
    /// workload in `traffic` is mixed into the seeds of `config`.
    fn meets_target<'t>(
        &self,
        config: &ReplayConfig,
        traffic: impl Iterator<Item = &'t HashedWorkload> + Clone,
    ) -> Result<bool, ReplayError> {
        let lengths = traffic
            .clone()
            .map(|traffic| traffic.workload().requests.len());
        let allowed_misses = self.allowed_misses(lengths.sum());
        let (mut requests, mut missed) = (0, 0);
        for (seed, traffic) in traffic.enumerate() {
            let missed_before = missed;
            let config = config.with_seed(seed as u64);
            let outcome = run_while(&config, traffic, &mut |progress| {
                missed = missed_before + progress.missed;
                if missed > allowed_misses {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            })?;
            if missed > allowed_misses {
                return Ok(false);
            }
            requests += outcome.requests;
        }
        // With a limit of duration there are fewer requests than the traffic has.
        Ok(missed <= self.allowed_misses(requests))
    }

    /// Returns how many of `requests` may miss the SLO.
    fn allowed_misses(&self, requests: usize) -> usize {
        // The subtraction absorbs rounding errors, so that 90 % of ten requests is nine.
        let needed = (self.fraction * requests as f64 - 1e-9).ceil() as usize;
        requests - needed.min(requests)
    }
}
