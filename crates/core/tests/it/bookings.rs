//! Bookings, compared with the [`naive`](crate::naive) model of each worker, driven by the same
//! steps.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::naive::{BLOCK_SIZE, NaiveWorker};
use foresee_core::booking::Booking;
use foresee_core::event_index::{CacheDelta, PrefixRuns};
use foresee_core::outlier::OutlierConfig;
use foresee_core::router::{CacheSource, Observed, Request, RouteError, Router, RouterConfig};
use foresee_core::sequence::Sequence;
use foresee_core::workers::{WorkerId, WorkerSpec};
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Step {
    Book {
        prompt: Vec<u32>,
        model: usize,
        is_streaming: bool,
        max_tokens: Option<u32>,
    },
    FirstToken(usize),
    Tokens(usize, u32),
    SetTokens(usize, u32),
    Move(usize, usize),
    Reroute(usize, bool),
    /// Sets the output sequence. If the flag is not set, it belongs to another prompt.
    SetOutput(usize, Vec<u32>, bool),
    Drop(usize),
    Complete(usize),
    RemoveWorker(usize),
    AddWorker(usize),
    Healthy(usize, bool),
    Draining(usize, bool),
    Models(usize, Vec<usize>),
    Capacity(usize, u32),
    ClearCache(usize),
    /// Selects events or the estimated cache as cache source.
    SetCacheSource(usize, CacheSource),
    /// An event reports a prompt as stored, or its last block and all blocks after it as removed.
    Event(usize, Vec<u32>, bool),
    /// Milliseconds pass. A negative number is a caller's mistake.
    Pass(i32),
}

/// Model names. The empty name stands for any model; no worker serves the last.
const MODELS: [&str; 4] = ["", "a", "b", "unserved"];
const WORKERS: usize = 4;

/// Prompts over two token ids. They share prefixes of every length, and some are prefixes of others.
fn prompt() -> impl Strategy<Value = Vec<u32>> + Clone {
    let tail = prop::collection::vec(0..2u32, 0..12);
    (0..20usize, tail).prop_map(|(zeros, tail)| {
        let mut prompt = vec![0; zeros];
        prompt.extend(tail);
        prompt
    })
}

fn step(
    is_streaming: impl Strategy<Value = bool> + Clone + 'static,
) -> impl Strategy<Value = Step> + Clone {
    let booking_index = 0..64usize;
    let worker = 0..WORKERS;
    let model = prop_oneof![4 => Just(0_usize), 1 => 1..MODELS.len()];
    let new_booking = (prompt(), model, is_streaming, prop::option::of(0..200u32));
    prop_oneof![
        12 => new_booking.prop_map(|(prompt, model, is_streaming, max_tokens)| {
            Step::Book { prompt, model, is_streaming, max_tokens }
        }),
        6 => booking_index.clone().prop_map(Step::FirstToken),
        6 => (booking_index.clone(), 0..9u32).prop_map(|(i, n)| Step::Tokens(i, n)),
        2 => (booking_index.clone(), 0..9u32).prop_map(|(i, n)| Step::SetTokens(i, n)),
        4 => (booking_index.clone(), worker.clone()).prop_map(|(i, w)| Step::Move(i, w)),
        2 => (booking_index.clone(), any::<bool>()).prop_map(|(i, stay)| Step::Reroute(i, stay)),
        6 => (booking_index.clone(), prompt(), prop::bool::weighted(0.9))
            .prop_map(|(i, output, follows_prompt)| Step::SetOutput(i, output, follows_prompt)),
        6 => booking_index.clone().prop_map(Step::Drop),
        4 => booking_index.prop_map(Step::Complete),
        1 => worker.clone().prop_map(Step::RemoveWorker),
        2 => worker.clone().prop_map(Step::AddWorker),
        2 => (worker.clone(), prop::bool::weighted(0.8)).prop_map(|(w, healthy)| Step::Healthy(w, healthy)),
        1 => (worker.clone(), prop::bool::weighted(0.2)).prop_map(|(w, draining)| Step::Draining(w, draining)),
        1 => (worker.clone(), prop::collection::vec(1..3usize, 0..4))
            .prop_map(|(w, models)| Step::Models(w, models)),
        2 => (worker.clone(), 0..50u32).prop_map(|(w, blocks)| Step::Capacity(w, blocks)),
        1 => worker.clone().prop_map(Step::ClearCache),
        2 => (worker.clone(), prop::sample::select(vec![CacheSource::Estimated, CacheSource::Events]))
            .prop_map(|(w, source)| Step::SetCacheSource(w, source)),
        8 => (worker, prompt(), prop::bool::weighted(0.7))
            .prop_map(|(w, prompt, stored)| Step::Event(w, prompt, stored)),
        2 => (-500..2000i32).prop_map(Step::Pass),
    ]
}

