//! Past of the fleet and of each worker, in rings of fixed size.
//!
//! 512 workers take about 0.7 MB. The series of a worker that was removed go with it.

use std::collections::{HashMap, VecDeque};

use foresee_api::dashboard::{FleetSample, FleetSeries, History, WorkerSeries};
use foresee_core::workers::{WorkerId, WorkerSnapshot};

use super::percentile::Percentiles;

/// Number of samples of one second.
const SECONDS: usize = 600;

/// Number of samples of one minute.
const MINUTES: usize = 720;

/// Number of seconds of a minute's sample.
const SECONDS_PER_MINUTE: usize = 60;

/// Number of seconds between two samples of a worker.
const WORKER_STEP: u64 = 10;

/// Number of samples of each worker: one hour.
const WORKER_SAMPLES: usize = 360;

/// Number of samples of each worker in the history of all workers: five minutes.
const SPARKLINE_SAMPLES: usize = 30;

/// Past of the fleet and its workers.
#[derive(Debug, Default)]
pub(super) struct HistoryRings {
    seconds: VecDeque<FleetSample>,
    minutes: VecDeque<FleetSample>,
    /// Samples of the minute that has not ended.
    this_minute: Vec<FleetSample>,
    /// Times to first token of that minute.
    ttft: Percentiles,
    /// Times between output tokens of that minute.
    itl: Percentiles,
    workers: HashMap<WorkerId, WorkerRing>,
    /// Number of samples so far.
    samples: u64,
    /// Time of the last sample of the workers.
    workers_at: f64,
}

/// Past of one worker.
#[derive(Debug, Default)]
struct WorkerRing {
    name: String,
    requests: VecDeque<u16>,
    active_permille: VecDeque<u16>,
}

impl HistoryRings {
    /// Adds the sample of a second, with the latencies, in seconds, of the requests that ended in it.
    pub(super) fn push(
        &mut self,
        sample: FleetSample,
        workers: &[WorkerSnapshot],
        ttft: &Percentiles,
        itl: &Percentiles,
    ) {
        push_bounded(&mut self.seconds, sample, SECONDS);
        self.this_minute.push(sample);
        self.ttft.extend(ttft);
        self.itl.extend(itl);
        if self.this_minute.len() == SECONDS_PER_MINUTE {
            let (ttft, itl) = (
                std::mem::take(&mut self.ttft),
                std::mem::take(&mut self.itl),
            );
            let minute = FleetSample {
                ttft_p50: ttft.at(0.5),
                ttft_p99: ttft.at(0.99),
                itl_p50: itl.at(0.5),
                itl_p99: itl.at(0.99),
                ..FleetSample::mean_of(&self.this_minute)
            };
            push_bounded(&mut self.minutes, minute, MINUTES);
            self.this_minute.clear();
        }
        if self.samples.is_multiple_of(WORKER_STEP) {
            self.workers_at = sample.time;
            self.push_workers(workers);
        }
        self.samples += 1;
    }

    /// Adds a sample of each worker, and removes the past of all others.
    fn push_workers(&mut self, workers: &[WorkerSnapshot]) {
        let mut known = std::mem::take(&mut self.workers);
        for worker in workers {
            let mut ring = known.remove(&worker.id).unwrap_or_else(|| WorkerRing {
                name: worker.name.to_string(),
                ..WorkerRing::default()
            });
            let requests = u16::try_from(worker.requests).unwrap_or(u16::MAX);
            let capacity = u64::from(worker.capacity_blocks).max(1);
            let permille = worker.active_blocks.saturating_mul(1000) / capacity;
            let permille = u16::try_from(permille).unwrap_or(u16::MAX);
            push_bounded(&mut ring.requests, requests, WORKER_SAMPLES);
            push_bounded(&mut ring.active_permille, permille, WORKER_SAMPLES);
            self.workers.insert(worker.id, ring);
        }
    }

