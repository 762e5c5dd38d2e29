//! The router's queue: requests that wait for their worker, and the order in which they are sent.
//!
//! A request is booked on arrival, on the worker where it costs least, so that every decision counts
//! it. It is sent when its worker is about to start it. Engines start prompts in order of arrival;
//! a request that is not sent yet can still be overtaken, and can still move to another worker.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use foresee_forecast::PrefillWork;
use foresee_prefix::counter::Counter;

use crate::booking_id::BookingId;
use crate::sglang_admission::OutputReservation;
use crate::time::duration_from_secs_saturating;

/// Order in which queued requests of equal priority are sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum QueueOrder {
    /// In order of arrival.
    #[default]
    Fcfs,
    /// Least prefill first, with ageing: one second less prefill counts as ten seconds of waiting,
    /// so a long prompt is not starved (shortest job first).
    ///
    /// A request that does not fit its worker's memory lets smaller ones pass (backfilling), for at
    /// most thirty seconds per second of its own prefill.
    ShortestPrefillFirst,
    /// Equal service for all tenants, by the predicted service time of their requests (start-time
    /// fair queueing; Goyal, Vin and Cheng, 1996: like deficit round robin, with one number per
    /// request instead of rounds).
    FairByTenant,
}

impl QueueOrder {
    /// Every order, with its name in configuration.
    pub const ALL: [(QueueOrder, &'static str); 3] = [
        (QueueOrder::Fcfs, "fcfs"),
        (QueueOrder::ShortestPrefillFirst, "shortest"),
        (QueueOrder::FairByTenant, "fair"),
    ];

    /// Returns one line on the order, for help texts.
    #[must_use]
    pub fn description(self) -> &'static str {
        match self {
            Self::Fcfs => "in order of arrival",
            Self::ShortestPrefillFirst => "least prefill time first, with ageing",
            Self::FairByTenant => "an equal share of the engines' time for each tenant",
        }
    }
}

impl fmt::Display for QueueOrder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::ALL.iter().find(|(order, _)| order == self);
        f.pad(name.map_or("", |(_, name)| name))
    }
}

/// Error for a name that is not in [`QueueOrder::ALL`].
#[derive(Debug, thiserror::Error)]
#[error("unknown queue order `{0}`: use fcfs, shortest or fair")]
pub struct UnknownQueueOrder(String);

impl FromStr for QueueOrder {
    type Err = UnknownQueueOrder;

    fn from_str(name: &str) -> Result<Self, UnknownQueueOrder> {
        Self::ALL
            .into_iter()
            .find_map(|(order, order_name)| (order_name == name).then_some(order))
            .ok_or_else(|| UnknownQueueOrder(name.to_owned()))
    }
}

/// Seconds of waiting that one second less of prefill is worth.
const AGEING_SECONDS_PER_PREFILL_SECOND: f64 = 10.0;

/// Time for which a request that does not fit its worker's memory lets others pass, as a multiple of
/// its ageing time. The others use memory that is free, but each of them delays the time at which
/// enough is free for this one.
const BACKFILL_WINDOW_FACTOR: f64 = 3.0;

/// Sort key in a worker's queue; the smallest is dispatched first. Compared field by field.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct QueueKey {
    /// Priority of the request; lower values come first.
    priority: i32,
    /// Position by the queue order: zero, a time of arrival plus ageing, or a start tag.
    order_tag: Duration,
    /// Number of the arrival, which decides between equal tags.
    arrival_number: u64,
    /// Time until which others may pass this request while it does not fit.
    backfill_until: Duration,
}

/// Part of a request's sort key that does not depend on the worker. Drawn on arrival, and kept when
/// the request moves to another worker.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct QueueTicket {
    order: QueueOrder,
    priority: i32,
    tenant: u64,
    arrived_at: Duration,
    /// Virtual time at which the service of the request starts, under fair queueing.
    start_tag: Duration,
    /// Number of the arrival.
    arrival_number: u64,
}

impl QueueTicket {
    /// Returns the sort key on a worker where the prefill takes `prefill_seconds`. Only
    /// [`QueueOrder::ShortestPrefillFirst`] uses `prefill_seconds`; a number that is negative or
    /// NaN counts as infinite.
    pub(crate) fn queue_key(&self, prefill_seconds: f64) -> QueueKey {
        let arrival_plus = |factor: f64| {
            self.arrived_at
                .saturating_add(duration_from_secs_saturating(factor * prefill_seconds))
        };
        let (order_tag, backfill_until) = match self.order {
            QueueOrder::Fcfs => (Duration::ZERO, Duration::ZERO),
            QueueOrder::ShortestPrefillFirst => (
                arrival_plus(AGEING_SECONDS_PER_PREFILL_SECOND),
                arrival_plus(BACKFILL_WINDOW_FACTOR * AGEING_SECONDS_PER_PREFILL_SECOND),
            ),
            QueueOrder::FairByTenant => (self.start_tag, Duration::ZERO),
        };
        QueueKey {
            priority: self.priority,
            order_tag,
            arrival_number: self.arrival_number,
            backfill_until,
        }
    }

