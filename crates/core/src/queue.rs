//! The router's queue: requests that wait for their worker, and the order in which they are sent.
//!
//! A request is booked on arrival, on the worker where it costs least, so that every decision counts
//! it. It is sent when its worker is about to start it. Engines start prompts in order of arrival;
//! a request that is not sent yet can still be overtaken, and can still move to another worker.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::str::FromStr;
use std::task::Waker;
use std::time::Duration;

use foresee_forecast::PrefillWork;
use foresee_prefix::counter::Counter;
use smallvec::SmallVec;

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

/// State that all worker queues share.
#[derive(Debug, Default)]
pub(crate) struct QueuePolicyState {
    /// Number of arrivals so far.
    arrivals: u64,
    /// Number of requests in all worker queues.
    pub(crate) queued_total: usize,
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
    /// Tasks to wake when the router's lock is released.
    pub(crate) pending_wakers: SmallVec<[Waker; 2]>,
}

impl QueuePolicyState {
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
}

/// Requests that wait for one worker. Queries take O(log n) time. Insertion and removal take O(n),
/// with a few additions per entry.
#[derive(Clone, Debug, Default)]
pub(crate) struct WorkerQueue {
    /// Entries by ascending queue key.
    entries: VecDeque<QueueEntry>,
    totals: PrefillTotals,
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

