//! Marginal delay: cost of placing a request on a worker, in seconds, over all requests.
//!
//! The marginal delay is the sum of the time that the request itself takes, of the delay that it
//! causes to requests on the worker, and of the delay that it causes to requests that will arrive.
//! All terms are times, so they need no weights against each other. Only the time to first token has
//! a configurable weight. For a request with `p` tokens to compute of a prompt of `s`, whose output
//! is expected to have `O` tokens, on a worker whose backlog takes `V` seconds:
//!
//! | term | | meaning |
//! |---|---|---|
//! | `queue_wait` | `V` | prefill of the prompts before this one |
//! | `prefill` | `x` | prefill of this prompt |
//! | `decode` | `O × step / (1 − ρ)` | decode of this output on an otherwise idle worker |
//! | `decode_slowdown` | `Σ (κn + κc s_j) both_j / (1 − ρ)` | slowdown of this output by each other output `j`, while both decode |
//! | `prefill_stall_caused` | `x Σ alive_j` | each other output stalls during this prefill |
//! | `decode_slowdown_caused` | `(κn + κc (s + O/2)) Σ both_j / (1 − ρ)` | slowdown of each other output by this one, while both decode |
//! | `busy_extension` | `ρ̄ / (1 − ρ̄) O² / (O + L) step` | prefills of later requests while this output keeps a worker busy that would be idle |
//! | `future_arrivals` | `λ x (V + x/2) / (1 − ρ) + min(M, λ M²/2)` | requests that arrive meanwhile (Hyytiä, Penttinen and Aalto, 2012: the size-aware value function of M/G/1) |
//!
//! A worker that has failed requests recently costs their [failure charge](crate::outlier) in
//! addition.
//!
//! - `κn` and `κc`: time that a request and a context token add to a decode step
//!   ([`LatencyModel`]).
//! - `λ` and `ρ`: arrival rate of the worker, and the fraction of its time that prefills take. No
//!   output makes progress in that time.
//! - `ρ̄`: mean of `ρ` over the workers that the request may go to.
//! - `alive_j`: probability that output `j` still decodes when this prefill starts.
//! - `both_j`: expected number of tokens that output `j` and this one decode together.
//! - `L`: expected remaining length of the outputs that last longest; 0 without any.
//! - `M`: time until enough running requests have finished for this request's blocks to fit, and to
//!   keep fitting while all outputs grow. Only the delay of *later* arrivals counts it. Adding it
//!   to this request's own wait made replay worse, both with the [router's queue](crate::queue),
//!   which backfills smaller requests, and without.
//!
//! A later prefill stalls no output if it finds a worker without one. An output that outlasts the
//! others on its worker therefore costs prefill time as long as it keeps the worker busy, which is
//! `busy_extension`. With few requests in flight, the term puts outputs on workers that are busy for
//! long anyway, so that others become idle. With many, `L` is about equal on all workers, and the
//! term decides little.
//!
//! The remaining length of an output is assumed to be exponential around its expectation. Outputs
//! are grouped into buckets of about equal remaining length, so the cost of evaluating a worker
//! does not depend on its number of requests.
//!
//! With a [router's queue](crate::queue), `V` counts only the queued requests before this one. The
//! queued requests that it overtakes wait for its prefill, which is part of `prefill_stall_caused`.
//! Their prefills stall its output, if it lasts that long, which is part of `decode_slowdown`.
//!
//! Without some of the terms, the delay reduces to a known policy:
//! - `κn` alone, outputs alike: `κn O × requests`, least outstanding requests.
//! - `queue_wait` and `prefill` alone: least time to first token.
//! - `prefill` and `prefill_stall_caused` alone: new tokens × (requests + 1), LMetric's product.
//! - `prefill` and `decode_slowdown`, outputs that outlast this one: `κc O × block size` times
//!   `β / (κc O) × prefill blocks + active blocks`, with `β` the time to compute a token: Dynamo's
//!   [cost](super::kv_cost), its weight derived.

mod lower_bounds;

use foresee_forecast::LatencyModel;
use foresee_prefix::PrefixMatch;

use super::candidates::{Candidates, WorkerView};
use super::interface::{BatchRule, NamedPolicy, Policy};
use super::request_profile::RequestProfile;
use crate::load::Load;
use crate::outlier::FailureCharge;
use crate::pending_work::{DECODE_BUCKETS, DecodeBucket, PendingWork, QueueWait};
use crate::queue::QueueOrder;
use lower_bounds::write_lower_bounds;

