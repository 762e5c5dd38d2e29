//! Policies: selection of a worker among candidates with known load and prefix matches.
//!
//! Every policy reads the same bookings under the same lock. Each decision therefore sees all
//! decisions before it. Policies differ only in the numbers that they compare.

mod probabilities;

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use rand::Rng;
use rand::rngs::SmallRng;

use crate::active_tree::{PrefixMatch, WorkerIndex};
use crate::kv_cost::{KvCost, KvCostInput};
use crate::marginal_delay::RequestProfile;
use crate::queue::QueueOrder;
use crate::sequence::SequenceHash;
use crate::workers::Workers;

/// Rule that chooses a worker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Policy {
    /// Least [marginal delay](crate::marginal_delay::MarginalDelay): predicted seconds over all
    /// requests.
    #[default]
    MarginalDelay,
    /// Least [`KvCost`]: prefill work and active blocks.
    Kv,
    /// Each worker after the other.
    RoundRobin,
    /// A random worker, all with equal probability.
    Random,
    /// The worker with the fewest requests.
    LeastRequests,
    /// The worker with fewer requests of two that are drawn at random (Mitzenmacher, 2001).
    PowerOfTwo,
    /// One worker for all prompts with the same first 1,024 tokens, by rendezvous hashing. A worker
    /// that would exceed 1.25 times the mean number of requests is passed over for the next in the
    /// order of the prompt's hash (consistent hashing with bounded loads; Mirrokni, Thorup and
    /// Zadimoghaddam, 2018).
    ConsistentHash,
}

impl Policy {
    /// Every policy, with its name in configuration.
    pub const ALL: [(Policy, &'static str); 7] = [
        (Policy::MarginalDelay, "marginal-delay"),
        (Policy::Kv, "kv"),
        (Policy::RoundRobin, "round-robin"),
        (Policy::Random, "random"),
        (Policy::LeastRequests, "least-requests"),
        (Policy::PowerOfTwo, "power-of-two"),
        (Policy::ConsistentHash, "consistent-hash"),
    ];

    /// Returns one line on how the policy chooses, for help texts.
    #[must_use]
    pub fn description(self) -> &'static str {
        match self {
            Self::MarginalDelay => "least predicted delay, in seconds over all requests",
            Self::Kv => "least overlap-weight × blocks to compute + active blocks",
            Self::RoundRobin => "each worker in turn",
            Self::Random => "a random worker",
            Self::LeastRequests => "the worker with the fewest requests",
            Self::PowerOfTwo => "of two random workers, the one with fewer requests",
            Self::ConsistentHash => "by the first 1,024 prompt tokens, with bounded load",
        }
    }

    /// Returns the queue order that suits the policy: shortest prefill first for the policy that
    /// predicts delays, and no queue for the others.
    #[must_use]
    pub fn default_queue(self) -> Option<QueueOrder> {
        (self == Self::MarginalDelay).then_some(QueueOrder::ShortestPrefillFirst)
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::ALL.iter().find(|(policy, _)| policy == self);
        f.pad(name.map_or("", |(_, name)| name))
    }
}

/// Error for a name that is not in [`Policy::ALL`].
#[derive(Debug, thiserror::Error)]
#[error("unknown policy `{0}`: use {names}", names = Policy::ALL.map(|(_, name)| name).join(", "))]
pub struct UnknownPolicy(String);

impl FromStr for Policy {
    type Err = UnknownPolicy;

    /// Reads a name of [`Policy::ALL`]; an underscore stands for a hyphen.
    fn from_str(name: &str) -> Result<Self, UnknownPolicy> {
        let hyphenated = name.replace('_', "-");
        Self::ALL
            .into_iter()
            .find_map(|(policy, known)| (known == hyphenated).then_some(policy))
            .ok_or_else(|| UnknownPolicy(name.to_owned()))
    }
}

/// State of the chosen worker when it was chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Decision {
    /// Cost of the request on the worker, in blocks.
    pub cost: KvCost,
    /// Prefix match of the prompt on the worker.
    pub prefix_match: PrefixMatch,
    /// Largest overlap of any worker, in blocks.
    pub best_overlap_blocks: u32,
}

/// Costs of the request on each worker, by worker index.
#[derive(Clone, Copy, Debug)]
pub(crate) enum CostSource<'a> {
    /// Costs of one prompt, computed from its prefix matches.
    Computed(KvCostInput, RequestProfile, &'a [PrefixMatch]),
    /// Sums over several prompts: in blocks, and in seconds.
    Precomputed(&'a [KvCost], &'a [f64]),
}

