//! Requests that wait at the router, in a line for each worker, and who in it is sent next.
//!
//! A request is booked when it comes, where it costs least, so that every decision counts it; it is
//! sent when its worker is about to turn to it. Engines take prompts as they come. What is not sent
//! yet can still be overtaken, and can still go elsewhere: see [`dispatch`](crate::dispatch).

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::str::FromStr;
use std::task::Waker;
use std::time::Duration;

use smallvec::SmallVec;

use crate::admission::Promised;
use crate::fleet::seconds;
use crate::forecast::pace::Work;
use crate::record::BookingKey;

/// In which order requests of one priority are sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Order {
    /// As they came.
    #[default]
    Fcfs,
    /// Those with less to compute first, but each waits only so long: one second less to compute
    /// counts as having come ten seconds before (shortest job first, with ageing). Those go first
    /// that fit into their worker's memory (backfilling), within three times that time.
    Shortest,
    /// Each tenant in proportion, by what its requests are predicted to take (start-time fair
    /// queueing; Goyal, Vin and Cheng, 1996: deficit round robin with one number for each request
    /// in place of rounds).
    Fair,
}

impl Order {
    /// Every order, with its name.
    pub const ALL: [(Order, &'static str); 3] = [
        (Order::Fcfs, "fcfs"),
        (Order::Shortest, "shortest"),
        (Order::Fair, "fair"),
    ];
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::ALL.iter().find(|(order, _)| order == self);
        f.pad(name.map_or("", |(_, name)| name))
    }
}

/// An order's name that is none of [`Order::ALL`].
#[derive(Debug, thiserror::Error)]
#[error("unknown order `{0}`: use fcfs, shortest or fair")]
pub struct UnknownOrder(String);

impl FromStr for Order {
    type Err = UnknownOrder;

    fn from_str(name: &str) -> Result<Self, UnknownOrder> {
        let known = Self::ALL.into_iter().find(|(_, known)| *known == name);
        let known = known.map(|(order, _)| order);
        known.ok_or_else(|| UnknownOrder(name.to_owned()))
    }
}

/// How many seconds later a request may come and still be sent first, for each second that it has
/// less to compute.
const AGEING: f64 = 10.0;

/// How many times as long a request that does not fit into its worker's memory lets others go first
/// that do: they use what is free, but each of them puts off the time when enough is.
const PATIENCE: f64 = 3.0;

/// A place in line: the least is sent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rank {
    priority: i32,
    tag: Duration,
    arrival: u64,
    /// Until then others go first that fit, if it does not fit itself.
    yields_until: Duration,
}

/// What a request's place is decided by, in whichever line.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Standing {
    order: Order,
    priority: i32,
    tenant: u64,
    since: Duration,
    /// Where its share of its tenant's time begins.
    begins: Duration,
    /// Numbers requests as they come.
    arrival: u64,
}

impl Standing {
    /// Where it stands if its prompt takes so many seconds to compute.
    pub(crate) fn rank(&self, prefill: f64) -> Rank {
        let after = |times: f64| self.since.saturating_add(seconds(times * prefill));
        let (tag, yields_until) = match self.order {
            Order::Fcfs => (Duration::ZERO, Duration::ZERO),
            Order::Shortest => (after(AGEING), after(PATIENCE * AGEING)),
            Order::Fair => (self.begins, Duration::ZERO),
        };
        Rank {
            priority: self.priority,
            tag,
            arrival: self.arrival,
            yields_until,
        }
    }
}

/// Most tenants whose shares are kept apart. Who has none left owing is forgotten before.
const MOST_TENANTS: usize = 4096;

/// What all lines have in common.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    arrivals: u64,
    /// Requests in all lines.
    pub(crate) held: usize,
    /// Where each tenant's next share begins, in predicted time, unless that is past.
    tenants: HashMap<u64, Duration>,
    /// Where the share of the latest request sent began: what is before is past.
    virtual_time: Duration,
    /// Who may go on, told when the lock is released.
    pub(crate) woken: SmallVec<[Waker; 2]>,
}

impl Queue {
    /// How a request stands that comes now.
    pub(crate) fn standing(
        &self,
        order: Order,
        priority: i32,
        tenant: u64,
        now: Duration,
    ) -> Standing {
        let owed = self.tenants.get(&tenant).copied().unwrap_or_default();
        Standing {
            order,
            priority,
            tenant,
            since: now,
            begins: owed.max(self.virtual_time),
            arrival: self.arrivals,
        }
    }

    /// A request has come, and is predicted to take so long.
    pub(crate) fn comes(&mut self, standing: &Standing, takes: Duration) {
        self.arrivals += 1;
        if standing.order != Order::Fair {
            return;
        }
        let is_known = self.tenants.contains_key(&standing.tenant);
        if !is_known && self.tenants.len() >= MOST_TENANTS {
            let past = self.virtual_time;
            self.tenants.retain(|_, end| *end > past);
        }
        if is_known || self.tenants.len() < MOST_TENANTS {
            let ends = standing.begins.saturating_add(takes);
            self.tenants.insert(standing.tenant, ends);
        }
    }

