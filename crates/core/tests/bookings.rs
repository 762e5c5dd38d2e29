//! Bookings against the slow, obviously right model: per worker a
//! `HashMap<SequenceHash, HashSet<RequestId>>`, a list for the free queue, and no cleverness.

#![allow(clippy::unwrap_used)]

use std::collections::{HashMap, HashSet, VecDeque};
use std::num::NonZeroU32;
use std::sync::Barrier;
use std::time::Duration;

use foresee_core::booking::Booking;
use foresee_core::choose::Policy;
use foresee_core::fleet::{WorkerId, WorkerSpec};
use foresee_core::router::{Request, Router, RouterConfig};
use foresee_core::sequence::{Sequence, SequenceHash};
use proptest::prelude::*;

const BLOCK_SIZE: NonZeroU32 = NonZeroU32::new(2).unwrap();

#[derive(Clone, Debug)]
enum Step {
    Book { prompt: Vec<u32>, streams: bool },
    FirstToken(usize),
    Tokens(usize, u32),
    SetTokens(usize, u32),
    Move(usize, usize),
    Reroute(usize),
    Drop(usize),
    Finish(usize),
    RemoveWorker(usize),
    AddWorker(usize),
    ForgetCache(usize),
}

/// Prompts over two tokens share prefixes of every length, and end anywhere in each other.
fn prompt() -> impl Strategy<Value = Vec<u32>> {
    let tail = prop::collection::vec(0..2u32, 0..12);
    (0..20usize, tail).prop_map(|(zeros, tail)| {
        let mut prompt = vec![0; zeros];
        prompt.extend(tail);
        prompt
    })
}

fn step(streams: impl Strategy<Value = bool> + 'static) -> impl Strategy<Value = Step> {
    let which = 0..64usize;
    prop_oneof![
        6 => (prompt(), streams)
            .prop_map(|(prompt, streams)| Step::Book { prompt, streams }),
        3 => which.clone().prop_map(Step::FirstToken),
        3 => (which.clone(), 0..9u32).prop_map(|(i, n)| Step::Tokens(i, n)),
        1 => (which.clone(), 0..9u32).prop_map(|(i, n)| Step::SetTokens(i, n)),
        2 => (which.clone(), 0..3usize).prop_map(|(i, w)| Step::Move(i, w)),
        1 => which.clone().prop_map(Step::Reroute),
        3 => which.clone().prop_map(Step::Drop),
        2 => which.prop_map(Step::Finish),
        1 => (0..3usize).prop_map(Step::RemoveWorker),
        1 => (0..3usize).prop_map(Step::AddWorker),
        1 => (0..3usize).prop_map(Step::ForgetCache),
    ]
}

/// One block in a worker's free queue; `None` is one whose content nobody can ask for.
type FreeBlock = Option<SequenceHash>;

#[derive(Debug, Default)]
struct ModelWorker {
    prefix_caching: bool,
    capacity: usize,
    pinned: HashMap<SequenceHash, HashSet<u64>>,
    computed: HashSet<SequenceHash>,
    free: VecDeque<FreeBlock>,
    unshared: HashMap<u64, usize>,
}

impl ModelWorker {
    fn active(&self) -> usize {
        self.pinned.len() + self.unshared.values().sum::<usize>()
    }

    fn book(&mut self, request: u64, sequence: &Sequence) {
        if self.prefix_caching {
            for &hash in sequence.hashes() {
                self.pinned.entry(hash).or_default().insert(request);
                self.free.retain(|&free| free != Some(hash));
            }
        }
        self.grow(request, sequence, 0);
    }

    fn grow(&mut self, request: u64, sequence: &Sequence, generated: u32) {
        let blocks = (sequence.tokens() + generated).div_ceil(BLOCK_SIZE.get()) as usize;
        let shared = if self.prefix_caching {
            sequence.hashes().len()
        } else {
            0
        };
        self.unshared.insert(request, blocks - shared);
        self.make_room();
    }

    fn computed(&mut self, sequence: &Sequence) {
        if self.prefix_caching {
            self.computed.extend(sequence.hashes());
        }
    }