/// A booking that has not ended, as the model describes it.
#[derive(Debug)]
struct LiveBooking {
    booking: Booking,
    /// Number of the request in the model.
    request: u64,
    /// Token ids of the prompt.
    prompt: Vec<u32>,
    output_sequence: Option<Sequence>,
    model: &'static str,
    output_tokens: u32,
    is_computed: bool,
    is_streaming: bool,
}

/// A worker, as the model describes it.
#[derive(Debug)]
struct ModelWorker {
    healthy: bool,
    draining: bool,
    models: Vec<&'static str>,
    naive: NaiveWorker,
    /// Cached prefixes of full blocks, as token ids, according to its events. `None` if the cache
    /// source is the estimate.
    reported: Option<BTreeSet<Vec<u32>>>,
}

impl ModelWorker {
    fn may_serve(&self, model: &str) -> bool {
        let serves = model.is_empty() || self.models.is_empty() || self.models.contains(&model);
        self.healthy && !self.draining && serves
    }

    /// Returns whether the model permits this overlap of a prompt, of which at most `max_blocks`
    /// blocks can be reused.
    fn permits_overlap(&self, overlap: u32, prompt: &[u32], max_blocks: u32) -> bool {
        let sequence = Sequence::from_tokens(prompt, BLOCK_SIZE, 7);
        let (cached, active) = self.naive.prefix_match(&sequence);
        let is_overlap =
            |cached: usize| overlap as usize == cached.max(active).min(max_blocks as usize);
        let Some(reported) = &self.reported else {
            return is_overlap(cached);
        };
        let block = BLOCK_SIZE.get() as usize;
        let reported_blocks = (1..=sequence.hashes().len())
            .take_while(|blocks| reported.contains(&prompt[..blocks * block]))
            .count();
        // Of the blocks that events have not reported, only the latest releases may count.
        let max_cached = reported_blocks.max(self.naive.unreported_prefix(&sequence));
        let is_pending_eviction = cached < reported_blocks
            && self
                .naive
                .may_be_pending_eviction(sequence.hashes()[cached]);
        (reported_blocks..=max_cached).any(is_overlap) || is_pending_eviction && is_overlap(cached)
    }

    /// Applies an event to the model and returns it as a delta for the router.
    fn report(&mut self, prompt: &[u32], stored: bool) -> CacheDelta {
        let sequence = Sequence::from_tokens(prompt, BLOCK_SIZE, 7);
        let block = BLOCK_SIZE.get() as usize;
        let mut delta = CacheDelta {
            engine_block_ratio: 1,
            ..CacheDelta::default()
        };
        let blocks = &prompt[..sequence.hashes().len() * block];
        if stored {
            delta.stored = PrefixRuns::from_sequence(sequence.hashes());
        } else {
            let reported = self.reported.iter().flatten();
            let removed =
                reported.filter(|prefix| !blocks.is_empty() && prefix.starts_with(blocks));
            for prefix in removed {
                let sequence = Sequence::from_tokens(prefix, BLOCK_SIZE, 7);
                let unchanged = sequence.hashes().len() - 1;
                delta.removed.push_suffix(sequence.hashes(), unchanged);
            }
        }
        if let Some(reported) = &mut self.reported {
            if stored {
                let prefixes = 1..=blocks.len() / block;
                reported.extend(prefixes.map(|len| blocks[..len * block].to_vec()));
            } else if !blocks.is_empty() {
                reported.retain(|prefix| !prefix.starts_with(blocks));
            }
            let stored = delta.stored.changed();
            self.naive.on_events(stored.chain(delta.removed.changed()));
        }
        delta
    }

    fn cached(&self) -> usize {
        match &self.reported {
            Some(reported) => reported.len(),
            None => self.naive.cached(),
        }
    }
}

/// The router and the model, driven by the same steps.
struct Pair {
    router: Router,
    /// Worker ids by position in `specs`. A worker that is added again gets another id.
    ids: Vec<Option<WorkerId>>,
    /// Capacity and prefix caching of each worker.
    specs: Vec<(u32, bool)>,
    workers: BTreeMap<WorkerId, ModelWorker>,
    live: Vec<LiveBooking>,
    requests: u64,
    now: Duration,
    /// Largest number of path ends so far.
    max_ends: usize,
    /// Whether all responses are streamed, so that the router estimates no progress and the model
    /// must equal it.
    exact: bool,
}

