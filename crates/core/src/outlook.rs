//! What a worker has ahead of it: prompts to compute, and answers to go on with.
//!
//! Kept up to date by every booking and token in whole numbers, so that freeing takes back
//! exactly what booking added; what it comes to in seconds is worked out when it is asked for,
//! from what is known by then.

use std::collections::VecDeque;
use std::time::Duration;

use crate::admission::Reserve;
use crate::forecast::pace::{Pace, Watch, Work};
use crate::queue::{Line, Prompts, Standing};

/// What one booking adds to its worker's outlook.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Share {
    /// Its booking's serial, which tells the order in which the worker gets them; 0 until then.
    place: u64,
    /// What it has to compute, while it waits for its first token.
    pub(crate) work: Work,
    /// Tokens of its answer expected to be still to come.
    pub(crate) remaining: u32,
    /// Tokens of its prompt and answer.
    pub(crate) context: u64,
    /// Its prompt is to be computed.
    is_ahead: bool,
    /// Its first token will be seen.
    pub(crate) is_watched: bool,
}

impl Share {
    pub(crate) fn new(work: Work, remaining: u32, context: u64) -> Self {
        Self {
            place: 0,
            work,
            remaining,
            context,
            is_ahead: true,
            is_watched: true,
        }
    }

    /// Whether its prompt is to be computed.
    pub(crate) fn is_ahead(&self) -> bool {
        self.is_ahead
    }
}

/// Requests alike in how much of their answers is to come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Group {
    pub(crate) requests: u32,
    /// Tokens to come, of all of them.
    pub(crate) remaining: u64,
    /// Tokens of their prompts and answers.
    pub(crate) context: u64,
}

impl Group {
    fn add(&mut self, share: &Share) {
        self.requests += 1;
        self.remaining += u64::from(share.remaining);
        self.context += share.context;
    }

    fn subtract(&mut self, share: &Share) {
        self.requests -= 1;
        self.remaining -= u64::from(share.remaining);
        self.context -= share.context;
    }
}

/// The first group has less than eight tokens to come, each further one up to twice as many.
pub(crate) const GROUPS: usize = 12;

fn group_of(remaining: u32) -> usize {
    let eights = remaining / 8;
    ((u32::BITS - eights.leading_zeros()) as usize).min(GROUPS - 1)
}

/// How long a request is on its way to the scheduler of its engine, and a token from there: what is
/// known when a token comes is of about so long ago.
const UNDERWAY: Duration = Duration::from_millis(5);

/// A prompt in the order in which it will be computed.
#[derive(Clone, Copy, Debug)]
struct Queued {
    place: u64,
    work: Work,
    sent_at: Duration,
    has_left: bool,
    is_watched: bool,
}

/// One worker's outlook.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outlook {
    /// Requests whose answers have begun, by what is to come of them.
    running: [Group; GROUPS],
    /// A bit for each group that has any, and all groups together.
    occupied: u16,
    all_running: Group,
    /// Requests whose prompts are to be computed.
    pub(crate) ahead: Group,
    pub(crate) work: Work,
    /// Those of them that are not sent yet.
    pub(crate) line: Line,
    /// Those that are.
    queue: VecDeque<Queued>,
    /// The last in that order that is known to have been begun with, and since when.
    begun: (u64, Duration),
    pub(crate) watch: Watch,
    /// Which law it follows.
    pub(crate) law: usize,
    pub(crate) inflow: Inflow,
    pub(crate) reserve: Reserve,
    /// Its KV blocks, if they are known.
    pub(crate) capacity: Option<u32>,
}

impl Outlook {
    /// Nothing is ahead of a worker that follows this law.
    pub(crate) fn following(law: usize) -> Self {
        Self {
            law,
            ..Self::default()
        }
    }

    pub(crate) fn add(&mut self, share: &Share) {
        debug_assert!(share.is_ahead, "it was just made");
        self.ahead.add(share);
        self.work += share.work;
    }

    /// The worker gets it, as the booking of this `serial`.
    pub(crate) fn send(&mut self, share: &mut Share, serial: u64, now: Duration) {
        share.place = serial;
        self.queue.push_back(Queued {
            place: share.place,
            work: share.work,
            sent_at: now,
            has_left: false,
            is_watched: share.is_watched,
        });
    }

