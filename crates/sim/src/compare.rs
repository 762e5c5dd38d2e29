//! Replays of the same traffic under several policies, several times with other seeds.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use crate::lab::Contender;
use crate::replay::{Progress, ReplayConfig, ReplayError, run_while};
use crate::report::{Outcome, Report, summarise};
use crate::traffic::Traffic;

/// Which of the runs of a comparison is told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Which {
    /// Index of the case.
    pub case: usize,
    /// Index of the policy.
    pub policy: usize,
    /// Index of the traffic.
    pub seed: usize,
}

/// What policies are compared on.
#[derive(Clone, Debug)]
pub struct Case {
    /// The fleet. Its policy is that of whoever is compared.
    pub config: ReplayConfig,
    /// Replayed once each. The traffic at index `n` is replayed with seeds that are those of the
    /// configuration and `n`; everything else is the same for all.
    pub traffic: Vec<Arc<Traffic>>,
}

/// Replays each of `traffic` once under each of `policies`, on up to `threads` threads.
///
/// # Errors
/// As [`run`](crate::replay::run), for any of them.
pub fn compare(
    config: &ReplayConfig,
    policies: &[Contender],
    traffic: &[Arc<Traffic>],
    threads: usize,
    progress: &(dyn Fn(Which, Progress) + Sync),
) -> Result<Report, ReplayError> {
    let began = Instant::now();
    let case = Case {
        config: config.clone(),
        traffic: traffic.to_vec(),
    };
    let mut reports = compare_all(&[case], policies, threads, progress)?;
    let report = reports.pop().unwrap_or_default();
    Ok(Report {
        real_seconds: began.elapsed().as_secs_f64(),
        ..report
    })
}

/// The same for several cases: a report for each, in their order, in which the time it took is
/// that of its runs, shared among the threads.
///
/// # Errors
/// As [`compare`].
pub fn compare_all(
    cases: &[Case],
    policies: &[Contender],
    threads: usize,
    progress: &(dyn Fn(Which, Progress) + Sync),
) -> Result<Vec<Report>, ReplayError> {
    let runs: Vec<Which> = cases
        .iter()
        .enumerate()
        .flat_map(|(case, it)| {
            let seeds = it.traffic.len();
            (0..policies.len() * seeds).map(move |run| Which {
                case,
                policy: run / seeds,
                seed: run % seeds,
            })
        })
        .collect();
    let threads = threads.clamp(1, runs.len().max(1));
    let outcomes = on_threads(threads, runs.len(), &|run| {
        let began = Instant::now();
        let which = runs[run];
        let (case, policy) = (&cases[which.case], &policies[which.policy]);
        let mut config = case.config.with_seed(which.seed as u64);
        config.contender = Some(policy.clone());
        let outcome = run_while(&config, &case.traffic[which.seed], &mut |it| {
            progress(which, it);
            ControlFlow::Continue(())
        })?;
        Ok((outcome, began.elapsed().as_secs_f64()))
    });
    let mut outcomes = outcomes.into_iter();
    let report = |case: &Case| {
        let seeds = case.traffic.len();
        let its = outcomes.by_ref().take(policies.len() * seeds);
        let its: Vec<(Outcome, f64)> = its.collect::<Result<_, ReplayError>>()?;
        let seconds: f64 = its.iter().map(|(_, seconds)| seconds).sum();
        let outcomes: Vec<Outcome> = its.into_iter().map(|(outcome, _)| outcome).collect();
        let name = case.traffic.first().map(|it| it.workload().name.clone());
        Ok(Report {
            workload: name.unwrap_or_default(),
            workers: case.config.engines.len(),
            slo: case.config.slo,
            seeds,
            summary: summarise(&outcomes, seeds),
            virtual_seconds: outcomes.iter().map(|it| it.makespan).sum(),
            outcomes,
            real_seconds: seconds / threads as f64,
        })
    };
    cases.iter().map(report).collect()
}

/// Does the jobs of indices below `jobs`, several at a time, and returns what they returned, in
/// the order of their indices.
pub(crate) fn on_threads<T: Send>(
    threads: usize,
    jobs: usize,
    job: &(dyn Fn(usize) -> T + Sync),
) -> Vec<T> {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= jobs {
                return done;
            }
            done.push((index, job(index)));
        }
    };
    let threads = threads.clamp(1, jobs.max(1));
    let mut done = std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let mut done = work();
        for other in others {
            match other.join() {
                Ok(more) => done.extend(more),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        done
    });
    done.sort_unstable_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, it)| it).collect()
}
