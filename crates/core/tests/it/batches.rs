//! Batches, compared with the [`naive`](crate::naive) model: each batch is placed where the sum of
//! its costs is least, and its release leaves nothing behind.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::time::Duration;

use crate::naive::{BLOCK_SIZE, NaiveWorker};
use foresee_core::batch::{Batch, MAX_BATCH_PROMPTS};
use foresee_core::outlier::OutlierConfig;
use foresee_core::policy;
use foresee_core::router::{Request, RouteError, Router, RouterConfig};
use foresee_core::sequence::Sequence;
use foresee_core::workers::{WorkerId, WorkerSpec};
use proptest::prelude::*;

const NOW: Duration = Duration::from_secs(1);
/// Capacity with which nothing is evicted, so that booking the prompts of a batch changes no cache.
const LARGE_CAPACITY: u32 = 100_000;

fn router() -> Router {
    let config = RouterConfig {
        policy: policy::KV,
        block_size: BLOCK_SIZE,
        queue_order: None,
        outlier: OutlierConfig::disabled(),
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

/// Prompts over two token ids. They share prefixes of every length, and some are prefixes of others.
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
    CompletePrompt(usize, usize),
    Reroute(usize),
    Drop(usize),
    Complete(usize),
}

fn step() -> impl Strategy<Value = Step> + Clone {
    let batch = 0..64usize;
    let prompt_index = 0..8usize;
    prop_oneof![
        4 => prop::collection::vec(prompt(), 1..8).prop_map(Step::Book),
        6 => (batch.clone(), prompt_index.clone(), 0..9u32).prop_map(|(i, j, n)| Step::Tokens(i, j, n)),
        3 => (batch.clone(), prompt_index).prop_map(|(i, j)| Step::CompletePrompt(i, j)),
        2 => batch.clone().prop_map(Step::Reroute),
        1 => batch.clone().prop_map(Step::Drop),
        1 => batch.prop_map(Step::Complete),
    ]
}

/// One prompt of a batch.
#[derive(Debug)]
struct BatchPrompt {
    id: u64,
    sequence: Sequence,
    output_tokens: u32,
    has_ended: bool,
}

/// The router and the model, driven by the same steps.
struct Pair {
    router: Router,
    workers: BTreeMap<WorkerId, NaiveWorker>,
    live: Vec<(Batch, Vec<BatchPrompt>)>,
    ids: u64,
}

impl Pair {
    fn new(caching: &[bool]) -> Self {
        let router = router();
        let workers = caching.iter().map(|&caching| {
            let id = add_worker(&router, LARGE_CAPACITY, caching);
            (id, NaiveWorker::new(LARGE_CAPACITY as usize, caching))
        });
        Self {
            workers: workers.collect(),
            router,
            live: Vec::new(),
            ids: 0,
        }
    }

    /// Returns the overlap, the blocks to compute and the active blocks of booking all prompts on a
    /// worker in order.
    fn cost(worker: &NaiveWorker, prompts: &[BatchPrompt]) -> (u32, u32, u64) {
        let mut worker = worker.clone();
        let (mut overlap, mut prefill) = (0, 0);
        for prompt in prompts.iter().filter(|prompt| !prompt.has_ended) {
            let (cached, active) = worker.prefix_match(&prompt.sequence);
            let hit = (cached.max(active) as u32).min(prompt.sequence.max_reusable_blocks());
            overlap += hit;
            prefill += prompt.sequence.blocks() - hit;
            worker.book(prompt.id, &prompt.sequence);
        }
        (overlap, prefill, worker.active() as u64)
    }

    fn book_in_model(&mut self, batch: &Batch, prompts: &mut [BatchPrompt], compare: bool) {
        let costs = self
            .workers
            .iter()
            .map(|(id, worker)| (*id, Self::cost(worker, prompts)));
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
        for prompt in prompts.iter_mut().filter(|prompt| !prompt.has_ended) {
            prompt.output_tokens = 0;
            worker.book(prompt.id, &prompt.sequence);
        }
    }

    fn release_in_model(&mut self, worker: WorkerId, prompt: &BatchPrompt, is_computed: bool) {
        let worker = self.workers.get_mut(&worker).unwrap();
        let is_computed = is_computed || prompt.output_tokens > 0;
        if is_computed {
            worker.mark_computed(prompt.id, &prompt.sequence);
        }
        worker.release(prompt.id, &prompt.sequence, is_computed, None);
    }

    fn apply(&mut self, step: Step) {
        let count = self.live.len();
        match step {
            Step::Book(token_lists) => {
                let prompts = token_lists.iter().map(|tokens| {
                    self.ids += 1;
                    BatchPrompt {
                        id: self.ids,
                        sequence: sequence(tokens),
                        output_tokens: 0,
                        has_ended: false,
                    }
                });
                let mut prompts: Vec<BatchPrompt> = prompts.collect();
                let sequences: Vec<Sequence> = prompts
                    .iter()
                    .map(|prompt| prompt.sequence.clone())
                    .collect();
                let first = Request::new(&sequences[0]);
                let explained = self.router.explain_batch(&first, &sequences[1..], NOW);
                let batch = self.router.route_batch(&first, &sequences[1..], NOW);
                let batch = batch.unwrap();
                let explained = explained.unwrap();
                let chosen = explained
                    .candidates
                    .iter()
                    .find(|candidate| candidate.id == batch.worker());
                assert_eq!(chosen.unwrap().cost, batch.decision().cost);
                assert!(chosen.unwrap().probability > 0.0);
                self.book_in_model(&batch, &mut prompts, true);
                self.live.push((batch, prompts));
            }
            _ if count == 0 => {}
            Step::Tokens(i, j, tokens) => {
                let (batch, prompts) = &mut self.live[i % count];
                let j = j % prompts.len();
                assert_eq!(batch.booking(j).is_none(), prompts[j].has_ended);
                if let Some(booking) = batch.booking(j) {
                    booking.on_tokens(tokens, NOW);
                    prompts[j].output_tokens += tokens;
                    let worker = self.workers.get_mut(&batch.worker()).unwrap();
                    if tokens > 0 {
                        worker.mark_computed(prompts[j].id, &prompts[j].sequence);
                    }
                    worker.grow(
                        prompts[j].id,
                        &prompts[j].sequence,
                        prompts[j].output_tokens,
                    );
                }
            }
            Step::CompletePrompt(i, j) => {
                let (mut batch, mut prompts) = self.live.swap_remove(i % count);
                let j = j % prompts.len();
                batch.complete_prompt(j, NOW);
                if !std::mem::replace(&mut prompts[j].has_ended, true) {
                    self.release_in_model(batch.worker(), &prompts[j], true);
                }
                self.live.push((batch, prompts));
            }
            Step::Reroute(i) => {
                let (mut batch, mut prompts) = self.live.swap_remove(i % count);
                let from = batch.worker();
                let others = self.workers.len() > 1;
                let rerouted = batch.reroute(&[from], NOW);
                let has_prompts = prompts.iter().any(|prompt| !prompt.has_ended);
                if others && has_prompts {
                    assert_eq!(rerouted, Ok(()));
                    assert_ne!(batch.worker(), from);
                    for prompt in prompts.iter().filter(|prompt| !prompt.has_ended) {
                        self.release_in_model(from, prompt, false);
                    }
                    self.book_in_model(&batch, &mut prompts, false);
                } else if has_prompts {
                    assert_eq!(rerouted, Err(RouteError::NoWorker(String::new())));
                    assert_eq!(batch.worker(), from);
                }
                self.live.push((batch, prompts));
            }
            Step::Drop(i) => {
                let (batch, prompts) = self.live.swap_remove(i % count);
                for prompt in prompts.iter().filter(|prompt| !prompt.has_ended) {
                    self.release_in_model(batch.worker(), prompt, false);
                }
                drop(batch);
            }
            Step::Complete(i) => {
                let (batch, prompts) = self.live.swap_remove(i % count);
                for prompt in prompts.iter().filter(|prompt| !prompt.has_ended) {
                    self.release_in_model(batch.worker(), prompt, true);
                }
                batch.complete(NOW);
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
            let running: Vec<&BatchPrompt> = here
                .flat_map(|(_, prompts)| prompts)
                .filter(|prompt| !prompt.has_ended)
                .collect();
            assert_eq!(snapshot.requests as usize, running.len());
            let context_tokens = running
                .iter()
                .map(|prompt| u64::from(prompt.sequence.tokens() + prompt.output_tokens));
            assert_eq!(snapshot.context_tokens, context_tokens.sum::<u64>());
        }
    }

    fn end_all(mut self) {
        self.live.clear();
        assert_nothing_is_booked(&self.router);
    }
}

/// Asserts that no worker has any block, request or token booked.
fn assert_nothing_is_booked(router: &Router) {
    assert_eq!(router.booking_count(), 0);
    for worker in router.workers(NOW) {
        let booked = (
            worker.active_blocks,
            worker.requests,
            worker.context_tokens,
            worker.prefill_tokens,
        );
        assert_eq!(booked, (0, 0, 0, 0));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn a_batch_is_placed_where_the_sum_of_its_costs_is_least(
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

    /// Covers caches that evict, a worker that is removed, and responses that are not streamed.
    #[test]
    fn released_batches_leave_nothing_behind(
        capacities in prop::collection::vec(0..40u32, 2..4),
        steps in prop::collection::vec((step(), any::<bool>()), 1..60),
        removed_at in 0..60usize,
    ) {
        let router = router();
        let ids: Vec<WorkerId> = capacities
            .iter()
            .map(|&capacity| add_worker(&router, capacity, true))
            .collect();
        let mut live: Vec<Batch> = Vec::new();
        for (at, (step, is_streaming)) in steps.into_iter().enumerate() {
            let now = NOW * (at as u32 + 1);
            if at == removed_at {
                router.remove_worker(ids[0]);
            }
            let count = live.len().max(1);
            match step {
                Step::Book(prompts) => {
                    let all: Vec<Sequence> = prompts.iter().map(|tokens| sequence(tokens)).collect();
                    let request = Request { is_streaming, ..Request::new(&all[0]) };
                    live.push(router.route_batch(&request, &all[1..], now).unwrap());
                }
                Step::Tokens(i, j, tokens) => {
                    if let Some(booking) = live.get_mut(i % count).and_then(|batch| batch.booking(j)) {
                        booking.on_tokens(tokens, now);
                    }
                }
                Step::CompletePrompt(i, j) => {
                    if let Some(batch) = live.get_mut(i % count) {
                        batch.complete_prompt(j, now);
                    }
                }
                Step::Reroute(i) => {
                    if let Some(batch) = live.get_mut(i % count) {
                        let from = batch.worker();
                        let _ = batch.reroute(&[from], now);
                    }
                }
                Step::Drop(i) if i % count < live.len() => drop(live.swap_remove(i % count)),
                Step::Complete(i) if i % count < live.len() => {
                    live.swap_remove(i % count).complete(now);
                }
                _ => {}
            }
        }
        drop(live);
        assert_nothing_is_booked(&router);
    }
}

#[test]
fn a_prefix_that_prompts_share_is_computed_once() {
    let router = router();
    add_worker(&router, LARGE_CAPACITY, true);
    let shared: Vec<u32> = (0..100).collect();
    let prompts: Vec<Sequence> = (0..MAX_BATCH_PROMPTS as u32)
        .map(|last| sequence(&[shared.as_slice(), &[1000 + last]].concat()))
        .collect();
    let batch = router.route_batch(&Request::new(&prompts[0]), &prompts[1..], NOW);
    let batch = batch.unwrap();
    let others = MAX_BATCH_PROMPTS as u64 - 1;
    assert_eq!(router.workers(NOW)[0].active_blocks, 51 + others);
    assert_eq!(u64::from(batch.decision().cost.overlap_blocks), 50 * others);
    assert_eq!(batch.prompt_count(), MAX_BATCH_PROMPTS);
    drop(batch);
    assert_nothing_is_booked(&router);
}
