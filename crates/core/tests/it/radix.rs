//! What is predicted of a worker that evicts as SGLang does, against a model of SGLang's cache
//! that does, node by node and page by page, what its source says.

#![allow(clippy::unwrap_used)]

use std::num::NonZeroU32;
use std::time::Duration;

use foresee_core::Eviction;
use foresee_core::booking::Booking;
use foresee_core::fleet::{WorkerId, WorkerSpec};
use foresee_core::router::{Request, Router, RouterConfig};
use foresee_core::sequence::Sequence;
use proptest::prelude::*;

const PAGE: usize = 4;
const PAGES: usize = 24;
const NOW: Duration = Duration::ZERO;

/// A node of the radix tree; the root is the first.
#[derive(Clone)]
struct Node {
    parent: usize,
    /// Whole pages.
    tokens: Vec<u32>,
    /// Running requests on this path.
    locks: usize,
    used_at: u64,
    evicted: bool,
}

/// SGLang's cache and its pool of pages.
#[derive(Clone)]
struct Engine {
    nodes: Vec<Node>,
    free: usize,
    clock: u64,
}

/// A request that the engine runs.
struct Running {
    /// Prompt and output.
    tokens: Vec<u32>,
    prompt: usize,
    /// Those of them whose keys and values are stored.
    stored: usize,
    /// Pages that belong to the tree, and where the path of them ends.
    shared: usize,
    node: usize,
}

impl Engine {
    fn new() -> Self {
        let root = Node {
            parent: 0,
            tokens: Vec::new(),
            locks: 1,
            used_at: 0,
            evicted: false,
        };
        Self {
            nodes: vec![root],
            free: PAGES,
            clock: 0,
        }
    }

    fn children(&self, of: usize) -> impl Iterator<Item = usize> {
        let is_child = move |&it: &usize| self.nodes[it].parent == of && !self.nodes[it].evicted;
        (1..self.nodes.len()).filter(is_child)
    }

    fn touch(&mut self, node: usize) {
        self.clock += 1;
        self.nodes[node].used_at = self.clock;
    }

    /// The child that continues with `tokens`, and for how many of them.
    fn step(&self, node: usize, tokens: &[u32]) -> Option<(usize, usize)> {
        let shared = |child: usize| {
            let theirs = self.nodes[child].tokens.chunks(PAGE);
            let pages = theirs.zip(tokens.chunks_exact(PAGE));
            pages.take_while(|(a, b)| a == b).count() * PAGE
        };
        let mut steps = self.children(node).map(|child| (child, shared(child)));
        steps.find(|&(_, shared)| shared > 0)
    }

    /// Cuts a node; the lower part counts as used now.
    fn split(&mut self, node: usize, keep: usize) -> usize {
        let upper = Node {
            tokens: self.nodes[node].tokens[..keep].to_vec(),
            ..Node {
                tokens: Vec::new(),
                ..self.nodes[node]
            }
        };
        self.nodes.push(upper);
        let upper = self.nodes.len() - 1;
        self.touch(upper);
        self.nodes[node].tokens.drain(..keep);
        self.nodes[node].parent = upper;
        self.touch(node);
        upper
    }

    /// Leaves the tree where `tokens` do. Returns the node reached, and how many were there.
    fn descend(&mut self, tokens: &[u32]) -> (usize, usize) {
        let (mut node, mut matched) = (0, 0);
        while let Some((child, shared)) = self.step(node, &tokens[matched..]) {
            matched += shared;
            node = match shared < self.nodes[child].tokens.len() {
                true => self.split(child, shared),
                false => child,
            };
            self.touch(node);
        }
        (node, matched)
    }

    /// Pages of `tokens` in the tree.
    fn cached(&self, tokens: &[u32]) -> usize {
        let (mut node, mut matched) = (0, 0);
        while let Some((child, shared)) = self.step(node, &tokens[matched..]) {
            matched += shared;
            if shared < self.nodes[child].tokens.len() {
                break;
            }
            node = child;
        }
        matched / PAGE
    }

    /// Puts whole pages into the tree. Returns the node where they end, and how many pages were
    /// there.
    fn insert(&mut self, tokens: &[u32]) -> (usize, usize) {
        let tokens = &tokens[..tokens.len() / PAGE * PAGE];
        let (mut node, matched) = self.descend(tokens);
        if matched < tokens.len() {
            self.nodes.push(Node {
                parent: node,
                tokens: tokens[matched..].to_vec(),
                locks: 0,
                used_at: 0,
                evicted: false,
            });
            node = self.nodes.len() - 1;
            self.touch(node);
        }
        (node, matched / PAGE)
    }

    fn lock(&mut self, mut node: usize, change: isize) {
        while node != 0 {
            let locks = self.nodes[node].locks.checked_add_signed(change);
            self.nodes[node].locks = locks.unwrap();
            node = self.nodes[node].parent;
        }
    }

