//! Baselines for replay: policies of other routers, re-implemented, and an oracle.
//!
//! `foresee serve` offers none of them; its policies are in [`foresee_core::policy`]. A baseline that
//! needs what a router knows implements the same trait and runs in the router, in place of its
//! policy. One that needs more, such as metrics of the engines, is shown the engines by a `driver`.
//! The modules differ in what the baselines look at:
//!
//! | module | input |
//! |---|---|
//! | `booked` | what the router has booked on each worker |
//! | `history` | which prompts were sent to which worker |
//! | `ablation` | the router's marginal delay without one of its terms |
//! | `scraped`, `smg` | metrics of the engines, as old as the last scrape |
//! | `kv_aware` | KV events, and the prompts that wait for their first token |
//! | `min_ttft` | true prefill times of the engines |
//! | `oracle` | the true state of the engines, simulated to its end by `lookahead` |
//!
//! `driver` asks a baseline of the last four kinds for a worker, and books the request there.

mod ablation;
mod booked;
pub(crate) mod driver;
mod history;
mod kv_aware;
mod lookahead;
mod min_ttft;
mod oracle;
mod scraped;
mod smg;
mod view;

use std::fmt;
use std::str::FromStr;

use foresee_core::outlier::OutlierConfig;
use foresee_core::policy::{self, NamedPolicy, Policy};
use foresee_core::queue::QueueOrder;
use foresee_core::router::RouterConfig;

use driver::PolicyDriver;
use view::InformedPolicy;

/// A policy of another router, the oracle, or an ablation: its name, its description and its
/// constructor.
#[derive(Clone, Copy)]
pub struct Baseline {
    /// Name in a [`PolicySpec`].
    pub name: &'static str,
    /// Description of one line, for `--help`.
    pub description: &'static str,
    rule: Rule,
}

/// Constructor of a policy without any history.
#[derive(Clone, Copy)]
enum Rule {
    /// A policy that runs in the router.
    Routed(fn() -> Box<dyn Policy>),
    /// A policy that sees the engines.
    Informed(fn() -> Box<dyn InformedPolicy>),
}

impl Baseline {
    /// Returns a baseline that runs in the router.
    const fn routed(
        name: &'static str,
        description: &'static str,
        create: fn() -> Box<dyn Policy>,
    ) -> Self {
        Self {
            name,
            description,
            rule: Rule::Routed(create),
        }
    }

    /// Returns a baseline that sees the engines.
    const fn informed(
        name: &'static str,
        description: &'static str,
        create: fn() -> Box<dyn InformedPolicy>,
    ) -> Self {
        Self {
            name,
            description,
            rule: Rule::Informed(create),
        }
    }

    /// Returns the policy that the router runs. Under an informed baseline it is the default one,
    /// among a single candidate.
    fn named(&self) -> NamedPolicy {
        match self.rule {
            Rule::Routed(create) => NamedPolicy {
                name: self.name,
                description: self.description,
                default_queue: None,
                create,
            },
            Rule::Informed(_) => NamedPolicy::default(),
        }
    }
}

impl fmt::Debug for Baseline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Baseline").field(&self.name).finish()
    }
}

/// All baselines, in the order in which they are listed. Formulas, parameters and sources are in
/// the documentation of the policies in the submodules.
pub static BASELINES: [Baseline; 12] = [
    Baseline::routed(
        "dynamo",
        "NVIDIA Dynamo: prefill backlog in blocks + active blocks, this request included",
        || Box::new(booked::Dynamo),
    ),
    Baseline::informed(
        "metrics-1s",
        "Dynamo before PR 1731: 2 × cached − KV usage − waiting, scraped every second",
        || Box::new(scraped::DynamoScraped::default()),
    ),
    Baseline::routed(
        "sglang",
        "SGLang cache_aware: longest routed prefix above 0.3, else smallest history",
        || Box::new(history::CacheAware::default()),
    ),
    Baseline::informed(
        "smg",
        "SMG 1.13 cache_aware: longest routed prefix up to a load bound, else least expected wait",
        || Box::new(smg::SmgCacheAware::default()),
    ),
    Baseline::informed(
        "llm-d",
        "llm-d's default scorers: prefix 3, queue 2, KV usage 2, scraped every 50 ms",
        || Box::new(scraped::LlmdScorers),
    ),
    Baseline::routed(
        "llm-d-affinity",
        "llm-d's optimized baseline: cached fraction ≥ 0.8, then fewest tokens in flight",
        || Box::new(booked::LlmdAffinity),
    ),
    Baseline::routed(
        "production-stack",
        "vLLM production-stack loadaware: matched fraction − load above the mean",
        || Box::new(booked::ProductionStack),
    ),
    Baseline::informed(
        "kv-aware",
        "vLLM router 0.1.17 kv_aware: (pending + uncached tokens) × (requests + 1), first of equals",
        || Box::new(kv_aware::KvAware),
    ),
    Baseline::routed(
        "two-tier",
        "Dynamo's two-tier cost: fewest requests if uneven, else cached fraction above 0.5",
        || Box::new(booked::TwoTier),
    ),
    Baseline::informed(
        "min-ttft",
        "Mooncake: shortest predicted time to first token, with the true prefill times",
        || Box::new(min_ttft::MinTtft),
    ),
    Baseline::informed(
        "oracle",
        "simulates each engine to its end, with true state and output lengths; greedy",
        || Box::new(oracle::Oracle::new(oracle::END_TO_END)),
    ),
    Baseline::informed(
        "oracle:ttft",
        "oracle in which a second before the request's first token counts as ten",
        || Box::new(oracle::Oracle::new(oracle::FIRST_TOKEN)),
    ),
];

