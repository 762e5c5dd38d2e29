//! Replays many cases under many policies, with one progress bar.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use foresee_report::grid::{Grid, Row};
use foresee_sim::baselines::PolicySpec;
use foresee_sim::compare::{Case, compare_all};

use crate::progress;

/// A case, with the heading of its row.
pub(super) struct NamedCase {
    pub(super) name: String,
    pub(super) description: String,
    /// Arrival rate as a multiple of the traffic's own, in a sweep.
    pub(super) rate: Option<f64>,
    pub(super) case: Case,
}

/// Replays all cases under all policies, on up to `threads` threads. Returns one row for each case,
/// in order. `left_out` lists scenarios that the report mentions as not replayed, each with the
/// reason.
///
/// # Errors
/// If any replay fails.
pub(super) fn replay(
    named: Vec<NamedCase>,
    policies: &[PolicySpec],
    left_out: Vec<String>,
    threads: usize,
) -> anyhow::Result<Grid> {
    let start = Instant::now();
    let cases: Vec<Case> = named.iter().map(|named| named.case.clone()).collect();
    let traffic = cases.iter().flat_map(|case| &case.traffic);
    let requests: usize = traffic
        .map(|traffic| traffic.workload().requests.len())
        .sum();
    let bar = progress::bar("requests", requests * policies.len())?;
    let max_seeds = cases
        .iter()
        .map(|case| case.traffic.len())
        .max()
        .unwrap_or(0);
    // Requests of each run that the bar already counts.
    let counted: Vec<AtomicU64> = (0..cases.len() * policies.len() * max_seeds)
        .map(|_| AtomicU64::new(0))
        .collect();
    let reports = compare_all(&cases, policies, threads, &|position, progress| {
        let run = (position.case * policies.len() + position.policy) * max_seeds + position.seed;
        let ended = progress.ended as u64;
        bar.inc(ended - counted[run].swap(ended, Ordering::Relaxed));
    })?;
    bar.finish_and_clear();
    let rows = named.into_iter().zip(reports).map(|(named, report)| Row {
        name: named.name,
        description: named.description,
        rate: named.rate,
        report,
    });
    Ok(Grid::new(
        policies.iter().map(ToString::to_string).collect(),
        rows.collect(),
        left_out,
        start.elapsed().as_secs_f64(),
    ))
}