impl Pair {
    fn new(specs: Vec<(u32, bool)>, seed: u64, exact: bool) -> Self {
        let config = RouterConfig {
            block_size: BLOCK_SIZE,
            seed,
            queue_order: None,
            outlier: OutlierConfig::disabled(),
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
            max_ends: 0,
            exact,
        };
        for worker in 0..pair.ids.len() {
            pair.add_worker(worker);
        }
        pair
    }

    fn mark_computed(&mut self, index: usize) {
        let live = &mut self.live[index];
        if !std::mem::replace(&mut live.is_computed, true)
            && let Some(worker) = self.workers.get_mut(&live.booking.worker())
        {
            worker
                .naive
                .mark_computed(live.request, live.booking.prompt());
        }
    }

    fn set_output_tokens(&mut self, index: usize, output_tokens: u32) {
        let live = &mut self.live[index];
        live.output_tokens = output_tokens;
        if let Some(worker) = self.workers.get_mut(&live.booking.worker()) {
            let sequence = live.booking.prompt();
            worker.naive.grow(live.request, sequence, output_tokens);
        }
    }

    fn end(&mut self, index: usize) -> Booking {
        let live = self.live.swap_remove(index);
        if let Some(worker) = self.workers.get_mut(&live.booking.worker()) {
            let sequence = live.booking.prompt();
            worker.naive.release(
                live.request,
                sequence,
                live.is_computed,
                live.output_sequence.as_ref(),
            );
        }
        live.booking
    }

    fn on_moved(&mut self, index: usize, from: WorkerId) {
        let live = &mut self.live[index];
        let sequence = live.booking.prompt();
        if let Some(worker) = self.workers.get_mut(&from) {
            worker
                .naive
                .release(live.request, sequence, live.is_computed, None);
        }
        (live.output_tokens, live.is_computed, live.output_sequence) = (0, false, None);
        let to = self.workers.get_mut(&live.booking.worker()).unwrap();
        if self.exact {
            let overlap = live.booking.decision().cost.overlap_blocks;
            assert!(to.permits_overlap(overlap, &live.prompt, sequence.max_reusable_blocks()));
        }
        to.naive.book(live.request, sequence);
    }

    fn book(&mut self, prompt: &[u32], model: usize, is_streaming: bool, max_tokens: Option<u32>) {
        let sequence = Sequence::from_tokens(prompt, BLOCK_SIZE, 7);
        let request = Request {
            model: MODELS[model],
            is_streaming,
            max_tokens,
            ..Request::new(&sequence)
        };
        let eligible = self.eligible(request.model, None);
        let booking = match self.router.route(&request, self.now) {
            Ok(booking) => booking,
            Err(error) => return assert_eq!(error, eligible.unwrap_err()),
        };
        assert!(eligible.unwrap().contains(&booking.worker()));
        let worker_model = self.workers.get_mut(&booking.worker()).unwrap();
        if self.exact {
            let overlap = booking.decision().cost.overlap_blocks;
            assert!(worker_model.permits_overlap(overlap, prompt, sequence.max_reusable_blocks()));
        }
        self.requests += 1;
        worker_model.naive.book(self.requests, &sequence);
        self.live.push(LiveBooking {
            booking,
            request: self.requests,
            prompt: prompt.to_vec(),
            output_sequence: None,
            model: MODELS[model],
            output_tokens: 0,
            is_computed: false,
            is_streaming,
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
                is_streaming,
                max_tokens,
            } => self.book(&prompt, model, is_streaming, max_tokens),
            Step::FirstToken(i)
            | Step::Tokens(i, _)
            | Step::SetTokens(i, _)
            | Step::Move(i, _)
            | Step::Reroute(i, _)
            | Step::SetOutput(i, _, _)
            | Step::Drop(i)
            | Step::Complete(i) => {
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
            | Step::ClearCache(i)
            | Step::SetCacheSource(i, _)
            | Step::Event(i, _, _) => {
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
                self.live[i].booking.on_first_token(now);
                self.mark_computed(i);
            }
            Step::Tokens(_, count) => {
                self.live[i].booking.on_tokens(count, now);
                if count > 0 {
                    self.mark_computed(i);
                    self.set_output_tokens(i, self.live[i].output_tokens + count);
                }
            }
            Step::SetTokens(_, total) => {
                self.live[i].booking.set_output_tokens(total, now);
                if total > 0 {
                    self.mark_computed(i);
                }
                self.set_output_tokens(i, total);
            }
            Step::Move(_, to) => {
                if let Some(to) = self.ids[to] {
                    self.live[i].booking.move_to(to, now).unwrap();
                    assert_eq!(self.live[i].booking.worker(), to);
                    self.on_moved(i, from);
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
                        self.on_moved(i, from);
                    }
                    Err(error) => assert_eq!(rerouted, Err(error)),
                }
            }
            Step::SetOutput(_, output, follows_prompt) => {
                self.set_output_sequence(i, &output, follows_prompt);
            }
            Step::Drop(_) => drop(self.end(i)),
            Step::Complete(_) => {
                self.mark_computed(i);
                self.end(i).complete(now);
            }
            _ => {}
        }
    }

