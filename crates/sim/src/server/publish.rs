//! Tells the world what the engine caches: KV events over ZMQ, as vLLM publishes them, with the
//! faults that subscribers must live with.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use foresee_engine::kv_events::{
    Adapter, BlockKey, BlockRemoved, BlockStored, Event, EventBatch, Layout, encode_batch,
    parse_replay_request, replay_end,
};
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use zeromq::{PubSocket, RouterSocket, Socket, SocketRecv, SocketSend, ZmqError, ZmqMessage};

use crate::engine::CacheEvent;
use crate::prompt::mix;

/// Batches that may wait to be sent. Further ones are lost, as at a PUB socket's high-water mark.
const MOST_UNSENT: usize = 10_000;

/// How KV events are published.
#[derive(Clone, Debug)]
pub struct KvEventsConfig {
    /// Where the PUB socket binds: `tcp://HOST:PORT` or `ipc://PATH`.
    pub endpoint: String,
    /// Where the ROUTER socket binds that sends batches again; `None` for no replay.
    pub replay: Option<String>,
    /// First frame of each message.
    pub topic: String,
    /// How events are laid out.
    pub layout: Layout,
    /// Batches kept for replay.
    pub replay_batches: usize,
    /// Every so many batches one is not sent: loss, for tests.
    pub drop_every: Option<NonZeroU64>,
    /// How long each batch is held back: a slow network, for tests.
    pub lag: Duration,
    /// After so many batches nothing more is said: a publisher that died, for tests.
    pub silent_after: Option<NonZeroU64>,
    /// After so many batches, once nothing runs, the engine begins anew with an empty cache, and
    /// its batches with number 0: restarts, for tests.
    pub restart_every: Option<NonZeroU64>,
    /// Nothing is said of blocks that are evicted: a publisher that lies, for tests.
    pub hides_removals: bool,
}

impl KvEventsConfig {
    /// vLLM's defaults at an address: maps, no topic, no replay, no faults.
    #[must_use]
    pub fn new(endpoint: impl Into<String>) -> Self {
        Self {
            endpoint: endpoint.into(),
            replay: None,
            topic: String::new(),
            layout: Layout::Map,
            replay_batches: 10_000,
            drop_every: None,
            lag: Duration::ZERO,
            silent_after: None,
            restart_every: None,
            hides_removals: false,
        }
    }
}

/// What a request's blocks contain, which its events tell.
#[derive(Debug)]
pub(super) struct Content {
    /// The hash of each full block, as the engine finds it by.
    pub(super) hashes: Arc<[u64]>,
    /// Prompt and answer.
    pub(super) tokens: Vec<u32>,
    pub(super) block_size: u32,
    pub(super) cache_salt: Option<Box<str>>,
}

/// One message, with the time it may leave.
#[derive(Clone, Debug)]
struct Batch {
    sequence: u64,
    payload: Bytes,
    due: Instant,
}

impl Batch {
    fn frames(&self, topic: &Bytes) -> [Bytes; 3] {
        let sequence = Bytes::copy_from_slice(&self.sequence.to_be_bytes());
        [topic.clone(), sequence, self.payload.clone()]
    }
}

type Kept = Arc<Mutex<VecDeque<Batch>>>;

/// The engine's end: turns what its cache says into batches, without waiting for anybody.
#[derive(Debug)]
pub(super) struct Publisher {
    config: KvEventsConfig,
    sequence: u64,
    contents: HashMap<u64, Arc<Content>>,
    /// Events of the step under way.
    pending: Vec<Event>,
    kept: Kept,
    outbox: mpsc::Sender<Batch>,
    published: Arc<AtomicU64>,
}

impl Publisher {
    /// A request is in the engine from now on.
    pub(super) fn remember(&mut self, request: u64, content: Arc<Content>) {
        self.contents.insert(request, content);
    }

    /// A request has left the engine.
    pub(super) fn forget(&mut self, request: u64) {
        self.contents.remove(&request);
    }

