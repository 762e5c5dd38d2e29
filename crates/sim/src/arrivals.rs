//! Plays a workload's arrival rules: which request is due at a time, given which have ended.
//!
//! It has no clock either, so replay and a live client send the same requests by the same rules.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::time::Duration;

use crate::workload::{Arrival, Workload};

/// The requests of a workload that have not been sent yet.
#[derive(Debug)]
pub struct Arrivals {
    /// Due at a time, then in the order of the workload.
    timed: BinaryHeap<Reverse<(Duration, usize)>>,
    /// Waiting for a place in the closed loop.
    when_free: VecDeque<usize>,
    /// Those in flight that hold a place in the closed loop.
    places: Vec<bool>,
    followers: HashMap<usize, Vec<(usize, Duration)>>,
}

impl Arrivals {
    /// All requests of `workload`; those of its closed loop that find a place are due at once.
    #[must_use]
    pub fn new(workload: &Workload) -> Self {
        let mut arrivals = Self {
            timed: BinaryHeap::new(),
            when_free: VecDeque::new(),
            places: vec![false; workload.requests.len()],
            followers: HashMap::new(),
        };
        for (index, request) in workload.requests.iter().enumerate() {
            match request.arrival {
                Arrival::At(time) => arrivals.timed.push(Reverse((time, index))),
                Arrival::WhenFree => arrivals.when_free.push_back(index),
                Arrival::After { request, think } => {
                    let followers = arrivals.followers.entry(request).or_default();
                    followers.push((index, think));
                }
            }
        }
        for _ in 0..workload.concurrency {
            arrivals.fill_place(Duration::ZERO);
        }
        arrivals
    }

    /// When the next request is due; `None` when that depends on requests in flight, or all have
    /// been sent.
    #[must_use]
    pub fn next_due(&self) -> Option<Duration> {
        self.timed.peek().map(|Reverse((time, _))| *time)
    }

    /// Takes a request that is due by `now`: its index in the workload.
    pub fn take_due(&mut self, now: Duration) -> Option<usize> {
        if self.next_due()? > now {
            return None;
        }
        self.timed.pop().map(|Reverse((_, index))| index)
    }

    /// Tells that a request has ended, well or badly, which may make others due.
    pub fn ended(&mut self, index: usize, now: Duration) {
        if std::mem::take(&mut self.places[index]) {
            self.fill_place(now);
        }
        for (follower, think) in self.followers.remove(&index).unwrap_or_default() {
            self.timed.push(Reverse((now + think, follower)));
        }
    }

    fn fill_place(&mut self, now: Duration) {
        if let Some(index) = self.when_free.pop_front() {
            self.places[index] = true;
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
            answer_stream: None,
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
    fn timed_requests_come_in_order() {
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
    fn a_closed_loop_keeps_its_places_filled() {
        let mut arrivals = Arrivals::new(&workload(2, &[Arrival::WhenFree; 3]));
        assert_eq!(arrivals.take_due(Duration::ZERO), Some(0));
        assert_eq!(arrivals.take_due(Duration::ZERO), Some(1));
        assert_eq!(arrivals.next_due(), None);
        arrivals.ended(1, second(5));
        assert_eq!(arrivals.take_due(second(5)), Some(2));
        arrivals.ended(0, second(6));
        assert_eq!(arrivals.next_due(), None);
    }

    #[test]
    fn a_follower_waits_for_the_end_and_the_think_time() {
        let think = second(3);
        let rules = [Arrival::At(second(0)), Arrival::After { request: 0, think }];
        let mut arrivals = Arrivals::new(&workload(0, &rules));
        assert_eq!(arrivals.take_due(second(0)), Some(0));
        assert_eq!(arrivals.next_due(), None);
        arrivals.ended(0, second(4));
        assert_eq!(arrivals.next_due(), Some(second(7)));
    }
}