    fn set_output_sequence(&mut self, i: usize, output: &[u32], follows_prompt: bool) {
        let live = &mut self.live[i];
        let prompt = live.prompt.as_slice();
        let tokens = if follows_prompt {
            [prompt, output].concat()
        } else {
            output.to_vec()
        };
        let sequence = Sequence::from_tokens(&tokens, BLOCK_SIZE, 7);
        let full = prompt.len() - prompt.len() % BLOCK_SIZE.get() as usize;
        if tokens.get(..full) == prompt.get(..full) {
            live.output_sequence = Some(sequence.clone());
        }
        live.booking.set_output_sequence(sequence);
    }

    fn apply_to_worker(&mut self, step: Step, index: usize, id: WorkerId) {
        let worker_model = self.workers.get_mut(&id).unwrap();
        match step {
            Step::RemoveWorker(_) => {
                self.ids[index] = None;
                self.workers.remove(&id);
                assert!(self.router.remove_worker(id));
                assert!(!self.router.remove_worker(id));
            }
            Step::Healthy(_, healthy) => {
                worker_model.healthy = healthy;
                self.router.set_healthy(id, healthy);
            }
            Step::Draining(_, draining) => {
                worker_model.draining = draining;
                self.router.set_draining(id, draining);
            }
            Step::Models(_, models) => {
                worker_model.models = models.into_iter().map(|model| MODELS[model]).collect();
                let names = worker_model.models.iter().map(|&model| model.to_owned());
                self.router.set_models(id, names.collect());
            }
            Step::Capacity(_, blocks) => {
                worker_model.naive.set_capacity(blocks as usize);
                self.router.set_capacity(id, blocks);
            }
            Step::ClearCache(_) => {
                worker_model.naive.clear_cache();
                self.router.clear_cache(id);
            }
            Step::SetCacheSource(_, source) => {
                let has_events = source == CacheSource::Events;
                if has_events != worker_model.reported.is_some() {
                    worker_model.naive.clear_cache();
                    worker_model.reported = has_events.then(BTreeSet::new);
                }
                self.router.set_cache_source(id, source);
            }
            Step::Event(_, prompt, stored) => {
                let delta = worker_model.report(&prompt, stored);
                self.router
                    .apply_cache_delta(id, &delta, Observed::Live(Duration::ZERO));
            }
            _ => {}
        }
    }

    fn add_worker(&mut self, index: usize) {
        if self.ids[index].is_some() {
            return;
        }
        let (capacity, prefix_caching) = self.specs[index];
        let spec = WorkerSpec {
            name: format!("w{index}"),
            models: Vec::new(),
            capacity_blocks: Some(capacity),
            prefix_caching,
            ..WorkerSpec::default()
        };
        let id = self.router.add_worker(spec).unwrap();
        self.router.set_healthy(id, true);
        self.ids[index] = Some(id);
        let worker_model = ModelWorker {
            healthy: true,
            draining: false,
            models: Vec::new(),
            naive: NaiveWorker::new(capacity as usize, prefix_caching),
            reported: None,
        };
        self.workers.insert(id, worker_model);
    }

    fn live_on(&self, id: WorkerId) -> impl Iterator<Item = &LiveBooking> {
        self.live
            .iter()
            .filter(move |live| live.booking.worker() == id)
    }

