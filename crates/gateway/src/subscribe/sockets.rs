//! The sockets: live messages through a bounded queue, and one exchange with a replay socket.
//!
//! The crate `zeromq` reconnects a SUB socket by itself, with pauses that grow to 30 s and cannot
//! be set, and without saying from which peer a message comes. So a lost connection ends the
//! socket here, and whoever opened it opens another, when it likes.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use foresee_engine::kv_events::{Message, Replay, parse_message, parse_replay, replay_request};
use futures_util::StreamExt;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use zeromq::{
    DealerSocket, Socket, SocketEvent, SocketRecv, SocketSend, SubSocket, ZmqError, ZmqMessage,
};

use crate::subscribe::source::EventSource;

/// Messages, and their bytes, that may wait to be decoded. What comes on top is left out, which
/// shows as a gap, which is replayed.
const MOST_WAITING: usize = 4096;
const MOST_WAITING_BYTES: usize = 64 << 20;

/// How long a connection and its handshake may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a replay socket may take for one answer. Engines answer between two steps.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// How long it may take for the next. They come in one burst.
const NEXT_ANSWER_TIMEOUT: Duration = Duration::from_secs(1);

/// Answers one replay may have: twice what engines keep.
const MOST_ANSWERS: usize = 20_000;

/// Why there is no socket, or no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum SocketError {
    #[error("no answer in time")]
    Late,
    #[error("{0}")]
    Zmq(#[from] ZmqError),
    #[error("more answers than an engine keeps")]
    Endless,
}

/// What a subscription hears.
#[derive(Debug)]
pub(super) enum Heard {
    Connected,
    /// With a socket that connects, nothing comes after this.
    Disconnected,
    /// Frames, to be read with [`parse_message`].
    Frames(Vec<Bytes>),
}

/// A SUB socket, read by a task of its own so that nothing waits for the decoder.
#[derive(Debug)]
pub(super) struct Feed {
    heard: mpsc::Receiver<Heard>,
    waiting_bytes: Arc<AtomicUsize>,
    reader: JoinHandle<()>,
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Feed {
    /// Connects to the worker, or binds where it dials.
    pub(super) async fn open(source: &EventSource) -> Result<Self, SocketError> {
        let mut socket = SubSocket::new();
        // Before there is anything to hear of.
        let mut monitor = socket.monitor();
        socket.subscribe(&source.topic).await?;
        if source.binds {
            remove_stale_socket(&source.endpoint);
            socket.bind(&source.endpoint).await?;
        } else {
            // It tries again until it is stopped.
            let connected = timeout(CONNECT_TIMEOUT, socket.connect(&source.endpoint)).await;
            connected.map_err(|_| SocketError::Late)??;
        }
        let (outbox, heard) = mpsc::channel(MOST_WAITING);
        let waiting_bytes = Arc::<AtomicUsize>::default();
        let waiting = Arc::clone(&waiting_bytes);
        let topic = source.topic.clone();
        let reader = tokio::spawn(async move {
            loop {
                let heard = tokio::select! {
                    Some(event) = monitor.next() => match event {
                        SocketEvent::Connected(..) | SocketEvent::Accepted(..) => Heard::Connected,
                        SocketEvent::Disconnected(_) => Heard::Disconnected,
                        _ => continue,
                    },
                    received = socket.recv() => {
                        // The monitor tells of the connection that an error ends.
                        let Ok(message) = received else { continue };
                        let frames = message.into_vec();
                        // ZeroMQ passes every topic that begins with the one asked for.
                        if !topic.is_empty() && frames.first().is_none_or(|it| *it != topic) {
                            continue;
                        }
                        let bytes = size_of(&frames);
                        let before = waiting.fetch_add(bytes, Ordering::Relaxed);
                        if before + bytes > MOST_WAITING_BYTES
                            || outbox.try_send(Heard::Frames(frames)).is_err()
                        {
                            waiting.fetch_sub(bytes, Ordering::Relaxed);
                        }
                        continue;
                    }
                };
                if outbox.send(heard).await.is_err() {
                    return;
                }
            }
        });
        Ok(Self {
            heard,
            waiting_bytes,
            reader,
        })
    }

    pub(super) async fn next(&mut self) -> Heard {
        let heard = self.heard.recv().await.unwrap_or(Heard::Disconnected);
        if let Heard::Frames(frames) = &heard {
            self.waiting_bytes
                .fetch_sub(size_of(frames), Ordering::Relaxed);
        }
        heard
    }
}

/// A process that was killed leaves its `ipc://` socket behind, where nobody can bind then.
/// libzmq removes it before it binds; `zeromq` does not.
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

fn size_of(frames: &[Bytes]) -> usize {
    frames.iter().map(Bytes::len).sum()
}

/// Reads frames of a live message. What is no batch is left out.
pub(super) fn read_message(frames: &[Bytes]) -> Option<Message<'_>> {
    parse_message(frames).ok()
}

/// Asks for all batches from a number on, and hands over each until `wanted` says no. Returns how
/// many came.
///
/// A ROUTER socket drops what its peer does not take fast enough, of a thousand answers or more the
/// end included. So what breaks off is asked for again from there.
pub(super) async fn replay(
    endpoint: &str,
    from: u64,
    mut wanted: impl FnMut(&Message<'_>) -> bool,
) -> Result<usize, SocketError> {
    let (mut next, mut count) = (from, 0);
    let mut socket = ask(endpoint, next).await?;
    let mut has_answered = false;
    for _ in 0..MOST_ANSWERS {
        let patience = match has_answered {
            true => NEXT_ANSWER_TIMEOUT,
            false => ANSWER_TIMEOUT,
        };
        let breaks_off = match timeout(patience, socket.recv()).await {
            Err(_) if !has_answered => return Err(SocketError::Late),
            Err(_) => true,
            Ok(answer) => match parse_replay(&answer?.into_vec()) {
                // At first it may be what the engine still keeps.
                Ok(Replay::Batch(message)) if has_answered && message.sequence > next => true,
                Ok(Replay::Batch(message)) => {
                    has_answered = true;
                    count += 1;
                    next = next.max(message.sequence.saturating_add(1));
                    if !wanted(&message) {
                        return Ok(count);
                    }
                    false
                }
                Ok(Replay::End) => return Ok(count),
                Err(error) => {
                    tracing::debug!(endpoint, %error, "an answer to replay is no batch");
                    false
                }
            },
        };
        if breaks_off {
            tracing::debug!(endpoint, next, "a replay broke off and is asked for again");
            socket = ask(endpoint, next).await?;
            has_answered = false;
        }
    }
    Err(SocketError::Endless)
}

async fn ask(endpoint: &str, from: u64) -> Result<DealerSocket, SocketError> {
    let mut socket = DealerSocket::new();
    let connected = timeout(CONNECT_TIMEOUT, socket.connect(endpoint)).await;
    connected.map_err(|_| SocketError::Late)??;
    let request = replay_request(from).map(Bytes::from).to_vec();
    let request = ZmqMessage::try_from(request).map_err(|_| ZmqError::NoMessage)?;
    socket.send(request).await?;
    Ok(socket)
}