    /// Returns the booking with the smallest key.
    pub(crate) fn first(&self) -> Option<BookingId> {
        self.entries.front().map(|entry| entry.booking)
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
        let priority = self.entries.front()?.key.priority;
        let entries = self.entries.iter().take(MAX_BACKFILL_CANDIDATES);
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
            },
        );
        for later in self.entries.range_mut(index + 1..) {
            later.totals_before += prompt;
        }
        self.totals += prompt;
    }

    /// Removes the request with this key. Returns its `blocks`, or `None` if there is no such
    /// request. If this request was [`dispatching`](Self::dispatching), no request is dispatching
    /// afterwards.
    pub(crate) fn remove(&mut self, key: QueueKey) -> Option<u64> {
        let index = self.position(key);
        self.entries.get(index).filter(|entry| entry.key == key)?;
        let removed = self.entries.remove(index)?;
        for later in self.entries.range_mut(index..) {
            later.totals_before -= removed.prompt;
        }
        self.totals -= removed.prompt;
        self.dispatching = self.dispatching.filter(|dispatching| *dispatching != key);
        Some(removed.blocks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use proptest::prelude::*;

    fn at(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    /// Records an arrival and returns the queue key of the request.
    fn arrive(
        queue: &mut QueuePolicyState,
        order: QueueOrder,
        tenant: u64,
        prefill: f64,
        now: f64,
    ) -> QueueKey {
        let ticket = queue.ticket(order, 0, tenant, at(now));
        queue.on_arrival(&ticket, at(prefill));
        ticket.queue_key(prefill)
    }

    #[test]
    fn fcfs_orders_by_arrival_within_a_priority() {
        let mut queue = QueuePolicyState::default();
        let long = arrive(&mut queue, QueueOrder::Fcfs, 0, 9.0, 1.0);
        let short = arrive(&mut queue, QueueOrder::Fcfs, 0, 0.1, 1.0);
        assert!(long < short);
        let urgent = queue
            .ticket(QueueOrder::Fcfs, -1, 0, at(2.0))
            .queue_key(9.0);
        assert!(urgent < long);
    }

    #[test]
    fn shorter_prompts_overtake_until_ageing_outweighs_them() {
        let mut queue = QueuePolicyState::default();
        let long = arrive(&mut queue, QueueOrder::ShortestPrefillFirst, 0, 2.0, 0.0);
        assert!(arrive(&mut queue, QueueOrder::ShortestPrefillFirst, 0, 1.0, 9.9) < long);
        assert!(arrive(&mut queue, QueueOrder::ShortestPrefillFirst, 0, 1.0, 10.1) > long);
    }

    #[test]
    fn smaller_requests_backfill_until_the_window_of_the_larger_passes() {
        let (mut policy_state, mut queue) = (QueuePolicyState::default(), WorkerQueue::default());
        let mut next_after_insert = |order, priority, prefill, blocks| {
            let ticket = policy_state.ticket(order, priority, 0, at(0.0));
            policy_state.on_arrival(&ticket, at(prefill));
            let serial = ticket.arrival_number;
            let booking = BookingId { serial, index: 0 };
            let memory = (blocks, OutputReservation::default());
            queue.insert(
                ticket.queue_key(prefill),
                booking,
                PrefillWork::default(),
                memory,
            );
            let next = |free_blocks, now| {
                let next = queue.next_dispatchable(at(now), |blocks, _| blocks <= free_blocks);
                next.map(|(_, booking, _)| booking.serial)
            };
            (next(9, 0.0), next(9, 29.9), next(9, 30.1), next(100, 0.0))
        };
        assert_eq!(
            next_after_insert(QueueOrder::ShortestPrefillFirst, 0, 1.0, 50),
            (None, None, Some(0), Some(0))
        );
        // A request of lower priority does not pass.
        assert_eq!(
            next_after_insert(QueueOrder::ShortestPrefillFirst, 1, 0.1, 5),
            (None, None, Some(0), Some(0))
        );
        let backfilled = next_after_insert(QueueOrder::ShortestPrefillFirst, 0, 2.0, 5);
        assert_eq!(backfilled, (Some(2), Some(2), Some(0), Some(0)));
        // Under fcfs the engine itself handles the lack of memory.
        let first = next_after_insert(QueueOrder::Fcfs, -1, 1.0, 50);
        assert_eq!(first, (Some(3), Some(3), Some(3), Some(3)));
    }

    #[test]
    fn tenants_get_equal_service_whatever_their_demand() {
        let mut queue = QueuePolicyState::default();
        let mut queued = Vec::new();
        // Tenant 1 has many requests, tenant 2 few, and tenant 3 long ones.
        for (tenant, requests, seconds) in [(1, 400, 1.0), (2, 30, 1.0), (3, 40, 5.0)] {
            for _ in 0..requests {
                let ticket = queue.ticket(QueueOrder::FairByTenant, 0, tenant, at(0.0));
                queue.on_arrival(&ticket, at(seconds));
                queued.push((ticket.queue_key(seconds), ticket, seconds));
            }
        }
        queued.sort_unstable_by_key(|(key, ..)| *key);
        let mut served = HashMap::<u64, f64>::new();
        for (_, ticket, seconds) in queued.into_iter().take(64) {
            queue.on_dispatch(&ticket);
            *served.entry(ticket.tenant).or_default() += seconds;
        }
        let service: Vec<f64> = served.into_values().collect();
        assert_eq!(service.len(), 3);
        for seconds in &service {
            assert!((seconds - service[0]).abs() <= 5.0, "{service:?}");
        }
        // A tenant that was idle gains no credit.
        let start_tag = queue
            .ticket(QueueOrder::FairByTenant, 0, 9, at(0.0))
            .start_tag;
        assert_eq!(start_tag, queue.virtual_time);
    }

    #[test]
    fn the_number_of_remembered_tenants_is_bounded() {
        let mut queue = QueuePolicyState::default();
        for tenant in 0..3 * MAX_TENANTS as u64 {
            arrive(&mut queue, QueueOrder::FairByTenant, tenant, 1.0, 0.0);
            assert!(queue.tenant_finish_tags.len() <= MAX_TENANTS);
        }
        queue.virtual_time = at(5.0);
        arrive(&mut queue, QueueOrder::FairByTenant, u64::MAX, 1.0, 0.0);
        assert_eq!(queue.tenant_finish_tags.len(), 1);
    }

    #[test]
    fn a_tenant_beyond_the_limit_does_not_overtake_itself_or_others() {
        let mut queue = QueuePolicyState::default();
        for tenant in 0..MAX_TENANTS as u64 {
            arrive(&mut queue, QueueOrder::FairByTenant, tenant, 1.0, 0.0);
        }
        let mut keys = (0..3)
            .map(|_| arrive(&mut queue, QueueOrder::FairByTenant, u64::MAX, 1.0, 0.0).order_tag);
        let tags = [keys.next(), keys.next(), keys.next()];
        assert_eq!(tags, [0.0, 1.0, 2.0].map(|tag| Some(at(tag))));
        // The shared tag has passed once the tenant's requests are served.
        queue.virtual_time = at(5.0);
        let key = arrive(&mut queue, QueueOrder::FairByTenant, u64::MAX, 1.0, 0.0);
        assert_eq!(key.order_tag, at(5.0));
    }

    #[test]
    fn a_limited_number_of_requests_is_considered_for_dispatch() {
        let insert = |queue: &mut WorkerQueue, serial: u64, blocks: u64| {
            let ticket = QueuePolicyState::default().ticket(
                QueueOrder::ShortestPrefillFirst,
                0,
                0,
                at(serial as f64),
            );
            let booking = BookingId { serial, index: 0 };
            let memory = (blocks, OutputReservation::default());
            queue.insert(
                ticket.queue_key(1.0),
                booking,
                PrefillWork::default(),
                memory,
            );
        };
        for (large_requests, is_found) in [
            (MAX_BACKFILL_CANDIDATES - 1, true),
            (MAX_BACKFILL_CANDIDATES, false),
        ] {
            let mut queue = WorkerQueue::default();
            for serial in 0..large_requests as u64 {
                insert(&mut queue, serial, 50);
            }
            insert(&mut queue, large_requests as u64, 5);
            let next = queue.next_dispatchable(at(0.0), |blocks, _| blocks <= 9);
            let serial = next.map(|(_, booking, _)| booking.serial);
            assert_eq!(serial, is_found.then_some(large_requests as u64));
        }
    }

    proptest! {
        /// Compares the queue with a sorted list.
        #[test]
        fn totals_before_a_key_equal_those_of_a_sorted_list(
            steps in prop::collection::vec((any::<bool>(), 0..9u64, 0..50u32), 1..120)
        ) {
            let (mut queue, mut naive) = (WorkerQueue::default(), Vec::new());
            for (arrival, (inserts, tag, tokens)) in (0..).zip(steps) {
                let tag = Duration::from_secs(tag);
                let key = QueueKey { priority: 0, order_tag: tag, arrival_number: arrival, backfill_until: tag };
                if inserts || naive.is_empty() {
                    let booking = BookingId { serial: arrival, index: 0 };
                    let work = PrefillWork::new(tokens, tokens);
                    queue.insert(key, booking, work, (tokens.into(), OutputReservation::default()));
                    naive.push((key, booking, work));
                    naive.sort_unstable_by_key(|(key, ..)| *key);
                } else {
                    let (removed, _, work) = naive.remove(tokens as usize % naive.len());
                    prop_assert_eq!(queue.remove(removed), Some(work.new_tokens));
                    prop_assert_eq!(queue.remove(removed), None);
                }
                let before = |limit: QueueKey| {
                    let mut sum = PrefillTotals::default();
                    for &(_, _, work) in naive.iter().filter(|(key, ..)| *key < limit) {
                        sum += PrefillTotals { requests: 1, work };
                    }
                    sum
                };
                prop_assert_eq!(queue.first(), naive.first().map(|(_, booking, _)| *booking));
                prop_assert_eq!(queue.totals_before(key), before(key));
                let last = QueueKey { priority: i32::MAX, ..key };
                prop_assert_eq!(queue.totals(), before(last));
                prop_assert!(queue.bookings().eq(naive.iter().map(|(_, booking, _)| *booking)));
            }
        }
    }
}
