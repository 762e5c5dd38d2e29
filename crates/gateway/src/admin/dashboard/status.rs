//! State of each worker and quality of the predictions, as the dashboard shows them.
//!
//! Numbers are rounded, so that a worker whose load does not change is not sent again.

use foresee_api::admin::{Accuracy, OutputLengths};
use foresee_api::dashboard::{Quality, WorkerStatus};
use foresee_core::workers::{WorkerSnapshot, WorkerState};
use foresee_core::{LatencyAccuracy, OutputLengthAccuracy};

use super::sample::HitSums;
use crate::kv_events::status::EventsState;
use crate::workers::worker::Worker;

/// Number of samples from which the error of a worker's predictions is shown.
const MIN_SAMPLES: u64 = 5;

/// Returns the state of a worker. `worker` is `None` while the worker is being removed.
pub(super) fn worker_status(
    snapshot: &WorkerSnapshot,
    worker: Option<&Worker>,
    hits: HitSums,
) -> WorkerStatus {
    let events = worker.and_then(|worker| {
        let has_source = worker.event_source.borrow().is_some();
        has_source.then(|| worker.events.read())
    });
    let outlier = &snapshot.outlier;
    let (hits_predicted, hits_actual) = hits.fractions();
    let ttft = snapshot.ttft_accuracy;
    let is_known = ttft.samples >= MIN_SAMPLES && ttft.mean_abs_relative_error.is_finite();
    WorkerStatus {
        name: snapshot.name.to_string(),
        state: snapshot.state.as_str().to_owned(),
        problems: problems(snapshot, worker, events.as_ref().map(|events| events.state)),
        running: snapshot.requests.saturating_sub(snapshot.queued_requests),
        queued: snapshot.queued_requests,
        active_blocks: snapshot.active_blocks,
        queued_blocks: snapshot.queued_blocks,
        cached_blocks: snapshot.cached_blocks,
        capacity_blocks: snapshot.capacity_blocks,
        backlog_tokens: snapshot.prefill_tokens,
        wait_seconds: rounded(snapshot.prefill_backlog.as_secs_f64()),
        token_seconds: rounded(snapshot.inter_token_latency.as_secs_f64()),
        hits_predicted: hits_predicted.map(rounded),
        hits_actual: hits_actual.map(rounded),
        events: events
            .as_ref()
            .map(|events| events.state.as_str().to_owned()),
        follows_events: events.is_some_and(|events| events.followed),
        ejected: outlier.is_ejected,
        ejections: outlier.ejections,
        failure_rate: rounded(outlier.failure_rate),
        ttft_error: is_known.then(|| rounded(ttft.mean_abs_relative_error)),
    }
}

/// Returns the problems of a worker, each in a few words, the worst first.
fn problems(
    snapshot: &WorkerSnapshot,
    worker: Option<&Worker>,
    events: Option<EventsState>,
) -> Vec<String> {
    let mut problems = Vec::new();
    let outlier = &snapshot.outlier;
    match snapshot.state {
        WorkerState::Unhealthy => {
            let health = worker.map(Worker::health_status);
            let error = health.and_then(|health| health.last_error);
            problems.push(error.unwrap_or_else(|| "no health check has succeeded yet".to_owned()));
        }
        WorkerState::Draining => problems.push("draining: gets no new requests".to_owned()),
        WorkerState::Healthy | WorkerState::Ejected => {}
    }
    if outlier.is_ejected {
        problems.push(format!(
            "ejected: {:.0} % of its latest results were failures; gets only trials",
            100.0 * outlier.failure_rate
        ));
    }
    if outlier.backpressure_until.is_some() {
        problems.push("responded with 429 or 503: paused".to_owned());
    }
    match events {
        Some(state @ (EventsState::Silent | EventsState::Faulty | EventsState::Untrusted)) => {
            problems.push(format!(
                "KV events are {}: the cache is estimated",
                state.as_str()
            ));
        }
        Some(EventsState::Connecting) if snapshot.state == WorkerState::Healthy => {
            problems.push("KV events are not connected: the cache is estimated".to_owned());
        }
        _ => {}
    }
    problems
}

/// Returns the quality of the predictions of all workers.
pub(super) fn quality(
    workers: &[WorkerSnapshot],
    lengths: OutputLengthAccuracy,
    overlap: [u64; 3],
) -> Quality {
    let of = |accuracy: fn(&WorkerSnapshot) -> LatencyAccuracy| {
        workers.iter().map(accuracy).collect::<Vec<_>>()
    };
    let shared = |accuracies: Vec<LatencyAccuracy>| {
        let samples = accuracies.iter().map(|accuracy| accuracy.samples).max();
        let mean_error = mean_error(&accuracies);
        Accuracy {
            samples: samples.unwrap_or(0),
            mean_error,
        }
    };
    let ttft = of(|worker| worker.ttft_accuracy);
    let [overlap_exact, overlap_over, overlap_under] = overlap;
    Quality {
        time_to_first_token: Accuracy {
            samples: ttft.iter().map(|accuracy| accuracy.samples).sum(),
            mean_error: mean_error(&ttft),
        },
        // Similar workers learn together, so their samples are the same.
        prefill: shared(of(|worker| worker.latency.prefill_accuracy)),
        decode_step: shared(of(|worker| worker.latency.decode_accuracy)),
        output_lengths: OutputLengths {
            outputs: lengths.outputs,
            expected_tokens: rounded(lengths.expected_tokens),
            bias: rounded(lengths.bias),
            mean_error: rounded(lengths.mean_abs_relative_error),
        },
        overlap_exact,
        overlap_over,
        overlap_under,
    }
}

/// Returns the mean error, weighted by the number of samples; 0 without samples.
fn mean_error(accuracies: &[LatencyAccuracy]) -> f64 {
    let known = accuracies
        .iter()
        .filter(|accuracy| accuracy.mean_abs_relative_error.is_finite());
    let (sum, samples) = known.fold((0.0, 0.0), |(sum, samples), accuracy| {
        let weight = accuracy.samples as f64;
        (
            sum + weight * accuracy.mean_abs_relative_error,
            samples + weight,
        )
    });
    if samples > 0.0 {
        rounded(sum / samples)
    } else {
        0.0
    }
}

/// Returns a number with about three significant digits; 0 for one that is not finite.
pub(super) fn rounded(value: f64) -> f64 {
    if !value.is_finite() || value == 0.0 {
        return 0.0;
    }
    let scale = 10_f64.powi(2 - value.abs().log10().floor() as i32);
    let rounded = (value * scale).round() / scale;
    if rounded.is_finite() { rounded } else { value }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_three_digits() {
        for (value, expected) in [
            (0.0, 0.0),
            (f64::NAN, 0.0),
            (f64::INFINITY, 0.0),
            (0.001_234_5, 0.001_23),
            (-1.239, -1.24),
            (123_456.0, 123_000.0),
            (1e-310, 1e-310),
        ] {
            let rounded = rounded(value);
            assert!(
                (rounded - expected).abs() <= 1e-12 * expected.abs(),
                "{value} {rounded}"
            );
        }
    }
}
