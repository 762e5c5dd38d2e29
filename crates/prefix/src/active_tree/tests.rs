//! Invariants of the tree and of the estimated caches, under random operations.

use std::collections::HashMap;

use proptest::prelude::*;

use super::naive::ActiveBlocks;
use super::*;
use crate::estimated_cache::{EstimatedCache, EvictionRule};
use crate::pending_evictions::PendingEvictions;

const WORKERS: WorkerIndex = 3;

#[derive(Clone, Debug)]
enum Operation {
    /// Pins a chain.
    Pin(WorkerIndex, Vec<SequenceHash>),
    /// Pins a chain as that of a queued request.
    PinQueued(WorkerIndex, Vec<SequenceHash>),
    /// Marks the path of a live pin as computed.
    MarkCached(usize),
    /// Releases a live pin, with blocks of unknown output at its tail.
    Unpin(usize, u32),
    /// Sets the capacity of a worker and evicts to fit.
    Capacity(WorkerIndex, u32),
    RemoveWorker(WorkerIndex),
    ClearCached(WorkerIndex),
    /// Drops the cached blocks of all but the latest `.1` frees.
    ClearFreedBefore(WorkerIndex, u64),
    /// Evicts lost blocks of up to `.1` entries of the free queue.
    EvictLost(WorkerIndex, usize),
}

struct Pin {
    worker: WorkerIndex,
    node: NodeId,
    blocks: u32,
    is_queued: bool,
    /// Whether the worker was removed after the pin, which removed the pin too.
    removed: bool,
}

/// Returns an empty estimated cache. Worker 1 evicts whole nodes.
fn estimated_cache_of(worker: WorkerIndex, capacity: u32) -> EstimatedCache {
    let eviction = match worker {
        1 => EvictionRule::SglangRadix,
        _ => EvictionRule::VllmLru,
    };
    EstimatedCache::new(eviction, Some(capacity))
}

/// The tree, the estimated cache of each worker, and the live pins.
#[derive(Default)]
struct Harness {
    tree: PrefixTree,
    caches: Vec<EstimatedCache>,
    /// Pinned blocks by worker.
    pinned: Vec<u64>,
    pins: Vec<Pin>,
}

impl Harness {
    fn new(capacity: u32) -> Self {
        Self {
            caches: (0..WORKERS)
                .map(|worker| estimated_cache_of(worker, capacity))
                .collect(),
            pinned: vec![0; WORKERS as usize],
            ..Self::default()
        }
    }

