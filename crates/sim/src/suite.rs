//! The suite: a fixed list of scenarios in which policies are compared.
//!
//! The scenarios are named workloads with their own arrivals, workloads at a fixed rate, two public
//! traces, which must be downloaded, and impaired fleets and cache signals. All have eight workers.
//! At each rate the best policies keep up; the highest rates are near their capacity.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use foresee_core::router::RouterConfig;

use crate::cache_signal::CacheSignal;
use crate::compare::Case;
use crate::engine::EngineConfig;
use crate::fleet_changes::{Change, FleetChange};
use crate::hashed_workload::HashedWorkload;
use crate::replay::ReplayConfig;
use crate::slo::Slo;
use crate::step_time::{H100_70B_TP4, L40S_8B, Preset};
use crate::trace::{TraceRequest, section};
use crate::workload::{
    InvalidRate, InvalidRequestRate, Recipe, Spacing, UnknownWorkload, Workload,
};

/// A scenario of the suite.
#[derive(Clone, Copy, Debug)]
pub struct Scenario {
    /// Name.
    pub name: &'static str,
    /// Description in one line.
    pub description: &'static str,
    /// Sources of the requests; the first available one is used.
    sources: &'static [WorkloadSource],
    condition: FleetCondition,
}

/// The source of requests.
#[derive(Clone, Copy, Debug)]
enum WorkloadSource {
    /// A named workload with its own arrivals.
    Named(&'static str),
    /// A named workload with Poisson arrivals: requests per second, and the number of requests,
    /// conversations or tasks.
    Open(&'static str, f64, u32),
    /// Mooncake's conversation trace with its arrival rate multiplied by this factor.
    Conversation(f64),
    /// Azure's conversation trace with its arrival rate multiplied by this factor.
    Azure(f64),
}

/// An impairment of the fleet or of the cache signal.
#[derive(Clone, Copy, Debug)]
enum FleetCondition {
    /// No impairment.
    Normal,
    /// One worker has half the speed.
    Uneven,
    /// One worker loses half its speed after half the time.
    Slowing,
    /// Engines have a quarter of their KV blocks.
    Small,
    /// KV events arrive half a second late.
    Late,
    /// The workers send no KV events.
    NoEvents,
}

/// Creates a scenario without an impairment.
const fn normal(
    name: &'static str,
    description: &'static str,
    sources: &'static [WorkloadSource],
) -> Scenario {
    Scenario {
        name,
        description,
        sources,
        condition: FleetCondition::Normal,
    }
}

/// Creates a scenario with an impairment. Its requests are those of Mooncake's conversation trace,
/// or of the agent workload if the trace is not available, at 70 % of the capacity of the
/// unimpaired fleet.
const fn under(
    condition: FleetCondition,
    name: &'static str,
    description: &'static str,
) -> Scenario {
    Scenario {
        name,
        description,
        sources: &[CONVERSATION_70, AGENT_70],
        condition,
    }
}

/// 70 % of the capacity of eight workers, which is 1.8 times the trace's rate.
const CONVERSATION_70: WorkloadSource = WorkloadSource::Conversation(1.26);
/// 70 % of the capacity of eight workers, which is 55 calls per second.
const AGENT_70: WorkloadSource = WorkloadSource::Open("agent", 38.0, 900);

/// Every scenario, in the order of reports.
#[rustfmt::skip]
pub static SCENARIOS: [Scenario; 25] = {
    use WorkloadSource::{Azure, Conversation, Named, Open};
    [
        normal("shared-prefix", "1,000 prompts, ISL 7000, OSL 100, 10 prefixes, 20 in flight", &[Named("shared-prefix")]),
        normal("shared-prefix-c10", "1,000 prompts, ISL 7000, OSL 100, 10 prefixes, 10 in flight", &[Named("shared-prefix-c10")]),
        normal("shared-prefix-isl", "1,000 prompts, ISL 7000 ±90 %, OSL 100, 10 prefixes, 20 in flight", &[Named("shared-prefix-isl")]),
        normal("shared-prefix-osl", "1,000 prompts, ISL 7000, OSL 100 ±90 %, 10 prefixes, 20 in flight", &[Named("shared-prefix-osl")]),
        normal("burst", "1,000 prompts at one instant, ISL 7000, OSL 100, 10 prefixes", &[Named("burst")]),
        normal("burst-isl", "1,000 prompts at one instant, ISL 7000 ±90 %, OSL 100, 10 prefixes", &[Named("burst-isl")]),
        normal("burst-one-prefix", "1,000 prompts at one instant, ISL 7000, OSL 100, one prefix", &[Named("burst-one-prefix")]),
        normal("burst-heavy", "800 prompts at one instant, ISL 1500, one in ten 15 times as long", &[Named("burst-heavy")]),
        normal("n-samples", "1,000 identical prompts at one instant", &[Named("n-samples")]),
        normal("conversation-50", "Mooncake's conversation trace at 50 % of the fleet's capacity", &[Conversation(0.9)]),
        normal("conversation-70", "Mooncake's conversation trace at 70 % of the fleet's capacity", &[CONVERSATION_70]),
        normal("conversation-85", "Mooncake's conversation trace at 85 % of the fleet's capacity", &[Conversation(1.53)]),
        normal("conversation-95", "Mooncake's conversation trace at 95 % of the fleet's capacity", &[Conversation(1.71)]),
        normal("agent-low", "tasks of about 12 calls at 15 % of the fleet's capacity", &[Open("agent", 8.0, 300)]),
        normal("agent", "tasks of about 12 calls at 70 % of the fleet's capacity", &[AGENT_70]),
        normal("agent-high", "tasks of about 12 calls at 90 % of the fleet's capacity", &[Open("agent", 50.0, 900)]),
        normal("rag", "questions about shared documents at 70 % of the fleet's capacity", &[Open("rag", 9.5, 3000)]),
        normal("chat", "conversations of up to 8 turns at 70 % of the fleet's capacity", &[Open("chat", 25.0, 1200)]),
        normal("azure", "Azure's trace, without shared prefixes, at 60 % of the fleet's capacity", &[Azure(5.0)]),
        normal("azure-high", "Azure's trace, without shared prefixes, at 90 % of the fleet's capacity", &[Azure(7.0)]),
        under(FleetCondition::Uneven, "uneven", "one worker with half the speed"),
        under(FleetCondition::Slowing, "slowing", "one worker with half the speed in the second half"),
        under(FleetCondition::Small, "small-kv", "engines with a quarter of the KV blocks"),
        under(FleetCondition::Late, "late-events", "KV events that arrive 500 ms late"),
        under(FleetCondition::NoEvents, "no-events", "no KV events"),
    ]
};

/// The public traces that some scenarios need; `None` if a trace is not available.
#[derive(Clone, Debug, Default)]
pub struct Traces {
    /// Mooncake's conversation trace.
    pub conversation: Option<Vec<TraceRequest>>,
    /// Azure's conversation trace of 2023.
    pub azure: Option<Vec<TraceRequest>>,
}

/// Settings of all scenarios, except where a scenario changes one of them.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The router's settings.
    pub router: RouterConfig,
    /// The router's source of knowledge about the engines' caches.
    pub cache_signal: CacheSignal,
    /// Limits that decide which requests count as goodput.
    pub slo: Slo,
    /// Number of runs of each policy, each with its own seed.
    pub seeds: NonZeroU32,
}

/// The reason why a scenario cannot be prepared.
#[derive(Debug, thiserror::Error)]
pub enum SuiteError {
    /// The scenario names an unknown workload.
    #[error(transparent)]
    Workload(#[from] UnknownWorkload),
    /// The factor on a trace's rate is invalid.
    #[error(transparent)]
    Rate(#[from] InvalidRate),
    /// The arrival rate of a workload is invalid.
    #[error(transparent)]
    RequestRate(#[from] InvalidRequestRate),
}

/// Number of workers in all scenarios.
const WORKERS: u32 = 8;

/// Length of the section of a trace that a run replays. Each seed has another section, until the
/// sections of the trace repeat.
const SECTION: Duration = Duration::from_secs(20 * 60);

impl Scenario {
    /// Returns the fleet and the requests to replay; `None` if the scenario needs a trace that is
    /// not available. The workload of run `i` has the router's seed plus `i`. The condition of the
    /// scenario overrides `settings`.
    ///
    /// # Errors
    /// If the entry in [`SCENARIOS`] is invalid.
    pub fn case(&self, traces: &Traces, settings: &Settings) -> Result<Option<Case>, SuiteError> {
        let Some(source) = self.source(traces) else {
            return Ok(None);
        };
        let router = &settings.router;
        let seeds = 0..u64::from(settings.seeds.get());
        let traffic = seeds.map(|seed| {
            let workload = source.workload(traces, router.seed.wrapping_add(seed), seed)?;
            Ok(Arc::new(HashedWorkload::new(workload, router.block_size)))
        });
        let traffic: Vec<_> = traffic.collect::<Result<_, SuiteError>>()?;
        let engine = EngineConfig {
            seed: router.seed,
            ..EngineConfig::from_preset(source.engine(), router.block_size)
        };
        let mut config = ReplayConfig::uniform(router.clone(), &engine, WORKERS);
        config.slo = settings.slo;
        config.cache_signal = settings.cache_signal;
        let duration = traffic
            .first()
            .map(|first| first.workload().arrivals_span());
        self.condition
            .apply(&mut config, duration.unwrap_or_default());
        Ok(Some(Case { config, traffic }))
    }

    /// Returns the first available source.
    fn source(&self, traces: &Traces) -> Option<WorkloadSource> {
        self.sources
            .iter()
            .copied()
            .find(|source| source.is_available(traces))
    }
}

impl WorkloadSource {
    fn is_available(self, traces: &Traces) -> bool {
        match self {
            Self::Named(_) | Self::Open(..) => true,
            Self::Conversation(_) => traces.conversation.is_some(),
            Self::Azure(_) => traces.azure.is_some(),
        }
    }

    /// Returns the engine of the workers. Mooncake's prompts are so long that only few would fit
    /// into the KV cache of a small engine.
    fn engine(self) -> &'static Preset {
        match self {
            Self::Conversation(_) => &H100_70B_TP4,
            Self::Named(_) | Self::Open(..) | Self::Azure(_) => &L40S_8B,
        }
    }

    /// Returns the workload of one run. `run` is the number of the run, which selects the section
    /// of a trace. `seed` generates the other workloads and does not affect a trace. A trace that
    /// is not available yields no requests.
    fn workload(self, traces: &Traces, seed: u64, run: u64) -> Result<Workload, SuiteError> {
        let from_trace = |trace: &Option<Vec<TraceRequest>>, rate, name: &str| {
            let requests = section(trace.as_deref().unwrap_or_default(), SECTION, run);
            let mut workload = Workload::from_trace(&requests, rate)?;
            workload.name = name.to_owned();
            Ok(workload)
        };
        match self {
            Self::Named(name) => Ok(Recipe::named(name)?.make(seed)),
            Self::Open(name, rate, requests) => {
                let recipe = Recipe::named(name)?.open(rate, Spacing { cv: 1.0 })?;
                let recipe = recipe.with_requests(requests);
                let mut workload = recipe.make(seed);
                workload.name = name.to_owned();
                Ok(workload)
            }
            Self::Conversation(rate) => from_trace(&traces.conversation, rate, "conversation"),
            Self::Azure(rate) => from_trace(&traces.azure, rate, "azure"),
        }
    }
}

impl FleetCondition {
    /// Changes the configuration. `duration` is the time from the first arrival to the last. The
    /// worker with half the speed is the first one.
    fn apply(self, config: &mut ReplayConfig, duration: Duration) {
        let half_speed = |at| FleetChange {
            at,
            worker: 0,
            change: Change::Speed(0.5),
        };
        match self {
            Self::Normal => {}
            Self::Uneven => config.changes.push(half_speed(Duration::ZERO)),
            Self::Slowing => config.changes.push(half_speed(duration / 2)),
            Self::Small => {
                for engine in &mut config.engines {
                    engine.blocks /= 4;
                }
            }
            Self::Late => {
                config.cache_signal = CacheSignal::Events {
                    lag: Duration::from_millis(500),
                    loss_fraction: 0.0,
                };
            }
            Self::NoEvents => config.cache_signal = CacheSignal::Estimated,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(seconds: u64) -> TraceRequest {
        TraceRequest {
            arrival: Duration::from_secs(seconds),
            prompt_tokens: 700,
            output_tokens: 9,
            hash_ids: vec![1, seconds],
            tokens_per_hash_id: NonZeroU32::new(512).unwrap(),
        }
    }

    fn named(name: &str) -> &'static Scenario {
        let scenario = SCENARIOS.iter().find(|scenario| scenario.name == name);
        scenario.unwrap()
    }

    fn case(name: &str, traces: &Traces) -> Option<Case> {
        let settings = Settings {
            router: RouterConfig::default(),
            cache_signal: CacheSignal::default(),
            slo: Slo::default(),
            seeds: NonZeroU32::new(2).unwrap(),
        };
        named(name).case(traces, &settings).unwrap()
    }

    #[test]
    fn without_traces_all_other_scenarios_are_available() {
        let mut names = Vec::new();
        for scenario in &SCENARIOS {
            assert!(!names.contains(&scenario.name));
            names.push(scenario.name);
            let source = scenario.source(&Traces::default());
            let needs = ["conversation-", "azure"]
                .iter()
                .any(|prefix| scenario.name.starts_with(prefix));
            assert_eq!(source.is_none(), needs, "{}", scenario.name);
            let Some(source) = source else { continue };
            let [first, second] = [0, 1].map(|seed| {
                let workload = source.workload(&Traces::default(), seed, seed);
                workload.unwrap().requests
            });
            assert!(first.len() >= 800, "{}", scenario.name);
            // A workload with one prefix and one length has no random choice.
            let is_same = scenario.name == "burst-one-prefix";
            assert_eq!(first == second, is_same, "{}", scenario.name);
        }
    }

    #[test]
    fn each_seed_has_its_own_section_of_a_trace() {
        let traces = Traces {
            conversation: Some([0, 600, 1200, 1500, 2400].map(request).to_vec()),
            azure: None,
        };
        let case = case("conversation-50", &traces).unwrap();
        let lengths = [0, 1].map(|seed| case.traffic[seed].workload().requests.len());
        assert_eq!(lengths, [2, 2]);
        let span = case.traffic[1].workload().arrivals_span();
        assert_eq!(span, Duration::from_secs(300).div_f64(0.9));
        assert!(self::case("azure", &traces).is_none());
    }

    #[test]
    fn each_condition_changes_the_configuration() {
        let traces = Traces {
            conversation: Some([0, 630].map(request).to_vec()),
            azure: None,
        };
        let config = |name: &str| {
            let case = case(name, &traces).unwrap();
            assert_eq!(case.traffic[0].workload().name, "conversation");
            assert_eq!((case.config.engines.len(), case.traffic.len()), (8, 2));
            let stand_in = named(name).source(&Traces::default());
            assert!(matches!(stand_in, Some(WorkloadSource::Open("agent", ..))));
            case.config
        };
        let slow = FleetChange {
            at: Duration::ZERO,
            worker: 0,
            change: Change::Speed(0.5),
        };
        assert_eq!(config("uneven").changes, [slow]);
        let at = Duration::from_secs(250);
        assert_eq!(config("slowing").changes, [FleetChange { at, ..slow }]);
        assert_eq!(config("small-kv").engines[0].blocks, 437_000 / 16 / 4);
        let lag = Duration::from_millis(500);
        assert_eq!(
            config("late-events").cache_signal,
            CacheSignal::Events {
                lag,
                loss_fraction: 0.0
            }
        );
        assert_eq!(config("no-events").cache_signal, CacheSignal::Estimated);
    }
}
