//! Time and memory of the event index: `cargo bench -p foresee-core --bench cache`.
//!
//! Each of 64 workers caches 27,000 blocks: ten system prompts of 219 blocks, which all workers
//! cache, and conversations of 40 blocks that continue one of them. One conversation in four is
//! cached by eight workers, the others by one. Events replace the oldest conversations by new ones.
//! The measured time includes making the engine hashes and token ids of the blocks.

#![allow(clippy::unwrap_used, missing_docs)]

use std::alloc::System;
use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use cap::Cap;
use divan::Bencher;
use divan::counter::ItemsCount;
use foresee_core::PrefixMatch;
use foresee_core::event_index::{CacheDelta, CacheView, EventIndex, PrefixRuns, StoredBlocks};
use foresee_core::router::{CacheSource, Observed, Request, Router, RouterConfig};
use foresee_core::sequence::Sequence;
use foresee_core::workers::{WorkerId, WorkerSpec};

#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, usize::MAX);

fn main() {
    // Measurements that are not a time per operation run first, unless benchmarks are selected by
    // name.
    if std::env::args()
        .skip(1)
        .all(|argument| argument == "--bench")
    {
        print_memory("one conversation in four is cached by eight workers", 4);
        print_memory("every conversation is cached by one worker", u64::MAX);
        print_decisions_during_events();
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

/// Consecutive blocks of one content: a system prompt or a conversation.
#[derive(Clone, Copy)]
struct Run {
    content: u64,
    /// Index of the first block within the content.
    from: usize,
    len: usize,
}

/// Spreads a number over 64 bits, one to one.
fn mix(number: u64) -> u64 {
    let product = (number + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (product ^ product >> 32).wrapping_mul(0xD6E8_FEB8_6659_FD93)
}

fn engine_hash(content: u64, block: usize) -> u64 {
    mix(content << 10 | block as u64)
}

fn write_tokens(run: Run, tokens: &mut [u32]) {
    for (block, tokens) in tokens.chunks_exact_mut(BLOCK).enumerate() {
        tokens[0] = run.content as u32;
        tokens[1] = (run.content >> 32) as u32;
        tokens[2] = (run.from + block) as u32;
    }
}

/// Bit that distinguishes the numbers of system prompts from those of conversations.
const SYSTEM: u64 = 1 << 40;

fn system_of(conversation: u64) -> u64 {
    SYSTEM + conversation % SYSTEM_PROMPTS
}

/// An engine, and the view that follows its events.
struct Engine {
    number: u64,
    view: CacheView,
    /// Engine hashes of the latest event.
    hashes: Vec<u64>,
    /// Token ids of the latest event.
    tokens: Vec<u32>,
    /// One conversation in this many is cached by other workers too.
    shared_interval: u64,
    /// Cached conversations, numbered in the order in which they start.
    conversations: std::ops::Range<u64>,
}

impl Engine {
    fn new(number: u64, shared_interval: u64) -> Self {
        Self {
            number,
            view: CacheView::new(RouterConfig::default().block_size),
            hashes: Vec::with_capacity(1024),
            tokens: Vec::with_capacity(1024 * BLOCK),
            shared_interval,
            conversations: 0..0,
        }
    }

    fn compute_hashes(&mut self, run: Run) {
        self.hashes.clear();
        let blocks = run.from..run.from + run.len;
        self.hashes
            .extend(blocks.map(|block| engine_hash(run.content, block)));
    }

    fn store(&mut self, run: Run) -> CacheDelta {
        self.compute_hashes(run);
        self.tokens.resize(run.len * BLOCK, 0);
        write_tokens(run, &mut self.tokens);
        let is_system = run.content & SYSTEM != 0;
        let parent = match run.from.checked_sub(1) {
            Some(before) => Some(engine_hash(run.content, before)),
            None if is_system => None,
            None => Some(engine_hash(system_of(run.content), SYSTEM_BLOCKS - 1)),
        };
        self.view.store(&StoredBlocks {
            parent,
            engine_hashes: &self.hashes,
            tokens: &self.tokens,
            block_size: BLOCK as u32,
            salt: SALT,
        })
    }

    fn remove(&mut self, run: Run) -> CacheDelta {
        self.compute_hashes(run);
        self.hashes.reverse();
        self.view.remove(&self.hashes)
    }

    /// Returns the content of a conversation on this worker.
    fn content(&self, conversation: u64) -> u64 {
        if conversation.is_multiple_of(self.shared_interval) {
            1 << 39 | (self.number / 8) << 32 | conversation
        } else {
            self.number << 32 | conversation
        }
    }

    fn start_conversation(&mut self, blocks_per_event: usize, apply: &mut impl FnMut(CacheDelta)) {
        let content = self.content(self.conversations.end);
        self.conversations.end += 1;
        for from in (0..CONVERSATION).step_by(blocks_per_event) {
            let len = blocks_per_event.min(CONVERSATION - from);
            apply(self.store(Run { content, from, len }));
        }
    }

    /// Evicts the oldest conversation, its last blocks first.
    fn evict_conversation(&mut self, blocks_per_event: usize, apply: &mut impl FnMut(CacheDelta)) {
        let content = self.content(self.conversations.start);
        self.conversations.start += 1;
        for from in (0..CONVERSATION).step_by(blocks_per_event).rev() {
            let len = blocks_per_event.min(CONVERSATION - from);
            apply(self.remove(Run { content, from, len }));
        }
    }

    fn store_system_prompts(&mut self, apply: &mut impl FnMut(CacheDelta)) {
        for content in SYSTEM..SYSTEM + SYSTEM_PROMPTS {
            let len = SYSTEM_BLOCKS;
            apply(self.store(Run {
                content,
                from: 0,
                len,
            }));
        }
    }

    fn fill(&mut self, apply: &mut impl FnMut(CacheDelta)) {
        self.store_system_prompts(apply);
        for _ in 0..CONVERSATIONS {
            self.start_conversation(CONVERSATION, apply);
        }
    }

    /// Replaces the oldest conversation by a new one, in events of `blocks_per_event` blocks.
    fn replace_conversation(
        &mut self,
        blocks_per_event: usize,
        apply: &mut impl FnMut(CacheDelta),
    ) {
        self.evict_conversation(blocks_per_event, apply);
        self.start_conversation(blocks_per_event, apply);
    }
}

/// Blocks that are removed and stored when one conversation replaces another.
const REPLACED_BLOCKS: usize = 2 * CONVERSATION;

fn router_with(workers: u64) -> (Router, Vec<WorkerId>) {
    let router = Router::new(RouterConfig {
        queue_order: None,
        ..RouterConfig::default()
    })
    .unwrap();
    let add = |worker| {
        let spec = WorkerSpec {
            name: format!("w{worker}"),
            capacity_blocks: Some(CAPACITY as u32),
            prefix_caching: true,
            ..WorkerSpec::default()
        };
        let id = router.add_worker(spec).unwrap();
        router.set_healthy(id, true);
        router.set_cache_source(id, CacheSource::Events);
        id
    };
    let ids = (0..workers).map(add).collect();
    (router, ids)
}

fn full_fleet() -> (Router, Vec<(WorkerId, Engine)>) {
    let (router, ids) = router_with(WORKERS);
    let engines = ids.into_iter().zip(0..).map(|(id, number)| {
        let mut engine = Engine::new(number, 4);
        engine.fill(&mut |delta| {
            router.apply_cache_delta(id, &delta, Observed::Live(Duration::ZERO))
        });
        (id, engine)
    });
    let engines = engines.collect();
    (router, engines)
}

/// The whole way from the engine's event to the router's index.
#[divan::bench(args = [1, 40], sample_size = 1, sample_count = 20_000)]
fn events_applied(bencher: Bencher<'_, '_>, blocks_per_event: usize) {
    let (router, mut engines) = full_fleet();
    let mut turn = 0;
    bencher
        .counter(ItemsCount::new(REPLACED_BLOCKS))
        .bench_local(|| {
            turn = (turn + 1) % engines.len();
            let (id, engine) = &mut engines[turn];
            engine.replace_conversation(blocks_per_event, &mut |delta| {
                router.apply_cache_delta(*id, &delta, Observed::Live(Duration::ZERO));
            });
        });
}

/// The part of `events_applied` in the views: hashing, and following the events. It can run on one
/// thread per worker.
#[divan::bench(args = [1, 40], sample_size = 1, sample_count = 20_000)]
fn events_applied_in_views(bencher: Bencher<'_, '_>, blocks_per_event: usize) {
    let mut engines: Vec<Engine> = (0..WORKERS).map(|number| Engine::new(number, 4)).collect();
    for engine in &mut engines {
        engine.fill(&mut drop);
    }
    let mut turn = 0;
    bencher
        .counter(ItemsCount::new(REPLACED_BLOCKS))
        .bench_local(|| {
            turn = (turn + 1) % engines.len();
            engines[turn].replace_conversation(blocks_per_event, &mut drop);
        });
}

/// The part of `events_applied` in the index, under the router's lock.
#[divan::bench(args = [1, 40], sample_size = 1, sample_count = 20_000)]
fn events_applied_in_index(bencher: Bencher<'_, '_>, blocks_per_event: usize) {
    let mut index = EventIndex::default();
    let mut event_cached_blocks = 0;
    let mut engines: Vec<Engine> = (0..WORKERS).map(|number| Engine::new(number, 4)).collect();
    for (engine, worker) in engines.iter_mut().zip(0..) {
        engine.fill(&mut |delta| index.update(worker, &delta, &mut event_cached_blocks));
    }
    let mut turn = 0;
    bencher
        .counter(ItemsCount::new(REPLACED_BLOCKS))
        .with_inputs(|| {
            turn = (turn + 1) % engines.len();
            let mut deltas = Vec::new();
            engines[turn].replace_conversation(blocks_per_event, &mut |delta| deltas.push(delta));
            (turn as u32, deltas)
        })
        .bench_local_refs(|(worker, deltas)| {
            for delta in deltas {
                index.update(*worker, delta, &mut event_cached_blocks);
            }
        });
}

const PROMPTS: usize = 64;
const PROMPT_BLOCKS: usize = 438;

/// Returns a prompt of 7,000 tokens, whose first half is a system prompt.
fn prompt(number: usize) -> Sequence {
    let content = SYSTEM + number as u64 % SYSTEM_PROMPTS;
    let mut tokens = vec![0; PROMPT_BLOCKS * BLOCK];
    let (system, own) = tokens.split_at_mut(SYSTEM_BLOCKS * BLOCK);
    let (from, len) = (0, SYSTEM_BLOCKS);
    write_tokens(Run { content, from, len }, system);
    own[0] = number as u32;
    Sequence::from_tokens(&tokens, RouterConfig::default().block_size, SALT)
}

/// Returns an index of two million blocks and some prompts. `cached_blocks` is the number of leading
/// blocks of each prompt that a worker caches.
fn index_of_prompts(
    workers: usize,
    cached_blocks: impl Fn(usize) -> usize,
) -> (EventIndex, Vec<Sequence>) {
    let mut index = EventIndex::default();
    let mut event_cached_blocks = 0;
    let prompts: Vec<Sequence> = (0..PROMPTS).map(prompt).collect();
    for worker in 0..workers {
        let others = 2_000_000 / workers as u64;
        let mut delta = CacheDelta {
            engine_block_ratio: 1,
            ..CacheDelta::default()
        };
        let others: Vec<u64> = (0..others)
            .map(|block| mix((worker as u64) << 32 | block))
            .collect();
        for conversation in others.chunks(CONVERSATION) {
            delta.stored.push_suffix(conversation, 0);
        }
        for prompt in &prompts {
            let cached = &prompt.hashes()[..cached_blocks(worker)];
            delta.stored.push_suffix(cached, 0);
        }
        index.update(worker as u32, &delta, &mut event_cached_blocks);
    }
    (index, prompts)
}

fn look_up(bencher: Bencher<'_, '_>, workers: usize, cached_blocks: impl Fn(usize) -> usize) {
    let (index, prompts) = index_of_prompts(workers, &cached_blocks);
    let mut turn = 0;
    let mut matches = vec![PrefixMatch::default(); workers];
    index.match_prefix(prompts[0].hashes(), &mut matches);
    for (worker, prefix_match) in matches.iter().enumerate() {
        assert_eq!(prefix_match.cached_blocks as usize, cached_blocks(worker));
    }
    bencher.counter(ItemsCount::new(1_u32)).bench_local(|| {
        turn = (turn + 1) % PROMPTS;
        matches.fill(PrefixMatch::default());
        index.match_prefix(black_box(prompts[turn].hashes()), &mut matches)
    });
}

/// Lookup of a prompt of 7,000 tokens that every worker caches completely.
#[divan::bench(args = [8, 64, 512], sample_size = 10, sample_count = 10_000)]
fn look_up_full_hit(bencher: Bencher<'_, '_>, workers: usize) {
    look_up(bencher, workers, |_| PROMPT_BLOCKS);
}

/// Lookup of a prompt of which the workers cache eight different numbers of blocks.
#[divan::bench(args = [8, 64, 512], sample_size = 10, sample_count = 10_000)]
fn look_up_eight_lengths(bencher: Bencher<'_, '_>, workers: usize) {
    look_up(bencher, workers, |worker| 54 * (worker % 8 + 1));
}

/// Lookup of a prompt of which each worker caches a different number of blocks, as far as the prompt
/// has enough of them.
#[divan::bench(args = [8, 64, 512], sample_size = 10, sample_count = 10_000)]
fn look_up_distinct_lengths(bencher: Bencher<'_, '_>, workers: usize) {
    look_up(bencher, workers, |worker| {
        1 + worker * (PROMPT_BLOCKS - 1) / (workers - 1)
    });
}

/// Removal of a worker, which visits every block under the lock.
#[divan::bench(sample_size = 1, sample_count = 20)]
fn worker_removal(bencher: Bencher<'_, '_>) {
    let mut index = EventIndex::default();
    let mut event_cached_blocks = 0;
    for worker in 0..WORKERS {
        let mut engine = Engine::new(worker, 4);
        engine.fill(&mut |delta| index.update(worker as u32, &delta, &mut event_cached_blocks));
    }
    let mut worker = 0;
    bencher.bench_local(|| {
        index.remove_worker(worker);
        worker += 1;
    });
}

/// Prints the memory of views and index per cached block, while the caches fill and when all blocks
/// have been replaced.
fn print_memory(what: &str, shared_interval: u64) {
    let (router, ids) = router_with(WORKERS);
    let mut engines: Vec<Engine> = (0..WORKERS)
        .map(|number| Engine::new(number, shared_interval))
        .collect();
    let empty = ALLOCATOR.allocated();
    let mut per_block = Vec::new();
    for conversation in 0..=CONVERSATIONS {
        for (engine, &id) in engines.iter_mut().zip(&ids) {
            let mut apply = |delta: CacheDelta| {
                router.apply_cache_delta(id, &delta, Observed::Live(Duration::ZERO))
            };
            match conversation {
                0 => engine.store_system_prompts(&mut apply),
                _ => engine.start_conversation(CONVERSATION, &mut apply),
            }
        }
        let blocks: usize = engines.iter().map(|engine| engine.view.len()).sum();
        per_block.push((ALLOCATOR.allocated() - empty) as f64 / blocks as f64);
    }
    let filled = per_block.last().unwrap();
    // From a fifth of the capacity on.
    let later = &per_block[per_block.len() / 8..];
    let min = later.iter().copied().fold(f64::INFINITY, f64::min);
    let max = later.iter().copied().fold(0.0, f64::max);
    let prefixes = router.indexed_blocks();
    println!(
        "bytes per cached block, {WORKERS} x {CAPACITY} blocks, {prefixes} distinct ({what}):"
    );
    println!(
        "    {filled:.1} when full; {min:.1} to {max:.1} while filling, from a fifth of the capacity on"
    );

    for _ in 0..CONVERSATIONS {
        for (engine, &id) in engines.iter_mut().zip(&ids) {
            let mut apply = |delta: CacheDelta| {
                router.apply_cache_delta(id, &delta, Observed::Live(Duration::ZERO))
            };
            engine.replace_conversation(CONVERSATION, &mut apply);
        }
    }
    let blocks: usize = engines.iter().map(|engine| engine.view.len()).sum();
    let replaced = (ALLOCATOR.allocated() - empty) as f64 / blocks as f64;
    let with_views = ALLOCATOR.allocated();
    for engine in &mut engines {
        engine.view = CacheView::new(RouterConfig::default().block_size);
    }
    let views = (with_views - ALLOCATOR.allocated()) as f64 / blocks as f64;
    let index = replaced - views;
    println!("    {replaced:.1} when all blocks are replaced: views {views:.1}, index {index:.1}");
}

/// Removes and stores the whole cache of an engine, as after a reconnection. Returns the number of
/// blocks applied.
fn reapply_whole_cache(router: &Router, id: WorkerId, engine: &Engine) -> usize {
    let CacheDelta {
        stored,
        engine_block_ratio,
        ..
    } = engine.view.snapshot();
    let blocks = stored.len() * 2;
    let removal = CacheDelta {
        stored: PrefixRuns::default(),
        removed: stored.clone(),
        engine_block_ratio,
    };
    router.apply_cache_delta(id, &removal, Observed::Live(Duration::ZERO));
    let storage = CacheDelta {
        stored,
        removed: PrefixRuns::default(),
        engine_block_ratio,
    };
    router.apply_cache_delta(id, &storage, Observed::Live(Duration::ZERO));
    blocks
}

/// Prints the time of decisions on one thread while another thread applies events without a pause.
fn print_decisions_during_events() {
    type Write = fn(&Router, WorkerId, &mut Engine) -> usize;
    let writes: [(&str, Option<Write>); 4] = [
        ("without events", None),
        (
            "during events of 1 block",
            Some(|router, id, engine| {
                engine.replace_conversation(1, &mut |delta| {
                    router.apply_cache_delta(id, &delta, Observed::Live(Duration::ZERO))
                });
                REPLACED_BLOCKS
            }),
        ),
        (
            "during events of 40 blocks",
            Some(|router, id, engine| {
                engine.replace_conversation(40, &mut |delta| {
                    router.apply_cache_delta(id, &delta, Observed::Live(Duration::ZERO))
                });
                REPLACED_BLOCKS
            }),
        ),
        (
            "while whole caches are applied again",
            Some(|router, id, engine| reapply_whole_cache(router, id, engine)),
        ),
    ];
    let (router, mut engines) = full_fleet();
    println!("time of a decision, {WORKERS} workers, ISL 7000:");
    for (what, write) in writes {
        let is_finished = AtomicBool::new(write.is_none());
        let written = AtomicU64::new(0);
        let began = Instant::now();
        let mut durations = std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let mut turn = 0;
                while !is_finished.load(Ordering::Relaxed) {
                    turn = (turn + 1) % engines.len();
                    let (id, engine) = &mut engines[turn];
                    let blocks = write.map_or(0, |write| write(&router, *id, engine));
                    written.fetch_add(blocks as u64, Ordering::Relaxed);
                }
            });
            let durations = decide_for(&router, Duration::from_secs(4));
            is_finished.store(true, Ordering::Relaxed);
            writer.join().unwrap();
            durations
        });
        let rate = written.load(Ordering::Relaxed) as f64 / began.elapsed().as_secs_f64() / 1e6;
        durations.sort_unstable();
        let percentile = |fraction: f64| {
            durations[((durations.len() - 1) as f64 * fraction) as usize].as_nanos() as f64
        };
        println!(
            "    {what}: p50 {:.2} us, p99 {:.2}, p99.9 {:.1}, max {:.0}; {} decisions, {rate:.1} \
             million blocks applied per second",
            percentile(0.5) / 1e3,
            percentile(0.99) / 1e3,
            percentile(0.999) / 1e3,
            percentile(1.0) / 1e3,
            durations.len()
        );
    }
}

/// Makes a decision every 20 microseconds, and returns the time of each.
fn decide_for(router: &Router, period: Duration) -> Vec<Duration> {
    let prompts: Vec<Sequence> = (0..PROMPTS).map(prompt).collect();
    let began = Instant::now();
    let mut durations = Vec::with_capacity(1_000_000);
    let mut next = Duration::ZERO;
    for prompt in prompts.iter().cycle() {
        while began.elapsed() < next {
            std::hint::spin_loop();
        }
        let start = Instant::now();
        let now = start - began;
        let mut booking = router.route(&Request::new(prompt), now).unwrap();
        booking.on_tokens(1, now);
        drop(black_box(booking));
        durations.push(start.elapsed());
        next = now + Duration::from_micros(20);
        if now > period {
            break;
        }
    }
    durations
}