/// Least [marginal delay](self).
pub const MARGINAL_DELAY: NamedPolicy = NamedPolicy {
    name: "marginal-delay",
    description: "least predicted delay, in seconds over all requests",
    default_queue: Some(QueueOrder::ShortestPrefillFirst),
    create: || Box::new(LeastMarginalDelay),
};

#[derive(Debug)]
struct LeastMarginalDelay;

impl Policy for LeastMarginalDelay {
    fn costs(
        &self,
        request: &RequestProfile<'_>,
        candidates: &Candidates<'_>,
        costs: &mut Vec<f64>,
    ) {
        costs.extend(candidates.iter().map(|worker| self.cost(request, &worker)));
    }

    fn costs_or_bounds(
        &self,
        request: &RequestProfile<'_>,
        candidates: &Candidates<'_>,
        costs: &mut Vec<f64>,
    ) {
        let bounds = lower_bounds(request, candidates);
        // The candidate of the least bound is probably that of the least cost.
        let first = (0..bounds.len()).min_by(|&a, &b| bounds[a].total_cmp(&bounds[b]));
        let first_cost = first.map(|position| self.cost(request, &candidates.at(position)));
        let mut minimum = f64::INFINITY.min(first_cost.unwrap_or(f64::INFINITY));
        costs.extend((0..candidates.len()).map(|position| {
            if first == Some(position) {
                return first_cost.unwrap_or(f64::INFINITY);
            }
            // The cutoff is just above the minimum, so that an equal cost is computed exactly.
            let cutoff = minimum.next_up();
            let bound = bounds.get(position).map(|&bound| f64::from(bound));
            if let Some(bound) = bound.filter(|&bound| bound >= cutoff) {
                return bound;
            }
            let cost = candidates
                .at(position)
                .marginal_delay_or_bound(request, cutoff);
            minimum = minimum.min(cost);
            cost
        }));
    }

    fn reads_bound_columns(&self) -> bool {
        true
    }

    fn cost(&self, request: &RequestProfile<'_>, worker: &WorkerView<'_>) -> f64 {
        worker.marginal_delay(request).total(request.ttft_weight)
    }

    fn lower_bound(&self, request: &RequestProfile<'_>, worker: &WorkerView<'_>) -> f64 {
        worker.marginal_delay_or_bound(request, f64::NEG_INFINITY)
    }

    fn batch_rule(&self) -> BatchRule {
        BatchRule::SumOverShortlist
    }

    fn standing_cost(&self, worker: &WorkerView<'_>) -> f64 {
        worker.failure_charge.seconds
    }

    fn replicates_prefixes(&self) -> bool {
        true
    }
}

/// Number of candidates from which lower bounds of all of them save time.
const MIN_CANDIDATES_FOR_BOUNDS: usize = 4;

/// Returns a lower bound of the cost on each candidate. Empty if there are few candidates, or if
/// they are not workers of the router.
fn lower_bounds(request: &RequestProfile<'_>, candidates: &Candidates<'_>) -> Vec<f32> {
    let Some((workers, indices, prefix_matches)) = candidates.fleet() else {
        return Vec::new();
    };
    let (Some(columns), Some(&first)) = (workers.bound_columns(request.now), indices.first())
    else {
        return Vec::new();
    };
    if indices.len() < MIN_CANDIDATES_FOR_BOUNDS {
        return Vec::new();
    }
    let group = columns.group[first as usize];
    let latency = workers.latency_model(&workers.pending_work[first as usize]);
    let mut bounds = Vec::new();
    write_lower_bounds(request, columns, latency, prefix_matches, &mut bounds);
    // From worker indices, which ascend, to positions among the candidates.
    for (position, &index) in indices.iter().enumerate() {
        let index = index as usize;
        // The coefficients are those of the first candidate.
        bounds[position] = match columns.group[index] == group {
            true => bounds[index],
            false => f32::NEG_INFINITY,
        };
    }
    bounds.truncate(indices.len());
    bounds
}

