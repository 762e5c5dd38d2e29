//! Batches against the [`naive`](crate::naive) model: each goes whole to where it costs least in sum, and ends
//! in exactly zero.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::time::Duration;

use crate::naive::{BLOCK_SIZE, NaiveWorker};
use foresee_core::batch::{Batch, MOST_IN_BATCH};
use foresee_core::choose::Policy;
use foresee_core::fleet::{WorkerId, WorkerSpec};
use foresee_core::router::{Request, RouteError, Router, RouterConfig};
use foresee_core::sequence::Sequence;
use proptest::prelude::*;

const NOW: Duration = Duration::from_secs(1);
/// Nothing is evicted, so that what is booked in the middle of a batch changes no cache.
const ROOM: u32 = 100_000;

fn router() -> Router {
    let config = RouterConfig {
        policy: Policy::Kv,
        block_size: BLOCK_SIZE,
        ..RouterConfig::default()
    };
    Router::new(config).unwrap()
}

fn add_worker(router: &Router, capacity: u32, prefix_caching: bool) -> WorkerId {
    let id = router.add_worker(WorkerSpec {
        name: format!("w{}", router.workers(NOW).len()),
        models: Vec::new(),
        capacity_blocks: Some(capacity),
        prefix_caching,
        ..WorkerSpec::default()
    });
    let id = id.unwrap();
    router.set_healthy(id, true);
    id
}

fn sequence(prompt: &[u32]) -> Sequence {
    Sequence::from_tokens(prompt, BLOCK_SIZE, 7)
}

/// Prompts over two tokens share prefixes of every length, and end anywhere in each other.
fn prompt() -> impl Strategy<Value = Vec<u32>> + Clone {
    let tail = prop::collection::vec(0..2u32, 0..12);
    (0..20usize, tail).prop_map(|(zeros, tail)| {
        let mut prompt = vec![0; zeros];
        prompt.extend(tail);
        prompt
    })
}

#[derive(Clone, Debug)]
enum Step {
    Book(Vec<Vec<u32>>),
    Tokens(usize, usize, u32),
    FinishOne(usize, usize),
    Reroute(usize),
    Drop(usize),
    Finish(usize),
}

fn step() -> impl Strategy<Value = Step> + Clone {
    let which = 0..64usize;
    let one = 0..8usize;
    prop_oneof![
        4 => prop::collection::vec(prompt(), 1..8).prop_map(Step::Book),
        6 => (which.clone(), one.clone(), 0..9u32).prop_map(|(i, j, n)| Step::Tokens(i, j, n)),
        3 => (which.clone(), one).prop_map(|(i, j)| Step::FinishOne(i, j)),
        2 => which.clone().prop_map(Step::Reroute),
        1 => which.clone().prop_map(Step::Drop),
        1 => which.prop_map(Step::Finish),
    ]
}

/// One prompt of a batch.
#[derive(Debug)]
struct Member {
    id: u64,
    sequence: Sequence,
    generated: u32,
    ended: bool,
}

struct Pair {
    router: Router,
    workers: BTreeMap<WorkerId, NaiveWorker>,
    live: Vec<(Batch, Vec<Member>)>,
    ids: u64,
}

impl Pair {
    fn new(caching: &[bool]) -> Self {
        let router = router();
        let workers = caching.iter().map(|&caching| {
            let id = add_worker(&router, ROOM, caching);
            (id, NaiveWorker::new(ROOM as usize, caching))
        });
        Self {
            workers: workers.collect(),
            router,
            live: Vec::new(),
            ids: 0,
        }
    }

    /// Blocks to compute and active blocks after, of booking all of them on a worker in order.
    fn cost(worker: &NaiveWorker, members: &[Member]) -> (u32, u32, u64) {
        let mut worker = worker.clone();
        let (mut overlap, mut prefill) = (0, 0);
        for member in members.iter().filter(|member| !member.ended) {
            let (cached, active) = worker.depth(&member.sequence);
            let hit = (cached.max(active) as u32).min(member.sequence.reusable_blocks());
            overlap += hit;
            prefill += member.sequence.blocks() - hit;
            worker.book(member.id, &member.sequence);
        }
        (overlap, prefill, worker.active() as u64)
    }