    /// Returns the claim to a place in a full queue, the strongest first: the priority, and under fair
    /// queueing the start tag, which is late for a tenant that has more than its share. Requests with
    /// equal claims keep their places.
    pub(crate) fn claim(&self) -> (i32, Duration) {
        let tag = match self.order {
            QueueOrder::FairByTenant => self.start_tag,
            QueueOrder::Fcfs | QueueOrder::ShortestPrefillFirst => Duration::ZERO,
        };
        (self.priority, tag)
    }
}

/// Maximum number of tenants with a finish tag of their own. At the limit, tags that have passed are
/// dropped first. If none had passed, a new tenant shares a tag with others.
const MAX_TENANTS: usize = 4096;

/// Number of finish tags that tenants beyond [`MAX_TENANTS`] share.
const SHARED_TAGS: usize = 1024;

/// Returns the index of the shared finish tag of a tenant.
fn shared_tag_of(tenant: u64) -> usize {
    (tenant.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) as usize % SHARED_TAGS
}

/// Source of queue tickets: the number of arrivals and, for fair queueing, the service of each
/// tenant.
#[derive(Debug, Default)]
pub(crate) struct QueueTickets {
    /// Number of arrivals so far.
    arrivals: u64,
    /// Virtual time at which the latest request of each tenant ends. A tenant whose tag has passed
    /// may be missing.
    tenant_finish_tags: HashMap<u64, Duration>,
    /// Virtual times at which the latest requests of tenants without a tag of their own end. Empty
    /// until there is such a tenant.
    shared_finish_tags: Box<[Duration]>,
    /// Virtual time for which tags that had passed were last dropped.
    dropped_until: Duration,
    /// Largest start tag of any dispatched request. Tags before it have passed.
    virtual_time: Duration,
}

impl QueueTickets {
    /// Returns the queue ticket of a request that arrives `now`. Lower values of `priority` come
    /// first. The start tag is the tenant's finish tag or the virtual time, whichever is later;
    /// only [`QueueOrder::FairByTenant`] uses it.
    ///
    /// The arrival itself is counted by [`on_arrival`](Self::on_arrival). All tickets between two
    /// calls of `on_arrival` have the same arrival number.
    pub(crate) fn ticket(
        &self,
        order: QueueOrder,
        priority: i32,
        tenant: u64,
        now: Duration,
    ) -> QueueTicket {
        let finish_tag = match self.tenant_finish_tags.get(&tenant) {
            Some(&finish_tag) => finish_tag,
            None => {
                let shared_tag = self.shared_finish_tags.get(shared_tag_of(tenant));
                shared_tag.copied().unwrap_or_default()
            }
        };
        QueueTicket {
            order,
            priority,
            tenant,
            arrived_at: now,
            start_tag: finish_tag.max(self.virtual_time),
            arrival_number: self.arrivals,
        }
    }

    /// Counts the arrival of a request that is predicted to take `service_time` of its worker.
    /// Under [`QueueOrder::FairByTenant`] the tenant's finish tag becomes the ticket's start tag
    /// plus `service_time`. If there are [`MAX_TENANTS`] other tags, that is a tag which the tenant
    /// shares: a new tenant must not overtake the others at every request. Other orders ignore
    /// `service_time`.
    pub(crate) fn on_arrival(&mut self, ticket: &QueueTicket, service_time: Duration) {
        self.arrivals += 1;
        if ticket.order != QueueOrder::FairByTenant {
            return;
        }
        let has_tag = self.tenant_finish_tags.contains_key(&ticket.tenant);
        let virtual_time = self.virtual_time;
        if !has_tag
            && self.tenant_finish_tags.len() >= MAX_TENANTS
            && self.dropped_until < virtual_time
        {
            self.dropped_until = virtual_time;
            self.tenant_finish_tags
                .retain(|_, finish_tag| *finish_tag > virtual_time);
        }
        let finish_tag = ticket.start_tag.saturating_add(service_time);
        if has_tag || self.tenant_finish_tags.len() < MAX_TENANTS {
            self.tenant_finish_tags.insert(ticket.tenant, finish_tag);
            return;
        }
        if self.shared_finish_tags.is_empty() {
            self.shared_finish_tags = vec![Duration::ZERO; SHARED_TAGS].into();
        }
        let shared_tag = &mut self.shared_finish_tags[shared_tag_of(ticket.tenant)];
        *shared_tag = finish_tag.max(*shared_tag);
    }

