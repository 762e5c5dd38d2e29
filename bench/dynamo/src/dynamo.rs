//! Dynamo's side: the indexer and the scheduler of `dynamo-kv-router` with the default policy, set
//! up as Dynamo's selection service sets them up.

use std::collections::HashMap;
use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use dynamo_custom_policy_builtin::default_policy;
use dynamo_kv_router::indexer::TieredMatchDetails;
use dynamo_kv_router::protocols::{
    BlockHashOptions, ExternalSequenceBlockHash, KvCacheEvent, KvCacheEventData, KvCacheRemoveData,
    KvCacheStoreData, KvCacheStoredBlockData, LocalBlockHash, RouterEvent, RoutingConstraints,
    WorkerConfigLike, WorkerWithDpRank, compute_block_hash_for_seq, compute_seq_hash_for_block,
};
use dynamo_kv_router::scheduling::{
    OverlapAnalysis, OverlapSignals, PolicyProfile, ScheduleMode, ScheduleRequest,
};
use dynamo_kv_router::{
    ActiveSequencesMultiWorker, ConcurrentRadixTreeCompressed, KvRouterConfig, LocalScheduler,
    NoopSequencePublisher, SyncIndexer, ThreadPoolIndexer, WorkerType,
};
use tokio::runtime::{self, Runtime};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::scenario::{
    self, BLOCK_SIZE, Batches, CAPACITY_BLOCKS, Measurement, PROMPT_TOKENS, Tally, Window,
};

/// Dynamo's default number of threads that apply events.
const EVENT_THREADS: usize = 4;

/// Dynamo's index of prefixes, with the threads that apply events to it.
pub(crate) type Indexer = ThreadPoolIndexer<ConcurrentRadixTreeCompressed>;

/// Description of a worker.
#[derive(Clone, PartialEq)]
struct Worker;

impl WorkerConfigLike for Worker {
    fn data_parallel_start_rank(&self) -> u32 {
        0
    }

    fn data_parallel_size(&self) -> u32 {
        1
    }

    fn max_num_batched_tokens(&self) -> Option<u64> {
        Some(8192)
    }

    fn total_kv_blocks(&self) -> Option<u64> {
        Some(CAPACITY_BLOCKS.into())
    }
}

/// A router, its fleet, and the requests that run there.
struct Router {
    config: KvRouterConfig,
    indexer: Indexer,
    scheduler: LocalScheduler<NoopSequencePublisher, Worker>,
    /// Held only: the scheduler follows the fleet through it.
    _workers: watch::Sender<HashMap<u64, Worker>>,
    /// Number of the next request.
    next_request: AtomicU64,
}

/// A router with the runtime in which it lives.
pub(crate) struct Fleet {
    runtime: Runtime,
    router: Arc<Router>,
    threads: usize,
    cancellation: CancellationToken,
}

/// Hashes a prompt: each block for the indexer, and chained for the scheduler.
pub(crate) fn hash(tokens: &[u32]) -> (Vec<LocalBlockHash>, Vec<u64>) {
    let blocks = hash_blocks(tokens);
    let sequence = compute_seq_hash_for_block(&blocks);
    (blocks, sequence)
}

/// Hashes each block of a prompt.
pub(crate) fn hash_blocks(tokens: &[u32]) -> Vec<LocalBlockHash> {
    compute_block_hash_for_seq(tokens, BLOCK_SIZE, BlockHashOptions::default())
}

/// Returns an empty index to which `threads` threads apply events.
pub(crate) fn indexer(threads: usize) -> Indexer {
    ThreadPoolIndexer::new(ConcurrentRadixTreeCompressed::new(), threads, BLOCK_SIZE)
}