    fn book_in_model(&mut self, batch: &Batch, members: &mut [Member], compare: bool) {
        let costs = self.workers.iter().map(|(id, worker)| {
            let (overlap, prefill, active) = Self::cost(worker, members);
            (*id, (overlap, prefill, active))
        });
        let costs: BTreeMap<WorkerId, (u32, u32, u64)> = costs.collect();
        let total = |(_, prefill, active): (u32, u32, u64)| u64::from(prefill) + active;
        let decision = batch.decision();
        let (overlap, prefill, active) = costs[&batch.worker()];
        assert_eq!(decision.cost.overlap_blocks, overlap);
        assert_eq!(decision.cost.prefill_blocks, prefill);
        assert_eq!(decision.cost.active_blocks, active);
        let best = costs.values().map(|cost| cost.0).max().unwrap();
        assert_eq!(decision.best_overlap_blocks, best);
        if compare {
            let least = costs.values().map(|cost| total(*cost)).min().unwrap();
            assert_eq!(total(costs[&batch.worker()]), least, "{costs:?}");
        }
        let worker = self.workers.get_mut(&batch.worker()).unwrap();
        for member in members.iter_mut().filter(|member| !member.ended) {
            member.generated = 0;
            worker.book(member.id, &member.sequence);
        }
    }

    fn free_in_model(&mut self, worker: WorkerId, member: &Member, computed: bool) {
        let worker = self.workers.get_mut(&worker).unwrap();
        let computed = computed || member.generated > 0;
        if computed {
            worker.computed(member.id, &member.sequence);
        }
        worker.free(member.id, &member.sequence, computed, None);
    }

    fn apply(&mut self, step: Step) {
        let count = self.live.len();
        match step {
            Step::Book(prompts) => {
                let mut members = prompts.iter().map(|prompt| {
                    self.ids += 1;
                    Member {
                        id: self.ids,
                        sequence: sequence(prompt),
                        generated: 0,
                        ended: false,
                    }
                });
                let mut members: Vec<Member> = members.by_ref().collect();
                let sequences: Vec<Sequence> =
                    members.iter().map(|it| it.sequence.clone()).collect();
                let first = Request::new(&sequences[0]);
                let explained = self.router.explain_batch(&first, &sequences[1..], NOW);
                let batch = self.router.route_batch(&first, &sequences[1..], NOW);
                let batch = batch.unwrap();
                let explained = explained.unwrap();
                let chosen = explained
                    .candidates
                    .iter()
                    .find(|it| it.id == batch.worker());
                assert_eq!(chosen.unwrap().cost, batch.decision().cost);
                assert!(chosen.unwrap().probability > 0.0);
                self.book_in_model(&batch, &mut members, true);
                self.live.push((batch, members));
            }
            _ if count == 0 => {}
            Step::Tokens(i, j, tokens) => {
                let (batch, members) = &mut self.live[i % count];
                let j = j % members.len();
                assert_eq!(batch.booking(j).is_none(), members[j].ended);
                if let Some(booking) = batch.booking(j) {
                    booking.tokens(tokens, NOW);
                    members[j].generated += tokens;
                    let worker = self.workers.get_mut(&batch.worker()).unwrap();
                    if tokens > 0 {
                        worker.computed(members[j].id, &members[j].sequence);
                    }
                    worker.grow(members[j].id, &members[j].sequence, members[j].generated);
                }
            }
            Step::FinishOne(i, j) => {
                let (mut batch, mut members) = self.live.swap_remove(i % count);
                let j = j % members.len();
                batch.finish_one(j, NOW);
                if !std::mem::replace(&mut members[j].ended, true) {
                    self.free_in_model(batch.worker(), &members[j], true);
                }
                self.live.push((batch, members));
            }
            Step::Reroute(i) => {
                let (mut batch, mut members) = self.live.swap_remove(i % count);
                let from = batch.worker();
                let others = self.workers.len() > 1;
                let rerouted = batch.reroute(&[from], NOW);
                let left = members.iter().any(|member| !member.ended);
                if others && left {
                    assert_eq!(rerouted, Ok(()));
                    assert_ne!(batch.worker(), from);
                    for member in members.iter().filter(|member| !member.ended) {
                        self.free_in_model(from, member, false);
                    }
                    self.book_in_model(&batch, &mut members, false);
                } else if left {
                    assert_eq!(rerouted, Err(RouteError::NoWorker(String::new())));
                    assert_eq!(batch.worker(), from);
                }
                self.live.push((batch, members));
            }
            Step::Drop(i) => {
                let (batch, members) = self.live.swap_remove(i % count);
                for member in members.iter().filter(|member| !member.ended) {
                    self.free_in_model(batch.worker(), member, false);
                }
                drop(batch);
            }
            Step::Finish(i) => {
                let (batch, members) = self.live.swap_remove(i % count);
                for member in members.iter().filter(|member| !member.ended) {
                    self.free_in_model(batch.worker(), member, true);
                }
                batch.finish(NOW);
            }
        }
    }

