//! What knowing every worker's cache costs: `cargo bench -p foresee-core --bench cache`.
//!
//! Each of 64 workers caches 27,000 blocks: ten system prompts of 219 blocks, which all cache, and
//! conversations of 40 blocks that go on from one of them. One conversation in four is cached by
//! eight workers, the others by one. Events replace the oldest conversations by new ones. Names
//! and tokens of blocks are made on the way, within what is measured.

#![allow(clippy::unwrap_used, missing_docs)]

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use cap::Cap;
use divan::Bencher;
use divan::counter::ItemsCount;
use foresee_core::Depth;
use foresee_core::cache::{CacheIndex, CacheView, Changes, Paths, StoredBlocks};
use foresee_core::fleet::{WorkerId, WorkerSpec};
use foresee_core::router::{Request, Router, RouterConfig};
use foresee_core::sequence::Sequence;
use mimalloc::MiMalloc;

#[global_allocator]
static ALLOCATOR: Cap<MiMalloc> = Cap::new(MiMalloc, usize::MAX);

fn main() {
    // What is no time per operation comes first, unless something else is asked for by name.
    if std::env::args().skip(1).all(|it| it == "--bench") {
        print_memory("one conversation in four is cached by eight workers", 4);
        print_memory("every conversation is cached by one worker", u64::MAX);
        print_decisions_beside_a_writer();
    }
    divan::main();
}

const WORKERS: u64 = 64;
const BLOCK: usize = 16;
const SYSTEM_PROMPTS: u64 = 10;
const SYSTEM_BLOCKS: usize = 219;
const CONVERSATION: usize = 40;
const CAPACITY: usize = 27_000;
const CONVERSATIONS: u64 =
    ((CAPACITY - SYSTEM_PROMPTS as usize * SYSTEM_BLOCKS) / CONVERSATION) as u64;
const SALT: u64 = 7;

/// A run of blocks by what it is a part of: its name, and its first block's number there.
#[derive(Clone, Copy)]
struct Run {
    of: u64,
    from: usize,
    len: usize,
}