    fn apply(&mut self, operation: Operation) {
        match operation {
            Operation::Pin(worker, hashes) => {
                let chain = HashChain::from(hashes);
                let mut prefix_matches = vec![PrefixMatch::default(); WORKERS as usize];
                let position = self.tree.match_prefix(&chain, true, &mut prefix_matches);
                // Serials of bookings begin at 1.
                let change = self.tree.pin(position, &chain, worker, 1);
                self.pinned[worker as usize] += u64::from(change.newly_pinned);
                let cache = &mut self.caches[worker as usize];
                cache.reuse(&change.reused, 0);
                let reusable = change.path_blocks.saturating_sub(1);
                cache.mark_engine_boundary(&change, reusable, worker, &mut self.tree);
                self.pins.push(Pin {
                    worker,
                    node: change.node,
                    blocks: change.path_blocks,
                    is_queued: false,
                    removed: false,
                });
                self.evict_to_fit(worker);
            }
            Operation::PinQueued(worker, hashes) => {
                let chain = HashChain::from(hashes);
                let position = self.tree.find(&chain);
                let (node, blocks) = self.tree.pin_queued(position, &chain, worker);
                self.pins.push(Pin {
                    worker,
                    node,
                    blocks,
                    is_queued: true,
                    removed: false,
                });
            }
            Operation::MarkCached(index) => {
                if let Some(index) = index.checked_rem(self.pins.len()) {
                    let pin = &self.pins[index];
                    if !pin.removed && !pin.is_queued {
                        self.tree.mark_cached(pin.node, pin.worker);
                    }
                }
            }
            Operation::Unpin(index, unhashed) => {
                if let Some(index) = index.checked_rem(self.pins.len()) {
                    let pin = self.pins.swap_remove(index);
                    match (pin.removed, pin.is_queued) {
                        (true, _) => {}
                        (false, true) => self.tree.unpin_queued(pin.node, pin.worker),
                        (false, false) => self.unpin(&pin, unhashed),
                    }
                }
            }
            Operation::Capacity(worker, blocks) => {
                self.caches[worker as usize].set_capacity(blocks);
                self.evict_to_fit(worker);
            }
            Operation::RemoveWorker(worker) => {
                self.tree.retire_worker(worker);
                self.assert_nothing_matches(worker);
                let pins = self.pins.iter_mut().filter(|pin| pin.worker == worker);
                for pin in pins.filter(|pin| !pin.removed) {
                    match pin.is_queued {
                        true => self.tree.unpin_queued(pin.node, worker),
                        false => {
                            self.tree.unpin(pin.node, worker, 0);
                        }
                    }
                    pin.removed = true;
                }
                let cache = &mut self.caches[worker as usize];
                cache.clear();
                while cache.evict_lost(1, worker, &mut self.tree) {}
                let is_held = |(_, node): (usize, &Node)| node.holder_index(worker).is_ok();
                assert!(!self.tree.nodes.iter().any(is_held));
                self.caches[worker as usize] = estimated_cache_of(worker, 20);
                self.pinned[worker as usize] = 0;
                self.tree.set_intra_step_sharing(worker, true);
            }
            Operation::ClearCached(worker) => {
                self.tree.lose_cached(worker);
                self.caches[worker as usize].clear();
            }
            Operation::EvictLost(worker, max_entries) => {
                let cache = &mut self.caches[worker as usize];
                cache.evict_lost(max_entries, worker, &mut self.tree);
            }
            Operation::ClearFreedBefore(worker, kept_epochs) => {
                let cache = &mut self.caches[worker as usize];
                let epoch = cache.next_epoch().saturating_sub(kept_epochs);
                self.tree.lose_freed_before(worker, epoch);
                cache.forget_freed_before(epoch);
            }
        }
    }

    /// Asserts that no block of `worker` matches any live chain.
    fn assert_nothing_matches(&self, worker: WorkerIndex) {
        for (_, node) in self.tree.nodes.iter() {
            let mut prefix_matches = vec![PrefixMatch::default(); WORKERS as usize];
            self.tree
                .match_prefix(&node.chain, true, &mut prefix_matches);
            assert_eq!(prefix_matches[worker as usize], PrefixMatch::default());
        }
    }

    fn unpin(&mut self, pin: &Pin, unhashed: u32) {
        let cache = &mut self.caches[pin.worker as usize];
        let epoch = cache.next_epoch();
        let unpinned = self.tree.unpin(pin.node, pin.worker, epoch);
        cache.push_freed(unpinned, unhashed, epoch);
        self.pinned[pin.worker as usize] -= u64::from(unpinned.unpinned);
        self.evict_to_fit(pin.worker);
    }

    fn evict_to_fit(&mut self, worker: WorkerIndex) {
        let active = self.pinned[worker as usize];
        let pending_evictions = &mut PendingEvictions::default();
        let cache = &mut self.caches[worker as usize];
        while !cache.evict_to_fit(active, worker, &mut self.tree, pending_evictions) {}
    }