    fn free(&mut self, request: u64, sequence: &Sequence, leaves_output: bool) {
        let unshared = self.unshared.remove(&request).unwrap_or(0);
        if !self.prefix_caching {
            return;
        }
        if leaves_output {
            self.free.extend(std::iter::repeat_n(None, unshared));
        }
        for hash in sequence.hashes().iter().rev() {
            let Some(by) = self.pinned.get_mut(hash) else {
                continue;
            };
            by.remove(&request);
            if by.is_empty() {
                self.pinned.remove(hash);
                if self.computed.contains(hash) {
                    self.free.push_back(Some(*hash));
                }
            }
        }
        self.make_room();
    }

    fn make_room(&mut self) {
        if !self.prefix_caching {
            return;
        }
        while self.free.len() > self.capacity.saturating_sub(self.active()) {
            if let Some(Some(hash)) = self.free.pop_front() {
                self.computed.remove(&hash);
            }
        }
    }

    /// Leading blocks that are (cached, active).
    fn depth(&self, sequence: &Sequence) -> (usize, usize) {
        let leading = |holds: &dyn Fn(&SequenceHash) -> bool| {
            sequence
                .hashes()
                .iter()
                .take_while(|hash| holds(hash))
                .count()
        };
        (
            leading(&|hash| self.computed.contains(hash)),
            leading(&|hash| self.pinned.contains_key(hash)),
        )
    }
}

struct Live {
    booking: Booking,
    request: u64,
    generated: u32,
    computed: bool,
    streams: bool,
}

