//! Publishes KV events over ZMQ in vLLM's format, with optional faults that subscribers must
//! handle.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use foresee_engine::kv_events::{
    Adapter, BlockKey, BlockRemoved, BlockStored, Event, EventBatch, parse_replay_request,
    replay_end,
};
use foresee_sim::engine::CacheEvent;
use foresee_sim::prompt::mix;
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use zeromq::{PubSocket, RouterSocket, Socket, SocketRecv, SocketSend, ZmqError, ZmqMessage};

use crate::event_encoding::{Layout, encode_batch};

/// Maximum number of batches that wait to be sent. Further batches are lost, as at the high-water
/// mark of a PUB socket.
const MAX_UNSENT_BATCHES: usize = 10_000;

/// Configuration of the publication of KV events.
#[derive(Clone, Debug)]
pub struct KvEventsConfig {
    /// Address at which the PUB socket binds: `tcp://HOST:PORT` or `ipc://PATH`.
    pub endpoint: String,
    /// Address at which the ROUTER socket for event replay binds; `None` for no replay.
    pub replay: Option<String>,
    /// First frame of each message.
    pub topic: String,
    /// Wire format of events.
    pub layout: Layout,
    /// Number of latest batches kept for replay.
    pub replay_batches: usize,
    /// Fault for tests: one batch in this number is not sent, to simulate loss.
    pub drop_every: Option<NonZeroU64>,
    /// Fault for tests: delay of each batch, to simulate a slow network.
    pub lag: Duration,
    /// Fault for tests: number of batches after which no more are published, to simulate a
    /// publisher that crashed.
    pub silent_after: Option<NonZeroU64>,
    /// Fault for tests: number of batches after which the engine restarts as soon as it is idle,
    /// with an empty cache and batch number 0.
    pub restart_every: Option<NonZeroU64>,
    /// Fault for tests: evictions are not published, to simulate incorrect events.
    pub hide_removals: bool,
}

impl KvEventsConfig {
    /// Returns vLLM's defaults at `endpoint`: events as maps, no topic, no replay, no faults.
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
            hide_removals: false,
        }
    }
}

/// Content of a request's blocks, which its events report.
#[derive(Debug)]
pub(crate) struct Content {
    /// The engine's key of each full block.
    pub(crate) hashes: Arc<[u64]>,
    /// Tokens of the prompt and the output.
    pub(crate) tokens: Vec<u32>,
    pub(crate) block_size: u32,
    pub(crate) cache_salt: Option<Box<str>>,
}

/// One message, with the time at which it is due to be sent.
#[derive(Clone, Debug)]
struct Batch {
    sequence: u64,
    /// The encoded event batch.
    payload: Bytes,
    due: Instant,
}

impl Batch {
    fn frames(&self, topic: &Bytes) -> [Bytes; 3] {
        let sequence = Bytes::copy_from_slice(&self.sequence.to_be_bytes());
        [topic.clone(), sequence, self.payload.clone()]
    }
}

/// The latest batches, kept for replay.
type Kept = Arc<Mutex<VecDeque<Batch>>>;

/// The engine's side: turns the engine's cache events into batches. Never waits for a subscriber.
#[derive(Debug)]
pub(crate) struct Publisher {
    config: KvEventsConfig,
    /// Number of the next batch.
    sequence: u64,
    /// Content of the blocks of each request in the engine, by its id.
    contents: HashMap<u64, Arc<Content>>,
    /// Events since the last batch.
    pending: Vec<Event>,
    kept: Kept,
    outbox: mpsc::Sender<Batch>,
    /// Number of batches published, lost ones included.
    published: Arc<AtomicU64>,
}

impl Publisher {
    /// Records the content of a request that was submitted to the engine.
    pub(crate) fn add_request(&mut self, request: u64, content: Arc<Content>) {
        self.contents.insert(request, content);
    }

    /// Removes a request that has left the engine.
    pub(crate) fn remove_request(&mut self, request: u64) {
        self.contents.remove(&request);
    }

