//! Which prefixes each worker holds: a path-compressed trie over sequence hashes.
//!
//! An edge is a slice of some request's own hash chain, so a node stands for a run of blocks
//! that no known request divides. Each node lists the workers that hold it: how many bookings
//! *pin* it there, and how many of its blocks the worker has *computed*, which stay cached when
//! the pins are gone until the [`shadow`](crate::shadow) evicts them.
//!
//! A sequence hash identifies its whole prefix, so one flat map from the first hash of an edge
//! to its node replaces a child table per node, and the point where a prompt leaves an edge is
//! found by bisection. Every operation costs the number of branchings on a path, not of blocks.
//!
//! Along a path, from the root down, pins never rise, and a worker that has computed blocks of a
//! node has computed all nodes above it whole. All that follows relies on this.
//!
//! Edges share the chains they were made from, so most changes copy nothing. Where a small
//! remainder would keep a long chain alive it gets a copy of its own, of bounded length: what
//! the tree occupies follows from the blocks that are held, not from the prompts they came in.

use std::collections::HashMap;
use std::hash::BuildHasherDefault;
use std::mem;
use std::sync::Arc;

use slab::Slab;
use smallvec::SmallVec;

use crate::sequence::{AlreadyHashed, SequenceHash};

mod eviction;
mod outcome;
mod progress;

use progress::Progress;

pub(crate) use outcome::{Evicted, Pinned, Revived, Unpinned};

/// A request's hashes, shared between its booking and the edges made from it.
pub(crate) type Chain = Arc<[SequenceHash]>;

/// Index of a worker in the router's tables.
pub(crate) type Slot = u32;

pub(crate) type NodeId = u32;

/// The most hashes that are copied at once, under the router's lock: 8 KiB.
const MOST_COPIED: u32 = 1024;
/// How many times as long as its edge a node's chain may be, and how long it may always be.
const CHAIN_PER_EDGE: usize = 4;
const SHORT_CHAIN: usize = 64;

/// No node: the parent of the first edge of a path, or the path of a prompt without full blocks.
pub(crate) const NO_NODE: NodeId = u32::MAX;

/// How deep a prompt reaches on one worker, in leading blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Depth {
    /// Blocks the worker has computed and, as far as is known, will still cache when it comes to
    /// the prompt.
    pub cached: u32,
    /// Blocks pinned by running requests.
    pub active: u32,
}

impl Depth {
    /// Blocks that need not be computed again: an active block is cached by the time a request
    /// queued behind it runs.
    #[must_use]
    pub fn overlap(self) -> u32 {
        self.cached.max(self.active)
    }
}

/// Where a chain leaves the tree.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Match {
    /// The last node reached, or [`NO_NODE`].
    node: NodeId,
    /// Blocks of that node's edge that matched; at least one.
    within: u32,
    /// Blocks matched from the root.
    blocks: u32,
    /// The largest overlap of any worker.
    pub(crate) best_overlap: u32,
}

#[derive(Clone, Copy, Debug)]
struct Hold {
    worker: Slot,
    /// Bookings on the worker whose path includes the node.
    pins: u32,
    /// Leading blocks of the edge that the worker has computed and still caches.
    computed: u32,
    /// Which freeing unpinned the node; while it is pinned, which booking did that first.
    stamp: u64,
    /// What lies below is another node to the worker's engine, if that evicts whole nodes.
    ends: bool,
}

#[derive(Debug)]
struct Node {
    /// The hashes of a request through this node, from its block `offset` to `end` or further.
    chain: Chain,
    offset: u32,
    /// The edge's blocks, as counted from the root.
    start: u32,
    end: u32,
    parent: NodeId,
    children: u32,
    /// Exclusive or of all children's ids: the id itself when there is one child, which is all
    /// that merging needs to know.
    children_xor: NodeId,
    /// Sorted by worker. Most nodes are held by one.
    holds: SmallVec<[Hold; 1]>,
}

impl Node {
    fn len(&self) -> u32 {
        self.end - self.start
    }

    fn edge(&self) -> &[SequenceHash] {
        &self.chain[(self.start - self.offset) as usize..(self.end - self.offset) as usize]
    }

