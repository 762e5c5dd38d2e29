//! Lower bounds of the marginal delay on all workers, in one vectorised pass over columns.
//!
//! The bound of a worker has the terms of the marginal delay that need no look at its requests one by
//! one, each with the value of its inputs that makes it least: the first prompt of the backlog is
//! about to be computed, all outputs of the decode batch are as short as those of the shortest
//! bucket, and a speed factor has the less of its weights within some seconds. Most workers cannot win
//! even so, and their marginal delay is never computed.

use foresee_forecast::{MAX_ATTENTION_TOKENS, SharedLatencyModel};
use foresee_prefix::PrefixMatch;

use super::super::request_profile::RequestProfile;
use crate::workers::BoundColumns;

/// Factor that makes up for the rounding of single precision.
const ROUNDING: f32 = 1.0 - 1e-5;

/// Writes a lower bound of the weighted marginal delay on the worker at every index into `bounds`, in
/// seconds. The bounds are valid for the workers that share `latency`. They may not be numbers.
pub(super) fn write_lower_bounds(
    request: &RequestProfile<'_>,
    columns: &BoundColumns,
    latency: &SharedLatencyModel,
    prefix_matches: &[PrefixMatch],
    bounds: &mut Vec<f32>,
) {
    let count = prefix_matches.len().min(columns.group.len());
    let [(prefill_mean, prefill), (decode_mean, decode)] = latency.mean_factors_and_coefficients();
    let [prefill_mean, decode_mean] = [prefill_mean, decode_mean].map(|mean| mean as f32);
    let [per_prefill_step, per_token, per_pair] = prefill.map(|seconds| seconds as f32);
    let [per_decode_step, per_request, per_context_token] = decode.map(|seconds| seconds as f32);

    let overlap_credit = request.overlap_weight.min(1.0) as f32;
    let prefill_scale = request.overlap_weight.max(1.0) as f32;
    let ttft_weight = request.ttft_weight as f32;
    let output = request.output_tokens as f32;
    let prompt = request.prompt_tokens as f32;
    let attended = least(prompt, MAX_ATTENTION_TOKENS as f32);
    let own_context = prompt + output / 2.0;
    let own_step = per_request + per_context_token * own_context;
    let now = request.now.as_secs_f64();

    bounds.clear();
    // The overlap, in tokens, of which the bound is written in its place.
    bounds.extend(prefix_matches[..count].iter().map(|prefix_match| {
        let blocks = prefix_match.overlap().min(request.max_reusable_blocks);
        (blocks * request.block_size) as f32
    }));
    let [prefill_factor, prefill_start, prefill_end] =
        columns.prefill_factor.each_ref().map(|c| &c[..count]);
    let [decode_factor, decode_start, decode_end] =
        columns.decode_factor.each_ref().map(|c| &c[..count]);
    let [backlog_steps, backlog_tokens, backlog_pairs] =
        columns.backlog.each_ref().map(|c| &c[..count]);
    let [decoding, decoding_context] = columns.decoding.each_ref().map(|c| &c[..count]);
    let [arrival_rates, utilisations, memories] = columns.arrivals.each_ref().map(|c| &c[..count]);
    let steps_per_prompt = &columns.steps_per_prompt[..count];
    let min_remaining = &columns.min_remaining[..count];
    let mixed_step = &columns.mixed_step[..count];
    let arrivals_at = &columns.arrivals_at[..count];
    for (index, bound) in bounds.iter_mut().enumerate() {
        let difference = prefill_factor[index] - prefill_mean;
        let at_start = prefill_mean + prefill_start[index] * difference;
        let at_end = prefill_mean + prefill_end[index] * difference;
        let (fast, slow) = (least(at_start, at_end), most(at_start, at_end));
        let difference = decode_factor[index] - decode_mean;
        let at_start = decode_mean + decode_start[index] * difference;
        let at_end = decode_mean + decode_end[index] * difference;
        let decode_fast = least(at_start, at_end);

        let tokens = most(prompt - overlap_credit * *bound, 1.0);
        let querying = least(tokens, MAX_ATTENTION_TOKENS as f32);
        let pairs = most(querying * (attended - querying / 2.0), 0.0);
        let computing = prefill_scale * (per_token * tokens + per_pair * pairs);
        let step = prefill_scale * per_prefill_step * steps_per_prompt[index];
        let prefill = fast * (computing + step);
        let wait = fast
            * (per_prefill_step * backlog_steps[index]
                + per_token * backlog_tokens[index]
                + per_pair * backlog_pairs[index]);

        let age = most((now - arrivals_at[index]) as f32, 0.0);
        let memory = memories[index];
        let weight = memory / (memory + age);
        let utilisation = utilisations[index] * weight;
        let decode_share = 1.0 - least(utilisation, super::MAX_PREFILL_UTILISATION as f32);
        let future = arrival_rates[index] * weight * prefill * (wait + prefill / 2.0);

        // Both zero if the prompt would have to wait.
        let (requests, context) = (decoding[index], decoding_context[index]);
        let stalls = requests * fast * computing;
        let others_step = per_request * requests + per_context_token * context;
        let mixed = most(
            mixed_step[index],
            decode_fast * (per_decode_step + others_step),
        );
        let remaining = min_remaining[index];
        let z =
            slow * (computing + step) / (most(mixed, super::MIN_STEP_SECONDS as f32) * remaining);
        let survival_and_overlap =
            remaining * output / ((remaining + output) * (1.0 + z + z * z / 2.0));
        let slowdown = decode_fast * (others_step + own_step * requests) * survival_and_overlap;

        let decode = output * decode_fast * (per_decode_step + own_step);
        let total =
            ttft_weight * (wait + prefill) + stalls + (decode + slowdown + future) / decode_share;
        *bound = total * ROUNDING;
    }
}

