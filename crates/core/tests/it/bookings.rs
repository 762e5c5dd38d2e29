//! Bookings against the [`naive`](crate::naive) model of each worker, driven by the same steps.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::naive::{BLOCK_SIZE, NaiveWorker};
use foresee_core::booking::Booking;
use foresee_core::cache::{Changes, Paths};
use foresee_core::fleet::{WorkerId, WorkerSpec};
use foresee_core::router::{Request, RouteError, Router, RouterConfig};
use foresee_core::sequence::Sequence;
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Step {
    Book {
        prompt: Vec<u32>,
        model: usize,
        streams: bool,
        max_tokens: Option<u32>,
    },
    FirstToken(usize),
    Tokens(usize, u32),
    SetTokens(usize, u32),
    Move(usize, usize),
    Reroute(usize, bool),
    /// What follows the prompt becomes known; or it is something else's prompt and output.
    Answered(usize, Vec<u32>, bool),
    Drop(usize),
    Finish(usize),
    RemoveWorker(usize),
    AddWorker(usize),
    Healthy(usize, bool),
    Draining(usize, bool),
    Models(usize, Vec<usize>),
    Capacity(usize, u32),
    ForgetCache(usize),
    /// Who tells what it caches: its events or nobody.
    Follow(usize, bool),
    /// Its events tell that a prompt was stored, or that its last block and all behind it went.
    Told(usize, Vec<u32>, bool),
    /// Time passes, or, by a caller's mistake, goes back.
    Pass(i32),
}

/// The empty name stands for any model; nobody serves the last.
const MODELS: [&str; 4] = ["", "a", "b", "nobody's"];
const WORKERS: usize = 4;

/// Prompts over two tokens share prefixes of every length, and end anywhere in each other.
fn prompt() -> impl Strategy<Value = Vec<u32>> + Clone {
    let tail = prop::collection::vec(0..2u32, 0..12);
    (0..20usize, tail).prop_map(|(zeros, tail)| {
        let mut prompt = vec![0; zeros];
        prompt.extend(tail);
        prompt
    })
}

fn step(
    streams: impl Strategy<Value = bool> + Clone + 'static,
) -> impl Strategy<Value = Step> + Clone {
    let which = 0..64usize;
    let worker = 0..WORKERS;
    let model = prop_oneof![4 => Just(0_usize), 1 => 1..MODELS.len()];
    let booking = (prompt(), model, streams, prop::option::of(0..200u32));
    prop_oneof![
        12 => booking.prop_map(|(prompt, model, streams, max_tokens)| {
            Step::Book { prompt, model, streams, max_tokens }
        }),
        6 => which.clone().prop_map(Step::FirstToken),
        6 => (which.clone(), 0..9u32).prop_map(|(i, n)| Step::Tokens(i, n)),
        2 => (which.clone(), 0..9u32).prop_map(|(i, n)| Step::SetTokens(i, n)),
        4 => (which.clone(), worker.clone()).prop_map(|(i, w)| Step::Move(i, w)),
        2 => (which.clone(), any::<bool>()).prop_map(|(i, stay)| Step::Reroute(i, stay)),
        6 => (which.clone(), prompt(), prop::bool::weighted(0.9))
            .prop_map(|(i, output, fits)| Step::Answered(i, output, fits)),
        6 => which.clone().prop_map(Step::Drop),
        4 => which.prop_map(Step::Finish),
        1 => worker.clone().prop_map(Step::RemoveWorker),
        2 => worker.clone().prop_map(Step::AddWorker),
        2 => (worker.clone(), prop::bool::weighted(0.8)).prop_map(|(w, is)| Step::Healthy(w, is)),
        1 => (worker.clone(), prop::bool::weighted(0.2)).prop_map(|(w, is)| Step::Draining(w, is)),
        1 => (worker.clone(), prop::collection::vec(1..3usize, 0..4))
            .prop_map(|(w, models)| Step::Models(w, models)),
        2 => (worker.clone(), 0..50u32).prop_map(|(w, blocks)| Step::Capacity(w, blocks)),
        1 => worker.clone().prop_map(Step::ForgetCache),
        2 => (worker.clone(), any::<bool>()).prop_map(|(w, follows)| Step::Follow(w, follows)),
        8 => (worker, prompt(), prop::bool::weighted(0.7))
            .prop_map(|(w, prompt, stored)| Step::Told(w, prompt, stored)),
        2 => (-500..2000i32).prop_map(Step::Pass),
    ]
}

