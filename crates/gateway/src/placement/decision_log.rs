//! Recent routing decisions with the costs of all candidates, and how their requests ended.
//!
//! An explanation computes all costs in full, which takes longer than the decision itself. So only a
//! few decisions a second are recorded: [`UNWATCHED_INTERVAL`] apart while no stream of the dashboard
//! is open, [`WATCHED_INTERVAL`] apart otherwise. All other decisions read one number.
//!
//! The log has no text of prompts. Its memory is bounded by the number of decisions and by that of
//! their candidates.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use foresee_core::batch::Batch;
use foresee_core::router::Explanation;
use foresee_core::workers::WorkerId;
use parking_lot::Mutex;

use crate::clock::since_epoch;
use crate::completion::Completion;
use crate::placement::parsed_request::ParsedRequest;

/// Time between two recorded decisions while no page is open.
const UNWATCHED_INTERVAL: Duration = Duration::from_secs(1);

/// Time between two recorded decisions while a page is open.
const WATCHED_INTERVAL: Duration = Duration::from_millis(100);

/// Maximum number of decisions.
const MAX_DECISIONS: usize = 500;

/// Maximum number of candidates of all decisions. An entry has about 200 bytes.
const MAX_CANDIDATES: usize = 32_768;

/// Maximum number of prompts of a request whose decision is recorded. The explanation of more takes
/// milliseconds in a large fleet.
const MAX_PROMPTS: usize = 8;

/// Maximum length of a model's name, in characters.
const MAX_MODEL_CHARS: usize = 128;

/// Log of decisions.
#[derive(Debug, Default)]
pub(crate) struct DecisionLog {
    /// Time from which the next decision is recorded, in microseconds of the gateway's clock.
    next_at: AtomicU64,
    /// Number of open streams of the dashboard.
    viewers: AtomicUsize,
    recent: Mutex<Recent>,
}

/// Recent decisions.
#[derive(Debug, Default)]
struct Recent {
    /// Ascending by id, without gaps.
    entries: VecDeque<Entry>,
    /// Number of candidates of all entries.
    candidates: usize,
    /// Number of decisions recorded so far.
    recorded: u64,
    /// Number of changes of entries so far.
    version: u64,
}

/// A recorded decision and its outcome.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    /// Ascending number, from 1.
    pub(crate) id: u64,
    pub(crate) decision: Arc<RecordedDecision>,
    /// How the request ended; `None` while it runs.
    pub(crate) outcome: Option<RecordedOutcome>,
    /// Number of the latest change of this entry.
    version: u64,
}

/// A decision as it was made.
#[derive(Debug)]
pub(crate) struct RecordedDecision {
    /// Seconds since the Unix epoch.
    pub(crate) time: f64,
    /// When the worker was chosen, by the gateway's clock.
    decided_at: Duration,
    /// Model that the request named, shortened.
    pub(crate) model: String,
    pub(crate) prompts: usize,
    pub(crate) prompt_tokens: u32,
    pub(crate) prompt_blocks: u32,
    /// Tokens of a block.
    pub(crate) block_size: u32,
    /// Costs just before the decision.
    pub(crate) explanation: Explanation,
    /// Worker that was chosen.
    pub(crate) chosen: WorkerId,
    /// Time to first token that was predicted when the request was booked.
    pub(crate) predicted_ttft: Duration,
    /// Output tokens that were expected, of all outputs.
    pub(crate) predicted_output_tokens: u32,
}

/// How a request ended whose decision was recorded.
#[derive(Clone, Debug)]
pub(crate) struct RecordedOutcome {
    /// Label of the outcome.
    pub(crate) outcome: &'static str,
    /// Worker that responded.
    pub(crate) worker: Option<String>,
    /// Time from the decision to the first token.
    pub(crate) ttft: Option<Duration>,
    /// Time from the decision to the end.
    pub(crate) total: Duration,
    pub(crate) cached_tokens: Option<u32>,
    pub(crate) output_tokens: u32,
}

impl DecisionLog {
    /// Returns whether the decision that is made at `now` has to be recorded. Then the next one is
    /// due after an interval.
    pub(super) fn is_due(&self, parsed: &ParsedRequest, now: Duration) -> bool {
        let next = self.next_at.load(Ordering::Relaxed);
        let now = micros(now);
        if now < next || parsed.sequences.rest.len() >= MAX_PROMPTS {
            return false;
        }
        let interval = match self.viewers.load(Ordering::Relaxed) {
            0 => UNWATCHED_INTERVAL,
            _ => WATCHED_INTERVAL,
        };
        let after = now + micros(interval);
        let exchanged =
            self.next_at
                .compare_exchange(next, after, Ordering::Relaxed, Ordering::Relaxed);
        exchanged.is_ok()
    }

