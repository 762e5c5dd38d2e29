//! What a verification comes to: what was promised, what was found, and what to do about it.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use crate::verify::report::{Hits, Verification};

/// The share of requests whose cache hit must be predicted to the block: one at a time with KV
/// events, several at a time with them, and without.
const GOAL_ALONE: f64 = 0.999;
const GOAL_TOGETHER: f64 = 0.99;
const GOAL_SHADOW: f64 = 0.97;

/// How far predicted active blocks may be from the engine's own account on average, as a share of
/// the most it held, where that is of the same requests.
const GOAL_ACTIVE: f64 = 0.02;

/// Something that was promised.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Check {
    /// What.
    pub what: String,
    /// How it is.
    pub found: String,
    /// How it must be.
    pub goal: String,
    /// Whether it is so; `None` if that cannot be said.
    pub passed: Option<bool>,
    /// What to do if it is not so.
    pub remedy: Option<&'static str>,
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = match self.passed {
            Some(true) => "ok  ",
            Some(false) => "FAIL",
            None => "?   ",
        };
        let Self {
            what, found, goal, ..
        } = self;
        write!(f, "{mark} {what}: {found} (goal: {goal})")?;
        match self.remedy {
            Some(remedy) if self.passed != Some(true) => write!(f, "\n     {remedy}"),
            _ => Ok(()),
        }
    }
}

pub(super) fn judge(found: &Verification) -> Vec<Check> {
    let mut checks = Vec::new();
    check_answers(found, &mut checks);
    check_hits(found, &mut checks);
    check_active_blocks(found, &mut checks);
    check_rest(found, &mut checks);
    check_parity(found, &mut checks);
    checks
}

fn check_answers(found: &Verification, checks: &mut Vec<Check>) {
    let failed: usize = found.phases.iter().map(|phase| phase.failed).sum();
    let sent = |it: &crate::verify::Phase| it.answered + it.left + it.failed;
    let sent: usize = found.phases.iter().map(sent).sum();
    checks.push(Check {
        what: "requests that failed".to_owned(),
        found: format!("{failed} of {sent}"),
        goal: "none".to_owned(),
        passed: Some(failed == 0),
        remedy: Some("the reasons are above; --max-prompt and --max-answer may be too long"),
    });
}

fn check_hits(found: &Verification, checks: &mut Vec<Check>) {
    let all_tell = found.workers.iter().all(|it| it.cache_source == "events");
    // Phases alike are one sample.
    let mut by_concurrency = BTreeMap::<usize, Hits>::new();
    for phase in &found.phases {
        let hits = by_concurrency.entry(phase.concurrency).or_default();
        hits.add(&phase.predictable(found.has_tokenizer));
    }
    for (concurrency, hits) in by_concurrency {
        let goal = match concurrency {
            _ if !all_tell => GOAL_SHADOW,
            1 => GOAL_ALONE,
            _ => GOAL_TOGETHER,
        };
        let reported = hits.requests > 0;
        checks.push(Check {
            what: format!("cache hits predicted to the block, {concurrency} at a time"),
            found: if reported {
                let share = hits.equal_share() * 100.0;
                format!("{} of {} ({share:.1} %)", hits.equal, hits.requests)
            } else {
                "the engines do not report cached_tokens".to_owned()
            },
            goal: format!("{} %", goal * 100.0),
            passed: reported.then(|| hits.equal_share() >= goal),
            remedy: Some(if !reported {
                "start vLLM with --enable-prompt-tokens-details, SGLang with --enable-cache-report"
            } else if all_tell {
                "look for other clients of these engines, and for a --block-size that is not theirs"
            } else {
                "give workers kv-events=…, so that the router is told what they evict"
            }),
        });
    }
}

fn check_active_blocks(found: &Verification, checks: &mut Vec<Check>) {
    for worker in &found.workers {
        let active = &worker.active;
        let agreed = active.agreed_error_share().filter(|_| active.peak > 0.0);
        checks.push(Check {
            what: format!("active blocks of {}, mean error", worker.name),
            found: match agreed {
                Some(share) => format!(
                    "{:.2} blocks, {:.1} % of the peak, in {} of {} readings with the same \
                     requests; in all {:.1} %",
                    active.agreed_error,
                    share * 100.0,
                    active.agreed,
                    active.samples,
                    active.error_share() * 100.0
                ),
                None => {
                    let why = worker.unread.as_deref();
                    why.unwrap_or("it was never seen with what it had been sent").to_owned()
                }
            },
            goal: format!("{} %", GOAL_ACTIVE * 100.0),
            passed: agreed.map(|share| share <= GOAL_ACTIVE),
            remedy: agreed.map(|_| {
                "other clients are load the router cannot see; SGLang needs --decode-log-interval 1"
            }),
        });
    }
}

fn check_rest(found: &Verification, checks: &mut Vec<Check>) {
    let predicted: u64 = found
        .workers
        .iter()
        .map(|it| it.active.predicted_at_rest)
        .sum();
    let held: f64 = found.workers.iter().map(|it| it.active.held_at_rest).sum();
    checks.push(Check {
        what: "active blocks when all is over".to_owned(),
        found: format!("{predicted} predicted, {held} held"),
        goal: "0".to_owned(),
        passed: Some(predicted == 0 && held == 0.0),
        remedy: Some("an engine that still holds blocks serves somebody else"),
    });
}

fn check_parity(found: &Verification, checks: &mut Vec<Check>) {
    if !found.has_tokenizer {
        return;
    }
    let parity = found.parity;
    let compared = parity.equal + parity.different;
    checks.push(Check {
        what: "prompts counted as the engines count them".to_owned(),
        found: format!("{} of {compared}", parity.equal),
        goal: "all".to_owned(),
        passed: (compared > 0).then_some(parity.different == 0),
        remedy: Some("--tokenizer must be the folder the engines were started with"),
    });
}
