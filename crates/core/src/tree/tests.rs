//! What must hold inside the tree and the shadow, whatever is done to them.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::foreseen::Foreseen;
use crate::shadow::{Eviction, Shadow};

const WORKERS: Slot = 3;

#[derive(Clone, Debug)]
enum Step {
    Pin(Slot, Vec<SequenceHash>),
    Compute(usize),
    Unpin(usize, u32),
    Capacity(Slot, u32),
    Forget(Slot),
    ForgetComputed(Slot),
    /// Forgets what all but so many of the latest freeings left.
    ForgetEarlier(Slot, u64),
}

struct Pin {
    worker: Slot,
    node: NodeId,
    blocks: u32,
    /// Gone with its worker.
    forgotten: bool,
}

/// One worker evicts whole nodes.
fn shadow_of(worker: Slot, capacity: u32) -> Shadow {
    let eviction = match worker {
        1 => Eviction::Radix,
        _ => Eviction::Queue,
    };
    Shadow::new(eviction, Some(capacity))
}

#[derive(Default)]
struct Held {
    tree: PrefixTree,
    shadows: Vec<Shadow>,
    pinned: Vec<u64>,
    pins: Vec<Pin>,
}

impl Held {
    fn new(capacity: u32) -> Self {
        Self {
            shadows: (0..WORKERS).map(|it| shadow_of(it, capacity)).collect(),
            pinned: vec![0; WORKERS as usize],
            ..Self::default()
        }
    }

    fn apply(&mut self, step: Step) {
        match step {
            Step::Pin(worker, hashes) => {
                let chain = Chain::from(hashes);
                let mut depths = vec![Depth::default(); WORKERS as usize];
                let at = self.tree.descend(&chain, &mut depths);
                let pinned = self.tree.pin(at, &chain, worker, 0);
                self.pinned[worker as usize] += u64::from(pinned.blocks);
                let shadow = &mut self.shadows[worker as usize];
                shadow.revived(&pinned.revived, 0);
                let reusable = pinned.path.saturating_sub(1);
                shadow.divide(&pinned, reusable, worker, &mut self.tree);
                self.pins.push(Pin {
                    worker,
                    node: pinned.node,
                    blocks: pinned.path,
                    forgotten: false,
                });
                self.make_room(worker);
            }
            Step::Compute(which) => {
                if let Some(index) = which.checked_rem(self.pins.len()) {
                    let pin = &self.pins[index];
                    if !pin.forgotten {
                        self.tree.mark_computed(pin.node, pin.worker);
                    }
                }
            }
            Step::Unpin(which, unhashed) => {
                if let Some(index) = which.checked_rem(self.pins.len()) {
                    let pin = self.pins.swap_remove(index);
                    if !pin.forgotten {
                        self.unpin(&pin, unhashed);
                    }
                }
            }
            Step::Capacity(worker, blocks) => {
                self.shadows[worker as usize].set_capacity(blocks);
                self.make_room(worker);
            }
            Step::Forget(worker) => {
                self.tree.forget_worker(worker);
                self.shadows[worker as usize] = shadow_of(worker, 20);
                self.pinned[worker as usize] = 0;
                let pins = self.pins.iter_mut().filter(|pin| pin.worker == worker);
                pins.for_each(|pin| pin.forgotten = true);
            }
            Step::ForgetComputed(worker) => {
                self.tree.forget_computed(worker);
                self.shadows[worker as usize].clear();
            }
            Step::ForgetEarlier(worker, latest) => {
                let shadow = &mut self.shadows[worker as usize];
                let stamp = shadow.next_stamp().saturating_sub(latest);
                self.tree.forget_freed_before(worker, stamp);
                shadow.forget_freed_before(stamp);
            }
        }
    }

    fn unpin(&mut self, pin: &Pin, unhashed: u32) {
        let shadow = &mut self.shadows[pin.worker as usize];
        let stamp = shadow.next_stamp();
        let unpinned = self.tree.unpin(pin.node, pin.worker, stamp);
        shadow.freed(unpinned, unhashed, stamp);
        self.pinned[pin.worker as usize] -= u64::from(unpinned.blocks);
        self.make_room(pin.worker);
    }

