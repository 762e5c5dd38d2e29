//! Body of a worker's response, which drives the connection that it arrives on.

use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use bytes::{Bytes, BytesMut};
use hyper::body::{Body, Frame, Incoming};

use crate::upstream::pool::{ConnectionLease, READ_BUFFER_BYTES};

/// Size of a frame from which no further data is added to it.
const FULL_FRAME_BYTES: usize = 4 * READ_BUFFER_BYTES;

/// Result of polling a body.
type NextFrame = Option<Result<Frame<Bytes>, hyper::Error>>;

/// Body of a worker's response. Each frame has all the data that has arrived, whatever the chunks are
/// that the worker sent it in, up to about [`FULL_FRAME_BYTES`].
///
/// Dropping the body before its end closes the connection.
#[derive(Debug)]
pub(crate) struct UpstreamBody {
    // Is dropped before `lease`, which then knows whether the response is complete.
    incoming: Incoming,
    /// Connection of the response; `None` after the end of the body.
    lease: Option<ConnectionLease>,
    /// Trailers or error that arrived together with the data of the previous frame.
    next: Option<Result<Frame<Bytes>, hyper::Error>>,
}

impl UpstreamBody {
    /// Creates the body of a response that arrives on the connection of `lease`.
    pub(super) fn new(incoming: Incoming, lease: ConnectionLease) -> Self {
        let lease = (!incoming.is_end_stream()).then_some(lease);
        Self {
            incoming,
            lease,
            next: None,
        }
    }

    /// Drives the connection and returns the next part of the body, as the worker sent it. The
    /// connection becomes idle with the end of the body.
    fn poll_part(&mut self, context: &mut Context<'_>) -> Poll<NextFrame> {
        if let Some(lease) = &mut self.lease {
            lease.drive(context);
        }
        let part = Pin::new(&mut self.incoming).poll_frame(context);
        if matches!(part, Poll::Ready(None)) || self.incoming.is_end_stream() {
            self.lease = None;
        }
        part
    }
}

impl Body for UpstreamBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<NextFrame> {
        let body = &mut *self;
        if let Some(next) = body.next.take() {
            return Poll::Ready(Some(next));
        }
        // Only this function takes parts of the body, so the task need not be woken for them.
        let mut unwoken = Context::from_waker(Waker::noop());
        let mut arrived = ArrivedData::None;
        while arrived.len() < FULL_FRAME_BYTES {
            let part = match body.poll_part(&mut unwoken) {
                Poll::Pending if arrived.len() == 0 => match body.poll_part(context) {
                    Poll::Pending => return Poll::Pending,
                    part => part,
                },
                part => part,
            };
            match part {
                Poll::Pending => break,
                Poll::Ready(Some(Ok(frame))) if frame.is_data() => {
                    arrived.add(frame.into_data().unwrap_or_default());
                }
                Poll::Ready(next) if arrived.len() == 0 => return Poll::Ready(next),
                Poll::Ready(next) => {
                    body.next = next;
                    break;
                }
            }
        }
        Poll::Ready(Some(Ok(Frame::data(arrived.into_bytes()))))
    }

    fn is_end_stream(&self) -> bool {
        self.next.is_none() && self.incoming.is_end_stream()
    }
}

/// Data that arrived at once. The first part is not copied unless another one follows.
enum ArrivedData {
    None,
    One(Bytes),
    Joined(BytesMut),
}

impl ArrivedData {
    fn len(&self) -> usize {
        match self {
            Self::None => 0,
            Self::One(data) => data.len(),
            Self::Joined(data) => data.len(),
        }
    }

    fn add(&mut self, part: Bytes) {
        match self {
            Self::None => *self = Self::One(part),
            Self::One(first) => {
                let mut joined = BytesMut::with_capacity(READ_BUFFER_BYTES);
                joined.extend_from_slice(first);
                joined.extend_from_slice(&part);
                *self = Self::Joined(joined);
            }
            Self::Joined(joined) => joined.extend_from_slice(&part),
        }
    }

    fn into_bytes(self) -> Bytes {
        match self {
            Self::None => Bytes::new(),
            Self::One(data) => data,
            Self::Joined(data) => data.freeze(),
        }
    }
}
