//! Table of reservations: what each holds, and until when.
//!
//! A reservation that is not renewed before its deadline is taken out of the table. Times are
//! parameters.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;

/// Id of a reservation: 128 bits that cannot be guessed. The text form has 32 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct ReservationId(u128);

impl fmt::Display for ReservationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl FromStr for ReservationId {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        if text.len() != 32 || !text.bytes().all(is_digit) {
            return Err(());
        }
        u128::from_str_radix(text, 16).map(Self).map_err(|_| ())
    }
}

/// Value that a reservation holds; `None` once the reservation has ended. Shared, so that it is used
/// without the lock of the table.
pub(super) type Held<T> = Arc<Mutex<Option<T>>>;

/// Reservations by id, at most a given number.
#[derive(Debug)]
pub(super) struct Reservations<T> {
    table: Mutex<Table<T>>,
    /// Maximum number of reservations.
    limit: usize,
    /// Number of ids made.
    ids: AtomicU64,
    /// Secret keys, from which the two halves of each id are derived.
    id_keys: [RandomState; 2],
    /// Wakes the task that waits for the earliest deadline, when that has become earlier.
    has_earlier_deadline: Notify,
}

#[derive(Debug)]
struct Table<T> {
    by_id: HashMap<ReservationId, Reservation<T>>,
    /// Deadline of each reservation, the earliest first.
    deadlines: BTreeSet<(Duration, ReservationId)>,
    /// Whether no further reservation is accepted.
    is_closed: bool,
}

#[derive(Debug)]
struct Reservation<T> {
    held: Held<T>,
    /// Time from a renewal to the deadline.
    ttl: Duration,
    deadline: Duration,
}

impl<T> Table<T> {
    /// Takes a reservation out of the table and returns what it holds.
    fn take(&mut self, id: ReservationId) -> Option<T> {
        let reservation = self.by_id.remove(&id)?;
        self.deadlines.remove(&(reservation.deadline, id));
        reservation.held.lock().take()
    }
}

impl<T> Reservations<T> {
    /// Creates a table of at most `limit` reservations.
    pub(super) fn new(limit: usize) -> Self {
        Self {
            table: Mutex::new(Table {
                by_id: HashMap::new(),
                deadlines: BTreeSet::new(),
                is_closed: false,
            }),
            limit,
            ids: AtomicU64::new(0),
            id_keys: [RandomState::new(), RandomState::new()],
            has_earlier_deadline: Notify::new(),
        }
    }

    /// Returns the maximum number of reservations.
    pub(super) fn limit(&self) -> usize {
        self.limit
    }

    /// Returns the number of reservations.
    pub(super) fn len(&self) -> usize {
        self.table.lock().by_id.len()
    }

    /// Returns an id for a new reservation.
    pub(super) fn new_id(&self) -> ReservationId {
        let number = self.ids.fetch_add(1, Ordering::Relaxed);
        let [high, low] = [0, 1].map(|half| self.id_keys[half].hash_one(number));
        ReservationId(u128::from(high) << 64 | u128::from(low))
    }

    /// Adds a reservation with a [new id](Self::new_id) that holds `value` for `ttl` from `now` on.
    /// If there is no room for it, or the table is closed, returns `value`.
    pub(super) fn add(
        &self,
        id: ReservationId,
        value: T,
        ttl: Duration,
        now: Duration,
    ) -> Result<(), T> {
        let mut table = self.table.lock();
        if table.is_closed || table.by_id.len() >= self.limit {
            return Err(value);
        }
        let deadline = now.saturating_add(ttl);
        let reservation = Reservation {
            held: Arc::new(Mutex::new(Some(value))),
            ttl,
            deadline,
        };
        table.by_id.insert(id, reservation);
        self.insert_deadline(&mut table, deadline, id);
        Ok(())
    }

    /// Adds a deadline, and wakes the task that waits for the earliest one if it is that now.
    fn insert_deadline(&self, table: &mut Table<T>, deadline: Duration, id: ReservationId) {
        table.deadlines.insert((deadline, id));
        if table.deadlines.first() == Some(&(deadline, id)) {
            self.has_earlier_deadline.notify_one();
        }
    }

    /// Sets the deadline of a reservation anew, to its ttl from `now` on; a `ttl` replaces the present
    /// one. Returns what the reservation holds and the ttl; `None` for an unknown id.
    pub(super) fn renew(
        &self,
        id: ReservationId,
        ttl: Option<Duration>,
        now: Duration,
    ) -> Option<(Held<T>, Duration)> {
        let mut table = self.table.lock();
        let reservation = table.by_id.get_mut(&id)?;
        let before = reservation.deadline;
        reservation.ttl = ttl.unwrap_or(reservation.ttl);
        reservation.deadline = now.saturating_add(reservation.ttl);
        let (deadline, ttl) = (reservation.deadline, reservation.ttl);
        let held = Arc::clone(&reservation.held);
        table.deadlines.remove(&(before, id));
        self.insert_deadline(&mut table, deadline, id);
        Some((held, ttl))
    }