    fn first_hash(&self) -> SequenceHash {
        self.chain[(self.start - self.offset) as usize]
    }

    fn hold_index(&self, worker: Slot) -> Result<usize, usize> {
        self.holds.binary_search_by_key(&worker, |hold| hold.worker)
    }

    fn hold_mut(&mut self, worker: Slot) -> Option<&mut Hold> {
        let index = self.hold_index(worker).ok()?;
        self.holds.get_mut(index)
    }

    /// The worker's hold if `freed_by` is what last unpinned it.
    fn hold_freed_by(&mut self, worker: Slot, freed_by: u64) -> Option<&mut Hold> {
        self.hold_mut(worker)
            .filter(|hold| hold.pins == 0 && hold.stamp == freed_by)
    }

    fn remove_hold(&mut self, worker: Slot) {
        if let Ok(index) = self.hold_index(worker) {
            self.holds.remove(index);
        }
    }

    /// Whether every worker treats this node and its only child alike, so that the two can be
    /// one. A booking or an eviction that ends between them shows as a difference.
    fn same_holds(&self, child: &Node) -> bool {
        self.holds.len() == child.holds.len()
            && self.holds.iter().zip(&child.holds).all(|(upper, lower)| {
                upper.worker == lower.worker
                    && upper.pins == lower.pins
                    && (upper.pins > 0 || upper.stamp == lower.stamp)
                    && (upper.computed == self.len() || lower.computed == 0)
                    && !upper.ends
            })
    }
}

#[derive(Debug, Default)]
pub(crate) struct PrefixTree {
    nodes: Slab<Node>,
    by_first_hash: HashMap<SequenceHash, NodeId, BuildHasherDefault<AlreadyHashed>>,
    /// By slot, as far as anything is known.
    progress: Vec<Progress>,
    /// Chains that lost a node: possibly the last reference to a long allocation, so the owner
    /// of the lock takes them and drops them outside of it.
    pub(crate) garbage: SmallVec<[Chain; 4]>,
}

impl PrefixTree {
    /// Finds how deep `chain` reaches on every worker. `depths` is indexed by slot and must be
    /// zero for workers that hold nothing.
    pub(crate) fn descend(&self, chain: &[SequenceHash], depths: &mut [Depth]) -> Match {
        let mut best_overlap = 0;
        let reached = self.walk(chain, |node, within| {
            for hold in &node.holds {
                let Some(depth) = depths.get_mut(hold.worker as usize) else {
                    continue;
                };
                let progress = self.progress(hold.worker);
                if hold.computed > 0 && (hold.pins > 0 || hold.stamp > progress.told) {
                    depth.cached = node.start + hold.computed.min(within);
                }
                let is_computed = hold.computed == node.len();
                if hold.pins > 0 && (is_computed || hold.stamp <= progress.begun) {
                    depth.active = node.start + within;
                }
                best_overlap = best_overlap.max(depth.overlap());
            }
        });
        Match {
            best_overlap,
            ..reached
        }
    }

    /// Finds how deep every worker still caches `chain` by the shadow's account, whoever tells.
    pub(crate) fn descend_shadows(&self, chain: &[SequenceHash], depths: &mut [Depth]) {
        self.walk(chain, |node, within| {
            for hold in node.holds.iter().filter(|hold| hold.computed > 0) {
                if let Some(depth) = depths.get_mut(hold.worker as usize) {
                    depth.cached = node.start + hold.computed.min(within);
                }
            }
        });
    }

    /// Visits every node on the path of `chain`, and tells how many blocks of its edge match.
    fn walk(&self, chain: &[SequenceHash], mut visit: impl FnMut(&Node, u32)) -> Match {
        let mut reached = Match {
            node: NO_NODE,
            within: 0,
            blocks: 0,
            best_overlap: 0,
        };
        while let Some(first) = chain.get(reached.blocks as usize)
            && let Some(&id) = self.by_first_hash.get(first)
        {
            let node = &self.nodes[id as usize];
            if node.start != reached.blocks {
                // Two prefixes of different length share a 64-bit hash. Treat it as unknown.
                break;
            }
            let rest = &chain[reached.blocks as usize..];
            let within = common_prefix(rest, node.edge());
            visit(node, within);
            reached.node = id;
            reached.within = within;
            reached.blocks = node.start + within;
            if within < node.len() {
                break;
            }
        }
        reached
    }

