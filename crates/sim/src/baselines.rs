//! Baselines for replay: policies of other routers, re-implemented, and an oracle.
//!
//! `foresee serve` offers none of them; its policies are in [`foresee_core::policy`]. A baseline is
//! a few lines over `view`, which shows one request and the workers that may take it. The modules
//! differ in what the baselines look at:
//!
//! | module | input |
//! |---|---|
//! | `booked` | what the router has booked on each worker |
//! | `scraped` | metrics of the engines, as old as the last scrape |
//! | `history` | which prompts were sent to which worker |
//! | `oracle` | the true state of the engines, simulated to its end by `lookahead` |
//! | `ablation` | the router's marginal delay without one of its terms |
//!
//! `driver` runs a baseline in place of the router's policy: it asks the baseline for a worker and
//! books the request there.

mod ablation;
mod booked;
pub(crate) mod driver;
mod history;
mod lookahead;
mod oracle;
mod scraped;
mod view;

use std::fmt;
use std::str::FromStr;

use foresee_core::outlier::OutlierConfig;
use foresee_core::policy::Policy;
use foresee_core::queue::QueueOrder;
use foresee_core::router::RouterConfig;

use driver::PolicyDriver;
use view::BaselinePolicy;

/// A policy of another router, the oracle, or an ablation: its name, its description and its
/// constructor.
#[derive(Clone, Copy)]
pub struct Baseline {
    /// Name in a [`PolicySpec`].
    pub name: &'static str,
    /// Description of one line, for `--help`.
    pub description: &'static str,
    /// Creates the policy without any history.
    make: fn() -> Box<dyn BaselinePolicy>,
}

impl fmt::Debug for Baseline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Baseline").field(&self.name).finish()
    }
}

/// All baselines, in the order in which they are listed. Formulas, parameters and sources are in
/// the documentation of the policies in the submodules.
pub static BASELINES: [Baseline; 11] = [
    Baseline {
        name: "dynamo",
        description: "NVIDIA Dynamo: prefill backlog in blocks + active blocks, this request included",
        make: || booked::argmin_by(booked::dynamo),
    },
    Baseline {
        name: "metrics-1s",
        description: "Dynamo before PR 1731: 2 × cached − KV usage − waiting, scraped every second",
        make: || Box::new(scraped::DynamoScraped::default()),
    },
    Baseline {
        name: "sglang",
        description: "SGLang cache_aware: longest routed prefix above 0.3, else smallest history",
        make: || Box::new(history::CacheAware::default()),
    },
    Baseline {
        name: "llm-d",
        description: "llm-d's default scorers: prefix 3, queue 2, KV usage 2, scraped every 50 ms",
        make: || Box::new(scraped::LlmdScorers),
    },
    Baseline {
        name: "llm-d-affinity",
        description: "llm-d's optimized baseline: cached fraction ≥ 0.8, then fewest tokens in flight",
        make: || Box::new(booked::LlmdAffinity),
    },
    Baseline {
        name: "lmetric",
        description: "LMetric: (pending + new prefill tokens) × (requests + 1)",
        make: || booked::argmin_by(booked::lmetric),
    },
    Baseline {
        name: "production-stack",
        description: "vLLM production-stack loadaware: matched fraction − load above the mean",
        make: || booked::argmin_by(booked::production_stack),
    },
    Baseline {
        name: "two-tier",
        description: "Dynamo's two-tier cost: fewest requests if uneven, else cached fraction above 0.5",
        make: || Box::new(booked::TwoTier),
    },
    Baseline {
        name: "min-ttft",
        description: "Mooncake: shortest predicted time to first token, with the true prefill times",
        make: || booked::argmin_by(booked::time_to_first_token),
    },
    Baseline {
        name: "oracle",
        description: "simulates each engine to its end, with true state and output lengths; greedy",
        make: || Box::new(oracle::Oracle::new(oracle::END_TO_END)),
    },
    Baseline {
        name: "oracle:ttft",
        description: "oracle in which a second before the request's first token counts as ten",
        make: || Box::new(oracle::Oracle::new(oracle::FIRST_TOKEN)),
    },
];