    /// Records the decision that booked `batch` at `now`. `explanation` has the costs just before
    /// it, and `output_tokens` is the number of tokens expected of each output.
    pub(super) fn record(
        self: &Arc<Self>,
        parsed: &ParsedRequest,
        explanation: Explanation,
        batch: &Batch,
        output_tokens: u32,
        now: Duration,
    ) -> DecisionTicket {
        let sequences = &parsed.sequences;
        let prompts = std::iter::once(&sequences.first).chain(&sequences.rest);
        let decision = Arc::new(RecordedDecision {
            time: since_epoch().as_secs_f64(),
            decided_at: now,
            model: parsed.model.chars().take(MAX_MODEL_CHARS).collect(),
            prompts: batch.prompt_count(),
            prompt_tokens: sequences.prompt_tokens,
            prompt_blocks: prompts.map(|prompt| prompt.blocks()).sum(),
            block_size: sequences.first.block_size().get(),
            explanation,
            chosen: batch.worker(),
            predicted_ttft: batch.predicted_ttft(),
            predicted_output_tokens: output_tokens.saturating_mul(batch.prompt_count() as u32),
        });
        let id = self.recent.lock().push(Arc::clone(&decision));
        DecisionTicket {
            log: Arc::clone(self),
            id,
            decision,
            is_settled: false,
        }
    }

    /// Records decisions more often until the guard is dropped.
    pub(crate) fn watch(self: &Arc<Self>) -> Viewer {
        self.viewers.fetch_add(1, Ordering::Relaxed);
        self.next_at.store(0, Ordering::Relaxed);
        Viewer(Arc::clone(self))
    }

    /// Returns at most `limit` entries with ids after `after`, the oldest first.
    pub(crate) fn after(&self, after: u64, limit: usize) -> Vec<Entry> {
        let recent = self.recent.lock();
        let first = recent.entries.partition_point(|entry| entry.id <= after);
        recent
            .entries
            .iter()
            .skip(first)
            .take(limit)
            .cloned()
            .collect()
    }

    /// Returns the latest `limit` entries, the oldest first.
    pub(crate) fn latest(&self, limit: usize) -> Vec<Entry> {
        let recent = self.recent.lock();
        let skipped = recent.entries.len().saturating_sub(limit);
        recent.entries.iter().skip(skipped).cloned().collect()
    }

    /// Returns the entry with this id, unless it is too old.
    pub(crate) fn get(&self, id: u64) -> Option<Entry> {
        let recent = self.recent.lock();
        let index = recent.index_of(id)?;
        recent.entries.get(index).cloned()
    }

    /// Returns the entries that changed after the change with number `version`, and the number of
    /// the latest change.
    pub(crate) fn changed_since(&self, version: u64) -> (Vec<Entry>, u64) {
        let recent = self.recent.lock();
        if recent.version == version {
            return (Vec::new(), version);
        }
        let changed = recent
            .entries
            .iter()
            .filter(|entry| entry.version > version);
        (changed.cloned().collect(), recent.version)
    }

    /// Sets the outcome of a decision. Has no effect if the decision is too old.
    fn settle(&self, id: u64, outcome: RecordedOutcome) {
        let mut recent = self.recent.lock();
        let Some(index) = recent.index_of(id) else {
            return;
        };
        recent.version += 1;
        let version = recent.version;
        if let Some(entry) = recent.entries.get_mut(index) {
            entry.outcome = Some(outcome);
            entry.version = version;
        }
    }
}

impl Recent {
    /// Adds a decision, removes the oldest ones beyond the limits, and returns the id.
    fn push(&mut self, decision: Arc<RecordedDecision>) -> u64 {
        self.recorded += 1;
        self.version += 1;
        self.candidates += decision.explanation.candidates.len();
        self.entries.push_back(Entry {
            id: self.recorded,
            decision,
            outcome: None,
            version: self.version,
        });
        while self.entries.len() > MAX_DECISIONS
            || (self.candidates > MAX_CANDIDATES && self.entries.len() > 1)
        {
            if let Some(oldest) = self.entries.pop_front() {
                self.candidates -= oldest.decision.explanation.candidates.len();
            }
        }
        self.recorded
    }

