//! The page of metrics: gauges set to the present state, and the text.

use std::fmt;

use foresee_core::OutputLengthAccuracy;
use foresee_core::workers::{WorkerSnapshot, WorkerState};
use prometheus_client::encoding::text;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{Atomic, Gauge};

use crate::fleet_demand::FleetNeed;
use crate::metrics::Metrics;
use crate::metrics::declaration::{FloatGaugeByWorker, GaugeByWorker, WorkerLabel};
use crate::metrics::llm_d;

/// Version of the gateway.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Processor that the gateway was built for.
const ARCHITECTURE: &str = std::env::consts::ARCH;

/// Operating system that the gateway was built for.
const SYSTEM: &str = std::env::consts::OS;

/// Present state of the gateway, to which gauges are set.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PresentState<'a> {
    pub(crate) workers: &'a [WorkerSnapshot],
    pub(crate) output_lengths: OutputLengthAccuracy,
    pub(crate) bookings: usize,
    pub(crate) prefix_tree_nodes: usize,
    pub(crate) need: &'a FleetNeed,
}

/// Names of another program that the page has as well.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CompatNames<'a> {
    /// The model that all workers serve, if there is only one.
    pub(crate) model: Option<&'a str>,
}

impl Metrics {
    /// Returns the exposition in OpenMetrics text format. The gauges are set to the present state
    /// first. Series of workers that are not in `state` are removed from these gauges. With `compat`,
    /// the page has llm-d's names as well.
    pub(crate) fn expose(
        &self,
        state: &PresentState<'_>,
        compat: Option<CompatNames<'_>>,
    ) -> Result<String, fmt::Error> {
        let _exposition = self.exposition.lock();
        let workers = state.workers;
        self.build_info
            .get_or_create(&[("version", VERSION), ("arch", ARCHITECTURE), ("os", SYSTEM)])
            .set(1);
        self.bookings.set(gauge_value(state.bookings as u64));
        self.prefix_tree_nodes
            .set(gauge_value(state.prefix_tree_nodes as u64));
        let lengths = state.output_lengths;
        self.output_expected_tokens.set(lengths.expected_tokens);
        self.output_length_bias_ratio.set(lengths.bias);
        self.output_length_error_ratio
            .set(lengths.mean_abs_relative_error);
        self.set_loads(workers);
        self.set_forecasts(workers);
        self.set_need(workers, state.need);
        let mut exposition = String::new();
        text::encode_registry(&mut exposition, &self.registry)?;
        if let Some(CompatNames { model }) = compat {
            llm_d::append(&mut exposition, self, workers, model)?;
        }
        text::encode_eof(&mut exposition)?;
        Ok(exposition)
    }

    /// Sets the gauges of the size that the fleet should have.
    fn set_need(&self, workers: &[WorkerSnapshot], need: &FleetNeed) {
        self.forecast_requests_per_second
            .set(need.requests_per_second);
        self.workers_needed.set(need.workers);
        let gauge = &self.worker_sustainable_requests_per_second;
        let rates = need.sustained.iter().copied();
        set_series(gauge, workers.iter().zip(rates));
    }

    /// Sets the gauges of the state, requests and blocks of every worker.
    fn set_loads(&self, workers: &[WorkerSnapshot]) {
        let set = |gauge: &GaugeByWorker, value: fn(&WorkerSnapshot) -> u64| {
            set_per_worker(gauge, workers, |worker| gauge_value(value(worker)));
        };
        set(&self.worker_up, |worker| {
            u64::from(worker.state == WorkerState::Healthy)
        });
        set(&self.worker_ejected, |worker| {
            worker.outlier.is_ejected.into()
        });
        set(&self.worker_requests, |worker| worker.requests.into());
        set(&self.worker_queued_requests, |worker| {
            worker.queued_requests.into()
        });
        set(&self.worker_active_blocks, |worker| worker.active_blocks);
        set(&self.worker_queued_blocks, |worker| worker.queued_blocks);
        set(&self.worker_cached_blocks, |worker| worker.cached_blocks);
        set(&self.worker_capacity_blocks, |worker| {
            worker.capacity_blocks.into()
        });
        set(&self.worker_prefill_tokens, |worker| worker.prefill_tokens);
        set(&self.worker_context_tokens, |worker| worker.context_tokens);
    }

    /// Sets the gauges of every worker's latency model and of its accuracy.
    fn set_forecasts(&self, workers: &[WorkerSnapshot]) {
        let set = |gauge: &FloatGaugeByWorker, value: fn(&WorkerSnapshot) -> f64| {
            set_per_worker(gauge, workers, value);
        };
        set(&self.worker_failure_charge_seconds, |worker| {
            worker.outlier.charge_seconds
        });
        set(&self.worker_inter_token_latency_seconds, |worker| {
            worker.inter_token_latency.as_secs_f64()
        });
        set(&self.worker_prefill_tokens_per_second, |worker| {
            worker.latency.prefill_speed()
        });
        set(&self.worker_prefill_base_seconds, |worker| {
            worker.latency.prefill_base
        });
        set(&self.worker_prefill_token_seconds, |worker| {
            worker.latency.prefill_per_token
        });
        set(&self.worker_prefill_attention_pair_seconds, |worker| {
            worker.latency.prefill_per_attention_pair
        });
        set(&self.worker_prefill_error_ratio, |worker| {
            worker.latency.prefill_accuracy.mean_abs_relative_error
        });
        set(&self.worker_decode_step_base_seconds, |worker| {
            worker.latency.decode_base
        });
        set(&self.worker_decode_step_request_seconds, |worker| {
            worker.latency.decode_per_request
        });
        set(&self.worker_decode_step_context_token_seconds, |worker| {
            worker.latency.decode_per_context_token
        });
        set(&self.worker_decode_step_error_ratio, |worker| {
            worker.latency.decode_accuracy.mean_abs_relative_error
        });
        set(&self.worker_time_to_first_token_error_ratio, |worker| {
            worker.ttft_accuracy.mean_abs_relative_error
        });
        let set = |gauge: &GaugeByWorker, samples: fn(&WorkerSnapshot) -> u64| {
            set_per_worker(gauge, workers, |worker| gauge_value(samples(worker)));
        };
        set(&self.worker_prefill_samples, |worker| {
            worker.latency.prefill_accuracy.samples
        });
        set(&self.worker_decode_step_samples, |worker| {
            worker.latency.decode_accuracy.samples
        });
        set(&self.worker_time_to_first_token_samples, |worker| {
            worker.ttft_accuracy.samples
        });
    }
}

/// Sets a gauge of every worker in `workers` to its `value` and removes all other series of the
/// gauge.
fn set_per_worker<N, A: Atomic<N> + Default>(
    gauge: &Family<WorkerLabel, Gauge<N, A>>,
    workers: &[WorkerSnapshot],
    value: impl Fn(&WorkerSnapshot) -> N,
) {
    set_series(gauge, workers.iter().map(|worker| (worker, value(worker))));
}

/// Sets a gauge of each worker to its value and removes all other series of the gauge.
fn set_series<'w, N, A: Atomic<N> + Default>(
    gauge: &Family<WorkerLabel, Gauge<N, A>>,
    values: impl Iterator<Item = (&'w WorkerSnapshot, N)>,
) {
    gauge.clear();
    for (worker, value) in values {
        gauge
            .get_or_create(&[("worker", worker.name.to_string())])
            .set(value);
    }
}

/// Converts a count to a gauge's type; the largest value stands for all that are larger.
pub(crate) fn gauge_value(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