    /// Asserts that every number of every worker equals that of the model.
    fn check(&mut self) {
        let snapshots = self.router.workers(self.now);
        assert_eq!(snapshots.len(), self.workers.len());
        for snapshot in snapshots {
            let worker_model = &self.workers[&snapshot.id];
            let name = &snapshot.name;
            let active = worker_model.naive.active();
            assert_eq!(snapshot.active_blocks as usize, active, "{name}");
            assert_eq!(
                snapshot.cached_blocks as usize,
                worker_model.cached(),
                "{name}"
            );
            assert_eq!(
                snapshot.requests as usize,
                self.live_on(snapshot.id).count()
            );
            let context: u64 = self
                .live_on(snapshot.id)
                .map(|live| u64::from(live.booking.prompt().tokens() + live.output_tokens))
                .sum();
            assert_eq!(snapshot.context_tokens, context, "{name}");
        }
        assert_eq!(self.router.booking_count(), self.live.len());
        // A branch that split an edge may be released before the paths that run along the edge.
        self.max_ends = self.max_ends.max(self.path_ends());
        self.check_node_count(self.max_ends);
    }

    /// Returns how many paths of the tree end: one for each booking, and one for each block that is
    /// still cached.
    fn path_ends(&self) -> usize {
        let reusable = self.workers.values().map(|worker| worker.naive.reusable());
        self.live.len() + reusable.sum::<usize>()
    }

    /// Asserts that the tree has a node only where a path ends or branches off. A few more are left
    /// of released paths, which are pruned later.
    fn check_node_count(&self, path_ends: usize) {
        let nodes = self.router.prefix_tree_nodes();
        assert!(
            nodes <= 2 * (path_ends + 16),
            "{nodes} nodes for {path_ends} path ends"
        );
    }

    /// Asserts that the prefix match of a prompt on every worker is one that the model permits.
    fn check_prefix_matches(&self, prompt: &[u32]) {
        let sequence = Sequence::from_tokens(prompt, BLOCK_SIZE, 7);
        let Ok(explained) = self.router.explain(&Request::new(&sequence), self.now) else {
            assert!(self.eligible("", None).is_err());
            return;
        };
        let ids: Vec<WorkerId> = explained
            .candidates
            .iter()
            .map(|candidate| candidate.id)
            .collect();
        assert_eq!(ids, self.eligible("", None).unwrap());
        for candidate in explained.candidates {
            let worker_model = &self.workers[&candidate.id];
            let (_, active) = worker_model.naive.prefix_match(&sequence);
            let name = &candidate.name;
            assert_eq!(
                candidate.prefix_match.active_blocks as usize, active,
                "active on {name}"
            );
            // For blocks that are pinned before they are computed, router and model agree only in
            // the overlap.
            let overlap = candidate.prefix_match.overlap();
            assert!(
                worker_model.permits_overlap(overlap, prompt, u32::MAX),
                "overlap on {name}"
            );
        }
    }

    /// Ends all bookings, and asserts that nothing is left.
    fn end_all(mut self) {
        while !self.live.is_empty() {
            drop(self.end(0));
        }
        assert_eq!(self.router.booking_count(), 0);
        if self.exact {
            self.check();
            self.check_node_count(self.path_ends());
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
        assert_eq!(self.router.prefix_tree_nodes(), 0);
    }
}

fn specs() -> impl Strategy<Value = Vec<(u32, bool)>> {
    prop::collection::vec((0..40u32, prop::bool::weighted(0.8)), WORKERS)
}

/// Many short sequences of steps, and a few long ones.
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

    /// Covers every step of the model with streamed responses, and asserts that nothing is left at
    /// the end.
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
            pair.check_prefix_matches(&probe);
        }
        pair.end_all();
    }

    /// Covers responses that are not streamed, whose progress is estimated.
    #[test]
    fn estimated_progress_leaves_nothing_behind(
        specs in specs(),
        steps in steps(step(any::<bool>())),
    ) {
        let mut pair = Pair::new(specs, 1, false);
        for step in steps {
            pair.apply(step);
            for worker in pair.router.workers(pair.now) {
                prop_assert_eq!(worker.requests as usize, pair.live_on(worker.id).count());
                let estimated = pair.live_on(worker.id).filter(|live| !live.is_streaming);
                let streamed_context: u64 = pair
                    .live_on(worker.id)
                    .filter(|live| live.is_streaming)
                    .map(|live| u64::from(live.booking.prompt().tokens() + live.output_tokens))
                    .sum();
                let max_estimated_context: u64 = estimated
                    .map(|live| u64::from(live.booking.prompt().tokens()) + 400)
                    .sum();
                prop_assert!(worker.context_tokens >= streamed_context);
                prop_assert!(worker.context_tokens <= streamed_context + max_estimated_context);
            }
        }
        pair.end_all();
    }
}
