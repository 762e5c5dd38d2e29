//! The records of all bookings, by id.

use foresee_prefix::paged_slab::PagedSlab;

use crate::booking_id::BookingId;
use crate::booking_record::{BookingRecord, QueuedState};

/// Records of all bookings. A stale id finds no record.
#[derive(Debug, Default)]
pub(crate) struct Bookings {
    records: PagedSlab<BookingRecord>,
    /// Serial of the latest booking. A booking that is made again gets a new serial.
    latest_serial: u64,
}

impl Bookings {
    /// Returns the number of bookings.
    pub(crate) fn len(&self) -> usize {
        self.records.len()
    }

    /// Returns the serial of the latest booking of all workers.
    pub(crate) fn latest_serial(&self) -> u64 {
        self.latest_serial
    }

    /// Returns the serial of a new booking.
    pub(crate) fn next_serial(&mut self) -> u64 {
        self.latest_serial += 1;
        self.latest_serial
    }

    /// Returns the record of a booking, unless the booking has ended.
    pub(crate) fn get(&self, id: BookingId) -> Option<&BookingRecord> {
        let record = self.records.get(id.index)?;
        (record.serial == id.serial).then_some(record)
    }

    /// Returns the record of a booking to be changed, unless the booking has ended.
    pub(crate) fn get_mut(&mut self, id: BookingId) -> Option<&mut BookingRecord> {
        let record = self.records.get_mut(id.index)?;
        (record.serial == id.serial).then_some(record)
    }

    /// Returns the queue state of a booking, if it is queued.
    pub(crate) fn queued_mut(&mut self, id: BookingId) -> Option<&mut QueuedState> {
        self.get_mut(id)?.queued.as_deref_mut()
    }

    /// Returns whether the booking is queued.
    pub(crate) fn is_queued(&self, id: BookingId) -> bool {
        self.get(id).is_some_and(|record| record.queued.is_some())
    }

    /// Returns whether the booking is queued and may choose a worker again, and withdraws the offer.
    pub(crate) fn take_rebalance_offer(&mut self, id: BookingId) -> bool {
        let queued = self.queued_mut(id);
        queued.is_some_and(|queued| std::mem::take(&mut queued.rebalance_offered))
    }

    /// Adds the record of a booking and returns its id.
    pub(crate) fn insert(&mut self, record: BookingRecord) -> BookingId {
        BookingId {
            serial: record.serial,
            index: self.records.insert(record),
        }
    }

    /// Removes the record of a booking and returns it, unless the booking has ended. The caller
    /// subtracts all that is in it from the worker.
    pub(crate) fn remove(&mut self, id: BookingId) -> Option<BookingRecord> {
        self.get(id)?;
        self.records.remove(id.index)
    }

    /// Returns the index after the largest one that a record has or had.
    pub(crate) fn index_end(&self) -> usize {
        self.records.id_end()
    }

    /// Returns the id of the booking at this index, if there is one.
    pub(crate) fn id_at(&self, index: usize) -> Option<BookingId> {
        let serial = self.records.get(index)?.serial;
        Some(BookingId { serial, index })
    }
}