/// Returns the event with which a worker reports all blocks of a prompt as stored.
pub(crate) fn stored_event(
    worker: usize,
    event_id: u64,
    blocks: &[LocalBlockHash],
    engine_hashes: &[u64],
) -> RouterEvent {
    let blocks = blocks.iter().zip(engine_hashes);
    let blocks = blocks.map(|(&tokens_hash, &engine_hash)| KvCacheStoredBlockData {
        block_hash: ExternalSequenceBlockHash(engine_hash),
        tokens_hash,
        mm_extra_info: None,
    });
    let data = KvCacheEventData::Stored(KvCacheStoreData {
        parent_hash: None,
        start_position: None,
        blocks: blocks.collect(),
    });
    event(worker, event_id, data)
}

/// Returns the event with which a worker reports blocks as removed.
pub(crate) fn removed_event<'a>(
    worker: usize,
    event_id: u64,
    engine_hashes: impl Iterator<Item = &'a u64>,
) -> RouterEvent {
    let block_hashes = engine_hashes.map(|&engine_hash| ExternalSequenceBlockHash(engine_hash));
    let data = KvCacheEventData::Removed(KvCacheRemoveData {
        block_hashes: block_hashes.collect(),
    });
    event(worker, event_id, data)
}

fn event(worker: usize, event_id: u64, data: KvCacheEventData) -> RouterEvent {
    let event = KvCacheEvent {
        event_id,
        data,
        dp_rank: 0,
    };
    RouterEvent::new(worker as u64, event)
}

impl Fleet {
    /// Returns a fleet on which the [earlier requests](scenario::earlier_requests) were booked, for
    /// decisions on `threads` threads. The workers have reported the prompts of all these requests
    /// as stored.
    pub(crate) fn new(workers: usize, threads: usize) -> Self {
        // With one thread, the scheduler's actor runs on the caller's thread: its best case.
        let mut builder = match threads {
            1 => runtime::Builder::new_current_thread(),
            _ => runtime::Builder::new_multi_thread(),
        };
        let runtime = builder
            .worker_threads(threads)
            .enable_all()
            .build()
            .expect("a runtime can be started");
        let cancellation = CancellationToken::new();
        let router = runtime.block_on(Router::new(workers, cancellation.clone()));
        Self {
            runtime,
            router: Arc::new(router),
            threads,
            cancellation,
        }
    }

    /// Makes decisions, hashing included, in `tasks_per_thread` tasks for each thread.
    pub(crate) fn measure(&self, tasks_per_thread: usize) -> Measurement {
        let window = Window::from_now();
        self.runtime.block_on(async {
            let mut tasks = JoinSet::new();
            for _ in 0..self.threads * tasks_per_thread {
                let router = Arc::clone(&self.router);
                tasks.spawn(async move { router.decide_during(window).await });
            }
            Tally::measurement(tasks.join_all().await)
        })
    }

    /// Makes decisions one after the other, and counts their time without that of hashing.
    pub(crate) fn measure_without_hashing(&self) -> Measurement {
        self.runtime.block_on(async {
            let mut batches = Batches::new();
            for decision in Batches::decisions() {
                let request = self.router.next_request();
                let (blocks, sequence) = scenario::with_prompt(request, hash);
                let start = Instant::now();
                let cached_blocks = self.router.decide(request, &blocks, sequence).await;
                batches.add(decision, start.elapsed(), cached_blocks);
            }
            batches.measurement()
        })
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.cancellation.cancel();
    }
}

impl Router {
    async fn new(workers: usize, cancellation: CancellationToken) -> Self {
        let config = KvRouterConfig::default();
        let label = WorkerType::Aggregated.default_selector_label();
        let ids = 0..workers as u64;
        let slots = Arc::new(ActiveSequencesMultiWorker::new_without_expiry(
            NoopSequencePublisher,
            BLOCK_SIZE as usize,
            ids.clone().map(|id| (id, (0, 1))).collect(),
            false,
            0,
            label,
        ));
        let (workers_tx, workers_rx) =
            watch::channel(ids.map(|id| (id, Worker)).collect::<HashMap<_, _>>());
        let profile =
            PolicyProfile::synthetic(config.router_queue_threshold, config.router_queue_policy);
        let scheduler = LocalScheduler::new(
            slots,
            workers_rx,
            profile,
            BLOCK_SIZE,
            default_policy(config.clone(), label),
            None,
            None,
            None,
            None,
            config.router_queue_recheck_interval(),
            config.router_track_prefill_tokens,
            cancellation,
            label,
            true,
        );
        let router = Self {
            config,
            indexer: indexer(EVENT_THREADS),
            scheduler,
            _workers: workers_tx,
            next_request: AtomicU64::new(scenario::first_measured_request(workers)),
        };
        router.book_earlier_requests(workers).await;
        router
    }