    /// Asserts all invariants. With `collision_free`, no hash stands for two prefixes, so every
    /// node must be found by its first hash.
    fn check(&self, collision_free: bool) {
        let mut children: HashMap<NodeId, Vec<NodeId>> = HashMap::new();
        for (id, node) in self.tree.nodes.iter() {
            assert!(node.start < node.end && node.offset <= node.start);
            assert_eq!(node.edge().len(), node.len() as usize);
            let id = NodeId::from_index(id);
            children.entry(node.parent).or_default().push(id);
            assert!(node.holders.is_sorted_by_key(|holder| holder.worker));
            assert!(!node.holders.is_empty() || node.children > 0);
            if let Some(parent) = self.tree.nodes.get(node.parent.index()) {
                assert_eq!(parent.end, node.start);
            } else {
                assert_eq!((node.parent, node.start), (NO_NODE, 0));
            }
            if collision_free {
                assert_eq!(self.tree.by_first_hash.get(node.first_hash()), Some(id));
            }
        }
        for (hash, &id) in self.tree.by_first_hash.iter() {
            assert_eq!(self.tree.nodes[id.index()].first_hash(), *hash);
        }
        for (id, node) in self.tree.nodes.iter() {
            let child_ids = children.remove(&NodeId::from_index(id)).unwrap_or_default();
            assert_eq!(child_ids.len(), node.children as usize);
            let xor = child_ids.iter().fold(0, |xor, child| xor ^ child.0);
            assert_eq!(xor, node.children_xor);
            for child in child_ids {
                for child_holder in &self.tree.nodes[child.index()].holders {
                    let sync = self.tree.worker_sync(child_holder.worker);
                    let child_cached = sync.cached_blocks(child_holder);
                    if child_holder.pin_count == 0
                        && child_holder.queued_count == 0
                        && child_cached == 0
                    {
                        continue;
                    }
                    let holder = &node.holders[node.holder_index(child_holder.worker).unwrap()];
                    assert!(holder.pin_count >= child_holder.pin_count);
                    assert!(holder.queued_count >= child_holder.queued_count);
                    assert!(child_cached == 0 || sync.cached_blocks(holder) == node.len());
                }
            }
        }
        for worker in 0..WORKERS {
            let mut pinned = 0;
            let mut cached = 0;
            for (_, node) in self.tree.nodes.iter() {
                if let Ok(index) = node.holder_index(worker) {
                    let holder = &node.holders[index];
                    assert!(holder.cached_blocks <= node.len());
                    match holder.pin_count {
                        0 => {
                            let sync = self.tree.worker_sync(worker);
                            cached += u64::from(sync.cached_blocks(holder));
                        }
                        _ => pinned += u64::from(node.len()),
                    }
                }
            }
            assert_eq!(pinned, self.pinned[worker as usize]);
            assert_eq!(cached, self.caches[worker as usize].cached_blocks());
        }
        for pin in self.pins.iter().filter(|pin| !pin.removed) {
            let end = self.tree.nodes.get(pin.node.index());
            assert_eq!(end.map_or(0, |node| node.end), pin.blocks);
        }
    }

    /// Returns the number of hashes in the chains that nodes keep alive.
    fn retained_hashes(&self) -> usize {
        let chains = self.tree.nodes.iter().map(|(_, node)| &node.chain);
        let lengths: HashMap<_, _> = chains.map(|chain| (chain.as_ptr(), chain.len())).collect();
        lengths.values().sum()
    }

    /// Releases every pin and evicts every block, and asserts that the tree is empty.
    fn unpin_all(&mut self) {
        while !self.pins.is_empty() {
            self.apply(Operation::Unpin(0, 0));
            self.check(false);
        }
        assert_eq!(self.pinned, [0; WORKERS as usize]);
        for worker in 0..WORKERS {
            self.apply(Operation::Capacity(worker, 0));
            self.check(false);
            self.apply(Operation::EvictLost(worker, usize::MAX));
            self.check(false);
        }
        assert_eq!(self.tree.len(), 0);
        assert_eq!(self.tree.by_first_hash.iter().count(), 0);
    }
}

/// Generates the hashes of prompts over two tokens: equal hashes mean equal prefixes.
fn collision_free_chain() -> impl Strategy<Value = Vec<SequenceHash>> {
    (0..24_usize, prop::collection::vec(0..2_u64, 0..6)).prop_map(|(zeros, tail)| {
        let blocks = std::iter::repeat_n(0, zeros).chain(tail);
        blocks
            .scan(1_u64, |prefix, block| {
                *prefix = (prefix.wrapping_mul(31) + block + 1).wrapping_mul(0x9E37_79B9);
                Some(*prefix)
            })
            .collect()
    })
}