    fn make_room(&mut self, worker: Slot) {
        let active = self.pinned[worker as usize];
        self.shadows[worker as usize].make_room(
            active,
            worker,
            &mut self.tree,
            &mut Foreseen::default(),
        );
    }

    /// `honest`: no hash stands for two prefixes, so every node can be found.
    fn check(&self, honest: bool) {
        let mut children: HashMap<NodeId, Vec<NodeId>> = HashMap::new();
        for (id, node) in &self.tree.nodes {
            assert!(node.start < node.end && node.offset <= node.start);
            assert_eq!(node.edge().len(), node.len() as usize);
            let id = id as NodeId;
            children.entry(node.parent).or_default().push(id);
            assert!(node.holds.is_sorted_by_key(|hold| hold.worker));
            assert!(!node.holds.is_empty() || node.children > 0);
            if let Some(parent) = self.tree.nodes.get(node.parent as usize) {
                assert_eq!(parent.end, node.start);
            } else {
                assert_eq!((node.parent, node.start), (NO_NODE, 0));
            }
            if honest {
                assert_eq!(self.tree.by_first_hash.get(&node.first_hash()), Some(&id));
            }
        }
        for (hash, &id) in &self.tree.by_first_hash {
            assert_eq!(self.tree.nodes[id as usize].first_hash(), *hash);
        }
        for (id, node) in &self.tree.nodes {
            let below = children.remove(&(id as NodeId)).unwrap_or_default();
            assert_eq!(below.len(), node.children as usize);
            let xor = below.iter().fold(0, |xor, child| xor ^ child);
            assert_eq!(xor, node.children_xor);
            for child in below {
                for lower in &self.tree.nodes[child as usize].holds {
                    if lower.pins == 0 && lower.computed == 0 {
                        continue;
                    }
                    let upper = &node.holds[node.hold_index(lower.worker).unwrap()];
                    assert!(upper.pins >= lower.pins);
                    assert!(lower.computed == 0 || upper.computed == node.len());
                }
            }
        }
        for worker in 0..WORKERS {
            let mut pinned = 0;
            let mut cached = 0;
            for (_, node) in &self.tree.nodes {
                if let Ok(index) = node.hold_index(worker) {
                    let hold = &node.holds[index];
                    assert!(hold.computed <= node.len());
                    match hold.pins {
                        0 => cached += u64::from(hold.computed),
                        _ => pinned += u64::from(node.len()),
                    }
                }
            }
            assert_eq!(pinned, self.pinned[worker as usize]);
            assert_eq!(cached, self.shadows[worker as usize].cached_blocks());
        }
        for pin in self.pins.iter().filter(|pin| !pin.forgotten) {
            let end = self.tree.nodes.get(pin.node as usize);
            assert_eq!(end.map_or(0, |node| node.end), pin.blocks);
        }
    }

    /// Hashes that live only because some node refers to them.
    fn kept_hashes(&self) -> usize {
        let chains = self.tree.nodes.iter().map(|(_, node)| &node.chain);
        let lengths: HashMap<_, _> = chains.map(|chain| (chain.as_ptr(), chain.len())).collect();
        lengths.values().sum()
    }

    fn end_all(&mut self) {
        while !self.pins.is_empty() {
            self.apply(Step::Unpin(0, 0));
            self.check(false);
        }
        assert_eq!(self.pinned, [0; WORKERS as usize]);
        for worker in 0..WORKERS {
            self.apply(Step::Capacity(worker, 0));
            self.check(false);
        }
        assert_eq!(self.tree.len(), 0);
        assert!(self.tree.by_first_hash.is_empty());
    }
}

