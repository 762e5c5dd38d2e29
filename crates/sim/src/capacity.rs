//! How much a policy can carry: the highest rate, or the fewest workers, at which enough requests
//! are served within the SLO.

use std::fmt;
use std::ops::ControlFlow;
use std::sync::Arc;

use serde::Serialize;

use crate::compare::on_threads;
use crate::lab::Contender;
use crate::replay::{ReplayConfig, ReplayError, run_while};
use crate::slo::Slo;
use crate::table::write_cells;
use crate::traffic::Traffic;
use crate::workload::InvalidRate;

/// What is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sought {
    /// The highest rate, as a multiple of the traffic's own, within one part in 64.
    Rate,
    /// The fewest workers, all like the first.
    Workers,
}

/// What each policy can carry.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Capacity {
    /// The workload's name.
    pub workload: String,
    /// Workers in the fleet, if they were not what was looked for.
    pub workers: Option<usize>,
    /// What counts as served well.
    pub slo: Slo,
    /// Share of requests, over all seeds, that are to be served well.
    pub target: f64,
    /// One for each policy, in the order asked for.
    pub found: Vec<Found>,
}

/// What one policy can carry.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Found {
    /// The policy's name.
    pub policy: String,
    /// The highest rate, over the traffic's own; 0 if none is low enough.
    pub rate: Option<f64>,
    /// The same in requests a second.
    pub requests_per_second: Option<f64>,
    /// The fewest workers; `None` if there are never enough.
    pub workers: Option<u32>,
}

/// Why there is nothing to be found.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum CapacityError {
    /// All requests come at once, or as others end.
    #[error(
        "{workload} has no rate of arrival to raise: give it one with --rps, or replay a trace"
    )]
    NoRate {
        /// Its name.
        workload: String,
    },
    /// That share can be reached by all or by none.
    #[error("target is {target}: it must be a share above 0 and at most 1")]
    Target {
        /// The share asked for.
        target: f64,
    },
    /// A fleet that is grown and shrunk has no workers to change.
    #[error("fleet changes name workers: they do not go with looking for the fewest")]
    Changes,
    /// A rate of the search.
    #[error(transparent)]
    Rate(#[from] InvalidRate),
    /// A replay.
    #[error(transparent)]
    Replay(#[from] ReplayError),
}

/// Rates this many times the traffic's own, and as small a part of it, are looked at, and no more
/// workers than that times those there are.
const WIDEST: u32 = 1024;

/// Finds what each of `policies` can carry of `traffic`, several policies at a time. Each step of
/// the search is a replay of all of `traffic`, broken off as soon as too many requests missed.
/// `step` is told of each: the policy's index, what was tried, and whether it was carried.
///
/// # Errors
/// When there is nothing to be found, or a replay fails.
pub fn find(
    config: &ReplayConfig,
    policies: &[Contender],
    traffic: &[Arc<Traffic>],
    sought: Sought,
    target: f64,
    threads: usize,
    step: &(dyn Fn(usize, f64, bool) + Sync),
) -> Result<Capacity, CapacityError> {
    if !(target > 0.0 && target <= 1.0) {
        return Err(CapacityError::Target { target });
    }
    let name = traffic.first().map(|it| it.workload().name.clone());
    let workload = name.unwrap_or_default();
    if sought == Sought::Rate && !traffic.iter().any(|it| it.workload().has_rate()) {
        return Err(CapacityError::NoRate { workload });
    }
    if sought == Sought::Workers && !config.changes.is_empty() {
        return Err(CapacityError::Changes);
    }
    let own_rate = mean_rate(traffic);
    let found = on_threads(threads, policies.len(), &|index| {
        let mut config = config.clone();
        config.contender = Some(policies[index].clone());
        let search = Search {
            config: &config,
            traffic,
            target,
        };
        let mut found = Found {
            policy: policies[index].to_string(),
            rate: None,
            requests_per_second: None,
            workers: None,
        };
        match sought {
            Sought::Rate => {
                let rate = search.highest_rate(&|rate, carried| step(index, rate, carried))?;
                found.rate = Some(rate);
                found.requests_per_second = Some(rate * own_rate);
            }
            Sought::Workers => {
                let told = |workers: u32, carried| step(index, f64::from(workers), carried);
                found.workers = search.fewest_workers(&told)?;
            }
        }
        Ok(found)
    });
    Ok(Capacity {
        workload,
        workers: (sought == Sought::Rate).then_some(config.engines.len()),
        slo: config.slo,
        target,
        found: found.into_iter().collect::<Result<_, CapacityError>>()?,
    })
}

/// Requests a second from the first arrival at a time to the last, followers included.
fn mean_rate(traffic: &[Arc<Traffic>]) -> f64 {
    let (mut requests, mut seconds) = (0, 0.0);
    for traffic in traffic {
        requests += traffic.workload().requests.len();
        seconds += traffic.workload().arrivals_span().as_secs_f64();
    }
    requests as f64 / f64::max(seconds, 1e-9)
}

struct Search<'a> {
    config: &'a ReplayConfig,
    traffic: &'a [Arc<Traffic>],
    target: f64,
}

