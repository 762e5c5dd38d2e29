//! Tests of the marginal delay: the known policies to which it reduces, and its terms one by one.

use std::time::Duration;

use foresee_forecast::{LatencyAccuracy, PrefillWork};

use super::*;
use crate::pending_work::RequestWork;
use crate::queue::{QueueOrder, QueueTickets};

/// A model in which nothing takes time. Each test sets the coefficients that it is about.
const NO_COST: LatencyModel = LatencyModel {
    prefill_base: 0.0,
    prefill_per_token: 0.0,
    prefill_per_attention_pair: 0.0,
    decode_base: 0.0,
    decode_per_request: 0.0,
    decode_per_context_token: 0.0,
    prefill_accuracy: LatencyAccuracy::NONE,
    decode_accuracy: LatencyAccuracy::NONE,
};

fn profile(prompt_tokens: u32, output_tokens: f64) -> RequestProfile<'static> {
    RequestProfile {
        output_tokens,
        ticket: QueueTickets::default().ticket(QueueOrder::Fcfs, 0, 0, Duration::ZERO),
        ..RequestProfile::of_tokens(prompt_tokens, 16)
    }
}

fn cached(blocks: u32) -> PrefixMatch {
    PrefixMatch {
        cached_blocks: blocks,
        active_blocks: 0,
    }
}

/// Returns a worker that decodes `requests` outputs, each with this many remaining and context
/// tokens.
fn running(requests: u32, remaining_tokens: u32, context_tokens: u64) -> PendingWork {
    let mut pending = PendingWork::default();
    for _ in 0..requests {
        let prefill = PrefillWork::default();
        let mut work = RequestWork::new(prefill, remaining_tokens, context_tokens);
        pending.add_prefill(&work);
        pending.finish_prefill(&mut work);
    }
    pending
}

fn total(
    profile: RequestProfile<'_>,
    latency_model: &LatencyModel,
    pending: &PendingWork,
    prefix_match: PrefixMatch,
) -> f64 {
    let delay = profile.marginal_delay(latency_model, pending, Load::default(), prefix_match);
    delay.total(profile.ttft_weight)
}

fn assert_close(actual: f64, expected: f64) {
    assert!(
        (actual - expected).abs() <= 1e-5 * expected.abs(),
        "{actual} is not close to {expected}"
    );
}

#[test]
fn with_request_cost_alone_the_delay_is_least_outstanding_requests() {
    let latency_model = LatencyModel {
        decode_per_request: 1e-4,
        ..NO_COST
    };
    let alone = total(
        profile(1000, 50.0),
        &latency_model,
        &running(0, 0, 0),
        cached(0),
    );
    for requests in [1, 7, 40] {
        let cost = total(
            profile(1000, 50.0),
            &latency_model,
            &running(requests, 200, 9),
            cached(0),
        );
        // Outputs of 50 and 200 tokens are expected to decode 40 tokens together.
        assert_close(cost - alone, 2.0 * 1e-4 * 40.0 * f64::from(requests));
    }
}

#[test]
fn with_prefill_cost_alone_the_delay_is_the_time_to_first_token() {
    let latency_model = LatencyModel {
        prefill_per_token: 1e-4,
        ..NO_COST
    };
    let mut pending = PendingWork::default();
    pending.add_prefill(&RequestWork::new(PrefillWork::new(3000, 3000), 10, 3000));
    let cost = total(profile(1600, 50.0), &latency_model, &pending, cached(60));
    // The output of the prompt before this one has ended by the time this one starts.
    assert_close(cost, 0.3 + 0.064);
}

#[test]
fn stalls_caused_are_new_tokens_times_requests() {
    let latency_model = LatencyModel {
        prefill_per_token: 1e-4,
        ..NO_COST
    };
    let delay = |requests| {
        let pending = running(requests, 200, 9);
        profile(1600, 50.0).marginal_delay(&latency_model, &pending, Load::default(), cached(60))
    };
    assert_close(delay(10).prefill_stall_caused, 10.0 * 640.0 * 1e-4);
    assert_close(
        delay(10).prefill + delay(10).prefill_stall_caused,
        11.0 * 640.0 * 1e-4,
    );
}