    /// Pins the whole of `chain` on `worker` for the booking `serial`. `at` is where
    /// [`descend`](Self::descend) left it, with no change to the tree since.
    pub(crate) fn pin(&mut self, at: Match, chain: &Chain, worker: Slot, serial: u64) -> Pinned {
        let mut node = at.node;
        if node != NO_NODE && at.within < self.nodes[node as usize].len() {
            node = self.split(node, at.within);
        }
        if let Some(first) = chain.get(at.blocks as usize)
            // Taken already only by a collision of 64-bit hashes: then the rest stays unshared.
            && !self.by_first_hash.contains_key(first)
        {
            node = self.add_leaf(chain, at.blocks, node);
        }

        let mut pinned = Pinned {
            node,
            path: self.nodes.get(node as usize).map_or(0, |node| node.end),
            held: 0,
            blocks: 0,
            revived: SmallVec::new(),
        };
        let mut ancestor = node;
        while ancestor != NO_NODE {
            let node = &mut self.nodes[ancestor as usize];
            let (start, length) = (node.start, node.len());
            match node.hold_index(worker) {
                Ok(index) => {
                    let hold = &mut node.holds[index];
                    let held = match hold.pins {
                        0 => hold.computed,
                        _ => length,
                    };
                    pinned.held = pinned.held.max(start + held);
                    if hold.pins == 0 {
                        pinned.blocks += length;
                        pinned.revive(start, hold.computed, hold.stamp);
                        hold.stamp = serial;
                    }
                    hold.pins += 1;
                }
                Err(index) => {
                    pinned.blocks += length;
                    node.holds.insert(
                        index,
                        Hold {
                            worker,
                            pins: 1,
                            computed: 0,
                            stamp: serial,
                            ends: false,
                        },
                    );
                }
            }
            ancestor = node.parent;
        }
        pinned
    }

    /// Records that `worker` has computed every block up to the end of `node`, which it pins.
    pub(crate) fn mark_computed(&mut self, node: NodeId, worker: Slot) {
        let mut id = node;
        while id != NO_NODE {
            let node = &mut self.nodes[id as usize];
            let length = node.len();
            match node.hold_mut(worker) {
                Some(hold) if hold.computed < length => hold.computed = length,
                // What is computed is computed all the way up.
                _ => return,
            }
            id = node.parent;
        }
    }

    /// Whether all blocks up to the end of `node` are still cached on `worker`, which pins it.
    pub(crate) fn is_computed(&self, node: NodeId, worker: Slot) -> bool {
        self.nodes.get(node as usize).is_none_or(|node| {
            let hold = node.hold_index(worker).map(|index| node.holds[index]);
            hold.is_ok_and(|hold| hold.computed == node.len())
        })
    }

    /// How many bookings on `worker` pin the first `depth` blocks of the path to `node`.
    pub(crate) fn pins_at(&self, node: NodeId, worker: Slot, depth: u32) -> u32 {
        let path = std::iter::successors(self.nodes.get(node as usize), |node| {
            self.nodes.get(node.parent as usize)
        });
        let last = path.take_while(|node| node.end >= depth).last();
        let hold = last.and_then(|node| Some(node.holds[node.hold_index(worker).ok()?]));
        hold.map_or(0, |hold| hold.pins)
    }

    /// Takes back one [`pin`](Self::pin). Blocks computed meanwhile stay cached, stamped with
    /// `freed_by`; the others are gone.
    pub(crate) fn unpin(&mut self, node: NodeId, worker: Slot, freed_by: u64) -> Unpinned {
        let mut unpinned = Unpinned {
            blocks: 0,
            cached: 0,
            deepest: NO_NODE,
        };
        let mut id = node;
        while id != NO_NODE {
            let node = &mut self.nodes[id as usize];
            let (length, parent) = (node.len(), node.parent);
            let Some(hold) = node.hold_mut(worker) else {
                debug_assert!(false, "a pinned node has a hold");
                break;
            };
            debug_assert!(hold.pins > 0, "unpinned more often than pinned");
            hold.pins -= 1;
            if hold.pins == 0 {
                unpinned.blocks += length;
                unpinned.cached += hold.computed;
                hold.stamp = freed_by;
                if hold.computed == 0 {
                    node.remove_hold(worker);
                } else if unpinned.deepest == NO_NODE {
                    unpinned.deepest = id;
                }
            }
            id = parent;
        }
        self.tidy_path(node);
        self.shorten(node);
        unpinned
    }

