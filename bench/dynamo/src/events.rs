//! Application of KV events: from the tokens and engine hashes of a stored prompt to the index.

use std::num::NonZeroU32;
use std::thread;
use std::time::{Duration, Instant};

use dynamo_kv_router::RadixTree;
use dynamo_kv_router::protocols::RouterEvent;
use foresee_core::event_index::{CacheView, StoredBlocks};
use foresee_core::policy::NamedPolicy;
use foresee_core::router::{CacheSource, Observed, Router};
use foresee_core::workers::WorkerId;

use crate::dynamo::Indexer;
use crate::scenario::{self, BLOCK_SIZE, Measurement, PROMPT_BLOCKS};
use crate::{dynamo, foresee};

/// Prompts of a measurement. A multiple of twice the size of every fleet.
const PROMPTS: usize = 4_096;
/// Prompts that are cached at a time where prompts are replaced.
const CACHED_PROMPTS: usize = PROMPTS / 2;
/// Runs of a measurement.
const RUNS: usize = 3;

/// A prompt that a worker caches for a time.
pub(crate) struct CachedPrompt {
    worker: usize,
    number: u64,
    tokens: Vec<u32>,
    engine_hashes: Vec<u64>,
}

/// Returns prompts that the workers of a fleet cache in turn. No two of them begin alike.
pub(crate) fn prompts(workers: usize) -> Vec<CachedPrompt> {
    let prompt = |number| CachedPrompt {
        worker: number as usize % workers,
        number,
        tokens: scenario::with_unique_prompt(number, <[u32]>::to_vec),
        engine_hashes: scenario::with_unique_prompt(number, dynamo::hash).1,
    };
    (0..PROMPTS as u64).map(prompt).collect()
}

/// What one KV event reports about all blocks of a prompt.
#[derive(Clone, Copy)]
pub(crate) enum Event<'a> {
    Stored(&'a CachedPrompt),
    /// The worker evicted the blocks, the last one first.
    Removed(&'a CachedPrompt),
}

impl Event<'_> {
    fn worker(&self) -> usize {
        match self {
            Self::Stored(prompt) | Self::Removed(prompt) => prompt.worker,
        }
    }

    /// Returns the event in the form that Dynamo's indexes take, for which tokens are hashed.
    fn to_dynamo(self) -> RouterEvent {
        match self {
            Self::Stored(prompt) => {
                let blocks = dynamo::hash_blocks(&prompt.tokens);
                let engine_hashes = &prompt.engine_hashes;
                dynamo::stored_event(prompt.worker, prompt.number, &blocks, engine_hashes)
            }
            Self::Removed(prompt) => {
                let engine_hashes = prompt.engine_hashes.iter().rev();
                dynamo::removed_event(prompt.worker, prompt.number, engine_hashes)
            }
        }
    }
}

/// Events of a measurement.
#[derive(Clone, Copy)]
pub(crate) enum Traffic {
    /// Empty caches fill: every event stores a prompt.
    Filling,
    /// Caches are full: a stored prompt follows a removed one.
    Replacing,
}

impl Traffic {
    /// Returns the events before the measurement, those of it, and how many prompts these store.
    fn events(self, prompts: &[CachedPrompt]) -> (Vec<Event<'_>>, Vec<Event<'_>>, usize) {
        let stored: Vec<Event<'_>> = prompts.iter().map(Event::Stored).collect();
        match self {
            Self::Filling => (Vec::new(), stored, prompts.len()),
            Self::Replacing => {
                let removed = prompts.iter().map(Event::Removed);
                let (before, stored) = stored.split_at(CACHED_PROMPTS);
                let replaced = removed.zip(stored).flat_map(|(old, &new)| [old, new]);
                (before.to_vec(), replaced.collect(), stored.len())
            }
        }
    }
}

/// Measures how many prompts a second the index of a router can follow, in the fastest of some runs
/// of `apply`. It applies the first events, then the others, to an empty index, and returns the time
/// of the latter.
pub(crate) fn measure(
    traffic: Traffic,
    prompts: &[CachedPrompt],
    apply: impl Fn(&[Event<'_>], &[Event<'_>]) -> Duration,
) -> Measurement {
    let (before, measured, stored) = traffic.events(prompts);
    let runs = (0..RUNS).map(|_| apply(&before, &measured));
    let fastest = runs.min().unwrap_or_default();
    Measurement {
        per_second: stored as f64 / fastest.as_secs_f64(),
        cached_blocks: None,
    }
}

/// Follows the events of one worker in Foresee.
struct Follower {
    router: Router,
    id: WorkerId,
    view: CacheView,
}

impl Follower {
    fn follow(&mut self, event: Event<'_>) {
        let delta = match event {
            Event::Stored(prompt) => self.view.store(&StoredBlocks {
                parent: None,
                engine_hashes: &prompt.engine_hashes,
                tokens: &prompt.tokens,
                block_size: BLOCK_SIZE,
                salt: foresee::SALT,
            }),
            Event::Removed(prompt) => {
                let engine_hashes: Vec<u64> = prompt.engine_hashes.iter().rev().copied().collect();
                self.view.remove(&engine_hashes)
            }
        };
        let observed = Observed::Live(Duration::ZERO);
        self.router.apply_cache_delta(self.id, &delta, observed);
    }
}