impl WorkerView<'_> {
    /// Returns the marginal delay of a request on the worker. A request waits for the prefills of
    /// the earlier prompts of its body, too.
    #[must_use]
    pub fn marginal_delay(&self, request: &RequestProfile<'_>) -> MarginalDelay {
        let latency_model = self.latency_model(request.now);
        let (pending, load) = (self.pending(), self.load());
        let mut delay = request.marginal_delay(&latency_model, pending, load, self.prefix_match);
        let earlier = self.earlier().prefill;
        if earlier.requests > 0 {
            let batches = f64::from(earlier.requests) / pending.latency.mean_prefill_batch();
            delay.queue_wait += request.overlap_weight.max(1.0)
                * latency_model.prefill_seconds(batches, earlier.work);
        }
        delay.failure_charge = self.failure_charge.seconds;
        delay
    }

    /// Returns the total marginal delay of a request on the worker if it is below `cutoff`, and
    /// otherwise a number that is at least `cutoff`, which is cheaper to compute. Both are in
    /// seconds, with the time to first token weighted. The result may not be a number.
    fn marginal_delay_or_bound(&self, request: &RequestProfile<'_>, cutoff: f64) -> f64 {
        let is_plain =
            self.failure_charge == FailureCharge::default() && self.earlier().prefill.requests == 0;
        if !is_plain {
            return self.marginal_delay(request).total(request.ttft_weight);
        }
        request.total_or_lower_bound(
            cutoff,
            &self.latency_model(request.now),
            self.pending(),
            self.load(),
            self.prefix_match,
        )
    }
}

/// Marginal delay of one placement, part by part, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct MarginalDelay {
    /// Time until the prefill of the request starts.
    pub queue_wait: f64,
    /// Prefill time of the request.
    pub prefill: f64,
    /// Decode time of the request on an otherwise idle worker.
    pub decode: f64,
    /// Additional decode time of the request because of other requests on the worker.
    pub decode_slowdown: f64,
    /// Time that the prefill of the request stalls other outputs and overtaken prompts, summed over
    /// them.
    pub prefill_stall_caused: f64,
    /// Additional decode time of other outputs because of this one, summed over them.
    pub decode_slowdown_caused: f64,
    /// Prefill time of later requests while this output keeps the worker busy that would be idle.
    pub busy_extension: f64,
    /// Delay of requests that will arrive later.
    pub future_arrivals: f64,
    /// Time that requests would have taken which the worker failed recently. Decays.
    pub failure_charge: f64,
}

impl MarginalDelay {
    /// Returns every term with its name.
    #[must_use]
    pub fn terms(&self) -> [(&'static str, f64); 9] {
        [
            ("queue_wait", self.queue_wait),
            ("prefill", self.prefill),
            ("decode", self.decode),
            ("decode_slowdown", self.decode_slowdown),
            ("prefill_stall_caused", self.prefill_stall_caused),
            ("decode_slowdown_caused", self.decode_slowdown_caused),
            ("busy_extension", self.busy_extension),
            ("future_arrivals", self.future_arrivals),
            ("failure_charge", self.failure_charge),
        ]
    }

    /// Returns the time to first token of the request.
    #[must_use]
    pub fn time_to_first_token(&self) -> f64 {
        self.queue_wait + self.prefill
    }

    /// Returns the cost to be minimised, in seconds. `ttft_weight` is the weight of a second of the
    /// request's time to first token; all other terms have a weight of 1.
    #[must_use]
    pub fn total(&self, ttft_weight: f64) -> f64 {
        ttft_weight * self.time_to_first_token()
            + self.decode
            + self.decode_slowdown
            + self.prefill_stall_caused
            + self.decode_slowdown_caused
            + self.busy_extension
            + self.future_arrivals
            + self.failure_charge
    }
}

impl std::ops::AddAssign for MarginalDelay {
    fn add_assign(&mut self, other: Self) {
        self.queue_wait += other.queue_wait;
        self.prefill += other.prefill;
        self.decode += other.decode;
        self.decode_slowdown += other.decode_slowdown;
        self.prefill_stall_caused += other.prefill_stall_caused;
        self.decode_slowdown_caused += other.decode_slowdown_caused;
        self.busy_extension += other.busy_extension;
        self.future_arrivals += other.future_arrivals;
        self.failure_charge += other.failure_charge;
    }
}

/// Largest fraction of a worker's time that prefills are assumed to take.
const MAX_PREFILL_UTILISATION: f64 = 0.7;

/// Smallest decode step time that is assumed, in seconds.
const MIN_STEP_SECONDS: f64 = 1e-6;

/// Returns the probability that an output still decodes after `z` times its expected remaining
/// steps: close to `exp(-z)`, at a fraction of its computing cost.
fn survival_probability(z: f64) -> f64 {
    1.0 / (1.0 + z + z * z / 2.0)
}

/// Returns the expected length of the shorter of two outputs, if only their means `a` and `b` are
/// known.
fn expected_overlap_tokens(a: f64, b: f64) -> f64 {
    a * b / (a + b)
}

/// Terms that do not depend on other outputs, and intermediate results for the terms that do.
struct PartialDelay {
    /// Terms so far. All others are zero or positive, so the total is a lower bound.
    delay: MarginalDelay,
    /// Time that a decoding output stalls during this prefill, in seconds.
    stall: f64,
    /// Time that this request adds to a decode step, in seconds.
    step_increment: f64,
    /// Requests per second that arrive at the worker.
    rate: f64,
    /// Fraction of the worker's time in which it decodes.
    decode_share: f64,
}

impl RequestProfile<'_> {
    /// Returns the marginal delay on a worker with this latency model, pending work, load and
    /// prefix match.
    pub(crate) fn marginal_delay(
        &self,
        latency_model: &LatencyModel,
        pending: &PendingWork,
        load: Load,
        prefix_match: PrefixMatch,
    ) -> MarginalDelay {
        let partial = self.lower_bound_terms(latency_model, pending, prefix_match);
        self.add_interaction_terms(partial, latency_model, pending, load, prefix_match)
    }