/// Generates arbitrary hashes, so that one hash stands for several prefixes.
fn colliding_chain() -> impl Strategy<Value = Vec<SequenceHash>> {
    prop::collection::vec(0..6_u64, 0..10)
}

fn operations(
    chain: impl Strategy<Value = Vec<SequenceHash>>,
) -> impl Strategy<Value = Vec<Operation>> {
    let worker = 0..WORKERS;
    let index = any::<prop::sample::Index>().prop_map(|index| index.index(1 << 20));
    let operation = prop_oneof![
        11 => (worker.clone(), chain, prop::bool::weighted(0.3)).prop_map(|(worker, chain, is_queued)| {
            match is_queued {
                true => Operation::PinQueued(worker, chain),
                false => Operation::Pin(worker, chain),
            }
        }),
        5 => index.clone().prop_map(Operation::MarkCached),
        8 => (index, 0..4_u32).prop_map(|(index, unhashed)| Operation::Unpin(index, unhashed)),
        2 => (worker.clone(), 0..60_u32).prop_map(|(worker, blocks)| Operation::Capacity(worker, blocks)),
        1 => worker.clone().prop_map(Operation::RemoveWorker),
        1 => worker.clone().prop_map(Operation::ClearCached),
        3 => (worker.clone(), 1..4_usize).prop_map(|(worker, max)| Operation::EvictLost(worker, max)),
        1 => (worker, 0..6_u64).prop_map(|(worker, kept_epochs)| Operation::ClearFreedBefore(worker, kept_epochs)),
    ];
    prop::collection::vec(operation, 1..150)
}

proptest! {
    #[test]
    fn any_sequence_of_operations_keeps_the_invariants(operations in operations(collision_free_chain())) {
        let mut harness = Harness::new(30);
        for operation in operations {
            harness.apply(operation);
            harness.check(true);
        }
        harness.unpin_all();
    }

    /// Compares the tree with plain maps of blocks and requests: one of dispatched requests, and
    /// one of queued requests.
    #[test]
    fn the_tree_knows_the_active_blocks_of_the_naive_map(
        steps in prop::collection::vec(
            (0..WORKERS, collision_free_chain(), any::<bool>(), any::<Option<prop::sample::Index>>()),
            1..120,
        ),
    ) {
        let mut tree = PrefixTree::default();
        let (mut active, mut queued) = (ActiveBlocks::default(), ActiveBlocks::default());
        let mut bookings: Vec<(WorkerIndex, u64, HashChain, bool, NodeId)> = Vec::new();
        for (request, (worker, hashes, is_queued, ended)) in (1..).zip(steps) {
            let chain = HashChain::from(hashes);
            let mut position = tree.find(&chain);
            for with_queued in [false, true] {
                let mut matches = vec![PrefixMatch::default(); WORKERS as usize];
                position = tree.match_prefix(&chain, with_queued, &mut matches);
                for (worker, prefix_match) in (0..).zip(&matches) {
                    let active_blocks = active.matching_blocks(worker, &chain);
                    let queued_blocks = queued.matching_blocks(worker, &chain);
                    let expected = match with_queued {
                        true => active_blocks.max(queued_blocks),
                        false => active_blocks,
                    };
                    prop_assert_eq!(prefix_match.active_blocks as usize, expected);
                }
            }
            let node = match is_queued {
                true => {
                    queued.pin(worker, request, &chain);
                    tree.pin_queued(position, &chain, worker).0
                }
                false => {
                    let change = tree.pin(position, &chain, worker, request);
                    let newly_pinned = active.pin(worker, request, &chain);
                    prop_assert_eq!(change.newly_pinned as usize, newly_pinned);
                    change.node
                }
            };
            bookings.push((worker, request, chain, is_queued, node));
            if let Some(ended) = ended {
                let (worker, request, chain, is_queued, node) =
                    bookings.swap_remove(ended.index(bookings.len()));
                if is_queued {
                    tree.unpin_queued(node, worker);
                    queued.unpin(worker, request, &chain);
                } else {
                    let change = tree.unpin(node, worker, 1);
                    let unpinned = active.unpin(worker, request, &chain);
                    prop_assert_eq!(change.unpinned as usize, unpinned);
                }
            }
        }
        for (worker, request, chain, is_queued, node) in bookings {
            if is_queued {
                tree.unpin_queued(node, worker);
            } else {
                tree.unpin(node, worker, 1);
                active.unpin(worker, request, &chain);
            }
        }
        prop_assert!((0..WORKERS).all(|worker| active.active_blocks(worker) == 0));
        prop_assert_eq!(tree.len(), 0);
    }

    /// Hashes of 64 bits collide only very rarely, or on purpose. A prefix may then be missed or
    /// taken for another, but no node and no count may be left behind.
    #[test]
    fn hash_collisions_leak_no_nodes(operations in operations(colliding_chain())) {
        let mut harness = Harness::new(30);
        for operation in operations {
            harness.apply(operation);
            harness.check(false);
        }
        harness.unpin_all();
    }
}

