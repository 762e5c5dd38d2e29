//! The goals of a verification.

use std::collections::BTreeMap;

use crate::verify::check::{Check, Evidence, grouped};
use crate::verify::interval::{Proportion, Verdict};
use crate::verify::report::{Hits, Verification};

/// Goals for the proportion of responses whose overlap is predicted exactly, in blocks: with KV
/// events and one request at a time, with events and several, and without events.
const GOAL_ALONE: f64 = 0.999;
const GOAL_TOGETHER: f64 = 0.99;
const GOAL_ESTIMATED: f64 = 0.97;

/// Goal for the mean difference between predicted active blocks and the engine's own count, as a
/// fraction of the engine's maximum, over readings with the same requests.
const GOAL_ACTIVE: f64 = 0.02;

/// Fewest readings with the same requests from which a mean error of active blocks is judged. In
/// fewer, a difference of one block in one reading decides.
const MIN_READINGS: usize = 20;

/// Compares a verification with all goals. `found.checks` is ignored.
pub(super) fn check(found: &Verification) -> Vec<Check> {
    let mut checks = vec![check_responses(found)];
    checks.extend(check_hits(found));
    checks.extend(check_active_blocks(found));
    checks.push(check_rest(found));
    checks.extend(check_parity(found));
    checks
}

fn holds(condition: bool) -> Verdict {
    if condition {
        Verdict::Holds
    } else {
        Verdict::Fails
    }
}

/// Checks that no request failed. Requests that the client aborted as planned are not failures.
fn check_responses(found: &Verification) -> Check {
    let failed: usize = found.phases.iter().map(|phase| phase.failed).sum();
    let sent = found.phases.iter();
    let sent: usize = sent
        .map(|phase| phase.completed + phase.aborted + phase.failed)
        .sum();
    Check {
        name: "failed requests".to_owned(),
        found: format!("{failed} of {sent}"),
        goal: "none".to_owned(),
        verdict: holds(failed == 0),
        evidence: None,
        remedy: Some("the reasons are above; --max-prompt and --max-output may be too long"),
    }
}

/// Checks the predicted overlap, with one check for each concurrency. The goal for events applies
/// only if all workers have KV events. Without a tokenizer, only prompts of token ids count.
fn check_hits(found: &Verification) -> Vec<Check> {
    let has_events = found
        .workers
        .iter()
        .all(|worker| worker.cache_source == "events");
    // Phases of the same concurrency are one sample.
    let mut by_concurrency = BTreeMap::<usize, Hits>::new();
    for phase in &found.phases {
        let hits = by_concurrency.entry(phase.concurrency).or_default();
        hits.add(&phase.predictable(found.has_tokenizer));
    }
    let checks = by_concurrency.into_iter().map(|(concurrency, hits)| {
        let goal = match concurrency {
            _ if !has_events => GOAL_ESTIMATED,
            1 => GOAL_ALONE,
            _ => GOAL_TOGETHER,
        };
        check_overlap(concurrency, &hits, goal, has_events)
    });
    checks.collect()
}

/// Checks the proportion of exact predictions in `hits`. Without any compared response, the goal is
/// not measured.
fn check_overlap(concurrency: usize, hits: &Hits, goal: f64, has_events: bool) -> Check {
    let proportion = Proportion {
        successes: hits.equal as u64,
        trials: hits.requests as u64,
    };
    let evidence = (proportion.trials > 0).then(|| Evidence::of(proportion, goal));
    let found = match evidence {
        Some(evidence) => format!(
            "predicted exactly in {} of {} responses (95 % interval {:.2}\u{2013}{:.2} %)",
            grouped(proportion.successes),
            grouped(proportion.trials),
            evidence.interval.0 * 100.0,
            evidence.interval.1 * 100.0,
        ),
        None => "the engines do not report cached_tokens".to_owned(),
    };
    Check {
        name: format!("overlap with cached prefixes, {concurrency} at a time"),
        found,
        goal: format!("{} %", goal * 100.0),
        verdict: proportion.verdict(goal),
        evidence,
        remedy: Some(if evidence.is_none() {
            "start vLLM with --enable-prompt-tokens-details, SGLang with --enable-cache-report"
        } else if has_events {
            "check that the engines have no other clients, and that --block-size is theirs"
        } else {
            "configure kv-events=… for the workers, so that the router learns of evictions"
        }),
    }
}