    /// Forgets all that `worker` holds. Visits every node: for when a worker leaves.
    pub(crate) fn forget_worker(&mut self, worker: Slot) {
        self.forget_progress(worker);
        self.retain_holds(worker, |_| false);
    }

    /// Forgets what `worker` has computed, but not what is pinned there. Visits every node: for
    /// when a worker has lost its cache.
    pub(crate) fn forget_computed(&mut self, worker: Slot) {
        self.retain_holds(worker, |hold| {
            hold.computed = 0;
            hold.pins > 0
        });
    }

    /// Forgets what freeings before `stamp` left cached on `worker`. Visits every node.
    pub(crate) fn forget_freed_before(&mut self, worker: Slot, stamp: u64) {
        // A node is pinned, or was freed last, no earlier than those below it: what stays is
        // closed under prefixes.
        self.retain_holds(worker, |hold| hold.pins > 0 || hold.stamp >= stamp);
    }

    fn retain_holds(&mut self, worker: Slot, mut keep: impl FnMut(&mut Hold) -> bool) {
        let ids: Vec<NodeId> = self.nodes.iter().map(|(id, _)| id as NodeId).collect();
        for &id in &ids {
            let node = &mut self.nodes[id as usize];
            if node.hold_mut(worker).is_some_and(|hold| !keep(hold)) {
                node.remove_hold(worker);
            }
        }
        for id in ids {
            self.tidy(id);
        }
    }

    /// Number of edges: what the tree's memory is proportional to.
    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Cuts an edge after `keep` blocks. The lower part keeps its id, because bookings that end
    /// with the edge remember it; returns the new upper part.
    fn split(&mut self, lower_id: NodeId, keep: u32) -> NodeId {
        let lower = &mut self.nodes[lower_id as usize];
        let cut = lower.start + keep;
        let mut upper = Node {
            chain: Arc::clone(&lower.chain),
            offset: lower.offset,
            start: lower.start,
            end: cut,
            parent: lower.parent,
            children: 1,
            children_xor: lower_id,
            holds: lower.holds.clone(),
        };
        for hold in &mut upper.holds {
            hold.computed = hold.computed.min(keep);
            hold.ends = false;
        }
        for hold in &mut lower.holds {
            // A hold with nothing left stays: the shadow's queue finds the upper part through it.
            hold.computed = hold.computed.saturating_sub(keep);
        }
        lower.start = cut;
        let (upper_hash, lower_hash) = (upper.first_hash(), lower.first_hash());
        let parent = upper.parent;
        let upper_id = self.nodes.insert(upper) as NodeId;
        self.nodes[lower_id as usize].parent = upper_id;
        self.by_first_hash.insert(upper_hash, upper_id);
        self.by_first_hash.insert(lower_hash, lower_id);
        self.replace_child(parent, lower_id, upper_id);
        upper_id
    }

    fn add_leaf(&mut self, chain: &Chain, start: u32, parent: NodeId) -> NodeId {
        let leaf = self.nodes.insert(Node {
            chain: Arc::clone(chain),
            offset: 0,
            start,
            end: chain.len() as u32,
            parent,
            children: 0,
            children_xor: 0,
            holds: SmallVec::new(),
        }) as NodeId;
        self.by_first_hash.insert(chain[start as usize], leaf);
        if let Some(parent) = self.nodes.get_mut(parent as usize) {
            parent.children += 1;
            parent.children_xor ^= leaf;
        }
        leaf
    }

    /// Tidies every node from `leaf` to the root.
    fn tidy_path(&mut self, leaf: NodeId) {
        let mut id = leaf;
        while id != NO_NODE {
            id = self.tidy(id);
        }
    }