/// Ablations: the router's [marginal delay](foresee_core::marginal_delay) without one of its terms,
/// which shows what the term is worth. No ablation replicates prefixes, so each is compared with
/// the first, which has all terms.
pub static ABLATIONS: [Baseline; 8] = [
    Baseline {
        name: "marginal-delay:no-replication",
        description: "the default cost without replication, which the ablations below also leave out",
        make: ablation::without_replication,
    },
    Baseline {
        name: "marginal-delay:no-queue-wait",
        description: "without queue_wait: the wait for prompts before this one",
        make: || ablation::without(|delay| &mut delay.queue_wait),
    },
    Baseline {
        name: "marginal-delay:no-prefill",
        description: "without prefill: the time to compute this prompt",
        make: || ablation::without(|delay| &mut delay.prefill),
    },
    Baseline {
        name: "marginal-delay:no-decode",
        description: "without decode: the decode time of this output on an idle worker",
        make: || ablation::without(|delay| &mut delay.decode),
    },
    Baseline {
        name: "marginal-delay:no-decode-slowdown",
        description: "without decode_slowdown: decode time that other requests add to this output",
        make: || ablation::without(|delay| &mut delay.decode_slowdown),
    },
    Baseline {
        name: "marginal-delay:no-prefill-stall-caused",
        description: "without prefill_stall_caused: time that this prefill stalls other requests",
        make: || ablation::without(|delay| &mut delay.prefill_stall_caused),
    },
    Baseline {
        name: "marginal-delay:no-decode-slowdown-caused",
        description: "without decode_slowdown_caused: decode time that this output adds to others",
        make: || ablation::without(|delay| &mut delay.decode_slowdown_caused),
    },
    Baseline {
        name: "marginal-delay:no-future-arrivals",
        description: "without future_arrivals: delay of requests that arrive later",
        make: || ablation::without(|delay| &mut delay.future_arrivals),
    },
];

/// A policy that replay can run, with the order of the router's queue:
/// `POLICY[:PARAMETER][+ORDER]`.
///
/// The policy is a [`Policy`] of the router or a [`Baseline`]. Without an order, requests are sent
/// at once.
#[derive(Clone, Debug)]
pub struct PolicySpec {
    /// Text from which the specification was parsed.
    name: String,
    kind: PolicyKind,
    /// Order of the router's queue; `None` for no queue.
    queue: Option<QueueOrder>,
}

/// Kind of a policy: the router's own, or a baseline.
#[derive(Clone, Copy, Debug)]
enum PolicyKind {
    /// A policy of the router, with a weight that may differ from the configured one.
    Router(Policy, WeightOverride),
    /// A policy that chooses in place of the router's.
    Baseline(&'static Baseline),
}

/// Weight of the router's policy that differs from the router's configuration.
#[derive(Clone, Copy, Debug)]
enum WeightOverride {
    /// No weight differs.
    Configured,
    /// Value for [`RouterConfig::overlap_weight`].
    Overlap(f64),
    /// Value for [`RouterConfig::ttft_weight`].
    TimeToFirstToken(f64),
}

/// Name and overlap weight of Dynamo's formula as PR 1731 introduced it: overlap weight × blocks to
/// compute + active blocks. The router's `kv` computes it.
const DYNAMO_PR_1731: (&str, f64) = ("dynamo-pr1731", 1.0);

impl PolicySpec {
    /// Returns `config` with the queue order of this policy. If the policy is one of the router's
    /// own, the policy and its weight are set too.
    #[must_use]
    pub fn settings(&self, config: &RouterConfig) -> RouterConfig {
        let mut settings = config.clone();
        settings.queue_order = self.queue;
        if let PolicyKind::Router(policy, weight) = self.kind {
            settings.policy = policy;
            match weight {
                WeightOverride::Configured => {}
                WeightOverride::Overlap(weight) => settings.overlap_weight = weight,
                WeightOverride::TimeToFirstToken(weight) => settings.ttft_weight = weight,
            }
        } else {
            // The baselines are compared by their costs alone.
            settings.outlier = OutlierConfig::disabled();
        }
        settings
    }

