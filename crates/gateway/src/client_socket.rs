//! Socket of a client with its deadlines: for the head of a request, between requests, and for a
//! client that does not read; and the orderly ends of a connection.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf, Take};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep};

use crate::connection_state::{ConnectionConfig, ConnectionState, RequestStage};
use crate::shutdown::ShutdownPhase;
use crate::tcp_timeouts::{KEEPALIVE_INTERVAL, KEEPALIVE_PROBES, USER_TIMEOUT};
use crate::tls::ClientStream;

/// Maximum number of bytes of one read. The HTTP library enlarges its buffer after a read of 8 KiB or
/// more, and keeps it until the connection ends. A long prompt would double the memory of a stream.
const MAX_READ_BYTES: u64 = 8191;

/// Maximum number of bytes in the kernel's queue beyond the free room of the client.
/// It bounds the kernel's memory for a client that does not read, and each part of that size that the
/// client reads is noticed as progress.
const MAX_UNSENT_BYTES: u32 = 32 << 10;

/// Maximum time for a client to close its side after the gateway has closed its own. Bytes that the
/// client sends in that time are discarded. Without it, they would reset the connection, and the
/// client could lose the last response.
const LINGER_TIMEOUT: Duration = Duration::from_secs(1);

/// Maximum time without a request on an open connection once no connection is accepted any more.
const DRAIN_IDLE_TIMEOUT: Duration = Duration::from_secs(1);

/// Number of reads that are repeated after the client has closed its side, before its request's body
/// counts as incomplete. The gateway may not have taken the last part of the body yet.
const MAX_REPEATED_READS: u8 = 3;

/// First and longest time between two checks whether a client that has closed its side still reads.
const FIRST_CHECK_INTERVAL: Duration = Duration::from_millis(5);
const MAX_CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Sets the TCP options of a client's connection. Errors are logged and have no other effect.
///
/// The kernel also ends a connection whose client acknowledges probes but keeps its window closed for
/// the user timeout. That is the case of `write_timeout`, so the user timeout is at least as long.
pub(crate) fn set_tcp_options(stream: &TcpStream, write_timeout: Duration) {
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE_INTERVAL)
        .with_interval(KEEPALIVE_INTERVAL)
        .with_retries(KEEPALIVE_PROBES);
    let socket = SockRef::from(stream);
    // Without TCP_NODELAY, small events would wait for the acknowledgement of earlier ones.
    let set = stream
        .set_nodelay(true)
        .and_then(|()| socket.set_tcp_keepalive(&keepalive));
    #[cfg(target_os = "linux")]
    let set = set
        .and_then(|()| socket.set_tcp_user_timeout(Some(write_timeout.max(USER_TIMEOUT))))
        .and_then(|()| socket.set_tcp_notsent_lowat(MAX_UNSENT_BYTES));
    #[cfg(not(target_os = "linux"))]
    let _ = (write_timeout, USER_TIMEOUT, MAX_UNSENT_BYTES);
    if let Err(error) = set {
        tracing::debug!(%error, "cannot set a TCP option");
    }
}

/// Reason for a read deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ReadWait {
    /// The head of a request is incomplete.
    Head,
    /// The connection has no request.
    Idle,
    /// The connection has no request, and the gateway shuts down.
    Drain,
}

/// A client that has closed its side of the connection and may still read the response.
#[derive(Debug)]
struct HalfClosed {
    /// Time of the next check.
    next_check: Pin<Box<Sleep>>,
    /// Time between the next check and the one after it.
    interval: Duration,
}

/// Socket of a client.
#[derive(Debug)]
pub(crate) struct ClientSocket<S> {
    /// Limited to [`MAX_READ_BYTES`] for each read.
    stream: Take<S>,
    config: ConnectionConfig,
    state: Arc<ConnectionState>,
    /// Number of requests at the latest read. If it has changed, a head was completed since.
    requests: u32,
    /// Number of requests when the task was last woken because a response was complete.
    completed_requests: u32,
    /// Whether a part of the next request's head has arrived.
    has_partial_head: bool,
    /// Deadline of the next byte, and its reason. Boxed, as are the other timers, because a running
    /// stream needs none of them.
    read_deadline: Option<(ReadWait, Pin<Box<Sleep>>)>,
    /// Deadline of the blocked write; `None` if no write is blocked.
    write_deadline: Option<Pin<Box<Sleep>>>,
    /// Whether the blocked write is a flush.
    is_flush_blocked: bool,
    half_closed: Option<HalfClosed>,
    /// End of the time for the client to close its side; `None` until the gateway has closed its own.
    linger: Option<Pin<Box<Sleep>>>,
    /// Whether the client has closed its side.
    has_ended: bool,
    /// Number of reads that were repeated since then.
    repeated_reads: u8,
}