    async fn book_earlier_requests(&self, workers: usize) {
        for earlier in scenario::earlier_requests(workers) {
            let (blocks, sequence) = scenario::with_prompt(earlier.number, hash);
            let event = stored_event(earlier.worker, earlier.number, &blocks, &sequence);
            self.indexer.enqueue_event(event).expect("indexer is up");
            if earlier.is_running {
                let id = earlier.number.to_string();
                let worker = WorkerWithDpRank::from_worker_id(earlier.worker as u64);
                let request = ScheduleRequest {
                    pinned_worker: Some(worker),
                    ..schedule_request(id.clone(), sequence, OverlapSignals::default())
                };
                let response = self.scheduler.schedule_request(request).await;
                assert_eq!(response.expect("workers are up").best_worker, worker);
                let marked = self.scheduler.mark_prefill_completed(&id).await;
                marked.expect("the request is booked");
            }
        }
        let flushed = self.indexer.flush_and_wait().await;
        flushed.expect("indexer is up");
    }

    async fn decide_during(&self, window: Window) -> Tally {
        let mut tally = Tally::default();
        while let Some(slice) = window.slice() {
            let request = self.next_request();
            let (blocks, sequence) = scenario::with_prompt(request, hash);
            let cached_blocks = self.decide(request, &blocks, sequence).await;
            tally.count(slice, cached_blocks);
        }
        tally
    }

    fn next_request(&self) -> u64 {
        self.next_request.fetch_add(1, Ordering::Relaxed)
    }

    /// Looks a prompt up, schedules the request, reports its first token, and releases it. Returns
    /// how many blocks of the prompt its worker has.
    async fn decide(&self, request: u64, blocks: &[LocalBlockHash], sequence: Vec<u64>) -> u64 {
        let mut matches = TieredMatchDetails::default();
        matches.device.overlap_scores = self.indexer.backend().find_matches(blocks, false);
        let overlap = OverlapAnalysis::new(&self.config, BLOCK_SIZE, &matches).signals();
        let id = request.to_string();
        let request = schedule_request(id.clone(), sequence, overlap);
        let response = self.scheduler.schedule_request(request).await;
        let response = response.expect("workers are up");
        let marked = self.scheduler.mark_prefill_completed(&id).await;
        marked.expect("the request is booked");
        let freed = self.scheduler.free(&id).await;
        freed.expect("the request is booked");
        black_box(response).effective_overlap_blocks as u64
    }
}

/// Returns a request without constraints.
fn schedule_request(id: String, sequence: Vec<u64>, overlap: OverlapSignals) -> ScheduleRequest {
    ScheduleRequest {
        mode: ScheduleMode::Tracked { request_id: id },
        token_seq: Some(sequence),
        block_hashes: None,
        isl_tokens: PROMPT_TOKENS,
        lora_name: None,
        expected_output_tokens: None,
        affinity_target: None,
        pinned_worker: None,
        allowed_worker_ids: None,
        routing_constraints: RoutingConstraints::default(),
        router_config_override: None,
        priority_jump: 0.0,
        strict_priority: 0,
        policy_class: None,
        session_context: None,
        overlap,
        kv_transfer_candidates: None,
        retain_kv_transfer_chain: false,
        shared_cache_hits: None,
    }
}
