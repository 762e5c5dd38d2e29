//! The id of a booking.

/// Key of a booking record. A slab index is reused after its booking ended. The serial is never
/// reused, so a stale id finds no record instead of another booking's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct BookingId {
    /// Number of the booking, counted over all workers.
    pub(crate) serial: u64,
    /// Index of the record in the slab.
    pub(crate) index: usize,
}