    /// Takes back the service of a request that lost its place, `service_time`, from its tenant, unless
    /// the tenant shares its tag.
    pub(crate) fn on_displaced(&mut self, ticket: &QueueTicket, service_time: Duration) {
        if let Some(finish_tag) = self.tenant_finish_tags.get_mut(&ticket.tenant) {
            *finish_tag = finish_tag
                .saturating_sub(service_time)
                .max(ticket.start_tag);
        }
    }

    /// Records the dispatch of a request, which advances the virtual time.
    pub(crate) fn on_dispatch(&mut self, ticket: &QueueTicket) {
        self.virtual_time = self.virtual_time.max(ticket.start_tag);
    }
}

/// Maximum number of requests that are considered for dispatch at once. The queue is searched at
/// every token of its worker, so a search must not take longer in a longer queue.
///
/// If none of these requests fits, a smaller one further back is not found, and waits until one of
/// them leaves the queue or memory becomes free. Under
/// [`ShortestPrefillFirst`](QueueOrder::ShortestPrefillFirst) the first requests tend to be the
/// smallest.
const MAX_BACKFILL_CANDIDATES: usize = 32;

/// Number of prompts, and their prefill work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PrefillTotals {
    /// Number of prompts.
    pub(crate) requests: u32,
    /// Sum of their prefill work.
    pub(crate) work: PrefillWork,
}

impl std::ops::AddAssign for PrefillTotals {
    fn add_assign(&mut self, other: Self) {
        self.requests += other.requests;
        self.work += other.work;
    }
}

impl std::ops::SubAssign for PrefillTotals {
    fn sub_assign(&mut self, other: Self) {
        self.requests.subtract(other.requests);
        self.work -= other.work;
    }
}

/// One queued request.
#[derive(Clone, Copy, Debug)]
struct QueueEntry {
    key: QueueKey,
    booking: BookingId,
    /// The request itself, in the form in which totals are summed.
    prompt: PrefillTotals,
    /// KV blocks that the request will pin in addition to active and queued ones.
    blocks: u64,
    /// Output that the request may generate.
    output_reservation: OutputReservation,
    /// Totals of all entries before this one.
    totals_before: PrefillTotals,
    /// Whether the request has lost its place to another one. It stays until its task has learned of
    /// that.
    is_displaced: bool,
}

/// Request that was removed from a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Removed {
    /// KV blocks that the request would have pinned in addition.
    pub(crate) blocks: u64,
    /// Whether it had lost its place before.
    pub(crate) was_displaced: bool,
}

/// Requests that wait for one worker. Queries take O(log n) time. Insertion and removal take O(n),
/// with a few additions per entry.
#[derive(Clone, Debug, Default)]
pub(crate) struct WorkerQueue {
    /// Entries by ascending queue key.
    entries: VecDeque<QueueEntry>,
    totals: PrefillTotals,
    /// Number of displaced entries.
    displaced: usize,
    /// Key of the request whose task was woken and has not polled yet. No other request is
    /// dispatched until then.
    pub(crate) dispatching: Option<QueueKey>,
}

