//! Measures of a replay: samples while it runs, and the outcome.

use std::time::Duration;

use foresee_core::workers::WorkerSnapshot;

use super::Replay;
use crate::outcome::{Goodput, Latency, Outcome, imbalance};
use crate::prediction::{BookedRequest, unallocated};
use crate::step_time::BatchLoad;

impl Replay<'_> {
    /// Samples router and engines at the instants before `now`, and scrapes the metrics for the
    /// baseline. The state of router and engines has not changed since the last event.
    pub(super) fn sample_before(&mut self, now: Duration) {
        if let Some(driver) = &mut self.driver {
            let workers = self.workers.iter();
            let engines = workers.map(|worker| (&worker.engine, worker.engine_block_ratio.get()));
            driver.scrape_before(now, engines);
        }
        while let Some(instant) = self.sampler.due_before(now) {
            let snapshots = self.router.workers(instant);
            self.compare_forecasts(instant, &snapshots);
            let flights = &self.in_flight;
            let workers = &self.workers;
            let block_size = self.workload.block_size().get();
            let samples = snapshots.iter().filter_map(|snapshot| {
                let worker = &workers[*self.by_id.get(&snapshot.id)?];
                let (engine, ratio) = (&worker.engine, worker.engine_block_ratio.get());
                let booked: Vec<BookedRequest<'_>> = engine
                    .in_flight()
                    .filter_map(|request| {
                        let flight = flights[request.id as usize].as_ref()?;
                        let sequence = flight.booking.prompt();
                        let shareable = engine.config().prefix_caching;
                        Some(BookedRequest {
                            hashes: if shareable { sequence.hashes() } else { &[] },
                            blocks: (sequence.tokens() + flight.generated).div_ceil(block_size),
                            engine_blocks: request.running.then_some(request.blocks * ratio),
                        })
                    })
                    .collect();
                Some((
                    snapshot.active_blocks,
                    engine.pinned_blocks() * ratio,
                    unallocated(&booked),
                ))
            });
            self.sampler.take(samples);
        }
    }

    /// Compares the router's latency models and output lengths with the engines' actual values.
    /// `snapshots` are the workers in the router at `now`.
    fn compare_forecasts(&mut self, now: Duration, snapshots: &[WorkerSnapshot]) {
        self.forecast_monitor
            .take_lengths(self.router.output_length_accuracy());
        for snapshot in snapshots {
            let Some(&index) = self.by_id.get(&snapshot.id) else {
                continue;
            };
            let worker = &self.workers[index];
            let mut decodes = BatchLoad::default();
            for request in worker.engine.in_flight() {
                if let Some(flight) = &self.in_flight[request.id as usize]
                    && flight.generated > 0
                {
                    decodes.add_decode(flight.booking.prompt().tokens() + flight.generated);
                }
            }
            let actual = (&worker.engine.config().step_time, worker.speed);
            self.forecast_monitor
                .take(now, index, snapshot, actual, &decodes);
        }
    }

    /// Returns the results of the run. Requests that have not ended count as unfinished, and not as
    /// goodput.
    pub(super) fn outcome(mut self) -> Outcome {
        let totals = || self.workers.iter().map(|worker| worker.engine.totals());
        let prompt_tokens: u64 = totals().map(|totals| totals.prompt_tokens).sum();
        let cached_tokens: u64 = totals().map(|totals| totals.cached_tokens).sum();
        let output_tokens: u64 = totals().map(|totals| totals.output_tokens).sum();
        let predicted = self.router.workers(self.last_end);
        let predicted: u64 = predicted.iter().map(|worker| worker.active_blocks).sum();
        let pinned = self
            .workers
            .iter()
            .map(|worker| u64::from(worker.engine.pinned_blocks()));
        let first_arrival = self.first_arrival.unwrap_or_default();
        let makespan = self.last_end.saturating_sub(first_arrival);
        // How many requests are due within a duration depends on the ends of others.
        let requests = match self.config.duration {
            Some(_) => self.arrived,
            None => self.workload.workload().requests.len(),
        };
        let unfinished = requests - self.ended;
        let within_slo = self.ended.saturating_sub(self.missed);
        Outcome {
            policy: match &self.config.policy {
                Some(policy) => policy.to_string(),
                None => self.config.router.policy.to_string(),
            },
            seed: self.config.router.seed,
            requests,
            finished: self.end_to_end.len(),
            rejected: self.rejected,
            faults: self.fault_outcome(),
            unfinished,
            goodput: Goodput {
                fraction: within_slo as f64 / requests.max(1) as f64,
                per_second: within_slo as f64 / makespan.as_secs_f64().max(1e-9),
            },
            makespan: makespan.as_secs_f64(),
            output_tokens_per_second: output_tokens as f64 / makespan.as_secs_f64().max(1e-9),
            prompt_tokens,
            cached_tokens,
            hit_fraction: cached_tokens as f64 / prompt_tokens.max(1) as f64,
            preemptions: totals().map(|totals| totals.preemptions).sum(),
            computed_imbalance: imbalance(
                totals().map(|totals| totals.prompt_tokens - totals.cached_tokens),
            ),
            request_imbalance: imbalance(self.workers.iter().map(|worker| worker.requests)),
            leaked_blocks: predicted + pinned.sum::<u64>(),
            prediction: self.sampler.finish(),
            forecast_errors: self.forecast_monitor.finish(self.last_end),
            active_blocks: self.sampler.take_instants(),
            time_to_first_token: Latency::of(&mut self.times_to_first_token),
            inter_token_latency: Latency::of(&mut self.inter_token_latencies),
            time_per_output_token: Latency::of(&mut self.times_per_output_token),
            end_to_end: Latency::of(&mut self.end_to_end),
        }
    }
}