    /// Removes the node, and what that leaves empty above it, if nobody holds it; joins it with
    /// its only child if nothing tells the two apart any longer. Returns the next node above
    /// that was not looked at.
    fn tidy(&mut self, mut id: NodeId) -> NodeId {
        let mut lost_a_child = false;
        while let Some(node) = self.nodes.get(id as usize)
            && node.holds.is_empty()
            && node.children == 0
        {
            let parent = node.parent;
            let node = self.nodes.remove(id as usize);
            self.by_first_hash.remove(&node.first_hash());
            self.garbage.push(node.chain);
            if let Some(parent) = self.nodes.get_mut(parent as usize) {
                parent.children -= 1;
                parent.children_xor ^= id;
            }
            id = parent;
            lost_a_child = true;
        }
        let parent = self
            .nodes
            .get(id as usize)
            .map_or(NO_NODE, |node| node.parent);
        self.merge_with_only_child(id);
        if lost_a_child {
            self.shorten(id);
        }
        parent
    }

    fn merge_with_only_child(&mut self, upper_id: NodeId) {
        let Some(upper) = self.nodes.get(upper_id as usize) else {
            return;
        };
        let lower_id = upper.children_xor;
        if upper.children != 1 || !upper.same_holds(&self.nodes[lower_id as usize]) {
            return;
        }
        let lower = &self.nodes[lower_id as usize];
        // Compared, because after a collision of hashes it need not be the same path.
        let covered = lower.offset <= upper.start
            && lower.chain[(upper.start - lower.offset) as usize] == upper.first_hash();
        if !covered && upper.len() + lower.len() > MOST_COPIED {
            return;
        }
        let upper = self.nodes.remove(upper_id as usize);
        let lower = &mut self.nodes[lower_id as usize];
        self.by_first_hash.remove(&lower.first_hash());
        if !covered {
            let joined = [upper.edge(), lower.edge()].concat().into();
            self.garbage.push(mem::replace(&mut lower.chain, joined));
            lower.offset = upper.start;
        }
        for (hold, above) in lower.holds.iter_mut().zip(&upper.holds) {
            hold.computed += above.computed;
        }
        lower.start = upper.start;
        lower.parent = upper.parent;
        self.by_first_hash.insert(upper.first_hash(), lower_id);
        self.replace_child(upper.parent, upper_id, lower_id);
        self.garbage.push(upper.chain);
    }

    /// Cuts off the end of a leaf that nobody holds any longer, and lets go of a chain that has
    /// become much longer than the edge.
    fn shorten(&mut self, id: NodeId) {
        let Some(node) = self.nodes.get_mut(id as usize) else {
            return;
        };
        if node.children == 0 && node.holds.iter().all(|hold| hold.pins == 0) {
            let held = node.holds.iter().map(|hold| hold.computed).max();
            node.end = node.start + held.unwrap_or(0).max(1);
        }
        let may_be = SHORT_CHAIN.max(CHAIN_PER_EDGE * node.len() as usize);
        if node.chain.len() > may_be && node.len() <= MOST_COPIED {
            let own = Arc::from(node.edge());
            self.garbage.push(mem::replace(&mut node.chain, own));
            node.offset = node.start;
        }
    }

    fn replace_child(&mut self, parent: NodeId, old: NodeId, new: NodeId) {
        if let Some(parent) = self.nodes.get_mut(parent as usize) {
            parent.children_xor ^= old ^ new;
        }
    }
}

/// Length of the common prefix of two chains that agree in their first hash. Equal at `i` means
/// equal before `i`, so bisection finds it.
fn common_prefix(a: &[SequenceHash], b: &[SequenceHash]) -> u32 {
    let shorter = a.len().min(b.len());
    debug_assert!(shorter > 0 && a[0] == b[0]);
    if a[shorter - 1] == b[shorter - 1] {
        return shorter as u32;
    }
    let (mut equal, mut different) = (0, shorter - 1);
    while different - equal > 1 {
        let middle = equal.midpoint(different);
        if a[middle] == b[middle] {
            equal = middle;
        } else {
            different = middle;
        }
    }
    different as u32
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
