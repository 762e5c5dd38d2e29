//! ZeroMQ sockets of a subscription: live messages through a bounded queue, and one exchange with a
//! replay socket.
//!
//! The crate `zeromq` reconnects a SUB socket by itself, with delays that grow to 30 s and cannot be
//! configured, and does not say which peer sent a message. So a [`Feed`] ends when its connection is
//! lost, and its owner decides when to open another.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use foresee_engine::kv_events::{Message, Replay, parse_message, parse_replay, replay_request};
use futures_util::StreamExt;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use zeromq::{
    DealerSocket, Socket, SocketEvent, SocketRecv, SocketSend, SubSocket, ZmqError, ZmqMessage,
};

use crate::kv_events::source::EventSource;

/// Maximum number of messages that wait to be decoded. Further messages are dropped; the
/// subscription then sees a gap and asks for a replay.
const MAX_QUEUED_MESSAGES: usize = 4096;
/// Maximum size of the messages that wait to be decoded, in bytes; see [`MAX_QUEUED_MESSAGES`].
const MAX_QUEUED_BYTES: usize = 64 << 20;

/// Time limit of a connection attempt, handshake included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Time limit of a replay's first batch. Engines serve replays between two steps.
const REPLAY_TIMEOUT: Duration = Duration::from_secs(5);

/// Time limit of each further batch of a replay. Engines send them in one burst.
const NEXT_REPLAY_TIMEOUT: Duration = Duration::from_secs(1);

/// Maximum time of a whole replay, during which no live event is applied.
const MAX_REPLAY_TIME: Duration = Duration::from_secs(60);

/// Maximum number of batches of one replay: twice what engines keep.
const MAX_REPLAYED_BATCHES: usize = 20_000;

/// Why a socket could not be opened, or a replay did not complete.
#[derive(Debug, thiserror::Error)]
pub(super) enum SocketError {
    /// The connection attempt or the replay exceeded its time limit.
    #[error("timed out")]
    TimedOut,
    /// ZeroMQ reported an error.
    #[error("{0}")]
    Zmq(#[from] ZmqError),
    /// A replay had more than [`MAX_REPLAYED_BATCHES`] batches.
    #[error("replay has more batches than an engine keeps")]
    Endless,
}

/// An event that a [`Feed`] delivers.
#[derive(Debug)]
pub(super) enum FeedEvent {
    /// A connection was made.
    Connected,
    /// The connection was lost. A socket that connects delivers nothing after this; a socket that
    /// binds can be connected to again.
    Disconnected,
    /// The frames of one message, to be read with [`read_message`].
    Frames(Vec<Bytes>),
}

/// A SUB socket, read by a task of its own, so that the socket never waits for the decoder.
#[derive(Debug)]
pub(super) struct Feed {
    events: mpsc::Receiver<FeedEvent>,
    /// Bytes of the messages in `events`, for [`MAX_QUEUED_BYTES`].
    queued_bytes: Arc<AtomicUsize>,
    /// Task that reads the socket; ends with the feed.
    reader: JoinHandle<()>,
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Feed {
    /// Opens a SUB socket: connects to the worker, or binds if the worker connects. Fails if no
    /// connection is established in time; a socket that binds does not wait for one. Messages of
    /// other topics, and messages beyond the limits of the queue, are dropped. Must be called
    /// inside a tokio runtime.
    pub(super) async fn open(source: &EventSource) -> Result<Self, SocketError> {
        let mut socket = SubSocket::new();
        // Created first, so that it reports the first connection too.
        let mut monitor = socket.monitor();
        socket.subscribe(&source.topic).await?;
        if source.binds {
            remove_stale_socket(&source.endpoint);
            socket.bind(&source.endpoint).await?;
        } else {
            // `connect` retries until it is dropped.
            let connected = timeout(CONNECT_TIMEOUT, socket.connect(&source.endpoint)).await;
            connected.map_err(|_| SocketError::TimedOut)??;
        }
        let (sender, events) = mpsc::channel(MAX_QUEUED_MESSAGES);
        let queued_bytes = Arc::<AtomicUsize>::default();
        let queued = Arc::clone(&queued_bytes);
        let topic = source.topic.clone();
        let reader = tokio::spawn(async move {
            loop {
                let event = tokio::select! {
                    Some(event) = monitor.next() => match event {
                        SocketEvent::Connected(..) | SocketEvent::Accepted(..) => {
                            FeedEvent::Connected
                        }
                        SocketEvent::Disconnected(_) => FeedEvent::Disconnected,
                        _ => continue,
                    },
                    received = socket.recv() => {
                        // After an error the monitor reports that the connection ended.
                        let Ok(message) = received else { continue };
                        let frames = message.into_vec();
                        // ZeroMQ also delivers topics that only begin with the subscribed one.
                        if !topic.is_empty() && frames.first().is_none_or(|first| *first != topic) {
                            continue;
                        }
                        let bytes = size_of(&frames);
                        let before = queued.fetch_add(bytes, Ordering::Relaxed);
                        if before + bytes > MAX_QUEUED_BYTES
                            || sender.try_send(FeedEvent::Frames(frames)).is_err()
                        {
                            queued.fetch_sub(bytes, Ordering::Relaxed);
                        }
                        continue;
                    }
                };
                if sender.send(event).await.is_err() {
                    return;
                }
            }
        });
        Ok(Self {
            events,
            queued_bytes,
            reader,
        })
    }

    /// Waits for the next event. Returns [`FeedEvent::Disconnected`] if the reader has ended.
    pub(super) async fn next(&mut self) -> FeedEvent {
        let event = self.events.recv().await.unwrap_or(FeedEvent::Disconnected);
        if let FeedEvent::Frames(frames) = &event {
            self.queued_bytes
                .fetch_sub(size_of(frames), Ordering::Relaxed);
        }
        event
    }
}

/// Removes the socket file of an `ipc://` endpoint, so that it can be bound. Has no effect for
/// other endpoints, or if the path is not a socket.
///
/// A process that is killed leaves the file behind, and binding then fails. libzmq removes the file
/// before it binds; the crate `zeromq` does not.
fn remove_stale_socket(endpoint: &str) {
    use std::os::unix::fs::FileTypeExt;
    let Some(path) = endpoint.strip_prefix("ipc://") else {
        return;
    };
    if std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket()) {
        // If the file cannot be removed, binding reports the error.
        let _ = std::fs::remove_file(path);
    }
}

/// Returns the total size of `frames` in bytes.
fn size_of(frames: &[Bytes]) -> usize {
    frames.iter().map(Bytes::len).sum()
}

/// Parses the frames of a live message. Returns `None` if they are not an event batch.
pub(super) fn read_message(frames: &[Bytes]) -> Option<Message<'_>> {
    parse_message(frames).ok()
}