    /// Creates the driver of a baseline, which breaks ties at random by `seed`. `None` for a policy
    /// of the router.
    pub(crate) fn driver(&self, seed: u64) -> Option<PolicyDriver> {
        match self.kind {
            PolicyKind::Router(..) => None,
            PolicyKind::Baseline(baseline) => Some(PolicyDriver::new(baseline, seed)),
        }
    }
}

impl From<Policy> for PolicySpec {
    /// Returns the policy with its default queue, as the router runs it by default.
    fn from(policy: Policy) -> Self {
        let queue = policy.default_queue();
        let suffix = queue.map(|order| format!("+{order}")).unwrap_or_default();
        Self {
            name: format!("{policy}{suffix}"),
            kind: PolicyKind::Router(policy, WeightOverride::Configured),
            queue,
        }
    }
}

impl fmt::Display for PolicySpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.name)
    }
}

/// A policy specification that cannot be parsed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown policy `{name}`: use {}", names().join(", "))]
pub struct UnknownPolicySpec {
    name: String,
}

/// Returns all forms of a policy specification. `WEIGHT` stands for a number, `POLICY` for one of
/// the other names.
fn names() -> Vec<&'static str> {
    let router = Policy::ALL.map(|(_, name)| name);
    let baselines = BASELINES.iter().chain(&ABLATIONS);
    let baselines = baselines.map(|baseline| baseline.name);
    let weighted =
        router
            .into_iter()
            .chain(["kv:WEIGHT", "marginal-delay:ttft=WEIGHT", DYNAMO_PR_1731.0]);
    let queued = ["POLICY+fcfs", "POLICY+shortest", "POLICY+fair"];
    weighted.chain(baselines).chain(queued).collect()
}

impl FromStr for PolicySpec {
    type Err = UnknownPolicySpec;

    /// Reads a policy specification; an underscore stands for a hyphen.
    fn from_str(name: &str) -> Result<Self, UnknownPolicySpec> {
        let name = name.replace('_', "-");
        let name = name.as_str();
        let unknown = || UnknownPolicySpec {
            name: name.to_owned(),
        };
        let (policy, queue) = match name.rsplit_once('+') {
            Some((policy, order)) => (policy, Some(order.parse().map_err(|_| unknown())?)),
            None => (name, None),
        };
        Ok(Self {
            name: name.to_owned(),
            kind: parse_kind(policy).ok_or_else(unknown)?,
            queue,
        })
    }
}

/// Parses a policy with its parameter, without a queue order. `None` if there is no such policy.
/// The value of a weight is not checked.
fn parse_kind(name: &str) -> Option<PolicyKind> {
    let number = |prefix| name.strip_prefix(prefix)?.parse().ok();
    if let Some(weight) = number("kv:") {
        return Some(PolicyKind::Router(
            Policy::Kv,
            WeightOverride::Overlap(weight),
        ));
    }
    if let Some(weight) = number("marginal-delay:ttft=") {
        let weight = WeightOverride::TimeToFirstToken(weight);
        return Some(PolicyKind::Router(Policy::MarginalDelay, weight));
    }
    if name == DYNAMO_PR_1731.0 {
        return Some(PolicyKind::Router(
            Policy::Kv,
            WeightOverride::Overlap(DYNAMO_PR_1731.1),
        ));
    }
    if let Ok(policy) = name.parse() {
        return Some(PolicyKind::Router(policy, WeightOverride::Configured));
    }
    let mut baselines = BASELINES.iter().chain(&ABLATIONS);
    baselines
        .find(|baseline| baseline.name == name)
        .map(PolicyKind::Baseline)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_listed_form_is_parsed_and_displayed_as_written() {
        for name in names() {
            let name = name.replace("WEIGHT", "100").replace("POLICY", "lmetric");
            let policy: PolicySpec = name.parse().unwrap();
            assert_eq!(policy.to_string(), name);
        }
    }

    #[test]
    fn the_error_for_an_unknown_name_lists_all_names() {
        for name in [
            "kv:",
            "kv:much",
            "oracle:ttf",
            "marginal-delay:ttft=",
            "marginal-delay:no-tax",
            "marginal-delay+",
            "marginal-delay+lifo",
            "",
        ] {
            let error = name.parse::<PolicySpec>().unwrap_err().to_string();
            assert!(error.contains("kv:WEIGHT, marginal-delay:ttft=WEIGHT, dynamo-pr1731, dynamo"));
            assert!(error.contains("least-requests") && error.ends_with("POLICY+fair"));
        }
    }
}