#[derive(Debug)]
struct Live {
    booking: Booking,
    request: u64,
    prompt: Vec<u32>,
    answered: Option<Sequence>,
    model: &'static str,
    generated: u32,
    computed: bool,
    streams: bool,
}

/// What the test knows of one worker.
#[derive(Debug)]
struct Known {
    healthy: bool,
    draining: bool,
    models: Vec<&'static str>,
    holds: NaiveWorker,
    /// What its events tell: prompts of full blocks, each prefix of one among them.
    told: Option<BTreeSet<Vec<u32>>>,
}

impl Known {
    fn may_serve(&self, model: &str) -> bool {
        let serves = model.is_empty() || self.models.is_empty() || self.models.contains(&model);
        self.healthy && !self.draining && serves
    }

    /// Whether this can be the overlap of a prompt, by its depths.
    fn explains(&self, overlap: u32, prompt: &[u32], most: u32) -> bool {
        let sequence = Sequence::from_tokens(prompt, BLOCK_SIZE, 7);
        let (cached, active) = self.holds.depth(&sequence);
        let is_overlap = |cached: usize| overlap as usize == cached.max(active).min(most as usize);
        let Some(told) = &self.told else {
            return is_overlap(cached);
        };
        let block = BLOCK_SIZE.get() as usize;
        let held =
            (1..=sequence.hashes().len()).take_while(|it| told.contains(&prompt[..it * block]));
        let held = held.count();
        // Of what events have been silent about the latest freeings alone are counted on.
        let untold = held.max(self.holds.freed_since_told(&sequence));
        let is_foreseen = cached < held && self.holds.may_foresee(sequence.hashes()[cached]);
        (held..=untold).any(is_overlap) || is_foreseen && is_overlap(cached)
    }

    /// What the router must be told, by events it listens to, of a prompt.
    fn hear(&mut self, prompt: &[u32], stored: bool) -> Changes {
        let sequence = Sequence::from_tokens(prompt, BLOCK_SIZE, 7);
        let block = BLOCK_SIZE.get() as usize;
        let mut changes = Changes {
            stride: 1,
            ..Changes::default()
        };
        let blocks = &prompt[..sequence.hashes().len() * block];
        if stored {
            changes.added = Paths::whole(sequence.hashes());
        } else {
            let told = self.told.iter().flatten();
            let behind = told.filter(|it| !blocks.is_empty() && it.starts_with(blocks));
            for it in behind {
                let sequence = Sequence::from_tokens(it, BLOCK_SIZE, 7);
                let before = sequence.hashes().len() - 1;
                changes.removed.push_behind(sequence.hashes(), before);
            }
        }
        if let Some(told) = &mut self.told {
            if stored {
                told.extend((1..=blocks.len() / block).map(|it| blocks[..it * block].to_vec()));
            } else if !blocks.is_empty() {
                told.retain(|it| !it.starts_with(blocks));
            }
            let added = changes.added.told();
            self.holds.told(added.chain(changes.removed.told()));
        }
        changes
    }

    fn cached(&self) -> usize {
        match &self.told {
            Some(told) => told.len(),
            None => self.holds.cached(),
        }
    }
}

/// The router and the model side by side.
struct Pair {
    router: Router,
    /// By place; a worker added again at its place is another one.
    ids: Vec<Option<WorkerId>>,
    specs: Vec<(u32, bool)>,
    workers: BTreeMap<WorkerId, Known>,
    live: Vec<Live>,
    requests: u64,
    now: Duration,
    most_ends: usize,
    /// Every output is watched, so the model knows all that the router does.
    exact: bool,
}