/// Requests all batches from sequence number `from` on, and calls `accept` with each until it
/// returns `false`. Returns the number of batches received.
///
/// A ROUTER socket drops messages that its peer does not read fast enough; of a thousand batches or
/// more that includes the end marker. So a replay that breaks off is requested again from the next
/// missing batch.
///
/// The first batch has a higher number than `from` if the engine no longer keeps earlier ones.
/// Unreadable messages are skipped. If the replay fails, the batches that `accept` has received are
/// not taken back.
pub(super) async fn replay(
    endpoint: &str,
    from: u64,
    mut accept: impl FnMut(&Message<'_>) -> bool,
) -> Result<usize, SocketError> {
    let (mut next, mut count) = (from, 0);
    let mut socket = request_replay(endpoint, next).await?;
    let mut has_batch = false;
    let began = Instant::now();
    for _ in 0..MAX_REPLAYED_BATCHES {
        if began.elapsed() > MAX_REPLAY_TIME {
            return Err(SocketError::TimedOut);
        }
        let time_limit = match has_batch {
            true => NEXT_REPLAY_TIMEOUT,
            false => REPLAY_TIMEOUT,
        };
        let breaks_off = match timeout(time_limit, socket.recv()).await {
            Err(_) if !has_batch => return Err(SocketError::TimedOut),
            Err(_) => true,
            Ok(reply) => match parse_replay(&reply?.into_vec()) {
                // The first batch may have a higher number than requested: the oldest one that the
                // engine still keeps. A later jump means that batches were dropped.
                Ok(Replay::Batch(message)) if has_batch && message.sequence > next => true,
                Ok(Replay::Batch(message)) => {
                    has_batch = true;
                    count += 1;
                    next = next.max(message.sequence.saturating_add(1));
                    if !accept(&message) {
                        return Ok(count);
                    }
                    false
                }
                Ok(Replay::End) => return Ok(count),
                Err(error) => {
                    tracing::debug!(endpoint, %error, "ignoring an unreadable replay message");
                    false
                }
            },
        };
        if breaks_off {
            tracing::debug!(
                endpoint,
                next,
                "replay of KV events broke off; requesting the rest"
            );
            socket = request_replay(endpoint, next).await?;
            has_batch = false;
        }
    }
    Err(SocketError::Endless)
}

/// Connects to a replay socket and requests the batches from sequence number `from` on.
async fn request_replay(endpoint: &str, from: u64) -> Result<DealerSocket, SocketError> {
    let mut socket = DealerSocket::new();
    let connected = timeout(CONNECT_TIMEOUT, socket.connect(endpoint)).await;
    connected.map_err(|_| SocketError::TimedOut)??;
    let request = replay_request(from).map(Bytes::from).to_vec();
    let request = ZmqMessage::try_from(request).map_err(|_| ZmqError::NoMessage)?;
    socket.send(request).await?;
    Ok(socket)
}