/// Returns a prompt of `blocks` blocks whose first `shared` blocks are those of prompt `family`.
fn chain(family: u64, shared: usize, unique: u64, blocks: usize) -> Vec<SequenceHash> {
    let hash =
        |of: u64, block: usize| (of << 32 | block as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let head = (0..shared).map(|block| hash(family, block));
    head.chain((shared..blocks).map(|block| hash(unique, block)))
        .collect()
}

impl Harness {
    /// Pins a chain, marks it as computed if `is_computed`, and releases it.
    fn run(&mut self, worker: WorkerIndex, hashes: Vec<SequenceHash>, is_computed: bool) {
        self.apply(Operation::Pin(worker, hashes));
        let pin = self.pins.len() - 1;
        if is_computed {
            self.apply(Operation::MarkCached(pin));
        }
        self.apply(Operation::Unpin(pin, 0));
    }
}

#[test]
fn prompts_that_share_a_long_document_retain_its_hashes_once() {
    let mut harness = Harness::new(5_000);
    for question in 0..1_500 {
        harness.run(0, chain(1, 4_000, 100 + question, 4_002), true);
    }
    harness.check(true);
    assert!(
        harness.tree.len() > 400,
        "the unshared tails of many prompts are still cached"
    );
    let retained = harness.retained_hashes();
    assert!(retained < 4 * 5_000 + 4_002, "{retained} hashes retained");
}

#[test]
fn short_edges_do_not_retain_the_long_chains_they_came_from() {
    let mut harness = Harness::new(1_200);
    for prompt in 0..300 {
        // Each prompt is computed once. Later requests share only its first block and are released
        // before they compute anything.
        harness.run(0, chain(prompt, 1, 10_000 + prompt, 500), true);
        for head in prompt.saturating_sub(99)..=prompt {
            harness.run(0, chain(head, 1, 20_000 + prompt, 500), false);
        }
    }
    harness.check(true);
    let retained = harness.retained_hashes();
    assert!(
        harness.tree.len() > 90,
        "the first blocks of many prompts are still cached"
    );
    assert!(
        retained < 64 * harness.tree.len() + 4 * 1_000,
        "{retained} hashes retained"
    );
}

#[test]
fn a_conversation_stays_one_edge_over_many_turns() {
    let mut harness = Harness::new(100_000);
    for turn in 1..100 {
        harness.run(0, chain(1, turn * 20, 2, turn * 20), true);
        assert_eq!(harness.tree.len(), 1);
    }
}

#[test]
fn edges_merge_again_after_abandoned_branches_are_evicted() {
    let mut harness = Harness::new(3_000);
    for turn in 1..100_u64 {
        let blocks = 20 * turn as usize;
        harness.run(0, chain(1, blocks - 5, 1_000 + turn, blocks), true);
        harness.run(0, chain(1, blocks, 2, blocks), true);
    }
    // An unrelated prompt evicts the branches.
    harness.run(0, chain(7, 1_019, 7, 1_019), true);
    harness.check(true);
    assert!(harness.tree.len() < 15, "{} edges", harness.tree.len());
}