impl Pair {
    fn new(specs: Vec<(u32, bool)>, seed: u64, exact: bool) -> Self {
        let config = RouterConfig {
            block_size: BLOCK_SIZE,
            seed,
            ..RouterConfig::default()
        };
        let mut pair = Self {
            router: Router::new(config).unwrap(),
            ids: vec![None; specs.len()],
            specs,
            workers: BTreeMap::new(),
            live: Vec::new(),
            requests: 0,
            now: Duration::from_secs(1),
            most_ends: 0,
            exact,
        };
        for worker in 0..pair.ids.len() {
            pair.add_worker(worker);
        }
        pair
    }

    fn mark_computed(&mut self, index: usize) {
        let live = &mut self.live[index];
        if !std::mem::replace(&mut live.computed, true)
            && let Some(worker) = self.workers.get_mut(&live.booking.worker())
        {
            worker.holds.computed(live.request, live.booking.sequence());
        }
    }

    fn set_generated(&mut self, index: usize, generated: u32) {
        let live = &mut self.live[index];
        live.generated = generated;
        if let Some(worker) = self.workers.get_mut(&live.booking.worker()) {
            let sequence = live.booking.sequence();
            worker.holds.grow(live.request, sequence, generated);
        }
    }

    fn end(&mut self, index: usize) -> Booking {
        let live = self.live.swap_remove(index);
        if let Some(worker) = self.workers.get_mut(&live.booking.worker()) {
            let sequence = live.booking.sequence();
            let answered = live.answered.as_ref();
            worker
                .holds
                .free(live.request, sequence, live.computed, answered);
        }
        live.booking
    }

    fn moved(&mut self, index: usize, from: WorkerId) {
        let live = &mut self.live[index];
        let sequence = live.booking.sequence();
        if let Some(worker) = self.workers.get_mut(&from) {
            worker
                .holds
                .free(live.request, sequence, live.computed, None);
        }
        (live.generated, live.computed, live.answered) = (0, false, None);
        let to = self.workers.get_mut(&live.booking.worker()).unwrap();
        if self.exact {
            let overlap = live.booking.decision().cost.overlap_blocks;
            assert!(to.explains(overlap, &live.prompt, sequence.reusable_blocks()));
        }
        to.holds.book(live.request, sequence);
    }

    fn book(&mut self, prompt: &[u32], model: usize, streams: bool, max_tokens: Option<u32>) {
        let sequence = Sequence::from_tokens(prompt, BLOCK_SIZE, 7);
        let request = Request {
            model: MODELS[model],
            streams,
            max_tokens,
            ..Request::new(&sequence)
        };
        let eligible = self.eligible(request.model, None);
        let booking = match self.router.route(&request, self.now) {
            Ok(booking) => booking,
            Err(error) => return assert_eq!(error, eligible.unwrap_err()),
        };
        assert!(eligible.unwrap().contains(&booking.worker()));
        let known = self.workers.get_mut(&booking.worker()).unwrap();
        if self.exact {
            let overlap = booking.decision().cost.overlap_blocks;
            assert!(known.explains(overlap, prompt, sequence.reusable_blocks()));
        }
        self.requests += 1;
        known.holds.book(self.requests, &sequence);
        self.live.push(Live {
            booking,
            request: self.requests,
            prompt: prompt.to_vec(),
            answered: None,
            model: MODELS[model],
            generated: 0,
            computed: false,
            streams,
        });
    }