/// The router and the model side by side, driven by the same steps.
struct Pair {
    router: Router,
    ids: Vec<Option<WorkerId>>,
    specs: Vec<(u32, bool)>,
    model: HashMap<WorkerId, ModelWorker>,
    live: Vec<Live>,
    requests: u64,
    now: Duration,
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
            model: HashMap::new(),
            live: Vec::new(),
            requests: 0,
            now: Duration::ZERO,
            exact,
        };
        for worker in 0..pair.ids.len() {
            pair.apply(Step::AddWorker(worker));
        }
        pair
    }

    fn free_in_model(&mut self, live: &Live) {
        if let Some(worker) = self.model.get_mut(&live.booking.worker()) {
            worker.free(live.request, live.booking.sequence(), live.computed);
        }
    }

    fn mark_computed(&mut self, index: usize) {
        let live = &mut self.live[index];
        if !std::mem::replace(&mut live.computed, true)
            && let Some(worker) = self.model.get_mut(&live.booking.worker())
        {
            worker.computed(live.booking.sequence());
        }
    }

    fn set_generated(&mut self, index: usize, generated: u32) {
        let live = &mut self.live[index];
        live.generated = generated;
        if let Some(worker) = self.model.get_mut(&live.booking.worker()) {
            worker.grow(live.request, live.booking.sequence(), generated);
        }
    }

    fn moved(&mut self, index: usize, from: WorkerId) {
        let live = &mut self.live[index];
        if let Some(worker) = self.model.get_mut(&from) {
            worker.free(live.request, live.booking.sequence(), false);
        }
        (live.generated, live.computed) = (0, false);
        let to = live.booking.worker();
        if let Some(worker) = self.model.get_mut(&to) {
            worker.book(live.request, live.booking.sequence());
        }
    }

    fn apply(&mut self, step: Step) {
        let now = self.now;
        let index = match &step {
            Step::FirstToken(i) | Step::Tokens(i, _) | Step::SetTokens(i, _) => *i,
            Step::Move(i, _) | Step::Reroute(i) | Step::Drop(i) | Step::Finish(i) => *i,
            _ => 0,
        };
        let live = match self.live.len() {
            0 => None,
            count => Some(index % count),
        };
        match (step, live) {
            (Step::Book { prompt, streams }, _) => {
                let sequence = Sequence::from_tokens(&prompt, BLOCK_SIZE, 7);
                let request = Request {
                    streams,
                    ..Request::new(&sequence)
                };
                match self.router.route(&request, now) {
                    Err(_) => assert!(self.ids.iter().all(Option::is_none)),
                    Ok(booking) => {
                        self.requests += 1;
                        let worker = self.model.get_mut(&booking.worker()).unwrap();
                        let (cached, active) = worker.depth(&sequence);
                        let most = sequence.reusable_blocks() as usize;
                        if self.exact {
                            assert_eq!(
                                booking.decision().cost.overlap_blocks as usize,
                                cached.max(active).min(most),
                            );
                        }
                        worker.book(self.requests, &sequence);
                        self.live.push(Live {
                            booking,
                            request: self.requests,
                            generated: 0,
                            computed: false,
                            streams,
                        });
                    }
                }
            }
            (Step::FirstToken(_), Some(i)) => {
                self.live[i].booking.first_token(now);
                self.mark_computed(i);
            }
            (Step::Tokens(_, count), Some(i)) => {
                self.live[i].booking.tokens(count, now);
                self.mark_computed(i);
                self.set_generated(i, self.live[i].generated + count);
            }
            (Step::SetTokens(_, total), Some(i)) => {
                self.live[i].booking.set_tokens(total, now);
                if total > 0 {
                    self.mark_computed(i);
                }
                self.set_generated(i, total);
            }
            (Step::Move(_, to), Some(i)) => {
                let from = self.live[i].booking.worker();
                if let Some(to) = self.ids[to % self.ids.len()] {
                    self.live[i].booking.move_to(to, now).unwrap();
                    self.moved(i, from);
                }
            }
            (Step::Reroute(_), Some(i)) => {
                let from = self.live[i].booking.worker();
                let others = self.ids.iter().flatten().any(|&id| id != from);
                let rerouted = self.live[i].booking.reroute(&[from], now);
                assert_eq!(rerouted.is_ok(), others);
                if others {
                    assert_ne!(self.live[i].booking.worker(), from);
                    self.moved(i, from);
                }
            }
            (Step::Drop(_), Some(i)) => {
                let live = self.live.swap_remove(i);
                self.free_in_model(&live);
            }
            (Step::Finish(_), Some(i)) => {
                self.mark_computed(i);
                let live = self.live.swap_remove(i);
                self.free_in_model(&live);
                live.booking.finish(now);
            }
            (Step::RemoveWorker(worker), _) => {
                if let Some(id) = self.ids[worker].take() {
                    self.model.remove(&id);
                    assert!(self.router.remove_worker(id));
                }
            }
            (Step::AddWorker(worker), _) => self.add_worker(worker),
            (Step::ForgetCache(worker), _) => {
                if let Some(id) = self.ids[worker]
                    && let Some(model) = self.model.get_mut(&id)
                {
                    self.router.forget_cache(id);
                    model.computed.clear();
                    model.free.clear();
                }
            }
            _ => {}
        }
    }

    fn add_worker(&mut self, worker: usize) {
        if self.ids[worker].is_some() {
            return;
        }
        let (capacity, prefix_caching) = self.specs[worker];
        let spec = WorkerSpec {
            name: format!("w{worker}"),
            models: Vec::new(),
            capacity_blocks: Some(capacity),
            prefix_caching,
        };
        let id = self.router.add_worker(spec).unwrap();
        self.router.set_healthy(id, true);
        self.ids[worker] = Some(id);
        let worker = ModelWorker {
            prefix_caching,
            capacity: capacity as usize,
            ..ModelWorker::default()
        };
        self.model.insert(id, worker);
    }

    fn check(&self) {
        for worker in self.router.workers(self.now) {
            let model = &self.model[&worker.id];
            assert_eq!(
                worker.active_blocks as usize,
                model.active(),
                "{}",
                worker.name
            );
            let here = || {
                self.live
                    .iter()
                    .filter(|live| live.booking.worker() == worker.id)
            };
            assert_eq!(worker.requests as usize, here().count());
            let context: u64 = here()
                .map(|live| u64::from(live.booking.sequence().tokens() + live.generated))
                .sum();
            assert_eq!(worker.context_tokens, context);
        }
    }

    fn check_depths(&self, prompt: &[u32]) {
        let sequence = Sequence::from_tokens(prompt, BLOCK_SIZE, 7);
        let Ok(explained) = self.router.explain(&Request::new(&sequence), self.now) else {
            assert!(self.ids.iter().all(Option::is_none));
            return;
        };
        for candidate in explained.candidates {
            let (cached, active) = self.model[&candidate.id].depth(&sequence);
            assert_eq!(
                candidate.depth.active as usize, active,
                "active on {}",
                candidate.name
            );
            // Where blocks are pinned before they are computed, the two agree only in what
            // counts: the overlap.
            assert_eq!(
                candidate.depth.overlap() as usize,
                cached.max(active),
                "overlap on {}",
                candidate.name
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Any interleaving equals the model at each step and ends in exactly zero. Time stands
    /// still, so that forecasts add nothing to what was said.
    #[test]
    fn any_interleaving_equals_the_model(
        specs in prop::collection::vec((0..40u32, prop::bool::weighted(0.8)), 3),
        steps in prop::collection::vec((step(Just(true)), prompt()), 1..120),
        seed in any::<u64>(),
    ) {
        let mut pair = Pair::new(specs, seed, true);
        for (step, probe) in steps {
            pair.apply(step);
            pair.check();
            pair.check_depths(&probe);
        }
        pair.live.clear();
        prop_assert_eq!(pair.router.bookings(), 0);
        for worker in pair.router.workers(pair.now) {
            prop_assert_eq!(worker.active_blocks, 0);
            prop_assert_eq!(worker.requests, 0);
            prop_assert_eq!(worker.context_tokens, 0);
            prop_assert_eq!(worker.prefill_tokens, 0);
        }
        for id in pair.ids.iter().flatten() {
            pair.router.remove_worker(*id);
        }
        prop_assert_eq!(pair.router.tracked_edges(), 0);
    }

    /// The same while time passes and forecasts move what nobody watches: still exactly zero.
    #[test]
    fn forecasts_leave_nothing_behind(
        steps in prop::collection::vec((step(any::<bool>()), 0..400u64), 1..120),
    ) {
        let mut pair = Pair::new(vec![(30, true), (1000, true), (30, false)], 1, false);
        for (step, milliseconds) in steps {
            pair.now += Duration::from_millis(milliseconds);
            pair.apply(step);
            for worker in pair.router.workers(pair.now) {
                let streamed = pair.live.iter().filter(|live| live.booking.worker() == worker.id);
                prop_assert_eq!(worker.requests as usize, streamed.count());
            }
        }
        let unwatched = pair.live.iter().filter(|live| !live.streams).count();
        prop_assert!(unwatched <= pair.router.bookings());
        pair.live.clear();
        for worker in pair.router.workers(pair.now) {
            prop_assert_eq!(
                (worker.active_blocks, worker.requests, worker.context_tokens, worker.prefill_tokens),
                (0, 0, 0, 0)
            );
        }
    }
}

fn fleet(count: usize, config: RouterConfig) -> Router {
    let router = Router::new(config).unwrap();
    for worker in 0..count {
        let spec = WorkerSpec {
            name: format!("w{worker}"),
            prefix_caching: true,
            ..WorkerSpec::default()
        };
        let id = router.add_worker(spec).unwrap();
        router.set_healthy(id, true);
    }
    router
}

/// 1,000 requests at once, from 16 threads, of one length and nothing in common: each decision
/// sees all others, so they spread exactly.
#[test]
fn simultaneous_requests_spread_evenly() {
    for seed in 0..20 {
        let router = fleet(
            8,
            RouterConfig {
                seed,
                ..RouterConfig::default()
            },
        );
        let start = Barrier::new(16);
        let bookings: Vec<Booking> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..16u32)
                .map(|thread| {
                    let (router, start) = (&router, &start);
                    scope.spawn(move || {
                        start.wait();
                        let share = 1000 / 16 + u32::from(thread < 1000 % 16);
                        (0..share)
                            .map(|i| {
                                let first = thread * 1_000_000 + i * 1_000;
                                let prompt: Vec<u32> = (first..first + 700).collect();
                                let block_size = RouterConfig::default().block_size;
                                let sequence = Sequence::from_tokens(&prompt, block_size, 0);
                                router
                                    .route(&Request::new(&sequence), Duration::ZERO)
                                    .unwrap()
                            })
                            .collect::<Vec<_>>()
                    })
                })
                .collect();
            threads
                .into_iter()
                .flat_map(|t| t.join().unwrap())
                .collect()
        });
        assert_eq!(bookings.len(), 1000);
        for worker in router.workers(Duration::ZERO) {
            assert_eq!(worker.requests, 125);
            assert_eq!(worker.active_blocks, 125 * 700_u64.div_ceil(16));
        }
        drop(bookings);
        assert!(
            router
                .workers(Duration::ZERO)
                .iter()
                .all(|worker| worker.active_blocks == 0)
        );
    }
}

