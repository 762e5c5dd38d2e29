//! Policies of the field, and an oracle, as baselines for replay.
//!
//! None of them serves: what `foresee serve` offers is in [`foresee_core::choose`]. Each is a few
//! lines over what [`view`] shows of one request and the workers: [`rules`] (what the router
//! books), [`metered`] (what engines report of themselves, and when they last did), [`history`]
//! (what was sent where), [`oracle`] (what engines will do, by [`rolling`] them forward);
//! [`ablation`] (the router's own cost in seconds, less a term). [`seat`] puts a rule in the router's
//! place: it asks the rule, and books there.

mod ablation;
mod history;
mod metered;
mod oracle;
mod rolling;
mod rules;
pub(crate) mod seat;
mod view;

use std::fmt;
use std::str::FromStr;

use foresee_core::choose::Policy;
use foresee_core::queue::Order;
use foresee_core::router::RouterConfig;

use seat::Seat;
use view::Rule;

/// A rule of the lab: how it is called, what it does, and how a fresh one is made.
#[derive(Clone, Copy)]
pub struct LabRule {
    /// What it is chosen by.
    pub name: &'static str,
    /// One line, for `--help`.
    pub what: &'static str,
    make: fn() -> Box<dyn Rule>,
}

impl fmt::Debug for LabRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("LabRule").field(&self.name).finish()
    }
}

/// Every rule of the lab, in the order to list them.
pub static RULES: [LabRule; 11] = [
    LabRule {
        name: "dynamo",
        what: "Dynamo today: prefill backlog + active blocks, this request included",
        make: || rules::least(rules::dynamo),
    },
    LabRule {
        name: "metrics-1s",
        what: "Dynamo before PR 1731: 2 × overlap − KV usage − waiting, scraped each second",
        make: || Box::new(metered::Scraped::default()),
    },
    LabRule {
        name: "sglang",
        what: "SGLang's cache_aware: longest history above 0.3, else the smallest; 64 and 1.5",
        make: || Box::new(history::CacheAware::default()),
    },
    LabRule {
        name: "llm-d",
        what: "llm-d's scorers: prefix 3, queue 2, KV usage 2, metrics scraped each 50 ms",
        make: || Box::new(metered::Scored),
    },
    LabRule {
        name: "llm-d-affinity",
        what: "llm-d's optimized baseline: stick to caches ≥ 0.8, then least tokens in flight",
        make: || Box::new(rules::Affinity),
    },
    LabRule {
        name: "lmetric",
        what: "LMetric: (pending + new prefill tokens) × (requests + 1)",
        make: || rules::least(rules::lmetric),
    },
    LabRule {
        name: "production-stack",
        what: "vLLM production-stack: matched share − load above the mean, β = 1",
        make: || rules::least(rules::production_stack),
    },
    LabRule {
        name: "two-tier",
        what: "Dynamo's two-tier cost: least requests if 32 and 1.1 apart, else overlap > 0.5",
        make: || Box::new(rules::TwoTier),
    },
    LabRule {
        name: "min-ttft",
        what: "Mooncake: least predicted time to first token, engine's own prefill times known",
        make: || rules::least(rules::time_to_first_token),
    },
    LabRule {
        name: "oracle",
        what: "true engine state and answer lengths, each choice rolled forward; greedy",
        make: || Box::new(oracle::Oracle::new(oracle::END_TO_END)),
    },
    LabRule {
        name: "oracle:ttft",
        what: "the same, its own time to first token counted ten times more",
        make: || Box::new(oracle::Oracle::new(oracle::FIRST_TOKEN)),
    },
];

/// The router's `delay` without one of its terms each, and without copies: what that is worth.
pub static ABLATIONS: [LabRule; 8] = [
    LabRule {
        name: "delay:no-copies",
        what: "`delay` that gives idle workers no copy of a prefix; nor do the others without a term",
        make: ablation::without_copies,
    },
    LabRule {
        name: "delay:no-wait",
        what: "`delay` without the wait for prompts before it",
        make: || ablation::without(|it| &mut it.wait),
    },
    LabRule {
        name: "delay:no-prefill",
        what: "`delay` without the time its own prompt takes",
        make: || ablation::without(|it| &mut it.prefill),
    },
    LabRule {
        name: "delay:no-decode",
        what: "`delay` without the time its answer takes alone",
        make: || ablation::without(|it| &mut it.decode),
    },
    LabRule {
        name: "delay:no-slowed",
        what: "`delay` without what others add to that",
        make: || ablation::without(|it| &mut it.slowed),
    },
    LabRule {
        name: "delay:no-stalls",
        what: "`delay` without what its prompt makes others wait",
        make: || ablation::without(|it| &mut it.stalls),
    },
    LabRule {
        name: "delay:no-slows",
        what: "`delay` without what its answer makes others wait",
        make: || ablation::without(|it| &mut it.slows),
    },
    LabRule {
        name: "delay:no-future",
        what: "`delay` without the wait of requests to come",
        make: || ablation::without(|it| &mut it.future),
    },
];