    fn eligible(
        &self,
        model: &str,
        excluded: Option<WorkerId>,
    ) -> Result<Vec<WorkerId>, RouteError> {
        let workers = || self.workers.values();
        let may_exist = model.is_empty()
            || self.workers.is_empty()
            || workers().any(|worker| worker.models.is_empty())
            || workers().any(|worker| worker.models.contains(&model));
        if !may_exist {
            return Err(RouteError::UnknownModel(model.to_owned()));
        }
        let eligible: Vec<WorkerId> = self
            .workers
            .iter()
            .filter(|&(&id, worker)| worker.may_serve(model) && excluded != Some(id))
            .map(|(&id, _)| id)
            .collect();
        if eligible.is_empty() {
            return Err(RouteError::NoWorker(model.to_owned()));
        }
        Ok(eligible)
    }

    fn apply(&mut self, step: Step) {
        match step {
            Step::Book {
                prompt,
                model,
                streams,
                max_tokens,
            } => self.book(&prompt, model, streams, max_tokens),
            Step::FirstToken(i)
            | Step::Tokens(i, _)
            | Step::SetTokens(i, _)
            | Step::Move(i, _)
            | Step::Reroute(i, _)
            | Step::Answered(i, _, _)
            | Step::Drop(i)
            | Step::Finish(i) => {
                if let Some(live) = i.checked_rem(self.live.len()) {
                    self.apply_to_booking(step, live);
                }
            }
            Step::Pass(milliseconds) => {
                let by = Duration::from_millis(milliseconds.unsigned_abs().into());
                self.now = if milliseconds < 0 {
                    self.now.saturating_sub(by)
                } else {
                    self.now + by
                };
            }
            Step::AddWorker(worker) => self.add_worker(worker),
            Step::RemoveWorker(i)
            | Step::Healthy(i, _)
            | Step::Draining(i, _)
            | Step::Models(i, _)
            | Step::Capacity(i, _)
            | Step::ForgetCache(i)
            | Step::Follow(i, _)
            | Step::Told(i, _, _) => {
                if let Some(id) = self.ids[i] {
                    self.apply_to_worker(step, i, id);
                }
            }
        }
    }

    fn apply_to_booking(&mut self, step: Step, i: usize) {
        let now = self.now;
        let from = self.live[i].booking.worker();
        match step {
            Step::FirstToken(_) => {
                self.live[i].booking.first_token(now);
                self.mark_computed(i);
            }
            Step::Tokens(_, count) => {
                self.live[i].booking.tokens(count, now);
                if count > 0 {
                    self.mark_computed(i);
                    self.set_generated(i, self.live[i].generated + count);
                }
            }
            Step::SetTokens(_, total) => {
                self.live[i].booking.set_tokens(total, now);
                if total > 0 {
                    self.mark_computed(i);
                }
                self.set_generated(i, total);
            }
            Step::Move(_, to) => {
                if let Some(to) = self.ids[to] {
                    self.live[i].booking.move_to(to, now).unwrap();
                    assert_eq!(self.live[i].booking.worker(), to);
                    self.moved(i, from);
                }
            }
            Step::Reroute(_, may_stay) => {
                let excluded = (!may_stay).then_some(from);
                let eligible = self.eligible(self.live[i].model, excluded);
                let rerouted = self.live[i].booking.reroute(excluded.as_slice(), now);
                match eligible {
                    Ok(eligible) => {
                        assert_eq!(rerouted, Ok(()));
                        assert!(eligible.contains(&self.live[i].booking.worker()));
                        self.moved(i, from);
                    }
                    Err(error) => assert_eq!(rerouted, Err(error)),
                }
            }
            Step::Answered(_, output, fits) => self.answered(i, &output, fits),
            Step::Drop(_) => drop(self.end(i)),
            Step::Finish(_) => {
                self.mark_computed(i);
                self.end(i).finish(now);
            }
            _ => {}
        }
    }

    fn answered(&mut self, i: usize, output: &[u32], fits: bool) {
        let live = &mut self.live[i];
        let prompt = live.prompt.as_slice();
        let tokens = if fits {
            [prompt, output].concat()
        } else {
            output.to_vec()
        };
        let sequence = Sequence::from_tokens(&tokens, BLOCK_SIZE, 7);
        let full = prompt.len() - prompt.len() % BLOCK_SIZE.get() as usize;
        if tokens.get(..full) == prompt.get(..full) {
            live.answered = Some(sequence.clone());
        }
        live.booking.answered(sequence);
    }