    /// Takes what the cache says while its requests are there to ask.
    pub(super) fn note(&mut self, events: Vec<CacheEvent>) {
        for event in events {
            let event = match event {
                CacheEvent::Removed { .. } if self.config.hides_removals => continue,
                CacheEvent::Removed { hash } => Event::Removed(BlockRemoved {
                    hashes: vec![name_of(hash)],
                    ..BlockRemoved::default()
                }),
                CacheEvent::Stored { request, blocks } => {
                    let Some(content) = self.contents.get(&request) else {
                        continue;
                    };
                    let size = content.block_size as usize;
                    let parent = blocks.start.checked_sub(1);
                    Event::Stored(BlockStored {
                        hashes: content.hashes[blocks.clone()]
                            .iter()
                            .map(|&hash| name_of(hash))
                            .collect(),
                        parent: parent.map(|parent| name_of(content.hashes[parent])),
                        tokens: content.tokens[blocks.start * size..blocks.end * size].to_vec(),
                        block_size: content.block_size,
                        adapter: Adapter::Base,
                        cache_salt: content.cache_salt.clone(),
                        ..BlockStored::default()
                    })
                }
            };
            self.pending.push(event);
        }
    }

    fn is_silent(&self) -> bool {
        let after = self.config.silent_after;
        after.is_some_and(|after| self.sequence >= after.get())
    }

    /// Whether it is time for the engine to begin anew.
    pub(super) fn is_due_to_restart(&self) -> bool {
        let every = self.config.restart_every;
        every.is_some_and(|every| self.sequence >= every.get())
    }

    /// Speaks for another engine from now on.
    pub(super) fn restart(&mut self) {
        self.sequence = 0;
        self.pending.clear();
        self.kept.lock().clear();
        self.published.store(0, Ordering::Relaxed);
    }

    /// Publishes what was noted since last time, if anything.
    pub(super) fn publish(&mut self) {
        if self.is_silent() {
            self.pending.clear();
        }
        if self.pending.is_empty() {
            return;
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let batch = EventBatch {
            timestamp: now.ok().map(|since| since.as_secs_f64()),
            events: std::mem::take(&mut self.pending),
            data_parallel_rank: Some(0),
            ..EventBatch::default()
        };
        let batch = Batch {
            sequence: self.sequence,
            payload: encode_batch(&batch, self.config.layout).into(),
            due: Instant::now() + self.config.lag,
        };
        self.sequence += 1;
        {
            let mut kept = self.kept.lock();
            kept.push_back(batch.clone());
            while kept.len() > self.config.replay_batches {
                kept.pop_front();
            }
        }
        let lost = self
            .config
            .drop_every
            .is_some_and(|every| self.sequence % every == 0);
        if !lost {
            // Nobody waits for a subscriber: what does not fit is lost.
            let _ = self.outbox.try_send(batch);
        }
        self.published.store(self.sequence, Ordering::Relaxed);
    }
}

/// An engine's name for a block, which is not how anybody else would hash it.
fn name_of(hash: u64) -> BlockKey {
    BlockKey(mix(hash))
}

/// The sockets. When this is dropped they are closed, soon; [`close`](Self::close) waits for it.
#[derive(Debug)]
pub(super) struct Publication {
    stop: watch::Sender<bool>,
    sockets: JoinSet<()>,
    published: Arc<AtomicU64>,
}

impl Publication {
    /// Binds the sockets.
    pub(super) async fn open(config: KvEventsConfig) -> io::Result<(Self, Publisher)> {
        let refused = |endpoint: &str, error: ZmqError| {
            io::Error::other(format!("cannot publish KV events at {endpoint}: {error}"))
        };
        let (stop, stopped) = watch::channel(false);
        let kept = Kept::default();
        let topic = Bytes::from(config.topic.clone());
        let mut sockets = JoinSet::new();

        let mut publisher = PubSocket::new();
        remove_stale_socket(&config.endpoint);
        let bound = publisher.bind(&config.endpoint).await;
        bound.map_err(|error| refused(&config.endpoint, error))?;
        let (outbox, batches) = mpsc::channel(MOST_UNSENT);
        sockets.spawn(send(publisher, topic.clone(), batches, stopped.clone()));

        if let Some(endpoint) = &config.replay {
            let mut router = RouterSocket::new();
            remove_stale_socket(endpoint);
            let bound = router.bind(endpoint).await;
            bound.map_err(|error| refused(endpoint, error))?;
            sockets.spawn(replay(router, topic, Arc::clone(&kept), stopped));
        }
        let published = Arc::<AtomicU64>::default();
        let publication = Self {
            stop,
            sockets,
            published: Arc::clone(&published),
        };
        let publisher = Publisher {
            config,
            sequence: 0,
            contents: HashMap::new(),
            pending: Vec::new(),
            kept,
            outbox,
            published,
        };
        Ok((publication, publisher))
    }

