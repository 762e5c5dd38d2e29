//! Worker faults of a replay: workers that fail or hang for a while.
//!
//! A fault decides the fate of the requests that are sent to its worker while it lasts. Requests
//! that were sent earlier are not affected.

use std::time::Duration;

use crate::duration::{self, InvalidDuration};
use crate::prompt::mix;

/// Time in which a worker that fails fast responds.
const FAST: Duration = Duration::from_millis(1);

/// Time in which a worker that fails slowly responds.
const SLOW: Duration = Duration::from_secs(20);

/// A fault of one worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkerFault {
    /// Index of the worker in the fleet.
    pub worker: usize,
    /// Kind of the fault.
    pub kind: FaultKind,
    /// Start of the fault.
    pub from: Duration,
    /// End of the fault, at which the worker recovers; `None` if it does not.
    pub until: Option<Duration>,
}

/// Kind of a [`WorkerFault`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// Every request fails at once.
    FailFast,
    /// Every second request, on average, fails at once.
    FailHalf,
    /// Every request fails after 20 s.
    FailSlow,
    /// No request gets a response.
    Hang,
}

impl FaultKind {
    /// Every kind, with its name on the command line.
    pub const ALL: [(FaultKind, &'static str); 4] = [
        (FaultKind::FailFast, "fail-fast"),
        (FaultKind::FailHalf, "fail-half"),
        (FaultKind::FailSlow, "fail-slow"),
        (FaultKind::Hang, "hang"),
    ];
}

/// Fate of a request that is sent to a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// The engine serves it.
    Served,
    /// The worker responds with an error after this time.
    FailsAfter(Duration),
    /// The worker never responds.
    Hangs,
}

impl WorkerFault {
    /// Returns the fate of a request that is sent to the worker at `now`. `draw` is a number that
    /// differs between requests.
    fn fate(&self, draw: u64, now: Duration) -> Fate {
        let has_ended = self.until.is_some_and(|until| until <= now);
        if now < self.from || has_ended {
            return Fate::Served;
        }
        match self.kind {
            FaultKind::FailFast => Fate::FailsAfter(FAST),
            FaultKind::FailHalf if mix(draw).is_multiple_of(2) => Fate::FailsAfter(FAST),
            FaultKind::FailHalf => Fate::Served,
            FaultKind::FailSlow => Fate::FailsAfter(SLOW),
            FaultKind::Hang => Fate::Hangs,
        }
    }
}

/// Returns the fate of a request that is sent to `worker` at `now`: that of the first fault of the
/// worker that does not let it be served.
pub(crate) fn fate(faults: &[WorkerFault], worker: usize, draw: u64, now: Duration) -> Fate {
    let fates = faults
        .iter()
        .filter(|fault| fault.worker == worker)
        .map(|fault| fault.fate(draw, now));
    let mut failing = fates.filter(|&fate| fate != Fate::Served);
    failing.next().unwrap_or(Fate::Served)
}

/// Reason why the text of a fault is not valid.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum InvalidFault {
    /// The text has another form.
    #[error(
        "cannot parse fault {text:?}: expected WORKER:KIND@START or WORKER:KIND@START-END, where \
         KIND is fail-fast, fail-half, fail-slow or hang"
    )]
    Form {
        /// Given text.
        text: String,
    },
    /// The end is not after the start.
    #[error("fault {text:?} ends before it starts")]
    Order {
        /// Given text.
        text: String,
    },
    /// A time is not valid.
    #[error(transparent)]
    Time(#[from] InvalidDuration),
}

impl std::str::FromStr for WorkerFault {
    type Err = InvalidFault;

    /// Parses `WORKER:KIND@START[-END]`, such as `3:fail-fast@60s-300s`. Workers are counted from 0,
    /// and a time needs its unit.
    fn from_str(text: &str) -> Result<Self, InvalidFault> {
        let form = || InvalidFault::Form {
            text: text.to_owned(),
        };
        let (worker, rest) = text.split_once(':').ok_or_else(form)?;
        let worker = worker.parse().map_err(|_| form())?;
        let (name, times) = rest.split_once('@').ok_or_else(form)?;
        let kind = FaultKind::ALL
            .into_iter()
            .find_map(|(kind, known)| (known == name).then_some(kind))
            .ok_or_else(form)?;
        let (from, until) = match times.split_once('-') {
            Some((from, until)) => (from, Some(duration::parse(until)?)),
            None => (times, None),
        };
        let from = duration::parse(from)?;
        if until.is_some_and(|until| until <= from) {
            return Err(InvalidFault::Order {
                text: text.to_owned(),
            });
        }
        Ok(Self {
            worker,
            kind,
            from,
            until,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn valid_faults_are_parsed_and_others_rejected() {
        let fault: WorkerFault = "3:fail-fast@60s-5m".parse().unwrap();
        let expected = WorkerFault {
            worker: 3,
            kind: FaultKind::FailFast,
            from: Duration::from_secs(60),
            until: Some(Duration::from_secs(300)),
        };
        assert_eq!(fault, expected);
        for (kind, name) in FaultKind::ALL {
            let fault: WorkerFault = format!("0:{name}@0s").parse().unwrap();
            assert_eq!((fault.kind, fault.until), (kind, None));
        }
        for (text, error) in [
            ("3", "WORKER:KIND@START"),
            ("x:hang@1s", "WORKER:KIND@START"),
            ("3:hang", "WORKER:KIND@START"),
            ("3:explode@1s", "fail-fast, fail-half, fail-slow or hang"),
            ("3:hang@60", "write 60ms"),
            ("3:hang@60s-30s", "ends before it starts"),
        ] {
            let message = text.parse::<WorkerFault>().unwrap_err().to_string();
            assert!(message.contains(error), "{text}: {message}");
        }
    }

    #[test]
    fn a_fault_lasts_from_its_start_to_its_end() {
        let faults = ["1:hang@10s-20s", "1:fail-slow@15s-30s"];
        let faults = faults.map(|text| text.parse().unwrap());
        let at = |worker, seconds| fate(&faults, worker, 0, Duration::from_secs(seconds));
        assert_eq!(at(1, 9), Fate::Served);
        assert_eq!(at(0, 10), Fate::Served);
        assert_eq!(at(1, 10), Fate::Hangs);
        assert_eq!(at(1, 20), Fate::FailsAfter(SLOW));
        assert_eq!(at(1, 30), Fate::Served);
        let half = ["0:fail-half@0s".parse().unwrap()];
        let failed = (0..1000)
            .filter(|&draw| fate(&half, 0, draw, Duration::ZERO) != Fate::Served)
            .count();
        assert!((400..600).contains(&failed), "{failed}");
    }
}