    /// Prompts that the worker has, and has not computed.
    pub(crate) fn sent(&self) -> Prompts {
        let mut sent = self.prompts();
        sent -= self.line.all();
        sent
    }

    fn prompts(&self) -> Prompts {
        Prompts {
            requests: self.ahead.requests,
            work: self.work,
        }
    }

    /// Its prompt is computed. Returns whether that was not so before.
    pub(crate) fn compute(&mut self, share: &mut Share) -> bool {
        let was_ahead = std::mem::take(&mut share.is_ahead);
        if was_ahead {
            self.ahead.subtract(share);
            self.work -= share.work;
            self.leave_queue(share.place);
            self.join(share);
        }
        was_ahead
    }

    /// It was begun with, and so were those before it.
    pub(crate) fn begin(&mut self, share: &Share, now: Duration) {
        if share.place > self.begun.0 {
            self.begun = (share.place, now);
        }
    }

    /// The first booking that a step which has just begun may be too early for.
    pub(crate) fn first_underway(&self, now: Duration) -> Option<u64> {
        let latest = self.queue.iter().rev();
        let underway = latest.take_while(|it| now.saturating_sub(it.sent_at) < UNDERWAY);
        underway.last().map(|it| it.place)
    }

    /// Since when the first token has been there of a request that nobody watches: it was `due` at
    /// some time, but engines take requests in the order in which they came.
    pub(crate) fn computed_since(
        &self,
        share: &Share,
        due: Duration,
        now: Duration,
    ) -> Option<Duration> {
        if share.place <= self.begun.0 {
            return Some(self.begun.1);
        }
        let waits_behind = |it: &Queued| it.is_watched && it.place < share.place;
        let is_held_up = self.queue.front().is_some_and(waits_behind);
        (due <= now && !is_held_up).then_some(due)
    }

    fn join(&mut self, share: &Share) {
        let group = group_of(share.remaining);
        self.running[group].add(share);
        self.occupied |= 1 << group;
        self.all_running.add(share);
    }

    fn part(&mut self, share: &Share) {
        let group = group_of(share.remaining);
        self.running[group].subtract(share);
        if self.running[group].requests == 0 {
            self.occupied &= !(1 << group);
        }
        self.all_running.subtract(share);
    }

    /// Requests whose answers have begun, those alike together.
    pub(crate) fn running(&self) -> impl Iterator<Item = &Group> {
        let mut left = self.occupied;
        std::iter::from_fn(move || {
            let group = self.running.get(left.trailing_zeros() as usize)?;
            left &= left - 1;
            Some(group)
        })
    }

    /// Its answer has come on.
    pub(crate) fn renew(&mut self, share: &mut Share, remaining: u32, context: u64) {
        let is_ahead = share.is_ahead;
        if is_ahead {
            self.ahead.subtract(share);
        } else {
            self.part(share);
        }
        share.remaining = remaining;
        share.context = context;
        if is_ahead {
            self.ahead.add(share);
        } else {
            self.join(share);
        }
    }

    /// It has ended, one way or the other.
    pub(crate) fn remove(&mut self, share: &Share) {
        if share.is_ahead {
            self.ahead.subtract(share);
            self.work -= share.work;
            self.leave_queue(share.place);
        } else {
            self.part(share);
        }
    }

    fn leave_queue(&mut self, place: u64) {
        if let Ok(index) = self.queue.binary_search_by_key(&place, |it| it.place) {
            self.queue[index].has_left = true;
        }
        while self.queue.front().is_some_and(|it| it.has_left) {
            self.queue.pop_front();
        }
        // One prompt that takes for ever must not keep all others' places.
        if self.queue.len() > 2 * self.ahead.requests as usize + 64 {
            self.queue.retain(|it| !it.has_left);
        }
    }

    /// Requests that decode, and the tokens of their prompts and answers.
    pub(crate) fn decoding(&self) -> (u32, u64) {
        (self.all_running.requests, self.all_running.context)
    }

    /// What is left to compute of all prompts, in seconds.
    pub(crate) fn backlog(&self, pace: &Pace, now: Duration) -> f64 {
        self.backlog_of(self.prompts(), pace, now)
    }