/// A policy that replay can run: one of those that serve, or a [`LabRule`]; and in which order
/// requests wait at the router, if they do.
#[derive(Clone, Debug)]
pub struct Contender {
    name: String,
    chooser: Chooser,
    queue: Option<Order>,
}

#[derive(Clone, Copy, Debug)]
enum Chooser {
    /// The router, with a weight of its own.
    Router(Policy, Weight),
    Rule(&'static LabRule),
}

/// What a policy of the router has other than the configuration.
#[derive(Clone, Copy, Debug)]
enum Weight {
    Configured,
    Overlap(f64),
    TimeToFirstToken(f64),
}

/// Dynamo's formula as PR 1731 introduced it, which is what `kv` computes.
const PR_1731: (&str, f64) = ("dynamo-pr1731", 1.0);

impl Contender {
    /// The router's settings, changed so that it decides by this policy if it is one of its own.
    pub(crate) fn settings(&self, settings: &RouterConfig) -> RouterConfig {
        let mut settings = settings.clone();
        settings.queue = self.queue;
        if let Chooser::Router(policy, weight) = self.chooser {
            settings.policy = policy;
            match weight {
                Weight::Configured => {}
                Weight::Overlap(weight) => settings.overlap_weight = weight,
                Weight::TimeToFirstToken(weight) => settings.ttft_weight = weight,
            }
        }
        settings
    }

    /// What chooses in the router's place, if this is none of its own policies.
    pub(crate) fn seat(&self, seed: u64) -> Option<Seat> {
        match self.chooser {
            Chooser::Router(..) => None,
            Chooser::Rule(rule) => Some(Seat::new(rule, seed)),
        }
    }
}

impl From<Policy> for Contender {
    fn from(policy: Policy) -> Self {
        Self {
            name: policy.to_string(),
            chooser: Chooser::Router(policy, Weight::Configured),
            queue: None,
        }
    }
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.name)
    }
}

/// A name that is no policy's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown policy `{name}`: use {}", names().join(", "))]
pub struct UnknownContender {
    name: String,
}

/// Every name there is.
fn names() -> Vec<&'static str> {
    let router = Policy::ALL.map(|(_, name)| name);
    let rules = RULES.iter().chain(&ABLATIONS).map(|rule| rule.name);
    let written = router
        .into_iter()
        .chain(["kv:WEIGHT", "delay:ttft=WEIGHT", PR_1731.0]);
    let queued = ["POLICY+fcfs", "POLICY+shortest", "POLICY+fair"];
    written.chain(rules).chain(queued).collect()
}

impl FromStr for Contender {
    type Err = UnknownContender;

    fn from_str(name: &str) -> Result<Self, UnknownContender> {
        let unknown = || UnknownContender {
            name: name.to_owned(),
        };
        let (policy, queue) = match name.rsplit_once('+') {
            Some((policy, order)) => (policy, Some(order.parse().map_err(|_| unknown())?)),
            None => (name, None),
        };
        Ok(Self {
            name: name.to_owned(),
            chooser: chooser(policy).ok_or_else(unknown)?,
            queue,
        })
    }
}

fn chooser(name: &str) -> Option<Chooser> {
    let number = |prefix| name.strip_prefix(prefix)?.parse().ok();
    if let Some(weight) = number("kv:") {
        return Some(Chooser::Router(Policy::Kv, Weight::Overlap(weight)));
    }
    if let Some(weight) = number("delay:ttft=") {
        let weight = Weight::TimeToFirstToken(weight);
        return Some(Chooser::Router(Policy::Delay, weight));
    }
    if name == PR_1731.0 {
        return Some(Chooser::Router(Policy::Kv, Weight::Overlap(PR_1731.1)));
    }
    if let Ok(policy) = name.parse() {
        return Some(Chooser::Router(policy, Weight::Configured));
    }
    let mut rules = RULES.iter().chain(&ABLATIONS);
    rules.find(|rule| rule.name == name).map(Chooser::Rule)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_understood_and_kept() {
        for name in names() {
            let name = name.replace("WEIGHT", "100").replace("POLICY", "lmetric");
            let contender: Contender = name.parse().unwrap();
            assert_eq!(contender.to_string(), name);
        }
    }

    #[test]
    fn an_unknown_name_is_told_all_that_are_known() {
        for name in [
            "kv:",
            "kv:much",
            "oracle:ttf",
            "delay:ttft=",
            "delay:no-tax",
            "delay+",
            "delay+lifo",
            "",
        ] {
            let error = name.parse::<Contender>().unwrap_err().to_string();
            assert!(error.contains("kv:WEIGHT, delay:ttft=WEIGHT, dynamo-pr1731, dynamo"));
            assert!(error.contains("least-requests") && error.ends_with("POLICY+fair"));
        }
    }
}
