//! How a fleet differs from so many equal engines, at the beginning or from some time on.

use std::time::Duration;

use crate::span::{self, InvalidSpan};

/// Something that happens to a worker.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FleetChange {
    /// When; at zero it is so from the beginning.
    pub at: Duration,
    /// Which, counted from 0.
    pub worker: usize,
    /// What.
    pub what: Change,
}

/// What can happen to a worker.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Change {
    /// Its steps that begin from now on are so many times as fast as its law has them.
    Speed(f64),
    /// It joins the fleet, its cache empty. It is not there before.
    Join,
}

/// What is wrong with a change that was written.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum InvalidChange {
    /// It cannot be read.
    #[error(
        "cannot read the fleet change {text:?}: write WORKER:speed=FACTOR, with @TIME behind for \
         one that comes later, or WORKER:join@TIME"
    )]
    Form {
        /// What was written.
        text: String,
    },
    /// Nothing runs at that speed.
    #[error("a worker cannot be {factor} times as fast: it must be a number from 0.001 to 1000")]
    Speed {
        /// What was written.
        factor: f64,
    },
    /// The time.
    #[error(transparent)]
    Time(#[from] InvalidSpan),
}

impl std::str::FromStr for FleetChange {
    type Err = InvalidChange;

    fn from_str(text: &str) -> Result<Self, InvalidChange> {
        let form = || InvalidChange::Form {
            text: text.to_owned(),
        };
        let (worker, what) = text.split_once(':').ok_or_else(form)?;
        let worker = worker.parse().map_err(|_| form())?;
        let (what, at) = match what.split_once('@') {
            Some((what, at)) => (what, Some(span::parse(at)?)),
            None => (what, None),
        };
        let what = match (what.split_once('='), at) {
            (Some(("speed", factor)), _) => {
                let factor: f64 = factor.parse().map_err(|_| form())?;
                if !(0.001..=1000.0).contains(&factor) {
                    return Err(InvalidChange::Speed { factor });
                }
                Change::Speed(factor)
            }
            (None, Some(_)) if what == "join" => Change::Join,
            _ => return Err(form()),
        };
        Ok(Self {
            at: at.unwrap_or_default(),
            worker,
            what,
        })
    }
}

/// Changes in the order they happen.
#[derive(Debug)]
pub(crate) struct Schedule {
    /// The next one last.
    left: Vec<FleetChange>,
}

impl Schedule {
    pub(crate) fn new(changes: &[FleetChange]) -> Self {
        let mut left = changes.to_vec();
        // Stable: of two at one time, the one written first happens first.
        left.reverse();
        left.sort_by_key(|change| std::cmp::Reverse(change.at));
        Self { left }
    }

    /// Whether the worker is yet to join.
    pub(crate) fn is_to_join(&self, worker: usize) -> bool {
        let mut its = self.left.iter().filter(|change| change.worker == worker);
        its.any(|change| change.what == Change::Join)
    }

    pub(crate) fn next_due(&self) -> Option<Duration> {
        self.left.last().map(|change| change.at)
    }

    pub(crate) fn take_due(&mut self, now: Duration) -> Option<FleetChange> {
        (self.next_due()? <= now).then(|| self.left.pop()).flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_read_as_they_are_written() {
        let change = |text: &str| text.parse::<FleetChange>().unwrap();
        let slow = FleetChange {
            at: Duration::ZERO,
            worker: 3,
            what: Change::Speed(0.5),
        };
        assert_eq!(change("3:speed=0.5"), slow);
        let at = Duration::from_secs(60);
        assert_eq!(change("3:speed=0.5@60s"), FleetChange { at, ..slow });
        let what = Change::Join;
        assert_eq!(change("3:join@1m"), FleetChange { at, what, ..slow });
        for (text, error) in [
            ("3", "WORKER:speed=FACTOR"),
            ("x:join@1s", "WORKER:speed=FACTOR"),
            ("3:join", "WORKER:join@TIME"),
            ("3:leave@1s", "WORKER:join@TIME"),
            ("3:speed=0", "from 0.001"),
            ("3:speed=nan", "from 0.001"),
            ("3:speed=2@soon", "as in 60ms"),
        ] {
            let told = text.parse::<FleetChange>().unwrap_err().to_string();
            assert!(told.contains(error), "{text}: {told}");
        }
    }

    #[test]
    fn a_schedule_plays_in_order_of_time_then_of_writing() {
        let changes = ["0:speed=2@9s", "1:join@5s", "2:speed=3@5s", "3:speed=4"];
        let changes = changes.map(|text| text.parse().unwrap());
        let mut schedule = Schedule::new(&changes);
        assert!(schedule.is_to_join(1) && !schedule.is_to_join(0));
        let mut order = Vec::new();
        while let Some(change) = schedule.next_due().and_then(|at| schedule.take_due(at)) {
            order.push(change.worker);
        }
        assert_eq!(order, [3, 1, 2, 0]);
    }
}