    /// Of that, what the worker has already.
    pub(crate) fn sent_backlog(&self, pace: &Pace, now: Duration) -> f64 {
        self.backlog_of(self.sent(), pace, now)
    }

    /// What is left to compute before a prompt that takes `prefill` can be, and who in line is
    /// overtaken.
    pub(crate) fn ahead_of(
        &self,
        standing: &Standing,
        prefill: f64,
        pace: &Pace,
        now: Duration,
    ) -> Ahead {
        if self.line.is_empty() {
            return Ahead {
                wait: self.backlog(pace, now),
                ..Ahead::default()
            };
        }
        let before = self.line.before(standing.rank(prefill));
        let (mut first, mut overtaken) = (self.sent(), self.line.all());
        first += before;
        overtaken -= before;
        Ahead {
            wait: self.backlog_of(first, pace, now),
            overtaken: overtaken.requests,
            overtaken_take: pace.prefill(self.starts(overtaken), overtaken.work),
        }
    }

    /// How often computing these begins.
    fn starts(&self, prompts: Prompts) -> f64 {
        f64::from(prompts.requests) / self.watch.prompts_together()
    }

    /// What is left to compute of the first of all prompts.
    fn backlog_of(&self, prompts: Prompts, pace: &Pace, now: Duration) -> f64 {
        let all = pace.prefill(self.starts(prompts), prompts.work);
        let Some(first) = self.queue.front() else {
            return all;
        };
        let first_takes = pace.prefill(1.0 / self.watch.prompts_together(), first.work);
        let began = first.sent_at.max(self.watch.first_token_at());
        let elapsed = now.saturating_sub(began).as_secs_f64();
        let first_left = if elapsed < first_takes {
            first_takes - elapsed
        } else {
            // It should be done. The longer it is not, the longer it may take.
            OVERDUE * (elapsed - first_takes)
        };
        (all - first_takes).max(0.0) + first_left
    }

    /// Of the prompt tokens to compute, how many that is.
    pub(crate) fn backlog_tokens(&self, pace: &Pace, now: Duration) -> u64 {
        let all = pace.prefill(self.starts(self.prompts()), self.work);
        if all <= 0.0 {
            return 0;
        }
        let share = (self.backlog(pace, now) / all).min(1.0);
        (self.work.tokens as f64 * share).round() as u64
    }
}

/// What a prompt finds before and behind it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Ahead {
    /// Seconds until it is turned to.
    pub(crate) wait: f64,
    /// Prompts in line behind it, and the seconds that those take.
    pub(crate) overtaken: u32,
    pub(crate) overtaken_take: f64,
}

/// What an overdue prompt is expected to take still, as a share of the time it is overdue.
const OVERDUE: f64 = 0.25;

/// How fast requests have come lately.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Inflow {
    /// Requests, and what they took to compute in seconds, each forgotten with time.
    requests: f64,
    seconds: f64,
    at: Duration,
}

/// How long an arrival counts, on average, in seconds.
const INFLOW_MEMORY: f64 = 20.0;

impl Inflow {
    pub(crate) fn add(&mut self, seconds: f64, now: Duration) {
        let kept = self.kept(now);
        self.requests = self.requests * kept + 1.0;
        self.seconds = self.seconds * kept + seconds;
        self.at = self.at.max(now);
    }

    /// One of them, added at that time for so many seconds, goes elsewhere.
    pub(crate) fn take_back(&mut self, (at, seconds): (Duration, f64), now: Duration) {
        let kept = self.kept(now);
        let elapsed = now.saturating_sub(at).as_secs_f64();
        let its = INFLOW_MEMORY / (INFLOW_MEMORY + elapsed);
        self.requests = (self.requests * kept - its).max(0.0);
        self.seconds = (self.seconds * kept - its * seconds).max(0.0);
        self.at = self.at.max(now);
    }

    fn kept(&self, now: Duration) -> f64 {
        // Nearly exponential, and a tenth of its price.
        INFLOW_MEMORY / (INFLOW_MEMORY + now.saturating_sub(self.at).as_secs_f64())
    }

