//! The maximum number of connections of a listener, and of requests on those of HTTP/2.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use foresee_engine::error::ApiError;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;

/// Maximum number of connections above the limit that get a response at a time. Further ones are
/// closed without a response.
const MAX_REFUSALS: usize = 256;

/// Number of connections of a listener, and its maximum. A further request that runs at the same time on
/// a connection of HTTP/2 counts as a connection, because it needs one to a worker.
#[derive(Debug)]
pub(crate) struct ConnectionLimit {
    max: usize,
    open: AtomicUsize,
    /// Number of refusals that are being sent.
    refusals: AtomicUsize,
    /// Gauge of the open connections, for the metrics.
    open_gauge: Gauge,
    /// Counts the connections above the maximum.
    refused_counter: Counter,
}

/// Place of one connection, which dropping it returns.
#[derive(Debug)]
pub(crate) struct Place {
    limit: Arc<ConnectionLimit>,
    kind: PlaceKind,
}

/// Purpose of a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PlaceKind {
    /// A connection that is served.
    Connection,
    /// A further request on a connection of HTTP/2.
    Stream,
    /// A connection that is refused.
    Refusal,
}

impl ConnectionLimit {
    /// Creates a limit of `max` connections that reports to these metrics.
    pub(crate) fn new(max: usize, open_gauge: Gauge, refused_counter: Counter) -> Self {
        Self {
            max,
            open: AtomicUsize::new(0),
            refusals: AtomicUsize::new(0),
            open_gauge,
            refused_counter,
        }
    }

    /// Returns the number of connections that are served, and of further requests on them.
    pub(crate) fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// Returns the maximum of that number.
    pub(crate) fn max(&self) -> usize {
        self.max
    }

    /// Takes a place for a new connection, to serve it or else to refuse it. Returns `None` if there
    /// is no place for either. Counts a connection that is not served.
    pub(crate) fn take(self: &Arc<Self>) -> Option<Place> {
        let limit = Arc::clone(self);
        if increment_below(&self.open, self.max) {
            self.open_gauge.inc();
            let kind = PlaceKind::Connection;
            return Some(Place { limit, kind });
        }
        self.refused_counter.inc();
        let kind = PlaceKind::Refusal;
        increment_below(&self.refusals, MAX_REFUSALS).then_some(Place { limit, kind })
    }

    /// Takes a place for a further request on a connection of HTTP/2. Returns `None`, and counts a
    /// refusal, if there is none.
    pub(crate) fn take_stream(self: &Arc<Self>) -> Option<Place> {
        if !increment_below(&self.open, self.max) {
            self.refused_counter.inc();
            return None;
        }
        let (limit, kind) = (Arc::clone(self), PlaceKind::Stream);
        Some(Place { limit, kind })
    }
}

impl Place {
    /// Returns what the place is for.
    pub(crate) fn kind(&self) -> PlaceKind {
        self.kind
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        match self.kind {
            PlaceKind::Connection => {
                self.limit.open.fetch_sub(1, Ordering::Relaxed);
                self.limit.open_gauge.dec();
            }
            PlaceKind::Stream => {
                self.limit.open.fetch_sub(1, Ordering::Relaxed);
            }
            PlaceKind::Refusal => {
                self.limit.refusals.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }
}

/// Adds 1 to a number below `max`. Returns whether it did.
fn increment_below(number: &AtomicUsize, max: usize) -> bool {
    let add = |number: usize| (number < max).then_some(number + 1);
    number
        .fetch_update(Ordering::Relaxed, Ordering::Relaxed, add)
        .is_ok()
}

/// Returns the error for a connection, or a request on one, that is one too many.
pub(crate) fn too_many_connections() -> ApiError {
    ApiError {
        code: Some("too_many_connections"),
        retry_after: Some(Duration::from_secs(1)),
        ..ApiError::unavailable("The router has too many connections. Try again shortly.")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_bounded_and_returned() {
        let gauge = Gauge::default();
        let counter = Counter::default();
        let limit = Arc::new(ConnectionLimit::new(2, gauge.clone(), counter.clone()));
        let served = [limit.take().unwrap(), limit.take().unwrap()];
        assert!(
            served
                .iter()
                .all(|place| place.kind == PlaceKind::Connection)
        );
        assert!(limit.take_stream().is_none());
        assert_eq!((limit.open(), gauge.get()), (2, 2));
        let refused: Vec<Place> = (0..MAX_REFUSALS).map(|_| limit.take().unwrap()).collect();
        assert!(refused.iter().all(|place| place.kind == PlaceKind::Refusal));
        assert!(limit.take().is_none());
        assert_eq!(counter.get(), MAX_REFUSALS as u64 + 2);
        drop(served);
        drop(refused);
        assert_eq!((limit.open(), gauge.get()), (0, 0));
        let stream = limit.take_stream().unwrap();
        assert_eq!((limit.open(), gauge.get()), (1, 0));
        drop(stream);
        assert_eq!(limit.take().unwrap().kind, PlaceKind::Connection);
    }
}