    fn check(&self) {
        for snapshot in self.router.workers(NOW) {
            let worker = &self.workers[&snapshot.id];
            assert_eq!(snapshot.active_blocks as usize, worker.active());
            assert_eq!(snapshot.cached_blocks as usize, worker.cached());
            let live = self.live.iter();
            let here = live.filter(|(batch, _)| batch.worker() == snapshot.id);
            let running: Vec<&Member> = here
                .flat_map(|(_, members)| members)
                .filter(|member| !member.ended)
                .collect();
            assert_eq!(snapshot.requests as usize, running.len());
            let context = running.iter();
            let context = context.map(|it| u64::from(it.sequence.tokens() + it.generated));
            assert_eq!(snapshot.context_tokens, context.sum::<u64>());
        }
    }

    fn end_all(mut self) {
        self.live.clear();
        is_free(&self.router);
    }
}

/// Nothing is booked anywhere, to the last block and token.
fn is_free(router: &Router) {
    assert_eq!(router.bookings(), 0);
    for worker in router.workers(NOW) {
        let left = (
            worker.active_blocks,
            worker.requests,
            worker.context_tokens,
            worker.prefill_tokens,
        );
        assert_eq!(left, (0, 0, 0, 0));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn a_batch_goes_where_it_costs_least_in_sum(
        caching in prop::collection::vec(prop::bool::weighted(0.8), 1..5),
        steps in prop::collection::vec(step(), 1..60),
    ) {
        let mut pair = Pair::new(&caching);
        for step in steps {
            pair.apply(step);
            pair.check();
        }
        pair.end_all();
    }

    /// In caches that evict, while workers leave and answers are not watched: still exactly zero.
    #[test]
    fn batches_leave_nothing_behind(
        capacities in prop::collection::vec(0..40u32, 2..4),
        steps in prop::collection::vec((step(), any::<bool>()), 1..60),
        leaves in 0..60usize,
    ) {
        let router = router();
        let ids: Vec<WorkerId> = capacities
            .iter()
            .map(|&capacity| add_worker(&router, capacity, true))
            .collect();
        let mut live: Vec<Batch> = Vec::new();
        for (at, (step, streams)) in steps.into_iter().enumerate() {
            let now = NOW * (at as u32 + 1);
            if at == leaves {
                router.remove_worker(ids[0]);
            }
            let count = live.len().max(1);
            match step {
                Step::Book(prompts) => {
                    let all: Vec<Sequence> = prompts.iter().map(|it| sequence(it)).collect();
                    let request = Request { streams, ..Request::new(&all[0]) };
                    live.push(router.route_batch(&request, &all[1..], now).unwrap());
                }
                Step::Tokens(i, j, tokens) => {
                    if let Some(booking) = live.get_mut(i % count).and_then(|it| it.booking(j)) {
                        booking.tokens(tokens, now);
                    }
                }
                Step::FinishOne(i, j) => {
                    if let Some(batch) = live.get_mut(i % count) {
                        batch.finish_one(j, now);
                    }
                }
                Step::Reroute(i) => {
                    if let Some(batch) = live.get_mut(i % count) {
                        let from = batch.worker();
                        let _ = batch.reroute(&[from], now);
                    }
                }
                Step::Drop(i) if i % count < live.len() => drop(live.swap_remove(i % count)),
                Step::Finish(i) if i % count < live.len() => {
                    live.swap_remove(i % count).finish(now);
                }
                _ => {}
            }
        }
        drop(live);
        is_free(&router);
    }
}

#[test]
fn a_prefix_that_prompts_share_is_computed_once() {
    let router = router();
    add_worker(&router, ROOM, true);
    let shared: Vec<u32> = (0..100).collect();
    let prompts: Vec<Sequence> = (0..MOST_IN_BATCH as u32)
        .map(|last| sequence(&[shared.as_slice(), &[1000 + last]].concat()))
        .collect();
    let batch = router.route_batch(&Request::new(&prompts[0]), &prompts[1..], NOW);
    let batch = batch.unwrap();
    let others = MOST_IN_BATCH as u64 - 1;
    assert_eq!(router.workers(NOW)[0].active_blocks, 51 + others);
    assert_eq!(u64::from(batch.decision().cost.overlap_blocks), 50 * others);
    assert_eq!(batch.prompts(), MOST_IN_BATCH);
    drop(batch);
    is_free(&router);
}