    fn apply_to_worker(&mut self, step: Step, place: usize, id: WorkerId) {
        let known = self.workers.get_mut(&id).unwrap();
        match step {
            Step::RemoveWorker(_) => {
                self.ids[place] = None;
                self.workers.remove(&id);
                assert!(self.router.remove_worker(id));
                assert!(!self.router.remove_worker(id));
            }
            Step::Healthy(_, healthy) => {
                known.healthy = healthy;
                self.router.set_healthy(id, healthy);
            }
            Step::Draining(_, draining) => {
                known.draining = draining;
                self.router.set_draining(id, draining);
            }
            Step::Models(_, models) => {
                known.models = models.into_iter().map(|model| MODELS[model]).collect();
                let names = known.models.iter().map(|&model| model.to_owned());
                self.router.set_models(id, names.collect());
            }
            Step::Capacity(_, blocks) => {
                known.holds.set_capacity(blocks as usize);
                self.router.set_capacity(id, blocks);
            }
            Step::ForgetCache(_) => {
                known.holds.forget_cache();
                self.router.forget_cache(id);
            }
            Step::Follow(_, follows) => {
                if follows != known.told.is_some() {
                    known.holds.forget_cache();
                    known.told = follows.then(BTreeSet::new);
                }
                self.router.follow_events(id, follows);
            }
            Step::Told(_, prompt, stored) => {
                let changes = known.hear(&prompt, stored);
                self.router.update_cache(id, &changes, Some(Duration::ZERO));
            }
            _ => {}
        }
    }

    fn add_worker(&mut self, place: usize) {
        if self.ids[place].is_some() {
            return;
        }
        let (capacity, prefix_caching) = self.specs[place];
        let spec = WorkerSpec {
            name: format!("w{place}"),
            models: Vec::new(),
            capacity_blocks: Some(capacity),
            prefix_caching,
            ..WorkerSpec::default()
        };
        let id = self.router.add_worker(spec).unwrap();
        self.router.set_healthy(id, true);
        self.ids[place] = Some(id);
        let known = Known {
            healthy: true,
            draining: false,
            models: Vec::new(),
            holds: NaiveWorker::new(capacity as usize, prefix_caching),
            told: None,
        };
        self.workers.insert(id, known);
    }

    fn live_on(&self, id: WorkerId) -> impl Iterator<Item = &Live> {
        self.live
            .iter()
            .filter(move |live| live.booking.worker() == id)
    }

    /// Every number of every worker, exactly.
    fn check(&mut self) {
        let snapshots = self.router.workers(self.now);
        assert_eq!(snapshots.len(), self.workers.len());
        for snapshot in snapshots {
            let known = &self.workers[&snapshot.id];
            let name = &snapshot.name;
            let active = known.holds.active();
            assert_eq!(snapshot.active_blocks as usize, active, "{name}");
            assert_eq!(snapshot.cached_blocks as usize, known.cached(), "{name}");
            assert_eq!(
                snapshot.requests as usize,
                self.live_on(snapshot.id).count()
            );
            let context: u64 = self
                .live_on(snapshot.id)
                .map(|live| u64::from(live.booking.sequence().tokens() + live.generated))
                .sum();
            assert_eq!(snapshot.context_tokens, context, "{name}");
        }
        assert_eq!(self.router.bookings(), self.live.len());
        // What divided a path may be gone before those who booked it whole.
        self.most_ends = self.most_ends.max(self.ends());
        self.check_edges(self.most_ends);
    }

    /// Paths end where a booking ends and where one that ended left blocks behind.
    fn ends(&self) -> usize {
        let reusable = self.workers.values().map(|worker| worker.holds.reusable());
        self.live.len() + reusable.sum::<usize>()
    }

