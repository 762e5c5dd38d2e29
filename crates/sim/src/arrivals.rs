//! Arrival rules of a workload: which request is due at a time, given the requests that have ended.
//!
//! The caller supplies the time, so replay and the live client send the same requests by the same
//! rules.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::time::Duration;

use crate::workload::{Arrival, Workload};

/// The requests of a workload that have not been sent yet.
///
/// A request is named by its index in the workload.
#[derive(Debug)]
pub struct Arrivals {
    /// Requests with a known due time. Requests due at the same time keep the workload's order.
    timed: BinaryHeap<Reverse<(Duration, usize)>>,
    /// Requests that wait for a free slot of the closed loop, in the workload's order.
    closed_loop: VecDeque<usize>,
    /// By request: whether the request is due or in flight and occupies a slot of the closed loop.
    is_slot_holder: Vec<bool>,
    /// By request: the requests that arrive after its end, each with its think time.
    followers: HashMap<usize, Vec<(usize, Duration)>>,
    /// Time at which sending ends: no request is due then or later.
    end: Duration,
}

impl Arrivals {
    /// Creates the arrivals of all requests of `workload`. Requests that get a slot of the closed
    /// loop are due at time zero.
    #[must_use]
    pub fn new(workload: &Workload) -> Self {
        let mut arrivals = Self {
            timed: BinaryHeap::new(),
            closed_loop: VecDeque::new(),
            is_slot_holder: vec![false; workload.requests.len()],
            followers: HashMap::new(),
            end: Duration::MAX,
        };
        for (index, request) in workload.requests.iter().enumerate() {
            match request.arrival {
                Arrival::At(time) => arrivals.timed.push(Reverse((time, index))),
                Arrival::ClosedLoop => arrivals.closed_loop.push_back(index),
                Arrival::After { request, think } => {
                    let followers = arrivals.followers.entry(request).or_default();
                    followers.push((index, think));
                }
            }
        }
        for _ in 0..workload.concurrency {
            arrivals.fill_slot(Duration::ZERO);
        }
        arrivals
    }

    /// Drops the requests that become due at least `duration` after the first one, whatever the
    /// rule of their arrival. Requests due together with the first one are kept. `None` drops none.
    /// Must be called before a request is taken.
    #[must_use]
    pub fn within(mut self, duration: Option<Duration>) -> Self {
        if let (Some(duration), Some(first)) = (duration, self.next_due()) {
            let shortest = Duration::from_nanos(1);
            self.end = first.saturating_add(duration.max(shortest));
        }
        self
    }

    /// Returns the time at which the next request is due. `None` if that depends on requests in
    /// flight, or if all requests have been sent or dropped.
    #[must_use]
    pub fn next_due(&self) -> Option<Duration> {
        let next = self.timed.peek().map(|Reverse((time, _))| *time);
        next.filter(|&due| due < self.end)
    }

    /// Removes a request that is due by `now`, and returns its index in the workload; `None` if no
    /// request is due.
    pub fn take_due(&mut self, now: Duration) -> Option<usize> {
        if self.next_due()? > now {
            return None;
        }
        self.timed.pop().map(|Reverse((_, index))| index)
    }

    /// Records the end of a request, successful or not. Its slot of the closed loop passes to
    /// another request, and the requests that follow it become due after their think times. Must be
    /// called once for each request that was taken.
    pub fn on_request_end(&mut self, index: usize, now: Duration) {
        if std::mem::take(&mut self.is_slot_holder[index]) {
            self.fill_slot(now);
        }
        for (follower, think) in self.followers.remove(&index).unwrap_or_default() {
            self.timed.push(Reverse((now + think, follower)));
        }
    }