/// Returns the followers of a fleet whose caches are empty, for Foresee.
fn followers(workers: usize) -> Vec<Follower> {
    let (router, ids) = foresee::router(NamedPolicy::default(), CacheSource::Events, workers);
    let block_size = NonZeroU32::new(BLOCK_SIZE).expect("not zero");
    let follower = |id| Follower {
        router: router.clone(),
        id,
        view: CacheView::new(block_size),
    };
    ids.into_iter().map(follower).collect()
}

/// Applies events on `threads` threads, each of which follows some of the workers.
fn follow(followers: &mut [Follower], threads: usize, events: &[Event<'_>]) {
    let workers_per_thread = followers.len().div_ceil(threads);
    thread::scope(|scope| {
        for (thread, followers) in followers.chunks_mut(workers_per_thread).enumerate() {
            let first = thread * workers_per_thread;
            scope.spawn(move || {
                for &event in events {
                    let index = event.worker().checked_sub(first);
                    if let Some(follower) = index.and_then(|index| followers.get_mut(index)) {
                        follower.follow(event);
                    }
                }
            });
        }
    });
}

/// Applies events to Dynamo's index for several threads: one hashes, the other applies.
fn enqueue(index: &Indexer, events: &[Event<'_>]) {
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    let runtime = runtime.expect("a runtime can be started");
    for event in events {
        let enqueued = index.enqueue_event(event.to_dynamo());
        enqueued.expect("the indexer is up");
    }
    let flushed = runtime.block_on(index.flush_and_wait());
    flushed.expect("the indexer is up");
}

/// Applies events to Foresee's router.
pub(crate) fn apply_to_foresee(
    workers: usize,
    threads: usize,
    before: &[Event<'_>],
    measured: &[Event<'_>],
) -> Duration {
    let mut followers = followers(workers);
    follow(&mut followers, threads, before);
    let start = Instant::now();
    follow(&mut followers, threads, measured);
    let elapsed = start.elapsed();
    let cached_prompts = if before.is_empty() {
        PROMPTS
    } else {
        CACHED_PROMPTS
    };
    let indexed = followers[0].router.indexed_blocks();
    assert_eq!(indexed, cached_prompts * PROMPT_BLOCKS);
    elapsed
}

/// Applies events to Dynamo's index for one thread.
pub(crate) fn apply_to_dynamo_on_one_thread(
    before: &[Event<'_>],
    measured: &[Event<'_>],
) -> Duration {
    let mut index = RadixTree::new();
    let mut apply = |events: &[Event<'_>]| {
        for event in events {
            let applied = index.apply_event(event.to_dynamo());
            applied.expect("the event is valid");
        }
    };
    apply(before);
    let start = Instant::now();
    apply(measured);
    start.elapsed()
}

/// Applies events to Dynamo's index for several threads.
pub(crate) fn apply_to_dynamo_on_two_threads(
    before: &[Event<'_>],
    measured: &[Event<'_>],
) -> Duration {
    let index = dynamo::indexer(1);
    enqueue(&index, before);
    let start = Instant::now();
    enqueue(&index, measured);
    start.elapsed()
}

/// Resident memory of the two indexes, in bytes per block that a worker caches.
pub(crate) struct Memory {
    /// Of Dynamo's index for several threads.
    pub(crate) dynamo: f64,
    /// Of Foresee's index and views.
    pub(crate) foresee: f64,
}

/// Measures the memory of the indexes of fleets of these sizes, which cache these prompts.
pub(crate) fn measure_memory<'a>(
    fleets: impl Iterator<Item = (usize, &'a Vec<CachedPrompt>)>,
) -> Vec<Memory> {
    // Kept to the end: an index that reused the memory of an earlier one would seem smaller.
    let mut indexes = Vec::new();
    let measure = |(workers, prompts): (usize, &Vec<CachedPrompt>)| {
        let (_, events, stored) = Traffic::Filling.events(prompts);
        let bytes_per_block = |before: usize| {
            let bytes = resident_bytes().saturating_sub(before);
            bytes as f64 / (stored * PROMPT_BLOCKS) as f64
        };
        let before = resident_bytes();
        let index = dynamo::indexer(1);
        enqueue(&index, &events);
        let dynamo = bytes_per_block(before);
        let before = resident_bytes();
        let mut followers = followers(workers);
        follow(&mut followers, 1, &events);
        let foresee = bytes_per_block(before);
        indexes.push((index, followers));
        Memory { dynamo, foresee }
    };
    fleets.map(measure).collect()
}

/// Returns the resident memory of this process, as Linux reports it; 0 on other systems.
fn resident_bytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix(" kB"));
    kilobytes
        .and_then(|kilobytes| kilobytes.parse().ok())
        .map_or(0, |kilobytes: usize| kilobytes * 1024)
}