    /// Returns the samples of the fleet that are later than `since`, and the last minutes of all
    /// workers.
    pub(super) fn of_fleet(&self, since: f64) -> History {
        let series = |samples: &VecDeque<FleetSample>| {
            let mut series = FleetSeries::default();
            let later = samples.iter().filter(|sample| sample.time > since);
            later.for_each(|sample| series.push(sample));
            series
        };
        let mut workers: Vec<_> = self
            .workers
            .values()
            .map(|ring| self.series(ring, SPARKLINE_SAMPLES))
            .collect();
        workers.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        History {
            seconds: series(&self.seconds),
            minutes: series(&self.minutes),
            workers,
        }
    }

    /// Returns the last hour of the worker with this name, if there is one.
    pub(super) fn of_worker(&self, name: &str) -> Option<WorkerSeries> {
        let ring = self.workers.values().find(|ring| ring.name == name)?;
        Some(self.series(ring, WORKER_SAMPLES))
    }

    /// Returns the last `count` samples of a worker.
    fn series(&self, ring: &WorkerRing, count: usize) -> WorkerSeries {
        let last = |values: &VecDeque<u16>| {
            let skipped = values.len().saturating_sub(count);
            values.iter().skip(skipped).copied().collect()
        };
        WorkerSeries {
            name: ring.name.clone(),
            end: self.workers_at,
            step: WORKER_STEP as f64,
            requests: last(&ring.requests),
            active_permille: last(&ring.active_permille),
        }
    }
}

/// Adds a value at the end of a ring, and removes the first one if there are more than `limit`.
fn push_bounded<T>(ring: &mut VecDeque<T>, value: T, limit: usize) {
    if ring.len() == limit {
        ring.pop_front();
    }
    ring.push_back(value);
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use foresee_core::router::{Router, RouterConfig};
    use foresee_core::workers::WorkerSpec;

    use super::*;

    fn sample(second: usize) -> FleetSample {
        FleetSample {
            time: second as f64,
            running: Some(second as f32),
            ..FleetSample::default()
        }
    }

    #[test]
    fn rings_are_bounded_and_minutes_are_means() {
        let mut history = HistoryRings::default();
        let none = Percentiles::default();
        for second in 1..=(60 * (MINUTES + 3)) {
            let mut ttft = Percentiles::default();
            ttft.add(second as f32);
            history.push(sample(second), &[], &ttft, &none);
        }
        let all = history.of_fleet(0.0);
        assert_eq!(
            (all.seconds.time.len(), all.minutes.time.len()),
            (SECONDS, MINUTES)
        );
        let last = 60 * (MINUTES + 3);
        assert_eq!(all.minutes.time.last(), Some(&(last as f64)));
        assert_eq!(all.minutes.running.last(), Some(&Some(last as f32 - 29.5)));
        assert_eq!(all.minutes.ttft_p50.last(), Some(&Some(last as f32 - 29.0)));
        assert_eq!(all.minutes.itl_p50.last(), Some(&None));
        let recent = history.of_fleet(last as f64 - 2.0);
        assert_eq!(recent.seconds.time, [last as f64 - 1.0, last as f64]);
        assert_eq!(recent.minutes.time, [last as f64]);
    }

    #[test]
    fn the_past_of_a_removed_worker_goes() {
        let router = Router::new(RouterConfig::default()).unwrap();
        let add = |name: &str| {
            let name = name.to_owned();
            router
                .add_worker(WorkerSpec {
                    name,
                    ..WorkerSpec::default()
                })
                .unwrap()
        };
        let (first, _second) = (add("a"), add("b"));
        let mut history = HistoryRings::default();
        let none = Percentiles::default();
        for second in 0..20 {
            let workers = router.workers(Duration::ZERO);
            history.push(sample(second), &workers, &none, &none);
        }
        assert_eq!(history.of_worker("a").unwrap().requests, [0, 0]);
        router.remove_worker(first);
        for second in 20..40 {
            let workers = router.workers(Duration::ZERO);
            history.push(sample(second), &workers, &none, &none);
        }
        assert!(history.of_worker("a").is_none());
        assert_eq!(history.of_worker("b").unwrap().requests.len(), 4);
        assert_eq!(history.of_fleet(0.0).workers.len(), 1);
    }
}
