//! A choice among workers whose load and overlap are known.
//!
//! Every policy reads the same bookings under the same lock, so each sees all choices made
//! before its own. They differ only in what they look at.

use std::fmt;
use std::str::FromStr;

use rand::Rng;
use rand::rngs::SmallRng;

use crate::cost::{Cost, Demand};
use crate::delay::Placement;
use crate::fleet::Fleet;
use crate::sequence::SequenceHash;
use crate::tree::{Depth, Slot};

/// How a worker is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Policy {
    /// Least [`Delay`](crate::delay::Delay) of everybody, in predicted seconds.
    #[default]
    Delay,
    /// Least [`Cost`]: predicted prefill work and active blocks.
    Kv,
    /// Each worker in turn.
    RoundRobin,
    /// Any worker, evenly.
    Random,
    /// The worker with the fewest running requests.
    LeastRequests,
    /// The less busy, by requests, of two workers drawn at random (Mitzenmacher, 2001).
    PowerOfTwo,
    /// The same worker for the same first 1,024 prompt tokens, by rendezvous hashing, unless it
    /// runs more than 1.25 times the mean number of requests: then the next in the prompt's
    /// own order (consistent hashing with bounded loads; Mirrokni, Thorup, Zadimoghaddam, 2018).
    ConsistentHash,
}

impl Policy {
    /// Every policy, with its name.
    pub const ALL: [(Policy, &'static str); 7] = [
        (Policy::Delay, "delay"),
        (Policy::Kv, "kv"),
        (Policy::RoundRobin, "round-robin"),
        (Policy::Random, "random"),
        (Policy::LeastRequests, "least-requests"),
        (Policy::PowerOfTwo, "power-of-two"),
        (Policy::ConsistentHash, "consistent-hash"),
    ];
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::ALL.iter().find(|(policy, _)| policy == self);
        f.pad(name.map_or("", |(_, name)| name))
    }
}

/// A policy's name that is none of [`Policy::ALL`].
#[derive(Debug, thiserror::Error)]
#[error(
    "unknown policy `{0}`: use delay, kv, round-robin, random, least-requests, power-of-two or consistent-hash"
)]
pub struct UnknownPolicy(String);

impl FromStr for Policy {
    type Err = UnknownPolicy;

    fn from_str(name: &str) -> Result<Self, UnknownPolicy> {
        Self::ALL
            .into_iter()
            .find_map(|(policy, known)| (known == name).then_some(policy))
            .ok_or_else(|| UnknownPolicy(name.to_owned()))
    }
}

/// What the chosen worker looked like when it was chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Decision {
    /// Its cost.
    pub cost: Cost,
    /// How deep the prompt reached there.
    pub depth: Depth,
    /// The largest overlap, in blocks, that any worker offered.
    pub best_overlap_blocks: u32,
}

/// What a worker's bookings add up to.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Load {
    /// Blocks pinned by the requests that it has, shared ones once.
    pub(crate) active_blocks: u64,
    /// Blocks beside those that the requests in its line will pin.
    pub(crate) held_blocks: u64,
    /// Prompt and output tokens of all of them, not deduplicated: what a decode step reads.
    pub(crate) context_tokens: u64,
    pub(crate) requests: u32,
    /// Tells workers apart in consistent hashing; does not change when others come and go.
    pub(crate) identity: u64,
}

impl Load {
    /// Blocks that are or will be pinned by what is booked.
    pub(crate) fn booked_blocks(&self) -> u64 {
        self.active_blocks + self.held_blocks
    }
}

/// What placing the request on each worker costs, by slot.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Prices<'a> {
    /// One prompt's cost follows from how deep it reaches.
    OfOne(Demand, Placement, &'a [Depth]),
    /// Those of several prompts were summed up: in blocks, and in seconds.
    Summed(&'a [Cost], &'a [f64]),
}

/// The workers to choose from and what is known of them, indexed by slot.
pub(crate) struct Field<'a> {
    pub(crate) eligible: &'a [Slot],
    pub(crate) excluded: &'a [Slot],
    pub(crate) fleet: &'a Fleet,
    pub(crate) prices: Prices<'a>,
    pub(crate) hashes: &'a [SequenceHash],
}