    /// Ends a reservation and returns what it held; `None` for an unknown id.
    pub(super) fn remove(&self, id: ReservationId) -> Option<T> {
        self.table.lock().take(id)
    }

    /// Ends a reservation whose deadline is at `now` or before, and returns what it held; `None` if
    /// there is no such reservation.
    pub(super) fn remove_expired(&self, now: Duration) -> Option<T> {
        let mut table = self.table.lock();
        loop {
            let &(deadline, id) = table.deadlines.first()?;
            if deadline > now {
                return None;
            }
            if let Some(value) = table.take(id) {
                return Some(value);
            }
        }
    }

    /// Waits until a reservation may have expired. `now` returns the time. Returns `false` once the
    /// table is closed.
    pub(super) async fn until_next_deadline(&self, now: impl Fn() -> Duration) -> bool {
        let (next, is_closed) = {
            let table = self.table.lock();
            (table.deadlines.first().copied(), table.is_closed)
        };
        if is_closed {
            return false;
        }
        let earlier = self.has_earlier_deadline.notified();
        match next {
            // The time until the earliest deadline is at most the ttl of its reservation.
            Some((deadline, _)) => {
                let left = deadline.saturating_sub(now());
                // After the timeout the deadline has passed.
                let _ = tokio::time::timeout(left, earlier).await;
            }
            None => earlier.await,
        }
        true
    }

    /// Ends all reservations, returns what they held, and accepts no further ones.
    pub(super) fn close(&self) -> Vec<T> {
        let mut table = self.table.lock();
        table.is_closed = true;
        table.deadlines.clear();
        let ended = table.by_id.drain();
        let held = ended.filter_map(|(_, reservation)| reservation.held.lock().take());
        let held = held.collect();
        self.has_earlier_deadline.notify_one();
        held
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Adds a reservation for `ttl` seconds at second 1.
    fn add<T>(reservations: &Reservations<T>, value: T, ttl: u32) -> Result<ReservationId, T> {
        let id = reservations.new_id();
        reservations
            .add(id, value, ttl * SECOND, SECOND)
            .map(|()| id)
    }

    #[test]
    fn a_reservation_that_is_not_renewed_expires_and_others_stay() {
        let reservations = Reservations::new(8);
        let first = add(&reservations, "first", 2).unwrap();
        let second = add(&reservations, "second", 4).unwrap();
        assert_eq!(reservations.remove_expired(2 * SECOND), None);
        let (held, ttl) = reservations.renew(first, None, 2 * SECOND).unwrap();
        assert_eq!((*held.lock(), ttl), (Some("first"), 2 * SECOND));
        assert_eq!(reservations.remove_expired(3 * SECOND), None);
        assert_eq!(reservations.remove_expired(4 * SECOND), Some("first"));
        assert_eq!(*held.lock(), None, "a late report finds nothing");
        assert!(reservations.renew(first, None, 4 * SECOND).is_none());
        let renewed = reservations.renew(second, Some(9 * SECOND), 4 * SECOND);
        assert_eq!(renewed.unwrap().1, 9 * SECOND);
        assert_eq!(reservations.remove_expired(12 * SECOND), None);
        assert_eq!(reservations.remove(second), Some("second"));
        assert_eq!(reservations.remove(second), None);
        assert_eq!(reservations.remove_expired(99 * SECOND), None);
        assert_eq!(reservations.len(), 0);
    }

    #[test]
    fn the_number_is_bounded_and_a_closed_table_is_empty() {
        let reservations = Reservations::new(2);
        let first = add(&reservations, 1, 1).unwrap();
        add(&reservations, 2, 1).unwrap();
        assert_eq!(add(&reservations, 3, 1), Err(3));
        reservations.remove(first);
        add(&reservations, 4, 1).unwrap();
        let mut ended = reservations.close();
        ended.sort_unstable();
        assert_eq!(ended, [2, 4]);
        assert_eq!(reservations.remove_expired(9 * SECOND), None);
        assert_eq!(add(&reservations, 5, 1), Err(5));
    }

    #[tokio::test]
    async fn the_wait_for_a_deadline_ends_when_an_earlier_one_is_added() {
        let reservations = Reservations::new(8);
        add(&reservations, 1, 1000).unwrap();
        assert!(reservations.until_next_deadline(|| SECOND).await);
        let waiting = reservations.until_next_deadline(|| SECOND);
        let adding = async { add(&reservations, 2, 500).unwrap() };
        let (is_open, _) = tokio::join!(waiting, adding);
        assert!(is_open);
        reservations.close();
        assert!(!reservations.until_next_deadline(|| SECOND).await);
    }

    #[test]
    fn ids_differ_and_have_one_text_form() {
        let reservations = Reservations::<()>::new(0);
        let ids: BTreeSet<_> = (0..1000).map(|_| reservations.new_id()).collect();
        assert_eq!(ids.len(), 1000);
        for id in ids {
            assert_eq!(id.to_string().parse(), Ok(id));
        }
        for text in ["", "0", &"+".repeat(32), &"A".repeat(32), &"0".repeat(33)] {
            assert_eq!(text.parse::<ReservationId>(), Err(()), "{text}");
        }
    }
}