    /// Paths are divided where one ends and where one branches off. A few more ends are those
    /// of freed paths that nothing is left of, which is noticed later.
    fn check_edges(&self, ends: usize) {
        let edges = self.router.tracked_edges();
        assert!(edges <= 2 * (ends + 16), "{edges} edges for {ends} ends");
    }

    fn check_depths(&self, prompt: &[u32]) {
        let sequence = Sequence::from_tokens(prompt, BLOCK_SIZE, 7);
        let Ok(explained) = self.router.explain(&Request::new(&sequence), self.now) else {
            assert!(self.eligible("", None).is_err());
            return;
        };
        let ids: Vec<WorkerId> = explained.candidates.iter().map(|it| it.id).collect();
        assert_eq!(ids, self.eligible("", None).unwrap());
        for candidate in explained.candidates {
            let known = &self.workers[&candidate.id];
            let (_, active) = known.holds.depth(&sequence);
            let name = &candidate.name;
            assert_eq!(candidate.depth.active as usize, active, "active on {name}");
            // Where blocks are pinned before they are computed, the two agree only in what
            // counts: the overlap.
            let overlap = candidate.depth.overlap();
            assert!(
                known.explains(overlap, prompt, u32::MAX),
                "overlap on {name}"
            );
        }
    }

    /// Everything ends; nothing may be left.
    fn end_all(mut self) {
        while !self.live.is_empty() {
            drop(self.end(0));
        }
        assert_eq!(self.router.bookings(), 0);
        if self.exact {
            self.check();
            self.check_edges(self.ends());
        }
        for worker in self.router.workers(self.now) {
            assert_eq!(
                (
                    worker.active_blocks,
                    worker.requests,
                    worker.context_tokens,
                    worker.prefill_tokens
                ),
                (0, 0, 0, 0)
            );
        }
        for id in self.ids.iter().flatten() {
            self.router.remove_worker(*id);
        }
        assert_eq!(self.router.tracked_edges(), 0);
    }
}

fn specs() -> impl Strategy<Value = Vec<(u32, bool)>> {
    prop::collection::vec((0..40u32, prop::bool::weighted(0.8)), WORKERS)
}

/// Many short lives, and a few long ones.
fn steps<T: std::fmt::Debug>(
    step: impl Strategy<Value = T> + Clone,
) -> impl Strategy<Value = Vec<T>> {
    prop_oneof![
        99 => prop::collection::vec(step.clone(), 1..120),
        1 => prop::collection::vec(step, 3000),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Any interleaving equals the model at each step and ends in exactly zero.
    #[test]
    fn any_interleaving_equals_the_model(
        specs in specs(),
        steps in steps((step(Just(true)), prompt())),
        seed in any::<u64>(),
    ) {
        let mut pair = Pair::new(specs, seed, true);
        for (step, probe) in steps {
            pair.apply(step);
            pair.check();
            pair.check_depths(&probe);
        }
        pair.end_all();
    }

    /// The same while forecasts move what nobody watches: still exactly zero.
    #[test]
    fn forecasts_leave_nothing_behind(
        specs in specs(),
        steps in steps(step(any::<bool>())),
    ) {
        let mut pair = Pair::new(specs, 1, false);
        for step in steps {
            pair.apply(step);
            for worker in pair.router.workers(pair.now) {
                prop_assert_eq!(worker.requests as usize, pair.live_on(worker.id).count());
                let unwatched = pair.live_on(worker.id).filter(|live| !live.streams);
                let watched_context: u64 = pair
                    .live_on(worker.id)
                    .filter(|live| live.streams)
                    .map(|live| u64::from(live.booking.sequence().tokens() + live.generated))
                    .sum();
                let unwatched_most: u64 = unwatched
                    .map(|live| u64::from(live.booking.sequence().tokens()) + 400)
                    .sum();
                prop_assert!(worker.context_tokens >= watched_context);
                prop_assert!(worker.context_tokens <= watched_context + unwatched_most);
            }
        }
        pair.end_all();
    }
}