/// Prompt tokens that decide where consistent hashing sends a request.
const HASHED_TOKENS: usize = 1024;
/// How far above the mean number of requests consistent hashing lets a worker go.
const LOAD_BOUND: f64 = 1.25;

impl Field<'_> {
    fn slots(&self) -> impl Iterator<Item = Slot> + Clone + '_ {
        self.eligible
            .iter()
            .copied()
            .filter(|slot| !self.excluded.contains(slot))
    }

    #[inline]
    pub(crate) fn cost_of(&self, slot: Slot) -> Cost {
        let index = slot as usize;
        match self.prices {
            Prices::OfOne(demand, _, depths) => {
                demand.cost(self.fleet.loads[index].booked_blocks(), depths[index])
            }
            Prices::Summed(costs, _) => costs[index],
        }
    }

    /// If that is no less than `most`, something no less.
    fn delay_of(&self, slot: Slot, most: f64) -> f64 {
        let index = slot as usize;
        match self.prices {
            Prices::OfOne(_, placement, depths) => {
                self.fleet
                    .delay_below(most, &placement, slot, depths[index])
            }
            Prices::Summed(_, delays) => delays[index],
        }
    }

    /// The cost that a policy looks at.
    fn price_of(&self, policy: Policy, slot: Slot) -> f64 {
        match policy {
            Policy::Kv => self.cost_of(slot).total,
            _ => self.delay_of(slot, f64::INFINITY),
        }
    }

    fn requests(&self, slot: Slot) -> u32 {
        self.fleet.loads[slot as usize].requests
    }

    /// Chooses a worker, or none if none is eligible. `turn` counts the choices made before.
    pub(crate) fn choose(
        &self,
        policy: Policy,
        temperature: f64,
        block_size: usize,
        turn: u64,
        rng: &mut SmallRng,
    ) -> Option<Slot> {
        match policy {
            Policy::Kv | Policy::Delay if temperature > 0.0 => {
                self.sample_by_cost(policy, temperature, rng)
            }
            Policy::Kv => self.least_cost(rng),
            Policy::Delay => self.least_delay(rng),
            Policy::RoundRobin => {
                let count = self.slots().count() as u64;
                let position = turn.checked_rem(count)?;
                self.slots().nth(position as usize)
            }
            Policy::Random => self.least(rng, |_, _| 0),
            Policy::LeastRequests => self.least(rng, |slot, _| self.requests(slot)),
            Policy::PowerOfTwo => self.less_busy_of_two(rng),
            Policy::ConsistentHash => {
                let deciding = (HASHED_TOKENS / block_size).clamp(1, self.hashes.len().max(1));
                match self.hashes.get(deciding - 1) {
                    Some(&key) => self.by_hash_within_bound(key),
                    // Shorter than a block: there is no prefix to stay close to.
                    None => self.least(rng, |slot, _| self.requests(slot)),
                }
            }
        }
    }

    fn least_cost(&self, rng: &mut SmallRng) -> Option<Slot> {
        let loads = &self.fleet.loads;
        match self.prices {
            Prices::OfOne(demand, _, depths) => self.least_cost_by(rng, |index| {
                let (load, depth) = (loads.get(index)?, depths.get(index)?);
                Some(demand.cost(load.booked_blocks(), *depth))
            }),
            Prices::Summed(costs, _) => self.least_cost_by(rng, |index| costs.get(index).copied()),
        }
    }

    /// The slot of least cost; of equal ones that with the least to compute, then any.
    ///
    /// The one loop that visits every worker at every decision, so it is written out: what it
    /// reads is in locals, and nothing but a new best branches.
    #[inline]
    fn least_cost_by(
        &self,
        rng: &mut SmallRng,
        cost: impl Fn(usize) -> Option<Cost>,
    ) -> Option<Slot> {
        let excludes = !self.excluded.is_empty();
        let mut chosen = None;
        let mut least = (f64::INFINITY, u32::MAX);
        let mut equal = 1;
        for &slot in self.eligible {
            let Some(cost) = cost(slot as usize) else {
                continue;
            };
            if cost.total > least.0 || (excludes && self.excluded.contains(&slot)) {
                continue;
            }
            let measured = (cost.total, cost.prefill_blocks);
            if measured < least {
                least = measured;
                chosen = Some(slot);
                equal = 1;
            } else if measured == least && is_drawn(&mut equal, rng) {
                chosen = Some(slot);
            }
        }
        chosen
    }

    /// The slot of least delay; of equal ones any.
    fn least_delay(&self, rng: &mut SmallRng) -> Option<Slot> {
        self.least(rng, |slot, least| {
            // Equal ones must be told apart from those above.
            let most = least.map_or(f64::INFINITY, f64::next_up);
            let delay = self.delay_of(slot, most);
            // What cannot be told must not keep a request from every worker.
            if delay.is_nan() { f64::INFINITY } else { delay }
        })
    }

    /// The slot with the least `measure`, which is told the least so far; each of several equal
    /// ones is as likely.
    fn least<M: PartialOrd + Copy>(
        &self,
        rng: &mut SmallRng,
        measure: impl Fn(Slot, Option<M>) -> M,
    ) -> Option<Slot> {
        let mut chosen = None;
        let mut least = None;
        let mut equal = 1;
        for slot in self.slots() {
            let measured = measure(slot, least);
            if least.is_none_or(|least| measured < least) {
                least = Some(measured);
                chosen = Some(slot);
                equal = 1;
            } else if least == Some(measured) && is_drawn(&mut equal, rng) {
                chosen = Some(slot);
            }
        }
        chosen
    }

    /// Samples by softmax over costs divided by their range.
    fn sample_by_cost(&self, policy: Policy, temperature: f64, rng: &mut SmallRng) -> Option<Slot> {
        let mut chosen = None;
        let mut total = 0.0;
        for (slot, weight) in self.softmax_weights(policy, temperature) {
            total += weight;
            if rng.random::<f64>() * total < weight {
                chosen = Some(slot);
            }
        }
        chosen
    }

    /// Each slot's share in the choice, up to a common factor. At temperature 0 all of it goes
    /// to the slots of least cost.
    pub(crate) fn softmax_weights(
        &self,
        policy: Policy,
        temperature: f64,
    ) -> impl Iterator<Item = (Slot, f64)> + '_ {
        let (mut least, mut most) = (f64::INFINITY, f64::NEG_INFINITY);
        for slot in self.slots() {
            let cost = self.price_of(policy, slot);
            least = least.min(cost);
            most = most.max(cost);
        }
        let range = most - least;
        self.slots().map(move |slot| {
            let above = self.price_of(policy, slot) - least;
            let weight = if above == 0.0 {
                1.0
            } else {
                (-(above / range) / temperature).exp()
            };
            (slot, weight)
        })
    }

    fn less_busy_of_two(&self, rng: &mut SmallRng) -> Option<Slot> {
        let count = self.slots().count();
        if count == 0 {
            return None;
        }
        let first = rng.random_range(0..count);
        let second = if count > 1 {
            (first + rng.random_range(1..count)) % count
        } else {
            first
        };
        let (first, second) = (self.slots().nth(first)?, self.slots().nth(second)?);
        let keep_first = self.requests(first) <= self.requests(second);
        Some(if keep_first { first } else { second })
    }

    fn by_hash_within_bound(&self, key: SequenceHash) -> Option<Slot> {
        let count = self.slots().count();
        let running: u64 = self
            .slots()
            .map(|slot| u64::from(self.requests(slot)))
            .sum();
        let bound = (LOAD_BOUND * (running + 1) as f64 / count as f64).ceil() as u32;
        self.slots()
            .filter(|&slot| self.requests(slot) < bound)
            .max_by_key(|&slot| rendezvous(key, self.fleet.loads[slot as usize].identity))
    }
}

/// Whether one more equal candidate replaces the one held so far: each of `n` ends up held with
/// probability 1/n.
fn is_drawn(equal: &mut u32, rng: &mut SmallRng) -> bool {
    *equal += 1;
    rng.random_range(0..*equal) == 0
}

/// A worker's rank for a key: the highest wins (rendezvous hashing; Thaler, Ravishankar, 1998).
fn rendezvous(key: SequenceHash, identity: u64) -> u64 {
    let product = u128::from(key ^ identity) * 0x9E37_79B9_7F4A_7C15;
    (product as u64) ^ ((product >> 64) as u64)
}