impl<S: ClientStream> ClientSocket<S> {
    /// Creates a socket without deadlines from a connected stream.
    pub(crate) fn new(stream: S, config: ConnectionConfig, state: Arc<ConnectionState>) -> Self {
        Self {
            stream: stream.take(MAX_READ_BYTES),
            config,
            state,
            requests: 0,
            completed_requests: 0,
            has_partial_head: false,
            read_deadline: None,
            write_deadline: None,
            is_flush_blocked: false,
            half_closed: None,
            linger: None,
            has_ended: false,
            repeated_reads: 0,
        }
    }

    /// Polls the deadline of a read that found nothing. A running request has none here. An idle
    /// connection ends with the deadline as if the client had closed it; an incomplete head is an
    /// error.
    fn poll_read_deadline(
        &mut self,
        stage: RequestStage,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        // The end of a response may still be waiting to be written.
        if stage != RequestStage::Idle || self.write_deadline.is_some() {
            return Poll::Pending;
        }
        let phase = self.state.shutdown.phase();
        if phase >= ShutdownPhase::Aborting {
            return Poll::Ready(Ok(()));
        }
        let (wait, limit) = if self.has_partial_head {
            (ReadWait::Head, self.config.head_timeout)
        } else if phase >= ShutdownPhase::Draining {
            let limit = DRAIN_IDLE_TIMEOUT.min(self.config.idle_timeout);
            (ReadWait::Drain, limit)
        } else {
            (ReadWait::Idle, self.config.idle_timeout)
        };
        let deadline = match &mut self.read_deadline {
            Some((present, deadline)) if *present == wait => deadline,
            other => &mut other.insert((wait, Box::pin(sleep(limit)))).1,
        };
        ready!(deadline.as_mut().poll(context));
        match wait {
            ReadWait::Head => {
                let message = "the head of a request did not arrive in time";
                Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, message)))
            }
            ReadWait::Idle | ReadWait::Drain => Poll::Ready(Ok(())),
        }
    }

    /// Handles the end of the client's side of the connection. Returns `Pending` if the client may
    /// still read the response to its complete request, and otherwise the end.
    ///
    /// TCP does not tell a client that has only finished sending from one that has closed the
    /// connection, until it receives a byte: in the latter case, its system resets the connection.
    /// So the gateway sends bytes that have no meaning: an interim response, or a leading zero of
    /// the next chunk's size.
    fn begin_half_close(
        &mut self,
        stage: RequestStage,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        self.has_ended = true;
        if stage == RequestStage::Receiving && self.repeated_reads < MAX_REPEATED_READS {
            self.repeated_reads += 1;
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        let probe: &[u8] = match stage {
            RequestStage::Waiting => b"HTTP/1.1 100 Continue\r\n\r\n",
            RequestStage::SendingChunks => b"0",
            // TCP's keepalive probes will find a closed connection.
            RequestStage::WaitingOverHttp10 => b"",
            RequestStage::Idle | RequestStage::Receiving | RequestStage::Sending => {
                return Poll::Ready(Ok(()));
            }
        };
        // A blocked write is a probe itself, and may have ended in the middle of a chunk.
        if self.write_deadline.is_none() && !probe.is_empty() {
            let stream = Pin::new(self.stream.get_mut());
            if let Poll::Ready(written) = stream.poll_write(context, probe)
                && written? < probe.len()
            {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
        }
        self.half_closed = Some(HalfClosed {
            next_check: Box::pin(sleep(FIRST_CHECK_INTERVAL)),
            interval: FIRST_CHECK_INTERVAL,
        });
        self.poll_half_closed(stage, context)
    }

    /// Returns the error of a half-closed connection if the client has closed it altogether, and
    /// the end once the response is complete.
    fn poll_half_closed(
        &mut self,
        stage: RequestStage,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        if stage == RequestStage::Idle {
            return Poll::Ready(Ok(()));
        }
        let socket = SockRef::from(self.stream.get_ref().tcp());
        let Some(half_closed) = &mut self.half_closed else {
            return Poll::Pending;
        };
        loop {
            ready!(half_closed.next_check.as_mut().poll(context));
            if let Some(error) = socket.take_error()? {
                return Poll::Ready(Err(error));
            }
            half_closed.interval = (half_closed.interval * 2).min(MAX_CHECK_INTERVAL);
            let next = Instant::now() + half_closed.interval;
            half_closed.next_check.as_mut().reset(next);
        }
    }

    /// Returns the result of a write, and an error if the client has taken nothing for the write
    /// timeout.
    fn check_write(
        &mut self,
        written: Poll<io::Result<usize>>,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        if written.is_ready() {
            self.write_deadline = None;
            return written;
        }
        let limit = self.config.write_timeout;
        let deadline = self
            .write_deadline
            .get_or_insert_with(|| Box::pin(sleep(limit)));
        ready!(deadline.as_mut().poll(context));
        let message = "the client does not read its response";
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, message)))
    }
}