/// Workers to choose from, with their costs.
pub(crate) struct CandidateSet<'a> {
    /// Workers that are healthy, serve the model and are not passed over.
    pub(crate) eligible: &'a [WorkerIndex],
    /// Workers that are ruled out for this request.
    pub(crate) excluded: &'a [WorkerIndex],
    /// All workers, with their loads.
    pub(crate) workers: &'a Workers,
    /// Costs of the request on each worker.
    pub(crate) costs: CostSource<'a>,
    /// Sequence hashes of the prompt's blocks, for consistent hashing.
    pub(crate) hashes: &'a [SequenceHash],
    /// Time of the decision, to which failure charges have decayed.
    pub(crate) now: Duration,
}

/// Number of prompt tokens that consistent hashing uses.
const CONSISTENT_HASH_PREFIX_TOKENS: usize = 1024;
/// Largest load that consistent hashing permits, relative to the mean number of requests.
const CONSISTENT_HASH_LOAD_FACTOR: f64 = 1.25;

impl CandidateSet<'_> {
    /// Returns the eligible workers that are not excluded.
    fn worker_indices(&self) -> impl Iterator<Item = WorkerIndex> + Clone + '_ {
        self.eligible
            .iter()
            .copied()
            .filter(|worker| !self.excluded.contains(worker))
    }

    /// Returns the KV cost of the request on a worker.
    #[inline]
    pub(crate) fn kv_cost(&self, worker: WorkerIndex) -> KvCost {
        let index = worker as usize;
        match self.costs {
            CostSource::Computed(input, _, prefix_matches) => input.cost(
                self.workers.loads[index].projected_blocks(),
                prefix_matches[index],
            ),
            CostSource::Precomputed(costs, _) => costs[index],
        }
    }

    /// Returns the marginal delay of the request on a worker if it is below `cutoff`, and otherwise
    /// a lower bound of it that may already be at or above `cutoff`.
    fn marginal_delay(&self, worker: WorkerIndex, cutoff: f64) -> f64 {
        let index = worker as usize;
        match self.costs {
            CostSource::Computed(_, profile, prefix_matches) => self
                .workers
                .marginal_delay_or_bound(cutoff, &profile, worker, prefix_matches[index]),
            CostSource::Precomputed(_, delays) => delays[index],
        }
    }

    /// Returns the cost that a policy minimises: blocks under [`Policy::Kv`], seconds of marginal
    /// delay under all others.
    fn policy_cost(&self, policy: Policy, worker: WorkerIndex) -> f64 {
        match policy {
            Policy::Kv => self.charged_kv_cost(worker).total,
            _ => self.marginal_delay(worker, f64::INFINITY),
        }
    }

    /// Returns the KV cost of the request on a worker, with the worker's failure charge in its
    /// total.
    pub(crate) fn charged_kv_cost(&self, worker: WorkerIndex) -> KvCost {
        let cost = self.kv_cost(worker);
        KvCost {
            total: cost.total + self.workers.outliers.charge(worker, self.now).blocks,
            ..cost
        }
    }

    /// Returns the number of requests on a worker, those of its failure charge included.
    fn requests(&self, worker: WorkerIndex) -> f64 {
        f64::from(self.workers.loads[worker as usize].requests)
            + self.workers.outliers.charge(worker, self.now).requests
    }

    /// Chooses a worker. Returns `None` if every eligible worker is excluded, or there is none.
    ///
    /// `temperature` above 0 samples by cost under [`Policy::Kv`] and [`Policy::MarginalDelay`];
    /// other policies ignore it. `block_size` is in tokens, at least 1, and only
    /// [`Policy::ConsistentHash`] uses it. `round_robin_cursor` is the number of choices made
    /// before, for [`Policy::RoundRobin`].
    pub(crate) fn select(
        &self,
        policy: Policy,
        temperature: f64,
        block_size: usize,
        round_robin_cursor: u64,
        rng: &mut SmallRng,
    ) -> Option<WorkerIndex> {
        match policy {
            Policy::Kv | Policy::MarginalDelay if temperature > 0.0 => {
                self.sample_by_cost(policy, temperature, rng)
            }
            Policy::Kv => self.argmin_kv_cost(rng),
            Policy::MarginalDelay => self.argmin_marginal_delay(rng),
            Policy::RoundRobin => self.round_robin(round_robin_cursor),
            Policy::Random => self.argmin(rng, |_, _| 0),
            Policy::LeastRequests => self.argmin(rng, |worker, _| self.requests(worker)),
            Policy::PowerOfTwo => self.power_of_two(rng),
            Policy::ConsistentHash => match self.consistent_hash_key(block_size) {
                Some(key) => self.bounded_consistent_hash(key),
                None => self.argmin(rng, |worker, _| self.requests(worker)),
            },
        }
    }

    /// Returns the worker at position `cursor`, counted around the eligible workers.
    fn round_robin(&self, cursor: u64) -> Option<WorkerIndex> {
        let count = self.worker_indices().count() as u64;
        let position = cursor.checked_rem(count)?;
        self.worker_indices().nth(position as usize)
    }

    /// Returns the hash of the prompt's first `CONSISTENT_HASH_PREFIX_TOKENS` tokens, or of all its
    /// whole blocks if it is shorter. Returns `None` for a prompt shorter than one block, which has
    /// no prefix that another request could share. Prompts of unknown content have no hashes, so
    /// `None` too.
    fn consistent_hash_key(&self, block_size: usize) -> Option<SequenceHash> {
        let blocks =
            (CONSISTENT_HASH_PREFIX_TOKENS / block_size).clamp(1, self.hashes.len().max(1));
        self.hashes.get(blocks - 1).copied()
    }

    /// Returns the worker of least KV cost; see [`argmin_kv_cost_by`](Self::argmin_kv_cost_by) for
    /// ties.
    fn argmin_kv_cost(&self, rng: &mut SmallRng) -> Option<WorkerIndex> {
        let loads = &self.workers.loads;
        if self.workers.outliers.has_charges() {
            return self.argmin_kv_cost_by(rng, |index| {
                Some(self.charged_kv_cost(index as WorkerIndex))
            });
        }
        match self.costs {
            CostSource::Computed(input, _, prefix_matches) => {
                self.argmin_kv_cost_by(rng, |index| {
                    let (load, prefix_match) = (loads.get(index)?, prefix_matches.get(index)?);
                    Some(input.cost(load.projected_blocks(), *prefix_match))
                })
            }
            CostSource::Precomputed(costs, _) => {
                self.argmin_kv_cost_by(rng, |index| costs.get(index).copied())
            }
        }
    }

    /// Returns the worker of least `cost`. Of workers with equal cost it prefers the one with fewer
    /// blocks to compute, and then draws at random.
    ///
    /// Passes over workers whose `cost` is `None` or not a number. Returns `None` if no worker is
    /// left.
    ///
    /// This is the one loop that visits every worker at every decision, so it is written out: its
    /// operands are in local variables, and only a new minimum branches.
    #[inline]
    fn argmin_kv_cost_by(
        &self,
        rng: &mut SmallRng,
        cost: impl Fn(usize) -> Option<KvCost>,
    ) -> Option<WorkerIndex> {
        let has_excluded = !self.excluded.is_empty();
        let mut chosen = None;
        let mut minimum = (f64::INFINITY, u32::MAX);
        let mut tie_count = 1;
        for &worker in self.eligible {
            let Some(cost) = cost(worker as usize) else {
                continue;
            };
            if cost.total > minimum.0 || (has_excluded && self.excluded.contains(&worker)) {
                continue;
            }
            let value = (cost.total, cost.prefill_blocks);
            if value < minimum {
                minimum = value;
                chosen = Some(worker);
                tie_count = 1;
            } else if value == minimum && replaces_tie(&mut tie_count, rng) {
                chosen = Some(worker);
            }
        }
        chosen
    }

    /// Returns the worker of least marginal delay, a random one of several with the same.
    fn argmin_marginal_delay(&self, rng: &mut SmallRng) -> Option<WorkerIndex> {
        self.argmin(rng, |worker, minimum| {
            // The cutoff is just above the minimum, so that an equal delay is computed exactly.
            let cutoff = minimum.map_or(f64::INFINITY, f64::next_up);
            let delay = self.marginal_delay(worker, cutoff);
            // A delay that is not a number must not keep the request from every worker.
            if delay.is_nan() { f64::INFINITY } else { delay }
        })
    }

    /// Returns the worker with the least `measure`, a random one of several with the same.
    /// `measure` is passed the least value so far. It must not return NaN. Returns `None` if there
    /// is no worker.
    fn argmin<M: PartialOrd + Copy>(
        &self,
        rng: &mut SmallRng,
        measure: impl Fn(WorkerIndex, Option<M>) -> M,
    ) -> Option<WorkerIndex> {
        let mut chosen = None;
        let mut minimum = None;
        let mut tie_count = 1;
        for worker in self.worker_indices() {
            let value = measure(worker, minimum);
            if minimum.is_none_or(|minimum| value < minimum) {
                minimum = Some(value);
                chosen = Some(worker);
                tie_count = 1;
            } else if minimum == Some(value) && replaces_tie(&mut tie_count, rng) {
                chosen = Some(worker);
            }
        }
        chosen
    }

    /// Draws a worker by softmax over the costs, divided by their range. Returns `None` if there is
    /// no worker.
    fn sample_by_cost(
        &self,
        policy: Policy,
        temperature: f64,
        rng: &mut SmallRng,
    ) -> Option<WorkerIndex> {
        let mut chosen = None;
        let mut total = 0.0;
        for (worker, weight) in self.softmax_weights(policy, temperature) {
            total += weight;
            if rng.random::<f64>() * total < weight {
                chosen = Some(worker);
            }
        }
        chosen
    }

    /// Returns the weight of each worker in the draw, up to a common factor. At temperature 0 only
    /// the workers of least cost have a weight above 0. A cost that is infinite or not a number has
    /// weight 0, unless no cost is finite: then all weights are 1.
    pub(crate) fn softmax_weights(
        &self,
        policy: Policy,
        temperature: f64,
    ) -> impl Iterator<Item = (WorkerIndex, f64)> + '_ {
        // A cost that is not a number counts as infinite, so that one unusable forecast does not
        // keep requests from every worker.
        let cost_of = move |worker| {
            let cost = self.policy_cost(policy, worker);
            if cost.is_nan() { f64::INFINITY } else { cost }
        };
        let (mut minimum, mut maximum) = (f64::INFINITY, f64::NEG_INFINITY);
        for worker in self.worker_indices() {
            let cost = cost_of(worker);
            minimum = minimum.min(cost);
            if cost.is_finite() {
                maximum = maximum.max(cost);
            }
        }
        let range = maximum - minimum;
        self.worker_indices().map(move |worker| {
            let cost = cost_of(worker);
            // The first case covers the minimum, and every worker if no cost is finite.
            let weight = if cost == minimum {
                1.0
            } else if !cost.is_finite() {
                0.0
            } else {
                (-((cost - minimum) / range) / temperature).exp()
            };
            (worker, weight)
        })
    }

    /// Draws two different workers at random and returns the one with fewer requests. Returns the
    /// first drawn if both have equally many, the only worker if there is one, and `None` if there
    /// is none.
    fn power_of_two(&self, rng: &mut SmallRng) -> Option<WorkerIndex> {
        let count = self.worker_indices().count();
        if count == 0 {
            return None;
        }
        let first = rng.random_range(0..count);
        let second = if count > 1 {
            (first + rng.random_range(1..count)) % count
        } else {
            first
        };
        let (first, second) = (
            self.worker_indices().nth(first)?,
            self.worker_indices().nth(second)?,
        );
        let keep_first = self.requests(first) <= self.requests(second);
        Some(if keep_first { first } else { second })
    }

    /// Returns the worker that ranks highest for `key` among those whose number of requests is
    /// below the bound. The bound counts the new request and is above the least load, so the result
    /// is `None` only if there is no worker.
    fn bounded_consistent_hash(&self, key: SequenceHash) -> Option<WorkerIndex> {
        let count = self.worker_indices().count();
        let total_requests: f64 = self
            .worker_indices()
            .map(|worker| self.requests(worker))
            .sum();
        let bound = (CONSISTENT_HASH_LOAD_FACTOR * (total_requests + 1.0) / count as f64).ceil();
        self.worker_indices()
            .filter(|&worker| self.requests(worker) < bound)
            .max_by_key(|&worker| rendezvous(key, self.workers.loads[worker as usize].name_hash))
    }
}

/// Returns whether one more equal candidate replaces the current one. Each of `n` equal candidates
/// ends up chosen with probability 1/n. Increments `tie_count`, which must start at 1.
fn replaces_tie(tie_count: &mut u32, rng: &mut SmallRng) -> bool {
    *tie_count += 1;
    rng.random_range(0..*tie_count) == 0
}

/// Returns the rank of a worker for a key; the highest wins (rendezvous hashing; Thaler and
/// Ravishankar, 1998).
fn rendezvous(key: SequenceHash, name_hash: u64) -> u64 {
    let product = u128::from(key ^ name_hash) * 0x9E37_79B9_7F4A_7C15;
    (product as u64) ^ ((product >> 64) as u64)
}