/// Spreads a number over 64 bits, one to one.
fn mix(number: u64) -> u64 {
    let product = (number + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (product ^ product >> 32).wrapping_mul(0xD6E8_FEB8_6659_FD93)
}

fn block_name(of: u64, block: usize) -> u64 {
    mix(of << 10 | block as u64)
}

fn write_tokens(run: Run, tokens: &mut [u32]) {
    for (block, tokens) in tokens.chunks_exact_mut(BLOCK).enumerate() {
        tokens[0] = run.of as u32;
        tokens[1] = (run.of >> 32) as u32;
        tokens[2] = (run.from + block) as u32;
    }
}

/// What tells a system prompt from a conversation.
const SYSTEM: u64 = 1 << 40;

fn system_of(conversation: u64) -> u64 {
    SYSTEM + conversation % SYSTEM_PROMPTS
}

/// An engine, and all that its router knows of it.
struct Engine {
    number: u64,
    view: CacheView,
    names: Vec<u64>,
    tokens: Vec<u32>,
    /// One conversation in so many is cached by others, too.
    private_per_shared: u64,
    /// Conversations are numbered by when they come. These are cached.
    conversations: std::ops::Range<u64>,
}

impl Engine {
    fn new(number: u64, private_per_shared: u64) -> Self {
        Self {
            number,
            view: CacheView::new(RouterConfig::default().block_size),
            names: Vec::with_capacity(1024),
            tokens: Vec::with_capacity(1024 * BLOCK),
            private_per_shared,
            conversations: 0..0,
        }
    }

    fn name_blocks(&mut self, run: Run) {
        self.names.clear();
        let blocks = run.from..run.from + run.len;
        self.names
            .extend(blocks.map(|block| block_name(run.of, block)));
    }

    fn store(&mut self, run: Run) -> Changes {
        self.name_blocks(run);
        self.tokens.resize(run.len * BLOCK, 0);
        write_tokens(run, &mut self.tokens);
        let is_system = run.of & SYSTEM != 0;
        let parent = match run.from.checked_sub(1) {
            Some(before) => Some(block_name(run.of, before)),
            None if is_system => None,
            None => Some(block_name(system_of(run.of), SYSTEM_BLOCKS - 1)),
        };
        self.view.store(&StoredBlocks {
            parent,
            hashes: &self.names,
            tokens: &self.tokens,
            block_size: BLOCK as u32,
            salt: SALT,
        })
    }

    fn remove(&mut self, run: Run) -> Changes {
        self.name_blocks(run);
        self.names.reverse();
        self.view.remove(&self.names)
    }

    /// What a conversation is, on this worker.
    fn identity(&self, conversation: u64) -> u64 {
        if conversation.is_multiple_of(self.private_per_shared) {
            1 << 39 | (self.number / 8) << 32 | conversation
        } else {
            self.number << 32 | conversation
        }
    }

    fn begin_conversation(&mut self, events_of: usize, tell: &mut impl FnMut(Changes)) {
        let of = self.identity(self.conversations.end);
        self.conversations.end += 1;
        for from in (0..CONVERSATION).step_by(events_of) {
            let len = events_of.min(CONVERSATION - from);
            tell(self.store(Run { of, from, len }));
        }
    }

    /// Evicts the oldest conversation, from its end.
    fn evict_conversation(&mut self, events_of: usize, tell: &mut impl FnMut(Changes)) {
        let of = self.identity(self.conversations.start);
        self.conversations.start += 1;
        for from in (0..CONVERSATION).step_by(events_of).rev() {
            let len = events_of.min(CONVERSATION - from);
            tell(self.remove(Run { of, from, len }));
        }
    }

    fn store_system_prompts(&mut self, tell: &mut impl FnMut(Changes)) {
        for of in SYSTEM..SYSTEM + SYSTEM_PROMPTS {
            let len = SYSTEM_BLOCKS;
            tell(self.store(Run { of, from: 0, len }));
        }
    }

    fn fill(&mut self, tell: &mut impl FnMut(Changes)) {
        self.store_system_prompts(tell);
        for _ in 0..CONVERSATIONS {
            self.begin_conversation(CONVERSATION, tell);
        }
    }

    /// Replaces one conversation by another, in events of so many blocks.
    fn replace_conversation(&mut self, events_of: usize, tell: &mut impl FnMut(Changes)) {
        self.evict_conversation(events_of, tell);
        self.begin_conversation(events_of, tell);
    }
}

/// Blocks that come or go when one conversation replaces another.
const REPLACED: usize = 2 * CONVERSATION;

fn router_of(workers: u64) -> (Router, Vec<WorkerId>) {
    let router = Router::new(RouterConfig::default()).unwrap();
    let add = |worker| {
        let spec = WorkerSpec {
            name: format!("w{worker}"),
            capacity_blocks: Some(CAPACITY as u32),
            prefix_caching: true,
            ..WorkerSpec::default()
        };
        let id = router.add_worker(spec).unwrap();
        router.set_healthy(id, true);
        router.follow_events(id, true);
        id
    };
    let ids = (0..workers).map(add).collect();
    (router, ids)
}

fn full_fleet() -> (Router, Vec<(WorkerId, Engine)>) {
    let (router, ids) = router_of(WORKERS);
    let engines = ids.into_iter().zip(0..).map(|(id, number)| {
        let mut engine = Engine::new(number, 4);
        engine.fill(&mut |changes| router.update_cache(id, &changes, Some(Duration::ZERO)));
        (id, engine)
    });
    let engines = engines.collect();
    (router, engines)
}

/// Everything, from the engine's event to the router's index.
#[divan::bench(args = [1, 40], sample_size = 1, sample_count = 20_000)]
fn events_applied(bencher: Bencher<'_, '_>, blocks_an_event: usize) {
    let (router, mut engines) = full_fleet();
    let mut turn = 0;
    bencher.counter(ItemsCount::new(REPLACED)).bench_local(|| {
        turn = (turn + 1) % engines.len();
        let (id, engine) = &mut engines[turn];
        engine.replace_conversation(blocks_an_event, &mut |changes| {
            router.update_cache(*id, &changes, Some(Duration::ZERO));
        });
    });
}

/// Of that, what one thread for each worker could do: hashing and following.
#[divan::bench(args = [1, 40], sample_size = 1, sample_count = 20_000)]
fn of_that_views(bencher: Bencher<'_, '_>, blocks_an_event: usize) {
    let mut engines: Vec<Engine> = (0..WORKERS).map(|it| Engine::new(it, 4)).collect();
    for engine in &mut engines {
        engine.fill(&mut drop);
    }
    let mut turn = 0;
    bencher.counter(ItemsCount::new(REPLACED)).bench_local(|| {
        turn = (turn + 1) % engines.len();
        engines[turn].replace_conversation(blocks_an_event, &mut drop);
    });
}

/// Of that, what happens under the router's lock.
#[divan::bench(args = [1, 40], sample_size = 1, sample_count = 20_000)]
fn of_that_the_index(bencher: Bencher<'_, '_>, blocks_an_event: usize) {
    let mut index = CacheIndex::default();
    let mut held = 0;
    let mut engines: Vec<Engine> = (0..WORKERS).map(|it| Engine::new(it, 4)).collect();
    for (engine, worker) in engines.iter_mut().zip(0..) {
        engine.fill(&mut |changes| index.update(worker, &changes, &mut held));
    }
    let mut turn = 0;
    bencher
        .counter(ItemsCount::new(REPLACED))
        .with_inputs(|| {
            turn = (turn + 1) % engines.len();
            let mut told = Vec::new();
            engines[turn].replace_conversation(blocks_an_event, &mut |it| told.push(it));
            (turn as u32, told)
        })
        .bench_local_refs(|(worker, told)| {
            for changes in told {
                index.update(*worker, changes, &mut held);
            }
        });
}

const PROMPTS: usize = 64;
const PROMPT_BLOCKS: usize = 438;

/// A prompt of 7,000 tokens, whose first half is a system prompt.
fn prompt(number: usize) -> Sequence {
    let of = SYSTEM + number as u64 % SYSTEM_PROMPTS;
    let mut tokens = vec![0; PROMPT_BLOCKS * BLOCK];
    let (system, own) = tokens.split_at_mut(SYSTEM_BLOCKS * BLOCK);
    let (from, len) = (0, SYSTEM_BLOCKS);
    write_tokens(Run { of, from, len }, system);
    own[0] = number as u32;
    Sequence::from_tokens(&tokens, RouterConfig::default().block_size, SALT)
}

/// An index of two million prefixes and some prompts, of which each worker holds what `depth`
/// says.
fn index_of_prompts(workers: usize, depth: impl Fn(usize) -> usize) -> (CacheIndex, Vec<Sequence>) {
    let mut index = CacheIndex::default();
    let mut held = 0;
    let prompts: Vec<Sequence> = (0..PROMPTS).map(prompt).collect();
    for worker in 0..workers {
        let others = 2_000_000 / workers as u64;
        let mut changes = Changes {
            stride: 1,
            ..Changes::default()
        };
        let others: Vec<u64> = (0..others)
            .map(|it| mix((worker as u64) << 32 | it))
            .collect();
        for conversation in others.chunks(CONVERSATION) {
            changes.added.push_behind(conversation, 0);
        }
        for prompt in &prompts {
            let held = &prompt.hashes()[..depth(worker)];
            changes.added.push_behind(held, 0);
        }
        index.update(worker as u32, &changes, &mut held);
    }
    (index, prompts)
}

fn look_up(bencher: Bencher<'_, '_>, workers: usize, depth: impl Fn(usize) -> usize) {
    let (index, prompts) = index_of_prompts(workers, &depth);
    let mut turn = 0;
    let mut depths = vec![Depth::default(); workers];
    index.descend(prompts[0].hashes(), &mut depths);
    for (worker, it) in depths.iter().enumerate() {
        assert_eq!(it.cached as usize, depth(worker));
    }
    bencher.counter(ItemsCount::new(1_u32)).bench_local(|| {
        turn = (turn + 1) % PROMPTS;
        depths.fill(Depth::default());
        index.descend(black_box(prompts[turn].hashes()), &mut depths)
    });
}

/// A prompt of 7,000 tokens that every worker holds whole.
#[divan::bench(args = [8, 64, 512], sample_size = 10, sample_count = 10_000)]
fn look_up_full_hit(bencher: Bencher<'_, '_>, workers: usize) {
    look_up(bencher, workers, |_| PROMPT_BLOCKS);
}

/// The workers hold eight different depths of it.
#[divan::bench(args = [8, 64, 512], sample_size = 10, sample_count = 10_000)]
fn look_up_eight_depths(bencher: Bencher<'_, '_>, workers: usize) {
    look_up(bencher, workers, |worker| 54 * (worker % 8 + 1));
}

/// Each holds another depth of it, as far as there are so many.
#[divan::bench(args = [8, 64, 512], sample_size = 10, sample_count = 10_000)]
fn look_up_every_depth(bencher: Bencher<'_, '_>, workers: usize) {
    look_up(bencher, workers, |worker| {
        1 + worker * (PROMPT_BLOCKS - 1) / (workers - 1)
    });
}

/// A worker that leaves: every prefix is visited, under the lock.
#[divan::bench(sample_size = 1, sample_count = 20)]
fn forgetting_a_worker(bencher: Bencher<'_, '_>) {
    let mut index = CacheIndex::default();
    let mut held = 0;
    for worker in 0..WORKERS {
        let mut engine = Engine::new(worker, 4);
        engine.fill(&mut |changes| index.update(worker as u32, &changes, &mut held));
    }
    let mut worker = 0;
    bencher.bench_local(|| {
        index.forget_worker(worker);
        worker += 1;
    });
}

/// Prints what a block cached by a worker takes, views and index together, as a fleet fills.
fn print_memory(what: &str, private_per_shared: u64) {
    let (router, ids) = router_of(WORKERS);
    let mut engines: Vec<Engine> = (0..WORKERS)
        .map(|it| Engine::new(it, private_per_shared))
        .collect();
    let empty = ALLOCATOR.allocated();
    let mut per_block = Vec::new();
    for conversation in 0..=CONVERSATIONS {
        for (engine, &id) in engines.iter_mut().zip(&ids) {
            let mut tell =
                |changes: Changes| router.update_cache(id, &changes, Some(Duration::ZERO));
            match conversation {
                0 => engine.store_system_prompts(&mut tell),
                _ => engine.begin_conversation(CONVERSATION, &mut tell),
            }
        }
        let blocks: usize = engines.iter().map(|it| it.view.len()).sum();
        per_block.push((ALLOCATOR.allocated() - empty) as f64 / blocks as f64);
    }
    let filled = per_block.last().unwrap();
    // From a fifth of the capacity on.
    let later = &per_block[per_block.len() / 8..];
    let least = later.iter().copied().fold(f64::INFINITY, f64::min);
    let most = later.iter().copied().fold(0.0, f64::max);
    let prefixes = router.cached_prefixes();
    println!(
        "bytes a (worker, block), {WORKERS} x {CAPACITY} blocks, {prefixes} prefixes ({what}):"
    );
    println!("    {filled:.1} when full; on the way from a fifth of it, {least:.1} to {most:.1}");

    for _ in 0..CONVERSATIONS {
        for (engine, &id) in engines.iter_mut().zip(&ids) {
            let mut tell =
                |changes: Changes| router.update_cache(id, &changes, Some(Duration::ZERO));
            engine.replace_conversation(CONVERSATION, &mut tell);
        }
    }
    let blocks: usize = engines.iter().map(|it| it.view.len()).sum();
    let replaced = (ALLOCATOR.allocated() - empty) as f64 / blocks as f64;
    let with_views = ALLOCATOR.allocated();
    for engine in &mut engines {
        engine.view = CacheView::new(RouterConfig::default().block_size);
    }
    let views = (with_views - ALLOCATOR.allocated()) as f64 / blocks as f64;
    let index = replaced - views;
    println!("    {replaced:.1} when all is replaced: views {views:.1}, index {index:.1}");
}

/// What an engine that begins anew, or is followed for the first time, makes of its whole cache.
fn tell_whole_cache(router: &Router, id: WorkerId, engine: &Engine) -> usize {
    let Changes { added, stride, .. } = engine.view.contents();
    let blocks = added.len() * 2;
    let gone = Changes {
        added: Paths::default(),
        removed: added.clone(),
        stride,
    };
    router.update_cache(id, &gone, Some(Duration::ZERO));
    let stored = Changes {
        added,
        removed: Paths::default(),
        stride,
    };
    router.update_cache(id, &stored, Some(Duration::ZERO));
    blocks
}

/// Prints how long decisions take on one thread while another applies events without a pause.
fn print_decisions_beside_a_writer() {
    type Write = fn(&Router, WorkerId, &mut Engine) -> usize;
    let writes: [(&str, Option<Write>); 4] = [
        ("alone", None),
        (
            "beside events of 1 block",
            Some(|router, id, engine| {
                engine.replace_conversation(1, &mut |it| {
                    router.update_cache(id, &it, Some(Duration::ZERO))
                });
                REPLACED
            }),
        ),
        (
            "beside events of 40 blocks",
            Some(|router, id, engine| {
                engine.replace_conversation(40, &mut |it| {
                    router.update_cache(id, &it, Some(Duration::ZERO))
                });
                REPLACED
            }),
        ),
        (
            "beside whole caches, told anew",
            Some(|router, id, engine| tell_whole_cache(router, id, engine)),
        ),
    ];
    let (router, mut engines) = full_fleet();
    println!("a decision, {WORKERS} workers, ISL 7000:");
    for (what, write) in writes {
        let is_over = AtomicBool::new(write.is_none());
        let written = AtomicU64::new(0);
        let began = Instant::now();
        let mut took = std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let mut turn = 0;
                while !is_over.load(Ordering::Relaxed) {
                    turn = (turn + 1) % engines.len();
                    let (id, engine) = &mut engines[turn];
                    let blocks = write.map_or(0, |write| write(&router, *id, engine));
                    written.fetch_add(blocks as u64, Ordering::Relaxed);
                }
            });
            let took = decide_for(&router, Duration::from_secs(4));
            is_over.store(true, Ordering::Relaxed);
            writer.join().unwrap();
            took
        });
        let rate = written.load(Ordering::Relaxed) as f64 / began.elapsed().as_secs_f64() / 1e6;
        took.sort_unstable();
        let at = |share: f64| took[((took.len() - 1) as f64 * share) as usize].as_nanos() as f64;
        println!(
            "    {what}: p50 {:.2} us, p99 {:.2}, p99.9 {:.1}, most {:.0}; {} decisions, {rate:.1} \
             million blocks written a second",
            at(0.5) / 1e3,
            at(0.99) / 1e3,
            at(0.999) / 1e3,
            at(1.0) / 1e3,
            took.len()
        );
    }
}

/// Decides every 20 microseconds, and tells how long each decision took.
fn decide_for(router: &Router, period: Duration) -> Vec<Duration> {
    let prompts: Vec<Sequence> = (0..PROMPTS).map(prompt).collect();
    let began = Instant::now();
    let mut took = Vec::with_capacity(1_000_000);
    let mut next = Duration::ZERO;
    for prompt in prompts.iter().cycle() {
        while began.elapsed() < next {
            std::hint::spin_loop();
        }
        let start = Instant::now();
        let now = start - began;
        let mut booking = router.route(&Request::new(prompt), now).unwrap();
        booking.tokens(1, now);
        drop(black_box(booking));
        took.push(start.elapsed());
        next = now + Duration::from_micros(20);
        if now > period {
            break;
        }
    }
    took
}