    /// Gives a free slot of the closed loop to the first request that waits for one. The request is
    /// due at `now`.
    fn fill_slot(&mut self, now: Duration) {
        if let Some(index) = self.closed_loop.pop_front() {
            self.is_slot_holder[index] = true;
            self.timed.push(Reverse((now, index)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prompt::Prompt;
    use crate::workload::WorkloadRequest;

    fn workload(concurrency: usize, rules: &[Arrival]) -> Workload {
        let requests = rules.iter().map(|&arrival| WorkloadRequest {
            prompt: Prompt::new().then(0, 1),
            output_stream: None,
            output_tokens: 1,
            arrival,
        });
        Workload {
            name: String::new(),
            requests: requests.collect(),
            concurrency,
        }
    }

    const fn second(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn timed_requests_are_due_in_order_of_time() {
        let rules = [
            Arrival::At(second(1)),
            Arrival::At(second(1)),
            Arrival::At(second(2)),
        ];
        let mut arrivals = Arrivals::new(&workload(0, &rules));
        assert_eq!(arrivals.take_due(Duration::ZERO), None);
        assert_eq!(arrivals.take_due(second(1)), Some(0));
        assert_eq!(arrivals.take_due(second(1)), Some(1));
        assert_eq!(arrivals.take_due(second(1)), None);
        assert_eq!(arrivals.next_due(), Some(second(2)));
    }

    #[test]
    fn a_closed_loop_sends_a_request_for_each_that_ends() {
        let mut arrivals = Arrivals::new(&workload(2, &[Arrival::ClosedLoop; 3]));
        assert_eq!(arrivals.take_due(Duration::ZERO), Some(0));
        assert_eq!(arrivals.take_due(Duration::ZERO), Some(1));
        assert_eq!(arrivals.next_due(), None);
        arrivals.on_request_end(1, second(5));
        assert_eq!(arrivals.take_due(second(5)), Some(2));
        arrivals.on_request_end(0, second(6));
        assert_eq!(arrivals.next_due(), None);
    }

    #[test]
    fn no_request_is_due_after_the_duration_whatever_its_rule() {
        let follow_up = Arrival::After {
            request: 0,
            think: second(1),
        };
        let rules = [
            Arrival::At(second(10)),
            follow_up,
            Arrival::At(second(15)),
            Arrival::At(second(20)),
        ];
        let due_after = |end, duration: Option<u64>| {
            let arrivals = Arrivals::new(&workload(0, &rules));
            let mut arrivals = arrivals.within(duration.map(second));
            assert_eq!(arrivals.take_due(second(10)), Some(0));
            arrivals.on_request_end(0, second(end));
            let due = std::iter::from_fn(|| arrivals.take_due(second(1000)));
            due.collect::<Vec<_>>()
        };
        assert_eq!(due_after(18, None), [2, 1, 3]);
        assert_eq!(due_after(18, Some(10)), [2, 1]);
        assert_eq!(due_after(19, Some(10)), [2]);
        assert!(due_after(18, Some(5)).is_empty());
        assert!(due_after(18, Some(0)).is_empty());

        let closed_loop = Arrivals::new(&workload(1, &[Arrival::ClosedLoop; 3]));
        let mut closed_loop = closed_loop.within(Some(second(5)));
        assert_eq!(closed_loop.take_due(Duration::ZERO), Some(0));
        closed_loop.on_request_end(0, second(4));
        assert_eq!(closed_loop.take_due(second(4)), Some(1));
        closed_loop.on_request_end(1, second(5));
        assert_eq!(closed_loop.take_due(second(5)), None);
    }

    #[test]
    fn a_follow_up_waits_for_the_end_and_the_think_time() {
        let think = second(3);
        let rules = [Arrival::At(second(0)), Arrival::After { request: 0, think }];
        let mut arrivals = Arrivals::new(&workload(0, &rules));
        assert_eq!(arrivals.take_due(second(0)), Some(0));
        assert_eq!(arrivals.next_due(), None);
        arrivals.on_request_end(0, second(4));
        assert_eq!(arrivals.next_due(), Some(second(7)));
    }
}
