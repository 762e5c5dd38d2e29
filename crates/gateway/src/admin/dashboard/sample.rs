//! Measures the fleet once a second: rates from counters, percentiles from the requests that ended,
//! and the cache hits of each worker.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use foresee_api::dashboard::FleetSample;
use foresee_core::workers::{WorkerId, WorkerSnapshot, WorkerState};

use super::percentile::Percentiles;
use crate::metrics::{Metrics, Outcome};
use crate::placement::ended_requests::EndedRequest;

/// Outcomes whose rates are shown.
const OUTCOMES: [Outcome; 6] = [
    Outcome::Ok,
    Outcome::Refused,
    Outcome::Unavailable,
    Outcome::WorkerError,
    Outcome::WorkerFailed,
    Outcome::ClientLeft,
];

/// Factor by which a worker's sums of hits decrease in one second: by half in about two minutes.
const HIT_DECAY: f64 = 0.994;

/// Sum of blocks below which no fraction of hits is shown.
const MIN_HIT_BLOCKS: f64 = 0.5;

/// Counters at one moment.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    outcomes: [u64; OUTCOMES.len()],
    prompt_tokens: u64,
    output_tokens: u64,
}

impl Counts {
    /// Reads the counters.
    pub(super) fn read(metrics: &Metrics) -> Self {
        Self {
            outcomes: OUTCOMES.map(|outcome| metrics.outcome_count(outcome)),
            prompt_tokens: metrics.prompt_tokens.get(),
            output_tokens: metrics.output_tokens.get(),
        }
    }
}

/// Blocks of prompts, recent ones above all.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct HitSums {
    /// Blocks of all prompts, and the blocks that were predicted to be cached.
    all: [f64; 2],
    /// Blocks of the prompts whose hits the engine reported, the blocks that were predicted to be
    /// cached, and the blocks that were cached.
    reported: [f64; 3],
}

impl HitSums {
    /// Adds a request.
    fn add(&mut self, request: &EndedRequest) {
        let blocks = f64::from(request.prompt_blocks);
        let predicted = f64::from(request.predicted_blocks);
        self.all[0] += blocks;
        self.all[1] += predicted;
        if let Some(actual) = request.actual_blocks {
            self.reported[0] += blocks;
            self.reported[1] += predicted;
            self.reported[2] += f64::from(actual);
        }
    }

    /// Makes earlier requests count less.
    fn decay(&mut self) {
        let all = self.all.iter_mut().chain(&mut self.reported);
        all.for_each(|sum| *sum *= HIT_DECAY);
    }

    /// Returns the predicted and the reported fraction of cached blocks: of the same prompts, if the
    /// engine reports hits. `None` is a fraction that is not known.
    pub(super) fn fractions(&self) -> (Option<f64>, Option<f64>) {
        let fraction = |part: f64, whole: f64| (whole > MIN_HIT_BLOCKS).then(|| part / whole);
        match fraction(self.reported[2], self.reported[0]) {
            Some(actual) => (fraction(self.reported[1], self.reported[0]), Some(actual)),
            None => (fraction(self.all[1], self.all[0]), None),
        }
    }
}

/// A sample of the fleet, with the latencies that its percentiles are of.
#[derive(Debug)]
pub(super) struct Measured {
    pub(super) sample: FleetSample,
    /// Times to first token, in seconds.
    pub(super) ttft: Percentiles,
    /// Mean times between output tokens, in seconds.
    pub(super) itl: Percentiles,
}

/// State from one sample to the next.
#[derive(Debug, Default)]
pub(super) struct FleetSampler {
    counts: Counts,
    sampled_at: Duration,
    hits: HashMap<WorkerId, HitSums>,
}

impl FleetSampler {
    /// Returns the recent hits of a worker.
    pub(super) fn hits(&self, worker: WorkerId) -> HitSums {
        self.hits.get(&worker).copied().unwrap_or_default()
    }

    /// Measures the time since the last call. `now` is a time of the gateway's clock, and `time` the
    /// same in seconds since the Unix epoch.
    pub(super) fn measure(
        &mut self,
        now: Duration,
        time: f64,
        workers: &[WorkerSnapshot],
        ended: &[EndedRequest],
        counts: Counts,
    ) -> Measured {
        let seconds = now.saturating_sub(self.sampled_at).as_secs_f64().max(1e-3);
        let before = std::mem::replace(&mut self.counts, counts);
        self.sampled_at = now;
        let rate =
            |after: u64, before: u64| Some((after.saturating_sub(before) as f64 / seconds) as f32);
        let outcome = |index: usize| rate(counts.outcomes[index], before.outcomes[index]);

        let (mut ttft, mut itl) = (Percentiles::default(), Percentiles::default());
        let mut hits = HitSums::default();
        let present: HashSet<WorkerId> = workers.iter().map(|worker| worker.id).collect();
        self.hits.retain(|id, _| present.contains(id));
        self.hits.values_mut().for_each(HitSums::decay);
        for request in ended {
            let seconds = |time: Duration| time.as_secs_f32();
            request
                .ttft
                .map(seconds)
                .into_iter()
                .for_each(|time| ttft.add(time));
            request
                .token_interval
                .map(seconds)
                .into_iter()
                .for_each(|time| itl.add(time));
            hits.add(request);
            self.hits.entry(request.worker).or_default().add(request);
        }
        let (hits_predicted, hits_actual) = hits.fractions();

        let healthy = || {
            workers
                .iter()
                .filter(|worker| worker.state == WorkerState::Healthy)
        };
        let sum = |value: fn(&WorkerSnapshot) -> u64| workers.iter().map(value).sum::<u64>();
        let queued = sum(|worker| worker.queued_requests.into());
        let active = sum(|worker| worker.active_blocks) as f64;
        let capacity = sum(|worker| worker.capacity_blocks.into()).max(1) as f64;
        let used = |worker: &WorkerSnapshot| {
            worker.active_blocks as f64 / f64::from(worker.capacity_blocks.max(1))
        };
        let wait = |worker: &WorkerSnapshot| worker.prefill_backlog.as_secs_f64();
        let healthy_count = healthy().count();
        let max = |value: &dyn Fn(&WorkerSnapshot) -> f64| healthy().map(value).fold(0.0, f64::max);
        let sample = FleetSample {
            time,
            healthy: Some(healthy_count as f32),
            running: Some(sum(|worker| worker.requests.into()).saturating_sub(queued) as f32),
            queued: Some(queued as f32),
            kv_mean: Some((active / capacity) as f32),
            kv_max: Some(max(&used) as f32),
            wait_mean: Some(
                (healthy().map(wait).sum::<f64>() / healthy_count.max(1) as f64) as f32,
            ),
            wait_max: Some(max(&wait) as f32),
            ttft_p50: ttft.at(0.5),
            ttft_p99: ttft.at(0.99),
            itl_p50: itl.at(0.5),
            itl_p99: itl.at(0.99),
            prompt_tokens: rate(counts.prompt_tokens, before.prompt_tokens),
            output_tokens: rate(counts.output_tokens, before.output_tokens),
            hits_predicted: hits_predicted.map(|hits| hits as f32),
            hits_actual: hits_actual.map(|hits| hits as f32),
            ok: outcome(0),
            refused: outcome(1),
            unavailable: outcome(2),
            worker_error: outcome(3),
            worker_failed: outcome(4),
            client_left: outcome(5),
        };
        Measured { sample, ttft, itl }
    }
}