impl WorkerQueue {
    /// Returns the totals of all queued requests.
    pub(crate) fn totals(&self) -> PrefillTotals {
        self.totals
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Returns the number of requests that have not lost their place.
    pub(crate) fn waiting(&self) -> usize {
        self.entries.len() - self.displaced
    }

    /// Returns the request with the largest key that has not lost its place and is not
    /// [`dispatching`](Self::dispatching).
    pub(crate) fn last(&self) -> Option<(QueueKey, BookingId)> {
        let mut entries = self.entries.iter().rev();
        let last = entries.find(|entry| !entry.is_displaced && self.dispatching != Some(entry.key));
        last.map(|entry| (entry.key, entry.booking))
    }

    /// Takes its place from the request with this key. Has no effect if it is not queued.
    pub(crate) fn displace(&mut self, key: QueueKey) {
        let index = self.position(key);
        let entry = self.entries.get_mut(index);
        if let Some(entry) = entry.filter(|entry| entry.key == key && !entry.is_displaced) {
            entry.is_displaced = true;
            self.displaced += 1;
        }
    }

    /// Returns whether the request with this key has lost its place.
    pub(crate) fn is_displaced(&self, key: QueueKey) -> bool {
        let entry = self.entries.get(self.position(key));
        entry.is_some_and(|entry| entry.key == key && entry.is_displaced)
    }

    /// Returns the booking with the smallest key that has not lost its place.
    pub(crate) fn first(&self) -> Option<BookingId> {
        self.in_place().next().map(|entry| entry.booking)
    }

    /// Returns the entries that have not lost their place, by ascending key.
    fn in_place(&self) -> impl Iterator<Item = &QueueEntry> {
        self.entries.iter().filter(|entry| !entry.is_displaced)
    }

    /// Returns the request to dispatch next, and whether it fits the worker's memory. `fits`
    /// decides that from the blocks and the possible output of a request.
    ///
    /// Among the first [`MAX_BACKFILL_CANDIDATES`] requests of the highest priority, this is the
    /// first that fits or whose backfill window has passed. Returns `None` if the queue is empty or
    /// there is no such request, even if a later one, or one of lower priority, fits. Ignores
    /// [`dispatching`](Self::dispatching).
    pub(crate) fn next_dispatchable(
        &self,
        now: Duration,
        fits: impl Fn(u64, OutputReservation) -> bool,
    ) -> Option<(QueueKey, BookingId, bool)> {
        let priority = self.in_place().next()?.key.priority;
        let entries = self.in_place().take(MAX_BACKFILL_CANDIDATES);
        let mut highest_priority = entries.take_while(|entry| entry.key.priority == priority);
        highest_priority.find_map(|entry| {
            let does_fit = fits(entry.blocks, entry.output_reservation);
            (does_fit || entry.key.backfill_until <= now).then_some((
                entry.key,
                entry.booking,
                does_fit,
            ))
        })
    }

    /// Returns the keys and bookings of all requests after the one with the key `after`, or of all
    /// requests if that is `None`, by ascending key.
    pub(crate) fn after(
        &self,
        after: Option<QueueKey>,
    ) -> impl Iterator<Item = (QueueKey, BookingId)> {
        let start = after.map_or(0, |after| {
            self.entries.partition_point(|entry| entry.key <= after)
        });
        self.entries
            .range(start..)
            .map(|entry| (entry.key, entry.booking))
    }

    /// Returns all bookings, by ascending key.
    pub(crate) fn bookings(&self) -> impl Iterator<Item = BookingId> {
        self.entries.iter().map(|entry| entry.booking)
    }

    /// Returns the index at which an entry with this key is or would be.
    fn position(&self, key: QueueKey) -> usize {
        self.entries.partition_point(|entry| entry.key < key)
    }

    /// Returns the totals of all requests that are sent before one with this key.
    pub(crate) fn totals_before(&self, key: QueueKey) -> PrefillTotals {
        let next = self.entries.get(self.position(key));
        next.map_or(self.totals, |entry| entry.totals_before)
    }

    /// Adds a request with this prefill work. `blocks` is the number of KV blocks that it will pin
    /// in addition, `output_reservation` the output that it may generate. The key must not be in
    /// the queue yet.
    pub(crate) fn insert(
        &mut self,
        key: QueueKey,
        booking: BookingId,
        work: PrefillWork,
        (blocks, output_reservation): (u64, OutputReservation),
    ) {
        let index = self.position(key);
        let prompt = PrefillTotals { requests: 1, work };
        let totals_before = self.totals_before(key);
        self.entries.insert(
            index,
            QueueEntry {
                key,
                booking,
                prompt,
                blocks,
                output_reservation,
                totals_before,
                is_displaced: false,
            },
        );
        for later in self.entries.range_mut(index + 1..) {
            later.totals_before += prompt;
        }
        self.totals += prompt;
    }

    /// Removes the request with this key. Returns `None` if there is no such request. If this request was [`dispatching`](Self::dispatching), no request is dispatching
    /// afterwards.
    pub(crate) fn remove(&mut self, key: QueueKey) -> Option<Removed> {
        let index = self.position(key);
        self.entries.get(index).filter(|entry| entry.key == key)?;
        let removed = self.entries.remove(index)?;
        for later in self.entries.range_mut(index..) {
            later.totals_before -= removed.prompt;
        }
        self.totals -= removed.prompt;
        self.dispatching = self.dispatching.filter(|dispatching| *dispatching != key);
        self.displaced -= usize::from(removed.is_displaced);
        Some(Removed {
            blocks: removed.blocks,
            was_displaced: removed.is_displaced,
        })
    }
}

#[cfg(test)]
mod tests;