/// Whatever the policy, load is booked, and the same seed makes the same choices.
#[test]
fn every_policy_books_and_repeats_itself() {
    let run = |policy| {
        let router = fleet(
            5,
            RouterConfig {
                policy,
                seed: 9,
                ..RouterConfig::default()
            },
        );
        let bookings: Vec<_> = (0..200u32)
            .map(|i| {
                let prompt: Vec<u32> = (0..100 + i).map(|t| t / 40 * (i % 7)).collect();
                let sequence =
                    Sequence::from_tokens(&prompt, RouterConfig::default().block_size, 0);
                router
                    .route(&Request::new(&sequence), Duration::ZERO)
                    .unwrap()
            })
            .collect();
        let requests: Vec<_> = router
            .workers(Duration::ZERO)
            .iter()
            .map(|worker| worker.requests)
            .collect();
        assert_eq!(requests.iter().sum::<u32>(), 200, "{policy}");
        let bound = if policy == Policy::Random { 70 } else { 50 };
        assert!(
            requests.iter().all(|&requests| requests <= bound),
            "{policy}: {requests:?}"
        );
        bookings.iter().map(Booking::worker).collect::<Vec<_>>()
    };
    for (policy, _) in Policy::ALL {
        if policy == Policy::Kv {
            continue; // balances blocks, not requests
        }
        assert_eq!(run(policy), run(policy), "{policy}");
    }
}