    /// Returns the total cost on a worker if it is below `cutoff`, and otherwise a lower bound of
    /// it that may already be at or above `cutoff`. It is used to find the cheapest worker without
    /// computing every term for all workers. Both are in seconds, with the time to first token
    /// weighted.
    pub(crate) fn total_or_lower_bound(
        &self,
        cutoff: f64,
        latency_model: &LatencyModel,
        pending: &PendingWork,
        load: Load,
        prefix_match: PrefixMatch,
    ) -> f64 {
        let partial = self.lower_bound_terms(latency_model, pending, prefix_match);
        let lower_bound = partial.delay.total(self.ttft_weight);
        if lower_bound >= cutoff {
            return lower_bound;
        }
        let delay = self.add_interaction_terms(partial, latency_model, pending, load, prefix_match);
        delay.total(self.ttft_weight)
    }

    /// Computes the terms that do not depend on other outputs. `future_arrivals` does not include
    /// the wait for memory yet.
    fn lower_bound_terms(
        &self,
        latency_model: &LatencyModel,
        pending: &PendingWork,
        prefix_match: PrefixMatch,
    ) -> PartialDelay {
        let prefill_batches = 1.0 / pending.latency.mean_prefill_batch();
        let prefill_scale = self.overlap_weight.max(1.0);
        let prefill = prefill_scale
            * latency_model.prefill_seconds(prefill_batches, self.prefill_work(prefix_match));
        let QueueWait {
            wait_seconds,
            overtaken_requests,
            overtaken_prefill_seconds,
        } = pending.queue_wait(&self.ticket, prefill, latency_model, self.now);
        let output = self.output_tokens;

        // The rest of the time goes into prefills of later arrivals, which stall every output.
        let (rate, utilisation) = pending.arrival_rate.rates(self.now);
        let decode_share = 1.0 - utilisation.min(MAX_PREFILL_UTILISATION);
        let own_context = f64::from(self.prompt_tokens) + output / 2.0;
        let step_increment =
            latency_model.decode_per_request + latency_model.decode_per_context_token * own_context;
        // Overtaken prompts wait for this prefill, and their prefills stall this output, if it
        // lasts that long.
        let mixed_step = pending.latency.mixed_step_seconds();
        let overtaken_stall = if mixed_step > 0.0 && overtaken_requests > 0 {
            expected_overlap_tokens(overtaken_prefill_seconds, output * mixed_step)
        } else {
            overtaken_prefill_seconds
        };
        PartialDelay {
            delay: MarginalDelay {
                queue_wait: wait_seconds,
                prefill,
                decode: output * (latency_model.decode_base + step_increment) / decode_share,
                decode_slowdown: overtaken_stall,
                prefill_stall_caused: f64::from(overtaken_requests) * prefill,
                future_arrivals: rate * prefill * (wait_seconds + prefill / 2.0) / decode_share,
                ..MarginalDelay::default()
            },
            stall: (prefill - prefill_scale * prefill_batches * latency_model.prefill_base)
                .max(0.0),
            step_increment,
            rate,
            decode_share,
        }
    }