/// Hashes as a prompt over two tokens would have: equal where the prefix is.
fn honest_chain() -> impl Strategy<Value = Vec<SequenceHash>> {
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

/// Hashes that mean nothing: the same anywhere, after anything.
fn colliding_chain() -> impl Strategy<Value = Vec<SequenceHash>> {
    prop::collection::vec(0..6_u64, 0..10)
}

fn steps(chain: impl Strategy<Value = Vec<SequenceHash>>) -> impl Strategy<Value = Vec<Step>> {
    let worker = 0..WORKERS;
    let which = any::<prop::sample::Index>().prop_map(|index| index.index(1 << 20));
    let step = prop_oneof![
        8 => (worker.clone(), chain).prop_map(|(worker, chain)| Step::Pin(worker, chain)),
        5 => which.clone().prop_map(Step::Compute),
        8 => (which, 0..4_u32).prop_map(|(which, unhashed)| Step::Unpin(which, unhashed)),
        2 => (worker.clone(), 0..60_u32).prop_map(|(worker, blocks)| Step::Capacity(worker, blocks)),
        1 => worker.clone().prop_map(Step::Forget),
        1 => worker.clone().prop_map(Step::ForgetComputed),
        1 => (worker, 0..6_u64).prop_map(|(worker, latest)| Step::ForgetEarlier(worker, latest)),
    ];
    prop::collection::vec(step, 1..150)
}

proptest! {
    #[test]
    fn whatever_is_done_the_tree_stays_in_order(steps in steps(honest_chain())) {
        let mut held = Held::new(30);
        for step in steps {
            held.apply(step);
            held.check(true);
        }
        held.end_all();
    }

    /// Hashes of 64 bits collide once in a very long while, or when somebody makes them. Then a
    /// prefix may be missed or mistaken, but nothing is lost or left behind.
    #[test]
    fn collisions_leave_nothing_behind(steps in steps(colliding_chain())) {
        let mut held = Held::new(30);
        for step in steps {
            held.apply(step);
            held.check(false);
        }
        held.end_all();
    }
}

/// A prompt of `blocks` whose first `shared` are those of prompt `family`.
fn chain(family: u64, shared: usize, unique: u64, blocks: usize) -> Vec<SequenceHash> {
    let hash =
        |of: u64, block: usize| (of << 32 | block as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let head = (0..shared).map(|block| hash(family, block));
    head.chain((shared..blocks).map(|block| hash(unique, block)))
        .collect()
}

impl Held {
    /// A request's whole life.
    fn run(&mut self, worker: Slot, hashes: Vec<SequenceHash>, computes: bool) {
        self.apply(Step::Pin(worker, hashes));
        let latest = self.pins.len() - 1;
        if computes {
            self.apply(Step::Compute(latest));
        }
        self.apply(Step::Unpin(latest, 0));
    }
}

#[test]
fn questions_about_one_long_document_keep_one_copy_of_it() {
    let mut held = Held::new(5_000);
    for question in 0..1_500 {
        held.run(0, chain(1, 4_000, 100 + question, 4_002), true);
    }
    held.check(true);
    assert!(held.tree.len() > 400, "many answers are still cached");
    let kept = held.kept_hashes();
    assert!(kept < 4 * 5_000 + 4_002, "{kept} hashes kept");
}

#[test]
fn heads_of_long_prompts_do_not_keep_the_prompts() {
    let mut held = Held::new(1_200);
    for prompt in 0..300 {
        // Computed once; only the first block is asked for again, and given up at once.
        held.run(0, chain(prompt, 1, 10_000 + prompt, 500), true);
        for head in prompt.saturating_sub(99)..=prompt {
            held.run(0, chain(head, 1, 20_000 + prompt, 500), false);
        }
    }
    held.check(true);
    let kept = held.kept_hashes();
    assert!(held.tree.len() > 90, "many heads are still cached");
    assert!(
        kept < 64 * held.tree.len() + 4 * 1_000,
        "{kept} hashes kept"
    );
}

#[test]
fn a_conversation_is_one_edge_however_many_turns_it_has() {
    let mut held = Held::new(100_000);
    for turn in 1..100 {
        held.run(0, chain(1, turn * 20, 2, turn * 20), true);
        assert_eq!(held.tree.len(), 1);
    }
}

#[test]
fn abandoned_branches_do_not_divide_a_conversation_for_good() {
    let mut held = Held::new(3_000);
    for turn in 1..100_u64 {
        let blocks = 20 * turn as usize;
        held.run(0, chain(1, blocks - 5, 1_000 + turn, blocks), true);
        held.run(0, chain(1, blocks, 2, blocks), true);
    }
    // Strangers take the place of the branches.
    held.run(0, chain(7, 1_019, 7, 1_019), true);
    held.check(true);
    assert!(held.tree.len() < 15, "{} edges", held.tree.len());
}