#[test]
fn weight_zero_looks_at_load_alone() {
    let router = fleet(
        2,
        RouterConfig {
            overlap_weight: 0.0,
            ..RouterConfig::default()
        },
    );
    let prompt: Vec<u32> = (0..1600).collect();
    let sequence = Sequence::from_tokens(&prompt, RouterConfig::default().block_size, 0);
    // A shared block costs nothing where it is, yet the second copy goes elsewhere.
    let first = router
        .route(&Request::new(&sequence), Duration::ZERO)
        .unwrap();
    let second = router
        .route(&Request::new(&sequence), Duration::ZERO)
        .unwrap();
    assert_ne!(first.worker(), second.worker());
}

#[test]
fn overlap_draws_until_load_outweighs_it() {
    let router = fleet(2, RouterConfig::default());
    let prompt: Vec<u32> = (0..1600).collect();
    let block_size = RouterConfig::default().block_size;
    let sequence = Sequence::from_tokens(&prompt, block_size, 0);
    let mut warm = router
        .route(&Request::new(&sequence), Duration::ZERO)
        .unwrap();
    let holder = warm.worker();
    warm.tokens(1, Duration::ZERO);
    warm.finish(Duration::ZERO);
    // Cached, not active: a sibling goes there.
    let sibling = router
        .route(&Request::new(&sequence), Duration::ZERO)
        .unwrap();
    assert_eq!(sibling.worker(), holder);
    assert_eq!(
        sibling.decision().cost.overlap_blocks,
        99,
        "one token must be computed"
    );
    // Its blocks there now weigh as much as computing the prompt elsewhere, and more once others
    // join: strangers go to the empty worker.
    let stranger: Vec<u32> = (10_000..11_600).collect();
    let stranger = Sequence::from_tokens(&stranger, block_size, 0);
    let elsewhere = router
        .route(&Request::new(&stranger), Duration::ZERO)
        .unwrap();
    assert_ne!(elsewhere.worker(), holder);
}
