//! Phases of a shutdown, and the signal through which connections and requests follow them.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use foresee_engine::error::ApiError;
use tokio::sync::watch;

/// The `code` of the error response to a request that the gateway cannot serve because it shuts down.
pub(crate) const SHUTTING_DOWN: &str = "shutting_down";

/// How a gateway shuts down, apart from the time for running responses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShutdownConfig {
    /// Time from the announcement of a shutdown, which makes the readiness checks fail, until the
    /// gateway accepts no further connection. Load balancers need it to notice.
    pub delay: Duration,
}

impl Default for ShutdownConfig {
    fn default() -> Self {
        Self {
            delay: Duration::from_secs(5),
        }
    }
}

/// Phases of a listener's life, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum ShutdownPhase {
    /// Connections are accepted and requests are served.
    Running,
    /// Readiness checks fail, and each response closes its connection. Everything else works as
    /// before.
    Announced,
    /// No further connection is accepted. Running requests, and the first request of each
    /// connection, are served.
    Draining,
    /// Running requests end now: a stream with an error event, a request without a response with a
    /// 503.
    Aborting,
    /// Remaining connections are closed.
    Closed,
}

impl ShutdownPhase {
    /// All phases, in order.
    const ALL: [Self; 5] = [
        Self::Running,
        Self::Announced,
        Self::Draining,
        Self::Aborting,
        Self::Closed,
    ];
}

/// The phase of a shutdown, shared by all connections of a listener. Reading it takes no lock, so it
/// can be read for each part of a response.
#[derive(Debug)]
pub(crate) struct ShutdownSignal {
    /// Number of the phase in `changes`.
    phase: AtomicU8,
    /// Wakes the tasks that wait for a phase.
    changes: watch::Sender<ShutdownPhase>,
}

impl ShutdownSignal {
    /// Creates a signal in the phase [`Running`](ShutdownPhase::Running).
    pub(crate) fn new() -> Self {
        Self {
            phase: AtomicU8::new(ShutdownPhase::Running as u8),
            changes: watch::Sender::new(ShutdownPhase::Running),
        }
    }

    /// Enters a phase and wakes all tasks that wait for it. An earlier phase than the present one is
    /// ignored.
    pub(crate) fn advance(&self, phase: ShutdownPhase) {
        self.phase.fetch_max(phase as u8, Ordering::Release);
        self.changes.send_if_modified(|current| {
            let is_later = phase > *current;
            *current = phase.max(*current);
            is_later
        });
    }

    /// Returns the present phase.
    pub(crate) fn phase(&self) -> ShutdownPhase {
        let number = usize::from(self.phase.load(Ordering::Acquire));
        ShutdownPhase::ALL
            .get(number)
            .copied()
            .unwrap_or(ShutdownPhase::Closed)
    }

    /// Returns whether a shutdown has begun, so that readiness checks must fail.
    pub(crate) fn has_begun(&self) -> bool {
        self.phase() >= ShutdownPhase::Announced
    }

    /// Returns whether running responses must end now.
    pub(crate) fn must_abort(&self) -> bool {
        self.phase() >= ShutdownPhase::Aborting
    }

    /// Returns a receiver whose `changed` completes with each later phase.
    pub(crate) fn subscribe(&self) -> watch::Receiver<ShutdownPhase> {
        self.changes.subscribe()
    }

    /// Waits until `phase` or a later one is reached.
    pub(crate) async fn reached(&self, phase: ShutdownPhase) {
        let mut changes = self.changes.subscribe();
        // The sender exists as long as `self`, so the wait cannot fail.
        let _ = changes.wait_for(|current| *current >= phase).await;
    }

    /// Runs `request` unless responses must end. Then, drops it and returns the error response.
    ///
    /// The returned future does not wake itself when the phase changes: the task of a connection
    /// polls its request at each change.
    pub(crate) fn unless_aborting<F>(&self, request: F) -> UnlessAborting<'_, F> {
        UnlessAborting {
            signal: self,
            request: Box::pin(request),
        }
    }
}

/// Future of [`ShutdownSignal::unless_aborting`].
#[derive(Debug)]
pub(crate) struct UnlessAborting<'s, F> {
    signal: &'s ShutdownSignal,
    /// Boxed, so that the memory is free once the request has its response.
    request: Pin<Box<F>>,
}

impl<T, F: Future<Output = Result<T, ApiError>>> Future for UnlessAborting<'_, F> {
    type Output = Result<T, ApiError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if self.signal.must_abort() {
            return Poll::Ready(Err(shutting_down()));
        }
        self.request.as_mut().poll(context)
    }
}

/// Returns the error response to a request that the gateway cannot serve because it shuts down.
pub(crate) fn shutting_down() -> ApiError {
    ApiError {
        code: Some(SHUTTING_DOWN),
        retry_after: Some(Duration::from_secs(1)),
        ..ApiError::unavailable("The router is shutting down. Send the request again.")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_advance_in_order_and_never_back() {
        let signal = ShutdownSignal::new();
        for phase in ShutdownPhase::ALL {
            signal.advance(phase);
            assert_eq!(signal.phase(), phase);
            assert_eq!(*signal.subscribe().borrow(), phase);
            signal.advance(ShutdownPhase::Running);
            assert_eq!(signal.phase(), phase);
        }
    }
}
