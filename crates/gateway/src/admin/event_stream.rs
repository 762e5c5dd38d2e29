//! Body of a stream of server-sent events.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::body::{Body, Frame};
use tokio::sync::mpsc;

/// Body that consists of a first event and of those that a channel receives.
#[derive(Debug)]
pub(crate) struct EventStream {
    /// First event, until it is sent.
    first: Option<Bytes>,
    receiver: mpsc::Receiver<Bytes>,
}

impl EventStream {
    /// Returns a body that begins with `first`, and ends when the sender of `receiver` is dropped.
    pub(super) fn new(first: Bytes, receiver: mpsc::Receiver<Bytes>) -> Self {
        Self {
            first: Some(first),
            receiver,
        }
    }
}

impl Body for EventStream {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(Ok(Frame::data(first))));
        }
        let event = self.receiver.poll_recv(context);
        event.map(|event| event.map(|event| Ok(Frame::data(event))))
    }
}
