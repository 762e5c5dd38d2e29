//! Fleet changes: workers of a replay that have another speed than the engine model, or that join
//! later.

use std::time::Duration;

use crate::duration::{self, InvalidDuration};

/// A change of one worker at a given time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FleetChange {
    /// Time of the change; zero for the start of the replay.
    pub at: Duration,
    /// Index of the worker in the fleet.
    pub worker: usize,
    /// Kind of the change.
    pub change: Change,
}

/// Kind of a [`FleetChange`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Change {
    /// Speed of all steps that start from now on, relative to the engine's step-time model: at 2,
    /// steps take half as long.
    Speed(f64),
    /// The worker joins the fleet with an empty cache. Before, it is not part of the fleet.
    Join,
}

/// Reason why the text of a fleet change is not valid.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum InvalidFleetChange {
    /// The text has another form.
    #[error(
        "cannot parse fleet change {text:?}: expected WORKER:speed=FACTOR, \
         WORKER:speed=FACTOR@TIME or WORKER:join@TIME"
    )]
    Form {
        /// Given text.
        text: String,
    },
    /// The speed is out of range.
    #[error("speed of a worker must be a number from 0.001 to 1000, got {factor}")]
    Speed {
        /// Given speed.
        factor: f64,
    },
    /// The time is not valid.
    #[error(transparent)]
    Time(#[from] InvalidDuration),
}

impl std::str::FromStr for FleetChange {
    type Err = InvalidFleetChange;

    /// Parses `WORKER:speed=FACTOR[@TIME]` or `WORKER:join@TIME`, such as `0:speed=0.5@1m`. Workers
    /// are counted from 0, the factor is between 0.001 and 1000, and a time needs its unit.
    fn from_str(text: &str) -> Result<Self, InvalidFleetChange> {
        let form = || InvalidFleetChange::Form {
            text: text.to_owned(),
        };
        let (worker, what) = text.split_once(':').ok_or_else(form)?;
        let worker = worker.parse().map_err(|_| form())?;
        let (what, at) = match what.split_once('@') {
            Some((what, at)) => (what, Some(duration::parse(at)?)),
            None => (what, None),
        };
        let what = match (what.split_once('='), at) {
            (Some(("speed", factor)), _) => {
                let factor: f64 = factor.parse().map_err(|_| form())?;
                if !(0.001..=1000.0).contains(&factor) {
                    return Err(InvalidFleetChange::Speed { factor });
                }
                Change::Speed(factor)
            }
            (None, Some(_)) if what == "join" => Change::Join,
            _ => return Err(form()),
        };
        Ok(Self {
            at: at.unwrap_or_default(),
            worker,
            change: what,
        })
    }
}

/// Fleet changes in order of time.
#[derive(Debug)]
pub(crate) struct FleetSchedule {
    /// Changes that have not happened, the next one last.
    pending: Vec<FleetChange>,
}

impl FleetSchedule {
    /// Sorts `changes` by time. Changes at the same time keep their order.
    pub(crate) fn new(changes: &[FleetChange]) -> Self {
        let mut pending = changes.to_vec();
        // The sort is stable, and the list is in reverse order.
        pending.reverse();
        pending.sort_by_key(|change| std::cmp::Reverse(change.at));
        Self { pending }
    }

    /// Returns whether the worker is not part of the fleet yet and joins later.
    pub(crate) fn joins_later(&self, worker: usize) -> bool {
        let mut changes = self.pending.iter();
        changes.any(|change| change.worker == worker && change.change == Change::Join)
    }

    /// Returns the time of the next change; `None` if there is none.
    pub(crate) fn next_due(&self) -> Option<Duration> {
        self.pending.last().map(|change| change.at)
    }

    /// Removes and returns the next change if it is due by `now`.
    pub(crate) fn take_due(&mut self, now: Duration) -> Option<FleetChange> {
        (self.next_due()? <= now)
            .then(|| self.pending.pop())
            .flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn valid_changes_are_parsed_and_others_rejected() {
        let change = |text: &str| text.parse::<FleetChange>().unwrap();
        let slow = FleetChange {
            at: Duration::ZERO,
            worker: 3,
            change: Change::Speed(0.5),
        };
        assert_eq!(change("3:speed=0.5"), slow);
        let at = Duration::from_secs(60);
        assert_eq!(change("3:speed=0.5@60s"), FleetChange { at, ..slow });
        let what = Change::Join;
        assert_eq!(
            change("3:join@1m"),
            FleetChange {
                at,
                change: what,
                ..slow
            }
        );
        for (text, error) in [
            ("3", "WORKER:speed=FACTOR"),
            ("x:join@1s", "WORKER:speed=FACTOR"),
            ("3:join", "WORKER:join@TIME"),
            ("3:leave@1s", "WORKER:join@TIME"),
            ("3:speed=0", "from 0.001"),
            ("3:speed=nan", "from 0.001"),
            ("3:speed=2@soon", "such as 60ms"),
        ] {
            let message = text.parse::<FleetChange>().unwrap_err().to_string();
            assert!(message.contains(error), "{text}: {message}");
        }
    }

    #[test]
    fn changes_happen_in_order_of_time_then_as_given() {
        let changes = ["0:speed=2@9s", "1:join@5s", "2:speed=3@5s", "3:speed=4"];
        let changes = changes.map(|text| text.parse().unwrap());
        let mut schedule = FleetSchedule::new(&changes);
        assert!(schedule.joins_later(1) && !schedule.joins_later(0));
        let mut order = Vec::new();
        while let Some(change) = schedule.next_due().and_then(|at| schedule.take_due(at)) {
            order.push(change.worker);
        }
        assert_eq!(order, [3, 1, 2, 0]);
    }
}