    /// Requests a second, and the share of the time that their prompts take.
    pub(crate) fn rates(&self, now: Duration) -> (f64, f64) {
        let kept = self.kept(now) / INFLOW_MEMORY;
        (self.requests * kept, self.seconds * kept)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use proptest::prelude::*;

    const PACE: Pace = Pace {
        start: 0.01,
        token: 1e-4,
        attention: 0.0,
        step: 0.02,
        sequence: 0.0,
        context: 0.0,
        samples: [0; 2],
        errors: [0.0; 2],
    };

    fn at(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    #[test]
    fn the_first_in_line_alone_is_worked_on() {
        let mut outlook = Outlook::default();
        let mut first = Share::new(Work::new(9_900, 9_900), 10, 9_900);
        let mut second = Share::new(Work::new(1_900, 1_900), 10, 1_900);
        for (serial, share) in [(1, &mut first), (2, &mut second)] {
            outlook.add(share);
            outlook.send(share, serial, at(5.0));
        }
        let backlog = |outlook: &Outlook, seconds| outlook.backlog(&PACE, at(seconds));
        assert!((backlog(&outlook, 5.0) - 1.2).abs() < 1e-9);
        assert!((backlog(&outlook, 5.4) - 0.8).abs() < 1e-9);
        assert!((backlog(&outlook, 6.0) - 0.2).abs() < 1e-9);
        // A worker that says nothing does not seem to have got through its work.
        assert!(backlog(&outlook, 10.0) > 1.0);
        outlook.compute(&mut first);
        assert!(backlog(&outlook, 5.0) - 0.2 < 1e-9);
        outlook.remove(&second);
        outlook.remove(&first);
        assert_eq!(backlog(&outlook, 6.0), 0.0);
    }

    #[test]
    fn arrivals_are_counted_and_forgotten() {
        let mut inflow = Inflow::default();
        let mut now = 0.0;
        for _ in 0..2000 {
            now += 0.25;
            inflow.add(0.1, at(now));
        }
        let (rate, utilisation) = inflow.rates(at(now));
        assert!((rate / 4.0 - 1.0).abs() < 0.05, "{rate}");
        assert!((utilisation / 0.4 - 1.0).abs() < 0.05, "{utilisation}");
        assert!(inflow.rates(at(now + 6000.0)).0 < 0.1);
    }

    proptest! {
        /// Against a list of what is there.
        #[test]
        fn what_is_taken_back_is_what_was_added(
            steps in prop::collection::vec((0..4u8, any::<prop::sample::Index>(), 0..20_000u32), 1..200)
        ) {
            let mut outlook = Outlook::default();
            let mut shares: Vec<Share> = Vec::new();
            for (serial, (what, which, tokens)) in (1..).zip(steps) {
                if what == 0 || shares.is_empty() {
                    let work = Work::new(tokens / 2, tokens);
                    let mut share = Share::new(work, tokens % 777, tokens.into());
                    outlook.add(&share);
                    outlook.send(&mut share, serial, Duration::ZERO);
                    shares.push(share);
                } else {
                    let index = which.index(shares.len());
                    match what {
                        1 => drop(outlook.compute(&mut shares[index])),
                        2 => outlook.renew(&mut shares[index], tokens % 333, tokens.into()),
                        _ => outlook.remove(&shares.swap_remove(index)),
                    }
                }
                let count = |is_ahead| shares.iter().filter(move |it| it.is_ahead == is_ahead);
                prop_assert_eq!(outlook.ahead.requests as usize, count(true).count());
                prop_assert_eq!(outlook.work.tokens, count(true).map(|it| it.work.tokens).sum::<u64>());
                let attention = count(true).map(|it| it.work.attention).sum::<u64>();
                prop_assert_eq!(outlook.work.attention, attention);
                prop_assert_eq!(outlook.decoding().0 as usize, count(false).count());
                let groups = outlook.running.iter().filter(|it| it.requests > 0);
                prop_assert_eq!(outlook.running().collect::<Vec<_>>(), groups.collect::<Vec<_>>());
                for (index, group) in outlook.running.iter().enumerate() {
                    let members = count(false).filter(|it| group_of(it.remaining) == index);
                    let remaining = members.map(|it| u64::from(it.remaining)).sum::<u64>();
                    prop_assert_eq!(group.remaining, remaining);
                }
                let first = count(true).map(|it| it.place).min();
                prop_assert_eq!(outlook.queue.front().map(|it| it.place), first);
                prop_assert!(outlook.queue.len() <= 2 * count(true).count() + 64);
            }
        }
    }
}