/// Returns the smaller number, in one instruction.
fn least(a: f32, b: f32) -> f32 {
    if a < b { a } else { b }
}

/// Returns the larger number, in one instruction.
fn most(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::Duration;

    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    use super::super::lower_bounds;
    use crate::policy::{Candidates, MARGINAL_DELAY};
    use crate::queue::QueueOrder;
    use crate::request::PreparedRequest;
    use crate::router::{Request, Router, RouterConfig};
    use crate::workers::WorkerSpec;
    use foresee_prefix::sequence::Sequence;

    /// Returns a router with 40 workers, some of which share a model.
    fn fleet(queue_order: Option<QueueOrder>) -> Router {
        let config = RouterConfig {
            queue_order,
            ..RouterConfig::default()
        };
        let router = Router::new(config).unwrap();
        for number in 0..40 {
            let spec = WorkerSpec {
                name: format!("worker-{number}"),
                models: (number >= 36)
                    .then(|| "other".to_owned())
                    .into_iter()
                    .collect(),
                capacity_blocks: (number % 2 == 0).then_some(2_000),
                prefix_caching: number % 5 != 0,
                ..WorkerSpec::default()
            };
            let id = router.add_worker(spec).unwrap();
            router.set_healthy(id, true);
        }
        router
    }

    fn prompt(rng: &mut SmallRng) -> Sequence {
        let shared = rng.random_range(0..8);
        let length = rng.random_range(1..6_000);
        let own = rng.random();
        let token = |position| if position < 2_000 { shared } else { own };
        let tokens: Vec<u32> = (0..length).map(token).collect();
        Sequence::from_tokens(&tokens, RouterConfig::default().block_size, 0)
    }

    /// Compares bounds and choices with the full computation, in fleets that learn from requests of
    /// random lengths.
    #[test]
    fn bounds_are_below_the_costs_and_change_no_choice() {
        let (mut compared, mut ruled_out) = (0, 0);
        for seed in 0..6 {
            let mut rng = SmallRng::seed_from_u64(seed);
            let router = fleet((seed % 2 == 0).then_some(QueueOrder::ShortestPrefillFirst));
            let mut running = Vec::new();
            let mut now = Duration::ZERO;
            for step in 0..600 {
                now += Duration::from_millis(rng.random_range(0..40));
                if rng.random_bool(0.01) {
                    now += Duration::from_secs(rng.random_range(0..100));
                }
                let sequence = prompt(&mut rng);
                running.push(router.route(&Request::new(&sequence), now).unwrap());
                for _ in 0..4 {
                    let index = rng.random_range(0..running.len());
                    now += Duration::from_micros(rng.random_range(0..20_000));
                    if rng.random_bool(0.2) {
                        running.swap_remove(index).complete(now);
                        break;
                    }
                    running[index].on_tokens(rng.random_range(1..30), now);
                }
                if step % 10 != 9 {
                    continue;
                }
                let sequence = prompt(&mut rng);
                let request = Request::new(&sequence);
                let request = PreparedRequest::new(&request, sequence.block_size()).unwrap();
                let mut state = router.shared().lock();
                state.advance_to(now);
                state.workers.refresh_bound_columns(now);
                let assessment = state.assess(&request);
                let profile = state.request_profile(&request, &assessment);
                let indices: Vec<u32> = (0..40).collect();
                let matches = &assessment.prefix_matches;
                let candidates = Candidates::new(&state.workers, &indices, matches, now);
                let bounds = lower_bounds(&profile, &candidates);
                assert_eq!(bounds.len(), 40);
                let policy = (MARGINAL_DELAY.create)();
                let (mut costs, mut bounded) = (Vec::new(), Vec::new());
                policy.costs(&profile, &candidates, &mut costs);
                policy.costs_or_bounds(&profile, &candidates, &mut bounded);
                let least = costs.iter().copied().fold(f64::INFINITY, f64::min);
                for ((&bound, &cost), &either) in bounds.iter().zip(&costs).zip(&bounded) {
                    assert!(f64::from(bound) <= cost, "{bound} is above {cost}");
                    assert_eq!(cost == least, either == least);
                    compared += 1;
                    ruled_out += u32::from(f64::from(bound) > least);
                }
            }
        }
        assert!(4 * ruled_out > compared, "{ruled_out} of {compared}");
    }
}
