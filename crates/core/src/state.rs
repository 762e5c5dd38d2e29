//! Everything behind the router's lock, and how a decision reads it.
//!
//! Read, choose and book are one critical section. Work proportional to a prompt (hashing,
//! tokenising, allocating) is done before the lock is taken, freeing after it is released.

use std::sync::Arc;
use std::task::Waker;
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use slab::Slab;
use smallvec::SmallVec;

use crate::batch::Members;
use crate::cache::CacheIndex;
use crate::choose::{Decision, Field, Prices};
use crate::config::RouterConfig;
use crate::copies::Losses;
use crate::cost::Demand;
use crate::delay::Placement;
use crate::depths::Depths;
use crate::fleet::{Fleet, WorkerId};
use crate::forecast::lengths::{Kind, OutputLength};
use crate::foreseen::Foreseen;
use crate::queue::{Queue, Standing};
use crate::record::Record;
use crate::request::{Candidate, Explanation, Request, RouteError};
use crate::tree::{Chain, Depth, Match, PrefixTree, Slot};
use crate::unwatched::Unwatched;

/// The state, shared by a router's handles and its bookings.
#[derive(Clone, Debug)]
pub(crate) struct Locked(Arc<Mutex<State>>);

impl Locked {
    pub(crate) fn new(state: State) -> Self {
        Self(Arc::new(Mutex::new(state)))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock()
    }
}

/// Everything behind the lock.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) config: RouterConfig,
    pub(crate) fleet: Fleet,
    /// What workers' requests pin, and what they leave cached.
    pub(crate) tree: PrefixTree,
    /// What requests in line will pin.
    pub(crate) lined_up: PrefixTree,
    pub(crate) cache: CacheIndex,
    pub(crate) foreseen: Foreseen,
    pub(crate) bookings: Slab<Record>,
    pub(crate) output_length: OutputLength,
    pub(crate) unwatched: Unwatched,
    pub(crate) serial: u64,
    pub(crate) queue: Queue,
    pub(crate) losses: Losses,
    rng: SmallRng,
    turn: u64,
    /// The latest time anybody told.
    pub(crate) now: Duration,
}

/// Ends a critical section. Hash chains that lost their last node may be long allocations, so
/// they are freed after the lock; and who is woken may want it.
pub(crate) fn release(state: MutexGuard<'_, State>) {
    release_by(state, drop);
}

/// The same, where the section is one of very many: whoever waits for the lock has it next.
pub(crate) fn release_fair(state: MutexGuard<'_, State>) {
    release_by(state, MutexGuard::unlock_fair);
}

fn release_by<'a>(mut state: MutexGuard<'a, State>, unlock: impl FnOnce(MutexGuard<'a, State>)) {
    let garbage: SmallVec<[Chain; 4]> = std::mem::take(&mut state.tree.garbage);
    let lined_up = std::mem::take(&mut state.lined_up.garbage);
    let woken = std::mem::take(&mut state.queue.woken);
    unlock(state);
    drop((garbage, lined_up));
    woken.into_iter().for_each(Waker::wake);
}

/// What a decision reads of one prompt.
#[derive(Debug)]
pub(crate) struct Reading {
    depths: Depths,
    /// Where it leaves the tree.
    pub(crate) at: Match,
    /// What its answer's length may depend on, and how many tokens it is expected to have.
    pub(crate) kind: Kind,
    pub(crate) expected_tokens: u32,
    pub(crate) standing: Standing,
}

impl Reading {
    /// By slot.
    pub(crate) fn depths(&self) -> &[Depth] {
        &self.depths
    }
}

impl State {
    pub(crate) fn new(config: RouterConfig) -> Self {
        Self {
            rng: SmallRng::seed_from_u64(config.seed),
            config,
            fleet: Fleet::default(),
            tree: PrefixTree::default(),
            lined_up: PrefixTree::default(),
            cache: CacheIndex::default(),
            foreseen: Foreseen::default(),
            bookings: Slab::new(),
            output_length: OutputLength::default(),
            unwatched: Unwatched::default(),
            serial: 0,
            queue: Queue::default(),
            losses: Losses::default(),
            turn: 0,
            now: Duration::ZERO,
        }
    }