    /// Returns the index of the entry with this id, unless it was removed.
    fn index_of(&self, id: u64) -> Option<usize> {
        let first = self.entries.front()?.id;
        usize::try_from(id.checked_sub(first)?).ok()
    }
}

/// Guard of a viewer of the log.
#[derive(Debug)]
pub(crate) struct Viewer(Arc<DecisionLog>);

impl Drop for Viewer {
    fn drop(&mut self) {
        self.0.viewers.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Place of a recorded decision's outcome. Dropping it without an outcome records that there was no
/// response.
#[derive(Debug)]
pub(crate) struct DecisionTicket {
    log: Arc<DecisionLog>,
    id: u64,
    decision: Arc<RecordedDecision>,
    is_settled: bool,
}

impl DecisionTicket {
    /// Records how the request ended, at `now`, with the response of `worker`. `cached_tokens` are
    /// those that the engine reports for the one prompt of the request.
    pub(super) fn complete(
        mut self,
        completion: &Completion,
        worker: &str,
        cached_tokens: Option<u32>,
        now: Duration,
    ) {
        let since_decision = |at: Duration| at.saturating_sub(self.decision.decided_at);
        let outcome = RecordedOutcome {
            outcome: completion.outcome.as_str(),
            worker: Some(worker.to_owned()),
            ttft: completion.first_token.map(since_decision),
            total: since_decision(now),
            cached_tokens,
            output_tokens: completion
                .usage
                .completion_tokens
                .unwrap_or(completion.output_tokens),
        };
        self.is_settled = true;
        self.log.settle(self.id, outcome);
    }
}

impl Drop for DecisionTicket {
    fn drop(&mut self) {
        if self.is_settled {
            return;
        }
        let elapsed = since_epoch().as_secs_f64() - self.decision.time;
        let outcome = RecordedOutcome {
            outcome: "no_response",
            worker: None,
            ttft: None,
            total: Duration::try_from_secs_f64(elapsed).unwrap_or_default(),
            cached_tokens: None,
            output_tokens: 0,
        };
        self.log.settle(self.id, outcome);
    }
}

/// Returns a duration in whole microseconds.
fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use foresee_core::router::{Request, Router, RouterConfig};
    use foresee_core::sequence::Sequence;
    use foresee_core::workers::WorkerSpec;

    use super::*;

    /// Returns a decision among `candidates` workers.
    fn decision(candidates: usize) -> Arc<RecordedDecision> {
        let router = Router::new(RouterConfig::default()).unwrap();
        for number in 0..candidates {
            let id = router.add_worker(WorkerSpec {
                name: format!("w{number}"),
                ..WorkerSpec::default()
            });
            router.set_healthy(id.unwrap(), true);
        }
        let block_size = RouterConfig::default().block_size;
        let prompt = Sequence::unhashed(8, block_size);
        let explanation = router.explain(&Request::new(&prompt), Duration::ZERO);
        let explanation = explanation.unwrap();
        Arc::new(RecordedDecision {
            time: 0.0,
            decided_at: Duration::ZERO,
            model: String::new(),
            prompts: 1,
            prompt_tokens: 8,
            prompt_blocks: 1,
            block_size: block_size.get(),
            chosen: explanation.candidates[0].id,
            explanation,
            predicted_ttft: Duration::ZERO,
            predicted_output_tokens: 0,
        })
    }

    #[test]
    fn the_log_is_bounded_by_decisions_and_by_candidates() {
        let log = DecisionLog::default();
        let small = decision(2);
        for _ in 0..2 * MAX_DECISIONS {
            log.recent.lock().push(Arc::clone(&small));
        }
        assert_eq!(log.latest(usize::MAX).len(), MAX_DECISIONS);
        let large = decision(512);
        for _ in 0..MAX_DECISIONS {
            log.recent.lock().push(Arc::clone(&large));
        }
        let entries = log.latest(usize::MAX);
        assert_eq!(entries.len(), MAX_CANDIDATES / 512);
        let recent = log.recent.lock();
        assert_eq!(recent.candidates, entries.len() * 512);
        let last = entries.last().unwrap().id;
        assert_eq!(last, 3 * MAX_DECISIONS as u64);
        drop(recent);
        assert!(log.get(1).is_none() && log.get(last).is_some());
        assert!(log.get(last + 1).is_none());
        assert_eq!(log.after(last - 3, 2).len(), 2);
    }
}