    /// Translates the engine's cache events and keeps them for the next [`publish`](Self::publish).
    ///
    /// The requests that stored blocks must not have been removed yet, because the events contain
    /// their tokens. Blocks of a request without recorded content are ignored, and so are evictions
    /// with `hide_removals`.
    pub(crate) fn note(&mut self, events: Vec<CacheEvent>) {
        for event in events {
            let event = match event {
                CacheEvent::Removed { .. } if self.config.hide_removals => continue,
                CacheEvent::Removed { hash } => Event::Removed(BlockRemoved {
                    hashes: vec![block_key(hash)],
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
                            .map(|&hash| block_key(hash))
                            .collect(),
                        parent: parent.map(|parent| block_key(content.hashes[parent])),
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

    /// Returns whether the publisher has crashed according to `silent_after`.
    fn is_silent(&self) -> bool {
        let after = self.config.silent_after;
        after.is_some_and(|after| self.sequence >= after.get())
    }

    /// Returns whether the engine must restart according to `restart_every`.
    pub(crate) fn is_due_to_restart(&self) -> bool {
        let every = self.config.restart_every;
        every.is_some_and(|every| self.sequence >= every.get())
    }

    /// Starts again at batch number 0, for an engine that has restarted.
    pub(crate) fn restart(&mut self) {
        self.sequence = 0;
        self.pending.clear();
        self.kept.lock().clear();
        self.published.store(0, Ordering::Relaxed);
    }

    /// Publishes the events noted since the last batch as one batch, if there are any. After
    /// `silent_after` batches, they are discarded.
    ///
    /// A batch that is lost, because of `drop_every` or because too many batches wait to be sent,
    /// has a number and is kept for replay like any other.
    pub(crate) fn publish(&mut self) {
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
        let is_dropped = self
            .config
            .drop_every
            .is_some_and(|every| self.sequence % every == 0);
        if !is_dropped {
            // A batch that does not fit into the outbox is lost: the engine never waits.
            let _ = self.outbox.try_send(batch);
        }
        self.published.store(self.sequence, Ordering::Relaxed);
    }
}

/// Returns the engine hash of a block. It differs from the sequence hash, so that a subscriber that
/// confuses the two fails.
fn block_key(hash: u64) -> BlockKey {
    BlockKey(mix(hash))
}

/// The sockets. They are closed some time after this value is dropped; [`close`](Self::close) waits
/// until they are.
#[derive(Debug)]
pub(crate) struct Publication {
    stop: watch::Sender<bool>,
    sockets: JoinSet<()>,
    published: Arc<AtomicU64>,
}

impl Publication {
    /// Binds the sockets and starts the tasks that serve them. The replay socket is optional. A
    /// file that a killed engine left at an `ipc://` address is removed first.
    ///
    /// # Errors
    /// If an address is in use or invalid. The message names the address.
    pub(crate) async fn open(config: KvEventsConfig) -> io::Result<(Self, Publisher)> {
        let bind_error = |endpoint: &str, error: ZmqError| {
            io::Error::other(format!("cannot publish KV events at {endpoint}: {error}"))
        };
        let (stop, stopped) = watch::channel(false);
        let kept = Kept::default();
        let topic = Bytes::from(config.topic.clone());
        let mut sockets = JoinSet::new();

        let mut publisher = PubSocket::new();
        remove_stale_socket(&config.endpoint);
        let bound = publisher.bind(&config.endpoint).await;
        bound.map_err(|error| bind_error(&config.endpoint, error))?;
        let (outbox, batches) = mpsc::channel(MAX_UNSENT_BATCHES);
        sockets.spawn(send(publisher, topic.clone(), batches, stopped.clone()));

        if let Some(endpoint) = &config.replay {
            let mut router = RouterSocket::new();
            remove_stale_socket(endpoint);
            let bound = router.bind(endpoint).await;
            bound.map_err(|error| bind_error(endpoint, error))?;
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

    /// Returns the counter of published batches, lost ones included.
    pub(crate) fn counter(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.published)
    }

    /// Closes the sockets, so that another engine can bind the same addresses.
    pub(crate) async fn close(mut self) {
        self.stop.send_replace(true);
        while self.sockets.join_next().await.is_some() {}
    }
}

/// Removes the file of an `ipc://` socket that an engine left when it was killed. libzmq does so
/// before it binds; the crate `zeromq` does not. Other addresses, and files that are no sockets,
/// are ignored.
fn remove_stale_socket(endpoint: &str) {
    use std::os::unix::fs::FileTypeExt;
    let Some(path) = endpoint.strip_prefix("ipc://") else {
        return;
    };
    if std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket()) {
        // If this fails, `bind` reports the cause.
        let _ = std::fs::remove_file(path);
    }
}

/// Sends each batch when it is due, until `stopped` becomes true. Then closes the socket; batches
/// that are still waiting are lost. The end of `batches` does not close it.
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
                // A PUB socket never waits, and an error concerns a single subscriber.
                let _ = socket.send(message).await;
            }
        }
        // The engine has stopped. Its sockets stay open until `stopped`.
        std::future::pending::<()>().await;
    };
    tokio::select! {
        _ = stopped.wait_for(|stopped| *stopped) => {}
        () = sending => {}
    }
    socket.close().await;
}

/// Responds to replay requests until `stopped` becomes true, then closes the socket. A response
/// consists of the kept batches from the requested number on, and the end marker. Malformed
/// requests get no response.
async fn replay(
    mut socket: RouterSocket,
    topic: Bytes,
    kept: Kept,
    mut stopped: watch::Receiver<bool>,
) {
    let responding = async {
        while let Ok(request) = socket.recv().await {
            let frames = request.into_vec();
            let Some((client, request)) = frames.split_first() else {
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
            let responses = again
                .iter()
                .map(|batch| [&[Bytes::new()][..], &batch.frames(&topic)].concat());
            let end = replay_end().map(Bytes::from).to_vec();
            for response in responses.chain([end]) {
                let mut frames = vec![client.clone()];
                frames.extend(response);
                let Ok(message) = ZmqMessage::try_from(frames) else {
                    break;
                };
                // An error means that the client has disconnected.
                if socket.send(message).await.is_err() {
                    break;
                }
            }
        }
    };
    tokio::select! {
        _ = stopped.wait_for(|stopped| *stopped) => {}
        () = responding => {}
    }
    socket.close().await;
}