/// Ablations: the router's [marginal delay](foresee_core::policy::marginal_delay) without one of its
/// terms or without replication, which shows what each is worth.
pub static ABLATIONS: [Baseline; 9] = [
    Baseline::routed(
        "marginal-delay:no-replication",
        "the default cost without replication",
        ablation::without_replication,
    ),
    Baseline::routed(
        "marginal-delay:no-queue-wait",
        "without queue_wait: the wait for prompts before this one",
        || ablation::without(|delay| &mut delay.queue_wait),
    ),
    Baseline::routed(
        "marginal-delay:no-prefill",
        "without prefill: the time to compute this prompt",
        || ablation::without(|delay| &mut delay.prefill),
    ),
    Baseline::routed(
        "marginal-delay:no-decode",
        "without decode: the decode time of this output on an idle worker",
        || ablation::without(|delay| &mut delay.decode),
    ),
    Baseline::routed(
        "marginal-delay:no-decode-slowdown",
        "without decode_slowdown: decode time that other requests add to this output",
        || ablation::without(|delay| &mut delay.decode_slowdown),
    ),
    Baseline::routed(
        "marginal-delay:no-prefill-stall-caused",
        "without prefill_stall_caused: time that this prefill stalls other requests",
        || ablation::without(|delay| &mut delay.prefill_stall_caused),
    ),
    Baseline::routed(
        "marginal-delay:no-decode-slowdown-caused",
        "without decode_slowdown_caused: decode time that this output adds to others",
        || ablation::without(|delay| &mut delay.decode_slowdown_caused),
    ),
    Baseline::routed(
        "marginal-delay:no-busy-extension",
        "without busy_extension: later prefills while this output keeps its worker busy",
        || ablation::without(|delay| &mut delay.busy_extension),
    ),
    Baseline::routed(
        "marginal-delay:no-future-arrivals",
        "without future_arrivals: delay of requests that arrive later",
        || ablation::without(|delay| &mut delay.future_arrivals),
    ),
];

/// A policy that replay can run, with the order of the router's queue:
/// `POLICY[:PARAMETER][+ORDER]`.
///
/// The policy is one of the [router's](foresee_core::policy::ALL) or a [`Baseline`]. Without an order, requests are sent
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
    Router(NamedPolicy, WeightOverride),
    /// The router's default without one of its parts.
    Ablation(&'static Baseline),
    /// A policy of another router.
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
        match self.kind {
            PolicyKind::Router(policy, weight) => {
                settings.policy = policy;
                match weight {
                    WeightOverride::Configured => {}
                    WeightOverride::Overlap(weight) => settings.overlap_weight = weight,
                    WeightOverride::TimeToFirstToken(weight) => settings.ttft_weight = weight,
                }
            }
            PolicyKind::Ablation(ablation) => settings.policy = ablation.named(),
            PolicyKind::Baseline(baseline) => {
                settings.policy = baseline.named();
                // Other routers' policies are compared by their costs alone.
                settings.outlier = OutlierConfig::disabled();
            }
        }
        settings
    }

    /// Returns whether the policy is that of another router.
    pub(crate) fn is_baseline(&self) -> bool {
        matches!(self.kind, PolicyKind::Baseline(_))
    }

    /// Creates the driver of a baseline that sees the engines, which breaks ties at random by
    /// `seed`. `None` for a policy that runs in the router.
    pub(crate) fn driver(&self, seed: u64) -> Option<PolicyDriver> {
        match self.kind {
            PolicyKind::Baseline(Baseline {
                rule: Rule::Informed(create),
                ..
            }) => Some(PolicyDriver::new(create(), seed)),
            _ => None,
        }
    }
}

impl From<NamedPolicy> for PolicySpec {
    /// Returns the policy with its default queue, as the router runs it by default.
    fn from(policy: NamedPolicy) -> Self {
        let queue = policy.default_queue;
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
    let router = policy::ALL.map(|policy| policy.name);
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
            policy::KV,
            WeightOverride::Overlap(weight),
        ));
    }
    if let Some(weight) = number("marginal-delay:ttft=") {
        let weight = WeightOverride::TimeToFirstToken(weight);
        return Some(PolicyKind::Router(policy::MARGINAL_DELAY, weight));
    }
    if name == DYNAMO_PR_1731.0 {
        return Some(PolicyKind::Router(
            policy::KV,
            WeightOverride::Overlap(DYNAMO_PR_1731.1),
        ));
    }
    if let Ok(policy) = name.parse() {
        return Some(PolicyKind::Router(policy, WeightOverride::Configured));
    }
    let is_named = |baseline: &&Baseline| baseline.name == name;
    let ablation = ABLATIONS.iter().find(is_named).map(PolicyKind::Ablation);
    ablation.or_else(|| BASELINES.iter().find(is_named).map(PolicyKind::Baseline))
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