    /// How a request stands that comes now.
    pub(crate) fn standing(&self, request: &Request<'_>) -> Standing {
        let order = self.config.queue.unwrap_or_default();
        self.queue
            .standing(order, request.priority, request.tenant, self.now)
    }

    /// Reads how deep the request's prompt reaches on every worker.
    pub(crate) fn read(&self, request: &Request<'_>) -> Reading {
        self.read_again(request, self.standing(request))
    }

    /// The same for a request that came before.
    pub(crate) fn read_again(&self, request: &Request<'_>, standing: Standing) -> Reading {
        let mut reading = self.read_as_sent(request, standing);
        if self.queue.held > 0 {
            let mut lined_up = Depths::zero(self.fleet.slots());
            let chain = request.sequence.hashes();
            self.lined_up.descend(chain, &mut lined_up);
            for (depth, lined_up) in reading.depths.iter_mut().zip(lined_up.iter()) {
                depth.active = depth.active.max(lined_up.active);
            }
            reading.at.best_overlap = reading.depths.best_overlap();
        }
        reading
    }

    /// The same as if it were sent at once, before all in line.
    pub(crate) fn read_as_sent(&self, request: &Request<'_>, standing: Standing) -> Reading {
        let mut depths = Depths::zero(self.fleet.slots());
        let chain = request.sequence.hashes();
        let mut at = self.tree.descend(chain, &mut depths);
        at.best_overlap = at.best_overlap.max(self.cache.descend(chain, &mut depths));
        let capped = self.foreseen.cap(chain, &self.tree, &mut depths);
        let reusable = request.sequence.reusable_blocks();
        let rounded = self.fleet.round_to_whole_blocks(reusable, &mut depths);
        if capped || rounded {
            at.best_overlap = depths.best_overlap();
        }
        let kind = request.kind();
        Reading {
            depths,
            at,
            kind,
            expected_tokens: self.output_length.remaining_of(
                kind,
                0,
                request.max_tokens,
                request.expected_tokens,
            ),
            standing,
        }
    }