impl<S: ClientStream> AsyncRead for ClientSocket<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let socket = &mut *self;
        let stage = socket.state.stage();
        if socket.half_closed.is_some() {
            return socket.poll_half_closed(stage, context);
        }
        let requests = socket.state.requests();
        if stage != RequestStage::Idle || requests != socket.requests {
            socket.requests = requests;
            socket.has_partial_head = false;
            socket.read_deadline = None;
        }
        let filled = buffer.filled().len();
        socket.stream.set_limit(MAX_READ_BYTES);
        match Pin::new(&mut socket.stream).poll_read(context, buffer) {
            Poll::Pending => socket.poll_read_deadline(stage, context),
            Poll::Ready(Ok(())) if buffer.filled().len() == filled => {
                socket.begin_half_close(stage, context)
            }
            Poll::Ready(Ok(())) => {
                socket.has_partial_head = stage == RequestStage::Idle;
                Poll::Ready(Ok(()))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
        }
    }
}

impl<S: ClientStream> AsyncWrite for ClientSocket<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(self.stream.get_mut()).poll_write(context, bytes);
        self.check_write(written, context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(self.stream.get_mut()).poll_write_vectored(context, slices);
        self.check_write(written, context)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Called once all bytes are written. If they complete a response, wakes the task, because the
    /// HTTP library does not read again before the socket is readable, and only a read sets the
    /// deadline of an idle connection.
    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let requests = self.state.requests();
        if requests != self.completed_requests && self.state.stage() == RequestStage::Idle {
            self.completed_requests = requests;
            context.waker().wake_by_ref();
        }
        // TLS encrypts a write at once, and may have to wait until the client takes it.
        match Pin::new(self.stream.get_mut()).poll_flush(context) {
            Poll::Pending => {
                self.is_flush_blocked = true;
                self.check_write(Poll::Pending, context).map_ok(|_| ())
            }
            flushed => {
                if std::mem::take(&mut self.is_flush_blocked) {
                    self.write_deadline = None;
                }
                flushed
            }
        }
    }

    /// Closes the gateway's side, and waits at most [`LINGER_TIMEOUT`] for the client to close its
    /// own. Discards what the client sends meanwhile.
    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let socket = &mut *self;
        if socket.linger.is_none() {
            ready!(Pin::new(socket.stream.get_mut()).poll_shutdown(context))?;
        }
        let is_aborted = socket.state.shutdown.must_abort();
        let linger = socket
            .linger
            .get_or_insert_with(|| Box::pin(sleep(LINGER_TIMEOUT)));
        let mut discarded = [0; 1024];
        while !socket.has_ended && !is_aborted && linger.as_mut().poll(context).is_pending() {
            let mut buffer = ReadBuf::new(&mut discarded);
            let read = Pin::new(socket.stream.get_mut()).poll_read(context, &mut buffer);
            // An error ends the connection as well.
            socket.has_ended = ready!(read).is_err() || buffer.filled().is_empty();
        }
        Poll::Ready(Ok(()))
    }
}