impl Search<'_> {
    fn highest_rate(&self, step: &dyn Fn(f64, bool)) -> Result<f64, CapacityError> {
        let carries = |rate: f64| {
            let traffic = self.traffic.iter().map(|it| it.at_rate(rate));
            let traffic: Vec<Traffic> = traffic.collect::<Result<_, _>>()?;
            let carried = self.carries(self.config, traffic.iter())?;
            step(rate, carried);
            Ok::<bool, CapacityError>(carried)
        };
        let widest = f64::from(WIDEST);
        let (mut low, mut high) = if carries(1.0)? {
            (1.0, 2.0)
        } else {
            (0.5, 1.0)
        };
        while low >= 1.0 && high <= widest && carries(high)? {
            (low, high) = (high, high * 2.0);
        }
        while low < 1.0 && !carries(low)? {
            (low, high) = (low / 2.0, low);
            if low < 1.0 / widest {
                return Ok(0.0);
            }
        }
        while high - low > low / 64.0 {
            let middle = f64::midpoint(low, high);
            if carries(middle)? {
                low = middle;
            } else {
                high = middle;
            }
        }
        Ok(low)
    }

    fn fewest_workers(&self, step: &dyn Fn(u32, bool)) -> Result<Option<u32>, CapacityError> {
        let carries = |workers: u32| {
            let config = self.config.with_workers(workers);
            let carried = self.carries(&config, self.traffic.iter().map(Arc::as_ref))?;
            step(workers, carried);
            Ok::<bool, CapacityError>(carried)
        };
        let mut enough = self.config.engines.len().max(1) as u32;
        let most = enough.saturating_mul(WIDEST);
        let mut too_few = 0;
        while !carries(enough)? {
            too_few = enough;
            enough = enough.saturating_mul(2);
            if enough > most {
                return Ok(None);
            }
        }
        while enough - too_few > 1 {
            let middle = too_few.midpoint(enough);
            if carries(middle)? {
                enough = middle;
            } else {
                too_few = middle;
            }
        }
        Ok(Some(enough))
    }

    /// Whether enough of all requests are served well.
    fn carries<'t>(
        &self,
        config: &ReplayConfig,
        traffic: impl Iterator<Item = &'t Traffic> + Clone,
    ) -> Result<bool, ReplayError> {
        let requests: usize = traffic.clone().map(|it| it.workload().requests.len()).sum();
        // Rounded against float noise, so that 90 % of ten is nine.
        let needed = (self.target * requests as f64 - 1e-9).ceil() as usize;
        let mut left = requests - needed.min(requests);
        for (seed, traffic) in traffic.enumerate() {
            let mut missed = 0;
            run_while(&config.with_seed(seed as u64), traffic, &mut |it| {
                missed = it.missed;
                if missed > left {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            })?;
            if missed > left {
                return Ok(false);
            }
            left -= missed;
        }
        Ok(true)
    }
}

/// The policies side by side.
impl fmt::Display for Capacity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let policies: Vec<&str> = self.found.iter().map(|it| it.policy.as_str()).collect();
        let row = |show: fn(&Found) -> String| self.found.iter().map(show).collect();
        let mut rows: Vec<(&str, Vec<String>)> = Vec::new();
        let title = if let Some(workers) = self.workers {
            rows.push(("highest rate, times", row(|it| number(it.rate))));
            rows.push(("  requests/s", row(|it| number(it.requests_per_second))));
            format!("{}, {workers} workers", self.workload)
        } else {
            let workers = |it: &Found| it.workers.map_or("-".to_owned(), |it| it.to_string());
            rows.push(("fewest workers", row(workers)));
            self.workload.clone()
        };
        write_cells(f, &title, &policies, &rows)?;
        let percent = self.target * 100.0;
        writeln!(f, "for {percent} % of requests within {}", self.slo)
    }
}

fn number(value: Option<f64>) -> String {
    value.map_or("-".to_owned(), |it| format!("{it:.2}"))
}