    fn field<'a>(
        &'a self,
        request: &Request<'a>,
        prices: Prices<'a>,
        excluded: &'a [Slot],
    ) -> Result<Field<'a>, RouteError> {
        let eligible = self
            .fleet
            .eligible(request.model)
            .ok_or_else(|| RouteError::UnknownModel(request.model.to_owned()))?;
        Ok(Field {
            eligible,
            excluded,
            fleet: &self.fleet,
            prices,
            hashes: request.sequence.hashes(),
        })
    }

    pub(crate) fn demand(&self, request: &Request<'_>) -> Demand {
        Demand {
            blocks: request.sequence.blocks(),
            reusable_blocks: request.sequence.reusable_blocks(),
            overlap_weight: self.config.overlap_weight,
        }
    }

    pub(crate) fn placement(&self, request: &Request<'_>, reading: &Reading) -> Placement {
        let sequence = request.sequence;
        Placement {
            prompt_tokens: sequence.tokens(),
            blocks: sequence.blocks(),
            reusable_blocks: sequence.reusable_blocks(),
            block_size: sequence.block_size().get(),
            output_tokens: f64::from(reading.expected_tokens),
            overlap_weight: self.config.overlap_weight,
            ttft_weight: self.config.ttft_weight,
            standing: reading.standing,
            now: self.now,
        }
    }

    /// What speaks for placing the request at `slot`, as last [read](Self::read).
    pub(crate) fn decision(
        &self,
        slot: Slot,
        reading: &Reading,
        request: &Request<'_>,
    ) -> Decision {
        let demand = self.demand(request);
        let booked = self.fleet.loads[slot as usize].booked_blocks();
        let depth = reading.depths[slot as usize];
        Decision {
            cost: demand.cost(booked, depth),
            depth,
            best_overlap_blocks: reading.at.best_overlap.min(demand.reusable_blocks),
        }
    }

    /// Slots of those excluded workers that still exist.
    pub(crate) fn excluded(&self, request: &Request<'_>) -> SmallVec<[Slot; 4]> {
        let known = request.excluded.iter();
        known
            .filter_map(|&id| self.fleet.get(id).map(|_| id.slot))
            .collect()
    }

    /// Reads, then chooses a worker for a request that has just come. Also tells what was read.
    pub(crate) fn choose(
        &mut self,
        request: &Request<'_>,
    ) -> Result<(WorkerId, Reading), RouteError> {
        let reading = self.read(request);
        let best = self.choose_by(request, &reading)?;
        let worker = self.copies_to(best, &reading, request).unwrap_or(best);
        Ok((worker, reading))
    }

    /// Chooses a worker by what was read.
    pub(crate) fn choose_by(
        &mut self,
        request: &Request<'_>,
        reading: &Reading,
    ) -> Result<WorkerId, RouteError> {
        let (demand, placement) = (self.demand(request), self.placement(request, reading));
        let prices = Prices::OfOne(demand, placement, &reading.depths);
        self.pick(request, prices)
    }

    /// Chooses a worker at these prices.
    pub(crate) fn pick(
        &mut self,
        request: &Request<'_>,
        prices: Prices<'_>,
    ) -> Result<WorkerId, RouteError> {
        let excluded = self.excluded(request);
        // A copy: a decision that fails draws nothing, and the field borrows the rest.
        let mut rng = self.rng.clone();
        let worker = self
            .field(request, prices, &excluded)?
            .choose(
                self.config.policy,
                self.config.temperature,
                self.config.block_size.get() as usize,
                self.turn,
                &mut rng,
            )
            .and_then(|slot| self.fleet.at(slot))
            .map(|worker| worker.id)
            .ok_or_else(|| RouteError::NoWorker(request.model.to_owned()))?;
        self.rng = rng;
        self.turn += 1;
        Ok(worker)
    }

    pub(crate) fn explain(&self, members: &Members<'_>) -> Result<Explanation, RouteError> {
        let request = &members.requests()[0];
        let sums = self.sum(members);
        let excluded = self.excluded(request);
        let field = self.field(
            request,
            Prices::Summed(&sums.costs, &sums.totals),
            &excluded,
        )?;
        let weights = self.probabilities(&field);
        let mut candidates: Vec<Candidate> = weights
            .into_iter()
            .filter_map(|(slot, probability)| {
                let worker = self.fleet.at(slot)?;
                let load = self.fleet.loads[slot as usize];
                Some(Candidate {
                    id: worker.id,
                    name: worker.name.clone(),
                    requests: load.requests,
                    active_blocks: load.booked_blocks(),
                    depth: sums.depths[slot as usize],
                    cost: field.cost_of(slot),
                    delay: sums.delays[slot as usize],
                    probability,
                })
            })
            .collect();
        if candidates.is_empty() {
            return Err(RouteError::NoWorker(request.model.to_owned()));
        }
        candidates.sort_unstable_by_key(|candidate| candidate.id);
        let mut explanation = Explanation {
            policy: self.config.policy,
            overlap_weight: self.config.overlap_weight,
            ttft_weight: self.config.ttft_weight,
            temperature: self.config.temperature,
            copies_to: None,
            candidates,
        };
        if let ([request], Some(chosen)) = (members.requests(), explanation.choice()) {
            let reading = self.read(request);
            explanation.copies_to = self.would_copy_to(chosen.id, &reading, request);
        }
        Ok(explanation)
    }

    /// How likely each eligible worker is to be preferred.
    fn probabilities(&self, field: &Field<'_>) -> Vec<(Slot, f64)> {
        let weights = field.softmax_weights(self.config.policy, self.config.temperature);
        let mut weights: Vec<(Slot, f64)> = weights.collect();
        let total: f64 = weights.iter().map(|(_, weight)| weight).sum();
        weights.iter_mut().for_each(|(_, weight)| *weight /= total);
        weights
    }
}
