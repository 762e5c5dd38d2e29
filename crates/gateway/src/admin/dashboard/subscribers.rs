//! Open streams of server-sent events.
//!
//! Every stream has a short queue of events, which share their bytes. A subscriber whose queue is full
//! does not read: it is removed, and its connection is closed.

use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::mpsc;

use super::super::event_stream::EventStream;
use super::super::listener::ConnectionCloser;
use crate::placement::decision_log::Viewer;

/// Maximum number of streams. Further ones are refused, so that probes and scrapers find connections.
const MAX_SUBSCRIBERS: usize = 32;

/// Number of events that wait for a subscriber: seconds for which it may be behind.
const QUEUE_LEN: usize = 8;

/// Time after which a stream ends. The page then opens another. Shorter than the maximum age of a
/// connection.
const MAX_STREAM_AGE: Duration = Duration::from_secs(240);

/// Open streams.
#[derive(Debug, Default)]
pub(super) struct Subscribers(Mutex<Vec<Subscriber>>);

/// One open stream.
#[derive(Debug)]
struct Subscriber {
    events: mpsc::Sender<Bytes>,
    /// Closes the subscriber's connection.
    connection: Option<ConnectionCloser>,
    /// When the stream ends, by the gateway's clock.
    ends_at: Duration,
    /// Makes the log record more decisions.
    _viewer: Viewer,
}

impl Subscribers {
    /// Returns whether there is no stream.
    pub(super) fn is_empty(&self) -> bool {
        self.0.lock().is_empty()
    }

    /// Returns whether there can be one more stream. Streams are added under the lock of the
    /// dashboard's state, so the answer holds until that is released.
    pub(super) fn has_room(&self) -> bool {
        self.0.lock().len() < MAX_SUBSCRIBERS
    }

    /// Adds a stream that begins with `first`, at `now`.
    pub(super) fn add(
        &self,
        first: Bytes,
        connection: Option<ConnectionCloser>,
        viewer: Viewer,
        now: Duration,
    ) -> EventStream {
        let (events, receiver) = mpsc::channel(QUEUE_LEN);
        self.0.lock().push(Subscriber {
            events,
            connection,
            ends_at: now + MAX_STREAM_AGE,
            _viewer: viewer,
        });
        EventStream::new(first, receiver)
    }

    /// Sends an event to all subscribers. Removes the ones that are gone, too old or too slow, and
    /// closes the connections of the last. Returns the number of those that were too slow.
    pub(super) fn send(&self, event: &Bytes, now: Duration) -> usize {
        let mut shed = 0;
        self.0.lock().retain(|subscriber| {
            if subscriber.ends_at <= now {
                return false;
            }
            match subscriber.events.try_send(event.clone()) {
                Ok(()) => true,
                Err(mpsc::error::TrySendError::Closed(_)) => false,
                Err(mpsc::error::TrySendError::Full(_)) => {
                    if let Some(connection) = &subscriber.connection {
                        connection.close();
                    }
                    shed += 1;
                    false
                }
            }
        });
        shed
    }

    /// Ends all streams.
    pub(super) fn clear(&self) {
        self.0.lock().clear();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Instant;

    use http::{Request, Response};
    use http_body_util::Either;
    use hyper::body::Incoming;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;
    use tokio::sync::watch;

    use super::super::super::listener::AdminListener;
    use super::super::super::settings::AdminListen;
    use super::*;
    use crate::placement::decision_log::DecisionLog;

    /// A subscriber that reads nothing is removed, and its connection is closed although bytes for it
    /// are waiting. One that reads gets all events.
    #[tokio::test]
    async fn a_subscriber_that_does_not_read_is_shed() {
        let subscribers = Arc::new(Subscribers::default());
        let log = Arc::new(DecisionLog::default());
        let listen: AdminListen = "127.0.0.1:0".parse().unwrap();
        let listener = AdminListener::open(None, &listen).unwrap().unwrap();
        let AdminListen::Tcp(address) = listener.address().unwrap() else {
            panic!("not a TCP address");
        };
        let (stop, stopped) = watch::channel(false);
        let added = Arc::clone(&subscribers);
        let handle = move |request: Request<Incoming>| {
            let connection = request.extensions().get::<ConnectionCloser>().cloned();
            assert!(connection.is_some());
            let first = Bytes::from_static(b"first");
            let stream = added.add(first, connection, log.watch(), Duration::ZERO);
            async { Response::new(Either::Right(stream)) }
        };
        let serving = tokio::spawn(listener.serve(stopped, Duration::ZERO, None, handle));
        let mut clients = Vec::new();
        for _ in 0..2 {
            let mut client = TcpStream::connect(address).await.unwrap();
            client
                .write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
                .await
                .unwrap();
            clients.push(client);
        }
        let (mut slow, mut fast) = (clients.pop().unwrap(), clients.pop().unwrap());
        let mut head = [0; 12];
        for client in [&mut slow, &mut fast] {
            client.read_exact(&mut head).await.unwrap();
            assert_eq!(&head, b"HTTP/1.1 200");
        }
        let reading = tokio::spawn(async move {
            let mut bytes = Vec::new();
            fast.read_to_end(&mut bytes).await.unwrap();
            bytes.iter().filter(|byte| **byte == b'x').count()
        });
        let event = Bytes::from(vec![b'x'; 1 << 20]);
        let (started, mut sent) = (Instant::now(), 0);
        while subscribers.send(&event, Duration::ZERO) == 0 {
            sent += 1;
            assert!(
                started.elapsed() < Duration::from_secs(20),
                "not shed after {sent} MiB"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(subscribers.0.lock().len(), 1, "the one that reads stays");
        // The connection ends, before all that was sent.
        let mut bytes = Vec::new();
        let read = tokio::time::timeout(Duration::from_secs(10), slow.read_to_end(&mut bytes));
        let _ = read.await.expect("the connection is closed");
        assert!(bytes.len() < sent << 20);

        // Streams end at their age.
        subscribers.send(&event, MAX_STREAM_AGE);
        assert!(subscribers.is_empty());
        assert!(reading.await.unwrap() >= sent << 20);
        stop.send_replace(true);
        serving.await.unwrap();
    }
}