    /// Adds the terms that depend on other requests of the worker. `partial` must come from
    /// [`lower_bound_terms`](Self::lower_bound_terms) with the same arguments.
    fn add_interaction_terms(
        &self,
        partial: PartialDelay,
        latency_model: &LatencyModel,
        pending: &PendingWork,
        load: Load,
        prefix_match: PrefixMatch,
    ) -> MarginalDelay {
        let PartialDelay {
            mut delay,
            stall,
            step_increment,
            rate,
            decode_share,
        } = partial;
        let output = self.output_tokens;
        let (requests, context_tokens) = pending.decode_load();
        let step = latency_model
            .decode_step_seconds(f64::from(requests), context_tokens as f64)
            .max(MIN_STEP_SECONDS);
        let mixed_step = pending.latency.mixed_step_seconds().max(step);
        let steps_until_prefill = delay.queue_wait / mixed_step;
        let steps_until_first_token = (delay.queue_wait + delay.prefill) / mixed_step;

        let (mut stalls, mut slowdown, mut overlap_tokens) = (0.0, 0.0, 0.0);
        let mut longest_remaining = 0.0f64;
        let mut add_bucket = |bucket: &DecodeBucket, until_prefill: f64, until_first_token: f64| {
            if bucket.requests == 0 {
                return;
            }
            let requests = f64::from(bucket.requests);
            let mean_remaining = (bucket.remaining_tokens as f64 / requests).max(1.0);
            longest_remaining = longest_remaining.max(mean_remaining);
            stalls += requests * survival_probability(until_prefill / mean_remaining) * stall;
            let overlap = survival_probability(until_first_token / mean_remaining)
                * expected_overlap_tokens(mean_remaining, output);
            slowdown += (latency_model.decode_per_request * requests
                + latency_model.decode_per_context_token * bucket.context_tokens as f64)
                * overlap;
            overlap_tokens += requests * overlap;
        };
        for bucket in pending.decode_buckets() {
            add_bucket(bucket, steps_until_prefill, steps_until_first_token);
        }
        // Outputs of prompts before this one start one after the other while this one waits: on
        // average, halfway.
        let half = steps_until_prefill / 2.0;
        add_bucket(
            &pending.prefill_requests,
            half,
            steps_until_first_token - half,
        );

        delay.decode_slowdown += slowdown / decode_share;
        delay.prefill_stall_caused += stalls;
        delay.decode_slowdown_caused = step_increment * overlap_tokens / decode_share;
        // Expected tokens that this output still has when the longest other one has ended.
        let last_tokens = output * output / (output + longest_remaining).max(1.0);
        let utilisation = self.mean_prefill_utilisation.min(MAX_PREFILL_UTILISATION);
        delay.busy_extension = utilisation / (1.0 - utilisation) * last_tokens * step;
        // Later arrivals wait for memory, or are routed elsewhere, which costs no more.
        let memory_wait =
            self.steps_until_memory_fits(pending, load, prefix_match) * step / decode_share;
        delay.future_arrivals += memory_wait * (rate * memory_wait / 2.0).min(1.0);
        delay
    }

    /// Returns the decode steps until the blocks of this request fit, and keep fitting while all
    /// outputs grow and end. Memory use peaks right before an output ends, so it is evaluated
    /// there, bucket by bucket (after Past-Future; Gong et al., 2025). 0 if the capacity is unknown
    /// or the worker has no requests. A request that never fits waits until all outputs have ended.
    fn steps_until_memory_fits(
        &self,
        pending: &PendingWork,
        load: Load,
        prefix_match: PrefixMatch,
    ) -> f64 {
        let Some(capacity) = pending.capacity else {
            return 0.0;
        };
        let resident = prefix_match.active_blocks.min(self.blocks);
        let used = load.projected_blocks() as f64 + f64::from(self.blocks - resident);
        let capacity = f64::from(capacity);
        let block_size = f64::from(self.block_size);
        let requests = f64::from(load.requests) + 1.0;
        // No output grows by more than this while the request is on the worker.
        if used + requests * self.output_tokens / block_size <= capacity || load.requests == 0 {
            return 0.0;
        }
        // A block that several requests share counts for each of them in part.
        let blocks_per_token =
            load.projected_blocks() as f64 / (load.context_tokens as f64).max(1.0);
        let mut buckets = [(0.0, 0.0, 0.0); DECODE_BUCKETS + 1];
        let present = pending.decode_buckets().chain([&pending.prefill_requests]);
        for (bucket, entry) in present.zip(&mut buckets) {
            let requests = f64::from(bucket.requests);
            let mean_remaining = bucket.remaining_tokens as f64 / requests.max(1.0);
            *entry = (
                mean_remaining,
                requests,
                bucket.context_tokens as f64 * blocks_per_token,
            );
        }
        // Requests in prefill are sorted among the others by when they end.
        buckets.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
        let (mut alive, mut freed, mut steps) = (requests, 0.0, 0.0);
        for (ends_after, requests, blocks) in buckets {
            if requests == 0.0 {
                continue;
            }
            if used - freed + alive * ends_after.min(self.output_tokens) / block_size > capacity {
                steps = ends_after;
            }
            alive -= requests;
            freed += blocks;
        }
        steps
    }
}

#[cfg(test)]
mod tests;
