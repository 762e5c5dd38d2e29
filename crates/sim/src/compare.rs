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
    /// Index of the policy.
    pub policy: usize,
    /// Index of the traffic.
    pub seed: usize,
}

/// Replays each of `traffic` once under each of `policies`, on up to `threads` threads. The
/// traffic at index `n` is replayed with seeds that are those of `config` and `n`; everything else
/// is the same for all.
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
    let seeds = traffic.len();
    let outcomes = on_threads(threads, policies.len() * seeds, &|job| {
        let which = Which {
            policy: job / seeds,
            seed: job % seeds,
        };
        let mut config = config.with_seed(which.seed as u64);
        config.contender = Some(policies[which.policy].clone());
        run_while(&config, &traffic[which.seed], &mut |it| {
            progress(which, it);
            ControlFlow::Continue(())
        })
    });
    let outcomes: Vec<Outcome> = outcomes.into_iter().collect::<Result<_, _>>()?;
    let name = traffic.first().map(|it| it.workload().name.clone());
    Ok(Report {
        workload: name.unwrap_or_default(),
        workers: config.engines.len(),
        slo: config.slo,
        seeds,
        summary: summarise(&outcomes, seeds),
        virtual_seconds: outcomes.iter().map(|it| it.makespan).sum(),
        outcomes,
        real_seconds: began.elapsed().as_secs_f64(),
    })
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