    /// Counts the batches published, the lost ones included.
    pub(super) fn counter(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.published)
    }

    /// Closes the sockets, so that another engine can bind where they were.
    pub(super) async fn close(mut self) {
        self.stop.send_replace(true);
        while self.sockets.join_next().await.is_some() {}
    }
}

/// An engine that was killed leaves its `ipc://` socket behind. libzmq removes it before it binds,
/// `zeromq` does not.
fn remove_stale_socket(endpoint: &str) {
    use std::os::unix::fs::FileTypeExt;
    let Some(path) = endpoint.strip_prefix("ipc://") else {
        return;
    };
    if std::fs::symlink_metadata(path).is_ok_and(|it| it.file_type().is_socket()) {
        // If it stays, binding says what is wrong.
        let _ = std::fs::remove_file(path);
    }
}

/// Sends batches when they are due, until told to stop.
async fn send(
    mut socket: PubSocket,
    topic: Bytes,
    mut batches: mpsc::Receiver<Batch>,
    mut stopped: watch::Receiver<bool>,
) {
    let sending = async {
        while let Some(batch) = batches.recv().await {
            tokio::time::sleep_until(batch.due).await;
            if let Ok(message) = ZmqMessage::try_from(batch.frames(&topic).to_vec()) {
                // A PUB socket never waits, and an error is one subscriber's.
                let _ = socket.send(message).await;
            }
        }
        // The engine is gone. Its sockets stay until somebody closes them.
        std::future::pending::<()>().await;
    };
    tokio::select! {
        _ = stopped.wait_for(|stopped| *stopped) => {}
        () = sending => {}
    }
    socket.close().await;
}

/// Answers requests for replay, until told to stop.
async fn replay(
    mut socket: RouterSocket,
    topic: Bytes,
    kept: Kept,
    mut stopped: watch::Receiver<bool>,
) {
    let answering = async {
        while let Ok(request) = socket.recv().await {
            let frames = request.into_vec();
            let Some((asker, request)) = frames.split_first() else {
                continue;
            };
            let Some(from) = parse_replay_request(request) else {
                continue;
            };
            let again: Vec<Batch> = {
                let kept = kept.lock();
                let again = kept.iter().filter(|batch| batch.sequence >= from);
                again.cloned().collect()
            };
            let answers = again
                .iter()
                .map(|batch| [&[Bytes::new()][..], &batch.frames(&topic)].concat());
            let end = replay_end().map(Bytes::from).to_vec();
            for answer in answers.chain([end]) {
                let mut frames = vec![asker.clone()];
                frames.extend(answer);
                let Ok(message) = ZmqMessage::try_from(frames) else {
                    break;
                };
                // Whoever asked has left.
                if socket.send(message).await.is_err() {
                    break;
                }
            }
        }
    };
    tokio::select! {
        _ = stopped.wait_for(|stopped| *stopped) => {}
        () = answering => {}
    }
    socket.close().await;
}
