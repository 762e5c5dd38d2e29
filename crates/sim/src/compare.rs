//! Comparison of policies: replays of the same traffic under each policy, once for each seed.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use serde::Serialize;

use crate::baselines::PolicySpec;
use crate::hashed_workload::HashedWorkload;
use crate::measures::{Summary, summarise};
use crate::outcome::Outcome;
use crate::replay::{Progress, ReplayConfig, ReplayError, run_while};
use crate::slo::Slo;

/// Results of one workload under several policies.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Comparison {
    /// The workload's name.
    pub workload: String,
    /// Workers in the fleet.
    pub workers: usize,
    /// Limits that decide which requests count as goodput.
    pub slo: Slo,
    /// Runs of each policy. Each has its own seed.
    pub seeds: usize,
    /// Outcomes of all runs: those of the first policy in the order of their seeds, then those of
    /// the next policy.
    pub outcomes: Vec<Outcome>,
    /// Every measure of every policy: the mean over seeds, and its difference from the best policy.
    pub summary: Vec<Summary>,
    /// Virtual time of all runs together, in seconds.
    pub virtual_seconds: f64,
    /// Real time of all runs together, in seconds.
    pub real_seconds: f64,
}

impl Comparison {
    /// Returns one measure of one policy; `None` if there is no such measure or policy.
    #[must_use]
    pub fn summary_of(&self, measure: &str, policy: &str) -> Option<&Summary> {
        let mut summary = self.summary.iter();
        summary.find(|row| row.measure == measure && row.policy == policy)
    }
}

/// Identity of one run of a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunId {
    /// Index of the case.
    pub case: usize,
    /// Index of the policy.
    pub policy: usize,
    /// Index of the workload in [`Case::traffic`], which is also the seed.
    pub seed: usize,
}

/// A fleet and its traffic, on which policies are compared.
#[derive(Clone, Debug)]
pub struct Case {
    /// Fleet and router. The policy is replaced by each compared one.
    pub config: ReplayConfig,
    /// Workloads, each of which is replayed once under each policy. The index of a workload is
    /// mixed into the seeds of the configuration; nothing else differs between the runs.
    pub traffic: Vec<Arc<HashedWorkload>>,
}

/// Replays each workload of `traffic` once under each of `policies`, on up to `threads` threads.
/// Calls `progress` when a request of a run has ended or has missed the SLO. The policy of `config`
/// is ignored. `progress` may be called from several threads at once. The report's real time is the
/// time of the whole call.
///
/// # Errors
/// The error of [`run`](crate::replay::run), if any replay fails. The other replays are still run
/// to their end.
pub fn compare(
    config: &ReplayConfig,
    policies: &[PolicySpec],
    traffic: &[Arc<HashedWorkload>],
    threads: usize,
    progress: &(dyn Fn(RunId, Progress) + Sync),
) -> Result<Comparison, ReplayError> {
    let started = Instant::now();
    let case = Case {
        config: config.clone(),
        traffic: traffic.to_vec(),
    };
    let mut reports = compare_all(&[case], policies, threads, progress)?;
    let report = reports.pop().unwrap_or_default();
    Ok(Comparison {
        real_seconds: started.elapsed().as_secs_f64(),
        ..report
    })
}

/// Compares `policies` on each of `cases`, on up to `threads` threads, and returns one report for
/// each case in their order. Calls `progress` when a request of a run has ended or has missed the
/// SLO, possibly from several threads at once.
///
/// [`Comparison::real_seconds`] is the total time of the case's runs, divided by the number of
/// threads.
///
/// # Errors
/// The error of [`run`](crate::replay::run), if any replay fails. The other replays are still run
/// to their end.
pub fn compare_all(
    cases: &[Case],
    policies: &[PolicySpec],
    threads: usize,
    progress: &(dyn Fn(RunId, Progress) + Sync),
) -> Result<Vec<Comparison>, ReplayError> {
    let runs: Vec<RunId> = cases
        .iter()
        .enumerate()
        .flat_map(|(index, case)| {
            let seeds = case.traffic.len();
            (0..policies.len() * seeds).map(move |run| RunId {
                case: index,
                policy: run / seeds,
                seed: run % seeds,
            })
        })
        .collect();
    let threads = threads.clamp(1, runs.len().max(1));
    let outcomes = on_threads(threads, runs.len(), &|run| {
        let started = Instant::now();
        let run = runs[run];
        let (case, policy) = (&cases[run.case], &policies[run.policy]);
        let mut config = case.config.with_seed(run.seed as u64);
        config.policy = Some(policy.clone());
        let outcome = run_while(&config, &case.traffic[run.seed], &mut |run_progress| {
            progress(run, run_progress);
            ControlFlow::Continue(())
        })?;
        Ok((outcome, started.elapsed().as_secs_f64()))
    });
    let mut outcomes = outcomes.into_iter();
    let report = |case: &Case| {
        let seeds = case.traffic.len();
        let of_case = outcomes.by_ref().take(policies.len() * seeds);
        let of_case: Vec<(Outcome, f64)> = of_case.collect::<Result<_, ReplayError>>()?;
        let seconds: f64 = of_case.iter().map(|(_, seconds)| seconds).sum();
        let outcomes: Vec<Outcome> = of_case.into_iter().map(|(outcome, _)| outcome).collect();
        let first = case.traffic.first();
        let name = first.map(|traffic| traffic.workload().name.clone());
        Ok(Comparison {
            workload: name.unwrap_or_default(),
            workers: case.config.engines.len(),
            slo: case.config.slo,
            seeds,
            summary: summarise(&outcomes, seeds),
            virtual_seconds: outcomes.iter().map(|outcome| outcome.makespan).sum(),
            outcomes,
            real_seconds: seconds / threads as f64,
        })
    };
    cases.iter().map(report).collect()
}

/// Calls `job` for all indices below `jobs` on up to `threads` threads, and returns the results in
/// the order of the indices. A panic of a job is passed on to the caller. The calling thread is one
/// of them, so 0 threads count as 1.
pub(crate) fn on_threads<T: Send>(
    threads: usize,
    jobs: usize,
    job: &(dyn Fn(usize) -> T + Sync),
) -> Vec<T> {
    let next_index = AtomicUsize::new(0);
    let run_jobs = || {
        let mut results = Vec::new();
        loop {
            let index = next_index.fetch_add(1, Ordering::Relaxed);
            if index >= jobs {
                return results;
            }
            results.push((index, job(index)));
        }
    };
    let threads = threads.clamp(1, jobs.max(1));
    let mut results = std::thread::scope(|scope| {
        let handles: Vec<_> = (1..threads).map(|_| scope.spawn(run_jobs)).collect();
        let mut results = run_jobs();
        for handle in handles {
            match handle.join() {
                Ok(others) => results.extend(others),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        results
    });
    results.sort_unstable_by_key(|(index, _)| *index);
    results.into_iter().map(|(_, result)| result).collect()
}