/// With outputs that outlast this one: a weight on blocks to compute, plus active blocks.
#[test]
fn with_prefill_and_context_cost_the_delay_is_dynamos_cost() {
    let latency_model = LatencyModel {
        prefill_per_token: 6.7e-5,
        decode_per_context_token: 3.1e-8,
        ..NO_COST
    };
    let weight = 6.7e-5 / (3.1e-8 * 343.0);
    let parts = |requests: u32, prefix_match| {
        let pending = running(requests, u32::MAX, 1600);
        let profile = profile(16_000, 343.0);
        let delay = profile.marginal_delay(&latency_model, &pending, Load::default(), prefix_match);
        delay.prefill + delay.decode_slowdown
    };
    let blocks = |requests: u32, overlap: u32| {
        weight * f64::from(1000 - overlap) + f64::from(requests * 100)
    };
    let scale = 3.1e-8 * 343.0 * 16.0;
    for (requests, overlap) in [(0, 0), (3, 500), (20, 900)] {
        let expected = scale * blocks(requests, overlap);
        assert_close(parts(requests, cached(overlap)), expected);
    }
}

#[test]
fn outputs_that_end_before_the_prefill_do_not_count() {
    let latency_model = LatencyModel {
        prefill_per_token: 1e-3,
        decode_base: 0.01,
        decode_per_request: 1e-4,
        ..NO_COST
    };
    // During a backlog of 10 s, the outputs with 100 remaining tokens end.
    let mut pending = running(5, 100, 9);
    pending.add_prefill(&RequestWork::new(
        PrefillWork::new(10_000, 10_000),
        5000,
        10_000,
    ));
    let delay =
        profile(1000, 50.0).marginal_delay(&latency_model, &pending, Load::default(), cached(0));
    assert!(
        (delay.prefill_stall_caused - 1.0).abs() < 0.01,
        "{}",
        delay.prefill_stall_caused
    );
    // Half of the output of the prompt before this one.
    assert!(
        (delay.decode_slowdown_caused / (1e-4 * 50.0) - 1.0).abs() < 0.1,
        "{}",
        delay.decode_slowdown_caused
    );
}

#[test]
fn an_output_extends_the_busy_time_of_a_worker_by_what_outlasts_the_longest_other() {
    let latency_model = LatencyModel {
        decode_base: 0.01,
        ..NO_COST
    };
    let extension = |pending: &PendingWork, mean_prefill_utilisation| {
        let profile = RequestProfile {
            mean_prefill_utilisation,
            ..profile(1000, 50.0)
        };
        profile
            .marginal_delay(&latency_model, pending, Load::default(), cached(0))
            .busy_extension
    };
    let idle = running(0, 0, 0);
    assert_close(extension(&idle, 0.2), 0.25 * 50.0 * 0.01);
    assert_eq!(extension(&idle, 0.0), 0.0);
    assert_close(extension(&running(1, 50, 9), 0.2), 0.25 * 25.0 * 0.01);
    // Shorter outputs beside the longest one change nothing.
    let mut pending = running(20, 10, 9);
    let mut longest = RequestWork::new(PrefillWork::default(), 200, 9);
    pending.add_prefill(&longest);
    assert_close(extension(&pending, 0.2), 0.25 * 10.0 * 0.01);
    pending.finish_prefill(&mut longest);
    assert_close(extension(&pending, 0.2), 0.25 * 10.0 * 0.01);
}

#[test]
fn overlap_weight_zero_ignores_the_cache_and_weights_above_one_scale_prefill() {
    let latency_model = LatencyModel {
        prefill_per_token: 1e-4,
        ..NO_COST
    };
    let prefill = |overlap_weight, prefix_match| {
        let profile = RequestProfile {
            overlap_weight,
            ..profile(1600, 50.0)
        };
        let pending = PendingWork::default();
        profile
            .marginal_delay(&latency_model, &pending, Load::default(), prefix_match)
            .prefill
    };
    assert_close(prefill(0.0, cached(90)), 0.16);
    assert_close(prefill(0.5, cached(50)), 0.12);
    assert_close(prefill(1.0, cached(50)), 0.08);
    assert_close(prefill(3.0, cached(50)), 0.24);
    assert_close(prefill(1.0, cached(100)), 0.0016);
}

#[test]
fn memory_fits_once_enough_outputs_have_ended() {
    let mut pending = running(4, 100, 1600);
    let mut last = RequestWork::new(PrefillWork::default(), 1000, 1600);
    pending.add_prefill(&last);
    pending.finish_prefill(&mut last);
    let load = Load {
        active_blocks: 500,
        context_tokens: 8000,
        requests: 5,
        ..Load::default()
    };
    let mut steps = |capacity| {
        pending.capacity = Some(capacity);
        profile(1600, 1.0).steps_until_memory_fits(&pending, load, cached(0))
    };
    assert_eq!(steps(10_000), 0.0);
    // The four short outputs end after a hundred steps.
    assert_close(steps(550), 100.0);
    // The request fits only when all outputs have ended.
    assert_close(steps(150), 1000.0);
}