    fn evictable(&self) -> usize {
        let idle = self.nodes.iter().filter(|it| it.locks == 0 && !it.evicted);
        idle.map(|it| it.tokens.len() / PAGE).sum()
    }

    /// Evicts leaves until so many pages are free.
    fn evict_until_free(&mut self, pages: usize) {
        while self.free < pages {
            let leaves = (1..self.nodes.len()).filter(|&it| {
                let node = &self.nodes[it];
                node.locks == 0 && !node.evicted && self.children(it).next().is_none()
            });
            let oldest = leaves.min_by_key(|&it| self.nodes[it].used_at).unwrap();
            self.nodes[oldest].evicted = true;
            self.free += self.nodes[oldest].tokens.len() / PAGE;
        }
    }

    /// Takes a request in, if there is room for it and for the next token of `others` as well. A
    /// prompt that is cached whole takes a page for a moment only, which the router is one page
    /// too careful about if others run: that is left out.
    fn start(&mut self, tokens: &[u32], others: usize) -> Option<Running> {
        let reusable = (tokens.len() - 1) / PAGE * PAGE;
        let pages = tokens.len().div_ceil(PAGE) - self.cached(&tokens[..reusable]);
        let path_at_most = self.cached(tokens);
        if pages + 2 * (others + 1) + path_at_most > self.free + self.evictable() {
            return None;
        }
        let is_cached_whole = path_at_most * PAGE == tokens.len();
        if is_cached_whole && others > 0 && self.free < pages + others + 2 {
            return None;
        }
        let before = self.clone();
        let (node, matched) = self.descend(&tokens[..reusable]);
        self.lock(node, 1);
        self.evict_until_free(pages + 1);
        if is_cached_whole && self.cached(tokens) < path_at_most {
            // It evicts the last page of the prompt just before it computes that again. The router,
            // which pins it, does not foresee that.
            *self = before;
            return None;
        }
        self.free -= pages;
        Some(Running {
            tokens: tokens.to_vec(),
            prompt: tokens.len(),
            stored: tokens.len(),
            shared: matched / PAGE,
            node,
        })
    }

    /// Puts what the request has stored into the tree. Copies of what is there are freed.
    fn publish(&mut self, request: &mut Running) {
        let (node, matched) = self.insert(&request.tokens[..request.stored]);
        if request.stored > request.prompt {
            self.insert(&request.tokens[..request.prompt]);
        }
        self.free += matched - request.shared;
        self.lock(node, 1);
        self.lock(request.node, -1);
        request.shared = request.stored / PAGE;
        request.node = node;
    }

    fn finish(&mut self, mut request: Running) {
        self.publish(&mut request);
        self.lock(request.node, -1);
        self.free += request.stored.div_ceil(PAGE) - request.shared;
    }
}

/// A router that knows that engine, and another whose requests divide the same prompts.
struct Side {
    router: Router,
    radix: WorkerId,
    other: WorkerId,
    engine: Engine,
    running: Vec<(Running, Booking, bool)>,
    /// Token sequences that the engine may have cached, as far as the router can know.
    known: Vec<Vec<u32>>,
    secrets: u32,
}

impl Side {
    fn new() -> Self {
        let router = Router::new(RouterConfig {
            block_size: NonZeroU32::new(PAGE as u32).unwrap(),
            ..RouterConfig::default()
        });
        let router = router.unwrap();
        let [radix, other] = [Eviction::Radix, Eviction::Queue].map(|eviction| {
            let id = router.add_worker(WorkerSpec {
                name: format!("{eviction:?}"),
                capacity_blocks: Some(PAGES as u32),
                prefix_caching: true,
                eviction,
                ..WorkerSpec::default()
            });
            let id = id.unwrap();
            router.set_healthy(id, true);
            id
        });
        Self {
            router,
            radix,
            other,
            engine: Engine::new(),
            running: Vec::new(),
            known: vec![Vec::new()],
            secrets: 1000,
        }
    }

    fn book(&self, tokens: &[u32], not: WorkerId) -> Booking {
        let sequence = sequence(tokens);
        let request = Request {
            excluded: &[not],
            ..Request::new(&sequence)
        };
        self.router.route(&request, NOW).unwrap()
    }