    /// One is sent.
    pub(crate) fn sends(&mut self, standing: &Standing) {
        self.virtual_time = self.virtual_time.max(standing.begins);
    }
}

/// Prompts, and what they take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Prompts {
    pub(crate) requests: u32,
    pub(crate) work: Work,
}

impl std::ops::AddAssign for Prompts {
    fn add_assign(&mut self, other: Self) {
        self.requests += other.requests;
        self.work += other.work;
    }
}

impl std::ops::SubAssign for Prompts {
    fn sub_assign(&mut self, other: Self) {
        self.requests -= other.requests;
        self.work -= other.work;
    }
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    rank: Rank,
    key: BookingKey,
    prompt: Prompts,
    /// KV blocks that it will make active, as far as nobody before it does, and what it may be
    /// answered.
    blocks: u64,
    answer: Promised,
    /// All before it.
    before: Prompts,
}

/// Those who wait for one worker. Asking costs O(log n), joining and leaving O(n) of the cheapest.
#[derive(Clone, Debug, Default)]
pub(crate) struct Line {
    /// By rank.
    entries: VecDeque<Entry>,
    all: Prompts,
    /// Who was told to go, and has not gone yet.
    pub(crate) called: Option<Rank>,
}

impl Line {
    pub(crate) fn all(&self) -> Prompts {
        self.all
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub(crate) fn first(&self) -> Option<BookingKey> {
        self.entries.front().map(|it| it.key)
    }

    /// Whom to send next where there is room for those who `fit`, so many blocks and such an
    /// answer: of those of the highest priority, the first that does, or that has yielded to others
    /// for long enough; and whether it fits.
    pub(crate) fn next(
        &self,
        now: Duration,
        fit: impl Fn(u64, Promised) -> bool,
    ) -> Option<(Rank, BookingKey, bool)> {
        let priority = self.entries.front()?.rank.priority;
        let alike = self.entries.iter();
        let mut alike = alike.take_while(|it| it.rank.priority == priority);
        alike.find_map(|it| {
            let fits = fit(it.blocks, it.answer);
            (fits || it.rank.yields_until <= now).then_some((it.rank, it.key, fits))
        })
    }

    pub(crate) fn keys(&self) -> impl Iterator<Item = BookingKey> {
        self.entries.iter().map(|it| it.key)
    }

    fn position(&self, rank: Rank) -> usize {
        self.entries.partition_point(|it| it.rank < rank)
    }

    /// Those that are sent before one of this rank.
    pub(crate) fn before(&self, rank: Rank) -> Prompts {
        let behind = self.entries.get(self.position(rank));
        behind.map_or(self.all, |it| it.before)
    }

    pub(crate) fn join(
        &mut self,
        rank: Rank,
        key: BookingKey,
        work: Work,
        (blocks, answer): (u64, Promised),
    ) {
        let at = self.position(rank);
        let prompt = Prompts { requests: 1, work };
        let before = self.before(rank);
        self.entries.insert(
            at,
            Entry {
                rank,
                key,
                prompt,
                blocks,
                answer,
                before,
            },
        );
        for behind in self.entries.range_mut(at + 1..) {
            behind.before += prompt;
        }
        self.all += prompt;
    }

    /// Returns how many KV blocks it would have made active, if it was there.
    pub(crate) fn leave(&mut self, rank: Rank) -> Option<u64> {
        let at = self.position(rank);
        self.entries.get(at).filter(|it| it.rank == rank)?;
        let gone = self.entries.remove(at)?;
        for behind in self.entries.range_mut(at..) {
            behind.before -= gone.prompt;
        }
        self.all -= gone.prompt;
        self.called = self.called.filter(|it| *it != rank);
        Some(gone.blocks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use proptest::prelude::*;

    fn at(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    /// Joins the queue and tells its rank.
    fn rank(queue: &mut Queue, order: Order, tenant: u64, prefill: f64, now: f64) -> Rank {
        let standing = queue.standing(order, 0, tenant, at(now));
        queue.comes(&standing, at(prefill));
        standing.rank(prefill)
    }

    #[test]
    fn the_first_to_come_is_the_first_to_go() {
        let mut queue = Queue::default();
        let long = rank(&mut queue, Order::Fcfs, 0, 9.0, 1.0);
        let short = rank(&mut queue, Order::Fcfs, 0, 0.1, 1.0);
        assert!(long < short);
        let urgent = queue.standing(Order::Fcfs, -1, 0, at(2.0)).rank(9.0);
        assert!(urgent < long);
    }

    #[test]
    fn the_shorter_overtakes_but_not_for_ever() {
        let mut queue = Queue::default();
        let long = rank(&mut queue, Order::Shortest, 0, 2.0, 0.0);
        assert!(rank(&mut queue, Order::Shortest, 0, 1.0, 9.9) < long);
        assert!(rank(&mut queue, Order::Shortest, 0, 1.0, 10.1) > long);
    }

    #[test]
    fn who_does_not_fit_yields_to_who_does_but_not_for_ever() {
        let (mut queue, mut line) = (Queue::default(), Line::default());
        let mut joins = |order, priority, prefill, blocks| {
            let standing = queue.standing(order, priority, 0, at(0.0));
            queue.comes(&standing, at(prefill));
            let serial = standing.arrival;
            let key = BookingKey { serial, index: 0 };
            let demand = (blocks, Promised::default());
            line.join(standing.rank(prefill), key, Work::default(), demand);
            let next = |free, now| {
                let next = line.next(at(now), |blocks, _| blocks <= free);
                next.map(|(_, key, _)| key.serial)
            };
            (next(9, 0.0), next(9, 29.9), next(9, 30.1), next(100, 0.0))
        };
        assert_eq!(
            joins(Order::Shortest, 0, 1.0, 50),
            (None, None, Some(0), Some(0))
        );
        // Nor to those of less priority.
        assert_eq!(
            joins(Order::Shortest, 1, 0.1, 5),
            (None, None, Some(0), Some(0))
        );
        let behind = joins(Order::Shortest, 0, 2.0, 5);
        assert_eq!(behind, (Some(2), Some(2), Some(0), Some(0)));
        // Where the first to come is the first to go, its engine sees to its memory.
        let first = joins(Order::Fcfs, -1, 1.0, 50);
        assert_eq!(first, (Some(3), Some(3), Some(3), Some(3)));
    }

    #[test]
    fn tenants_get_equal_shares_whatever_they_ask_for() {
        let mut queue = Queue::default();
        let mut line = Vec::new();
        // One asks for much, at once; another for little, later; a third in long pieces.
        for (tenant, requests, seconds) in [(1, 400, 1.0), (2, 30, 1.0), (3, 40, 5.0)] {
            for _ in 0..requests {
                let standing = queue.standing(Order::Fair, 0, tenant, at(0.0));
                queue.comes(&standing, at(seconds));
                line.push((standing.rank(seconds), standing, seconds));
            }
        }
        line.sort_unstable_by_key(|it| it.0);
        let mut served = HashMap::<u64, f64>::new();
        for (_, standing, seconds) in line.into_iter().take(64) {
            queue.sends(&standing);
            *served.entry(standing.tenant).or_default() += seconds;
        }
        let shares: Vec<f64> = served.into_values().collect();
        assert_eq!(shares.len(), 3);
        for share in &shares {
            assert!((share - shares[0]).abs() <= 5.0, "{shares:?}");
        }
        // Who has asked for nothing saves nothing up.
        let begins = queue.standing(Order::Fair, 0, 9, at(0.0)).begins;
        assert_eq!(begins, queue.virtual_time);
    }

    #[test]
    fn tenants_are_bounded() {
        let mut queue = Queue::default();
        for tenant in 0..3 * MOST_TENANTS as u64 {
            rank(&mut queue, Order::Fair, tenant, 1.0, 0.0);
            assert!(queue.tenants.len() <= MOST_TENANTS);
        }
        queue.virtual_time = at(5.0);
        rank(&mut queue, Order::Fair, u64::MAX, 1.0, 0.0);
        assert_eq!(queue.tenants.len(), 1);
    }

    proptest! {
        /// Against a sorted list.
        #[test]
        fn a_line_knows_who_is_before_whom(
            steps in prop::collection::vec((any::<bool>(), 0..9u64, 0..50u32), 1..120)
        ) {
            let (mut line, mut naive) = (Line::default(), Vec::new());
            for (arrival, (joins, tag, tokens)) in (0..).zip(steps) {
                let tag = Duration::from_secs(tag);
                let rank = Rank { priority: 0, tag, arrival, yields_until: tag };
                if joins || naive.is_empty() {
                    let key = BookingKey { serial: arrival, index: 0 };
                    let work = Work::new(tokens, tokens);
                    line.join(rank, key, work, (tokens.into(), Promised::default()));
                    naive.push((rank, key, work));
                    naive.sort_unstable_by_key(|it| it.0);
                } else {
                    let (rank, _, work) = naive.remove(tokens as usize % naive.len());
                    prop_assert_eq!(line.leave(rank), Some(work.tokens));
                    prop_assert_eq!(line.leave(rank), None);
                }
                let before = |rank: Rank| {
                    let mut sum = Prompts::default();
                    for &(_, _, work) in naive.iter().filter(|it| it.0 < rank) {
                        sum += Prompts { requests: 1, work };
                    }
                    sum
                };
                prop_assert_eq!(line.first(), naive.first().map(|it| it.1));
                prop_assert_eq!(line.before(rank), before(rank));
                let last = Rank { priority: i32::MAX, ..rank };
                prop_assert_eq!(line.all(), before(last));
                prop_assert!(line.keys().eq(naive.iter().map(|it| it.1)));
            }
        }
    }
}