/// Compares the mean error with its goal, without an interval: readings follow each other within
/// a fraction of a second, so they are no independent sample. A worker without active blocks or
/// without readings with the same requests is not measured.
fn check_active_blocks(found: &Verification) -> impl Iterator<Item = Check> {
    found.workers.iter().map(|worker| {
        let active = &worker.active;
        let agreed = active.agreed_error_fraction().filter(|_| active.peak > 0.0);
        Check {
            name: format!("active blocks of {}, mean error", worker.name),
            found: match agreed {
                Some(fraction) => format!(
                    "{:.2} blocks, {:.1} % of the peak, in {} of {} readings with the same \
                     requests; in all {:.1} %",
                    active.agreed_error,
                    fraction * 100.0,
                    active.agreed,
                    active.samples,
                    active.error_fraction() * 100.0
                ),
                None => {
                    let reason = worker.metrics_error.as_deref();
                    reason
                        .unwrap_or("no reading had the same requests as the router")
                        .to_owned()
                }
            },
            goal: format!("{} %", GOAL_ACTIVE * 100.0),
            verdict: match agreed {
                None => Verdict::NotMeasured,
                Some(_) if active.agreed < MIN_READINGS => Verdict::NotShown,
                Some(fraction) => holds(fraction <= GOAL_ACTIVE),
            },
            evidence: None,
            remedy: agreed.map(|_| {
                if active.agreed < MIN_READINGS {
                    "20 readings with the same requests are needed: send more requests or shorten \
                     --sample-interval"
                } else {
                    "requests of other clients are unknown to the router; SGLang needs \
                     --decode-log-interval 1"
                }
            }),
        }
    })
}

/// Checks that the last reading has no active blocks, neither predicted nor reported.
fn check_rest(found: &Verification) -> Check {
    let active = found.workers.iter().map(|worker| &worker.active);
    let predicted: u64 = active.clone().map(|blocks| blocks.predicted_at_rest).sum();
    let reported: f64 = active.map(|blocks| blocks.reported_at_rest).sum();
    Check {
        name: "active blocks after the last response".to_owned(),
        found: format!("{predicted} predicted, {reported} reported by the engines"),
        goal: "0".to_owned(),
        verdict: holds(predicted == 0 && reported == 0.0),
        evidence: None,
        remedy: Some("an engine that still has active blocks serves another client"),
    }
}

/// Checks that the router and the engines count prompt tokens alike. `None` if the router has no
/// tokenizer.
fn check_parity(found: &Verification) -> Option<Check> {
    let parity = found.parity;
    let compared = parity.equal + parity.different;
    found.has_tokenizer.then(|| Check {
        name: "prompt tokens counted as the engines count them".to_owned(),
        found: format!("{} of {compared}", parity.equal),
        goal: "all".to_owned(),
        verdict: if compared > 0 {
            holds(parity.different == 0)
        } else {
            Verdict::NotMeasured
        },
        evidence: None,
        remedy: Some("--tokenizer must be the model that the engines were started with"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn overlap(equal: usize, requests: usize, goal: f64) -> Check {
        let hits = Hits {
            requests,
            equal,
            ..Hits::default()
        };
        check_overlap(1, &hits, goal, true)
    }

    #[test]
    fn a_goal_that_was_not_shown_says_how_many_responses_would_be_needed() {
        let check = overlap(149, 150, 0.999);
        assert_eq!(check.verdict, Verdict::NotShown);
        assert_eq!(check.advice(), None);
        assert_eq!(
            check.to_string(),
            "not shown    overlap with cached prefixes, 1 at a time: predicted exactly in 149 of \
             150 responses (95 % interval 96.34\u{2013}99.98 %): consistent with the goal of \
             99.9 %; 5,570 responses would be needed to show it"
        );
    }

    #[test]
    fn a_goal_that_holds_or_fails_says_so() {
        let shown = overlap(4000, 4000, 0.999);
        assert_eq!(shown.verdict, Verdict::Holds);
        assert!(shown.to_string().starts_with("holds "), "{shown}");
        assert!(shown.to_string().ends_with("shows the goal of 99.9 %"));
        let missed = overlap(100, 150, 0.999);
        assert_eq!(missed.verdict, Verdict::Fails);
        assert!(missed.to_string().starts_with("FAILS "), "{missed}");
        assert!(missed.to_string().contains("excludes the goal of 99.9 %"));
        assert!(missed.to_string().contains("--block-size"), "{missed}");
    }

    #[test]
    fn engines_without_cached_tokens_leave_the_goal_unmeasured() {
        let check = overlap(0, 0, 0.999);
        assert_eq!(check.verdict, Verdict::NotMeasured);
        assert!(check.to_string().contains("--enable-cache-report"));
        let json = serde_json::to_value(&check).unwrap();
        assert_eq!(json["verdict"], "not_measured");
        assert_eq!(json["evidence"], serde_json::Value::Null);
    }

    #[test]
    fn digits_are_grouped_by_three() {
        let texts = [0, 999, 1000, 1_234_567].map(grouped);
        assert_eq!(texts, ["0", "999", "1,000", "1,234,567"]);
    }
}