    fn apply(&mut self, action: Action) {
        match action {
            Action::Start {
                like,
                keep,
                fresh,
                is_told,
            } => {
                let model = like.get(&self.known);
                let keep = keep.index(model.len() + 1);
                let tokens = [&model[..keep], &fresh].concat();
                let Some(mut request) = self.engine.start(&tokens, self.running.len()) else {
                    return;
                };
                let mut booking = self.book(&tokens, self.other);
                self.engine.publish(&mut request);
                booking.tokens(1, NOW);
                self.known.push(tokens);
                self.running.push((request, booking, is_told));
                self.answer();
                self.decode();
            }
            Action::Decode => self.decode(),
            Action::Finish(which) => {
                if !self.running.is_empty() {
                    self.finish(which.index(self.running.len()));
                }
            }
            Action::Elsewhere { like, keep, fresh } => {
                let model = like.get(&self.known);
                let keep = keep.index(model.len() + 1);
                let tokens = [&model[..keep], &fresh].concat();
                self.book(&tokens, self.radix).finish(NOW);
            }
        }
    }

    fn finish(&mut self, which: usize) {
        let (request, mut booking, is_told) = self.running.swap_remove(which);
        let stored = request.tokens[..request.stored].to_vec();
        if is_told {
            booking.answered(sequence(&stored));
            self.known.push(stored);
        }
        self.engine.finish(request);
        booking.finish(NOW);
    }

    /// The next token of each request that has stored all of its own.
    fn answer(&mut self) {
        for (request, _, is_told) in &mut self.running {
            if request.tokens.len() > request.stored {
                continue;
            }
            self.secrets += 1;
            let sum: u32 = request.tokens.iter().sum();
            let token = if *is_told { sum % 2 } else { self.secrets };
            request.tokens.push(token);
        }
    }

    /// A token for every request that runs.
    fn decode(&mut self) {
        let count = self.running.len();
        if count > self.engine.free + self.engine.evictable() {
            // It would interrupt one, to start it again later.
            return self.finish(0);
        }
        self.engine.evict_until_free(count);
        for (request, booking, _) in &mut self.running {
            self.engine.free -= usize::from(request.stored % PAGE == 0);
            request.stored += 1;
            booking.tokens(1, NOW);
        }
        self.answer();
    }

    fn check(&self) {
        for tokens in &self.known {
            if tokens.is_empty() {
                continue;
            }
            let sequence = sequence(tokens);
            let explained = self.router.explain(&Request::new(&sequence), NOW).unwrap();
            let mut candidates = explained.candidates.iter();
            let ours = candidates.find(|it| it.id == self.radix).unwrap();
            let theirs = self.engine.cached(tokens);
            assert_eq!(ours.depth.cached as usize, theirs, "{tokens:?}");
        }
    }
}

/// What is begun together shares nothing: none of it is computed yet.
#[test]
fn a_prompt_finds_what_others_began_before_it() {
    let side = Side::new();
    let predicted = |booking: &Booking| booking.decision().cost.overlap_blocks;
    let [alike, others] = [1, 2].map(|first| [vec![first; 3 * PAGE], vec![9; 1]].concat());
    // Nothing else is there, so it is begun at once.
    let mut first = side.book(&alike, side.other);
    assert_eq!(predicted(&side.book(&alike, side.other)), 3);
    // These will be begun together when the step is done.
    let _waits = side.book(&others, side.other);
    let with_it = side.book(&others, side.other);
    assert_eq!(predicted(&with_it), 0);
    first.tokens(1, Duration::from_millis(10));
    assert_eq!(predicted(&side.book(&others, side.other)), 3);
}

fn sequence(tokens: &[u32]) -> Sequence {
    Sequence::from_tokens(tokens, NonZeroU32::new(PAGE as u32).unwrap(), 0)
}

#[derive(Clone, Debug)]
enum Action {
    /// A request whose prompt begins as a former one does. If the router `is_told` the answer, it
    /// knows its tokens.
    Start {
        like: prop::sample::Index,
        keep: prop::sample::Index,
        fresh: Vec<u32>,
        is_told: bool,
    },
    Decode,
    Finish(prop::sample::Index),
    /// Such a prompt, on the other worker.
    Elsewhere {
        like: prop::sample::Index,
        keep: prop::sample::Index,
        fresh: Vec<u32>,
    },
}

fn action() -> impl Strategy<Value = Action> {
    let index = any::<prop::sample::Index>;
    let fresh = prop::collection::vec(0..2_u32, 1..16);
    let start = (index(), index(), fresh.clone(), any::<bool>());
    let elsewhere = (index(), index(), fresh);
    prop_oneof![
        3 => start.prop_map(|(like, keep, fresh, is_told)| Action::Start { like, keep, fresh, is_told }),
        6 => Just(Action::Decode),
        3 => index().prop_map(Action::Finish),
        1 => elsewhere.prop_map(|(like, keep, fresh)| Action::Elsewhere { like, keep, fresh }),
    ]
}

proptest! {
    #[test]
    fn a_radix_cache_is_known_without_events(actions in prop::collection::vec(action(), 1..120)) {
        let mut side = Side::new();
        for action in actions {
            side.apply(action);
            side.check();
        }
    }
}
