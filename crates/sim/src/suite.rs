//! The fixed list of scenarios that policies are judged by.
//!
//! Named workloads as they are, and as arrivals at a rate; two public traces, for who has them; and
//! fleets and knowledge that are not as they should be. Eight workers each. Rates are such that the
//! best policies keep up, near to what they can carry in the higher ones.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use foresee_core::router::RouterConfig;

use crate::compare::Case;
use crate::engine::EngineConfig;
use crate::knowledge::Knowledge;
use crate::law::{H100_70B_TP4, L40S_8B, Preset};
use crate::replay::ReplayConfig;
use crate::schedule::{Change, FleetChange};
use crate::slo::Slo;
use crate::trace::{TraceRequest, stretch};
use crate::traffic::Traffic;
use crate::workload::{
    InvalidRate, InvalidRequestRate, Recipe, Spacing, UnknownWorkload, Workload,
};

/// One of [`SCENARIOS`].
#[derive(Clone, Copy, Debug)]
pub struct Scenario {
    /// Its name.
    pub name: &'static str,
    /// A line about it.
    pub what: &'static str,
    /// What is sent: the first of these that there is.
    sources: &'static [Source],
    condition: Condition,
}

/// Where requests come from.
#[derive(Clone, Copy, Debug)]
enum Source {
    /// A named workload as it is.
    Named(&'static str),
    /// A named workload, at so many requests a second (Poisson), with so many requests,
    /// conversations or tasks.
    Open(&'static str, f64, u32),
    /// Mooncake's conversations, so many times as fast as they came.
    Conversation(f64),
    /// Azure's conversations, likewise.
    Azure(f64),
}

/// What is not as it should be.
#[derive(Clone, Copy, Debug)]
enum Condition {
    Fair,
    /// One worker is half as fast.
    Uneven,
    /// One worker becomes half as fast half-way through.
    Slowing,
    /// Engines have a quarter of their memory.
    Small,
    /// KV events come half a second late.
    Late,
    /// There are no KV events.
    Shadow,
}

const fn fair(name: &'static str, what: &'static str, sources: &'static [Source]) -> Scenario {
    Scenario {
        name,
        what,
        sources,
        condition: Condition::Fair,
    }
}

const fn under(condition: Condition, name: &'static str, what: &'static str) -> Scenario {
    Scenario {
        name,
        what,
        sources: &[CONVERSATION_70, AGENT_70],
        condition,
    }
}

/// Of what eight workers can carry of this trace, 1.8 times its rate, 70 %.
const CONVERSATION_70: Source = Source::Conversation(1.26);
/// Likewise, of 55 calls a second.
const AGENT_70: Source = Source::Open("agent", 38.0, 900);

/// Every scenario, in the order to list them.
#[rustfmt::skip]
pub static SCENARIOS: [Scenario; 25] = {
    use Source::{Azure, Conversation, Named, Open};
    [
        fair("seed", "20 at a time, ISL 7000, OSL 100, 10 prefixes", &[Named("seed")]),
        fair("seed-10", "10 at a time", &[Named("seed-10")]),
        fair("seed-isl", "ISL varied by 90 %", &[Named("seed-isl")]),
        fair("seed-osl", "OSL varied by 90 %", &[Named("seed-osl")]),
        fair("burst", "1,000 of these at one instant", &[Named("burst")]),
        fair("burst-isl", "with ISL varied by 90 %", &[Named("burst-isl")]),
        fair("burst-one-prefix", "with one prefix for all", &[Named("burst-one-prefix")]),
        fair("burst-heavy", "one prompt in ten 15 times as long", &[Named("burst-heavy")]),
        fair("n-samples", "1,000 identical prompts at one instant", &[Named("n-samples")]),
        fair("conversation-50", "Mooncake's trace, half of what can be carried", &[Conversation(0.9)]),
        fair("conversation-70", "70 % of it", &[CONVERSATION_70]),
        fair("conversation-85", "85 % of it", &[Conversation(1.53)]),
        fair("conversation-95", "95 % of it", &[Conversation(1.71)]),
        fair("agent-low", "tasks of some 12 calls, 15 % of what can be carried", &[Open("agent", 8.0, 300)]),
        fair("agent", "70 % of it", &[AGENT_70]),
        fair("agent-high", "90 % of it", &[Open("agent", 50.0, 900)]),
        fair("rag", "questions about shared documents, 70 %", &[Open("rag", 9.5, 3000)]),
        fair("chat", "conversations of up to 8 turns, 70 %", &[Open("chat", 25.0, 1200)]),
        fair("azure", "Azure's trace, which shares no prefixes, 60 %", &[Azure(5.0)]),
        fair("azure-high", "90 % of it", &[Azure(7.0)]),
        under(Condition::Uneven, "uneven", "one worker half as fast"),
        under(Condition::Slowing, "slowing", "one worker half as fast from half-way on"),
        under(Condition::Small, "small-kv", "a quarter of the KV cache"),
        under(Condition::Late, "late-events", "KV events come 500 ms late"),
        under(Condition::Shadow, "no-events", "no KV events"),
    ]
};

/// Traces that the list needs, for who has them.
#[derive(Clone, Debug, Default)]
pub struct Traces {
    /// Mooncake's conversations.
    pub conversation: Option<Vec<TraceRequest>>,
    /// Azure's of 2023.
    pub azure: Option<Vec<TraceRequest>>,
}

/// What is the same in all scenarios, but where one is about it.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The router's.
    pub router: RouterConfig,
    /// What tells the router what engines cache.
    pub knowledge: Knowledge,
    /// What counts as served well.
    pub slo: Slo,
    /// Runs of each policy.
    pub seeds: NonZeroU32,
}

/// Why a scenario cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum SuiteError {
    /// There is none of this name.
    #[error("unknown scenario {name:?}; known: {}", SCENARIOS.each_ref().map(|it| it.name).join(", "))]
    Unknown {
        /// The name asked for.
        name: String,
    },
    /// Its workload.
    #[error(transparent)]
    Workload(#[from] UnknownWorkload),
    /// Its rate.
    #[error(transparent)]
    Rate(#[from] InvalidRate),
    /// Its rate.
    #[error(transparent)]
    RequestRate(#[from] InvalidRequestRate),
}

/// The scenarios of these names, or all if there are none.
///
/// # Errors
/// If one is not known.
pub fn named(names: &[String]) -> Result<Vec<&'static Scenario>, SuiteError> {
    if names.is_empty() {
        return Ok(SCENARIOS.iter().collect());
    }
    let named = |name: &String| {
        let found = SCENARIOS.iter().find(|it| it.name == name);
        found.ok_or_else(|| SuiteError::Unknown { name: name.clone() })
    };
    names.iter().map(named).collect()
}

const WORKERS: u32 = 8;

/// How much of a trace is replayed; each seed has a stretch of its own, as far as it reaches.
const STRETCH: Duration = Duration::from_secs(20 * 60);

impl Scenario {
    /// What it replays; `None` if it needs a trace that there is not.
    ///
    /// # Errors
    /// If the list is wrong.
    pub fn case(&self, traces: &Traces, settings: &Settings) -> Result<Option<Case>, SuiteError> {
        let Some(source) = self.source(traces) else {
            return Ok(None);
        };
        let router = &settings.router;
        let seeds = 0..u64::from(settings.seeds.get());
        let traffic = seeds.map(|seed| {
            let workload = source.workload(traces, router.seed.wrapping_add(seed), seed)?;
            Ok(Arc::new(Traffic::new(workload, router.block_size)))
        });
        let traffic: Vec<_> = traffic.collect::<Result<_, SuiteError>>()?;
        let engine = EngineConfig {
            seed: router.seed,
            ..EngineConfig::from_preset(source.engine(), router.block_size)
        };
        let mut config = ReplayConfig::uniform(router.clone(), &engine, WORKERS);
        config.slo = settings.slo;
        config.knowledge = settings.knowledge;
        let span = traffic.first().map(|it| it.workload().arrivals_span());
        self.condition.impose(&mut config, span.unwrap_or_default());
        Ok(Some(Case { config, traffic }))
    }

    fn source(&self, traces: &Traces) -> Option<Source> {
        self.sources.iter().copied().find(|it| it.is_there(traces))
    }
}

impl Source {
    fn is_there(self, traces: &Traces) -> bool {
        match self {
            Self::Named(_) | Self::Open(..) => true,
            Self::Conversation(_) => traces.conversation.is_some(),
            Self::Azure(_) => traces.azure.is_some(),
        }
    }

    /// What its workers are: Mooncake's prompts are so long that small ones could hold few.
    fn engine(self) -> &'static Preset {
        match self {
            Self::Conversation(_) => &H100_70B_TP4,
            Self::Named(_) | Self::Open(..) | Self::Azure(_) => &L40S_8B,
        }
    }

    /// `run` counts the seeds.
    fn workload(self, traces: &Traces, seed: u64, run: u64) -> Result<Workload, SuiteError> {
        let of_trace = |trace: &Option<Vec<TraceRequest>>, rate, name: &str| {
            let requests = stretch(trace.as_deref().unwrap_or_default(), STRETCH, run);
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
            Self::Conversation(rate) => of_trace(&traces.conversation, rate, "conversation"),
            Self::Azure(rate) => of_trace(&traces.azure, rate, "azure"),
        }
    }
}

impl Condition {
    /// `span` is the time in which requests arrive.
    fn impose(self, config: &mut ReplayConfig, span: Duration) {
        let half_speed = |at| FleetChange {
            at,
            worker: 0,
            what: Change::Speed(0.5),
        };
        match self {
            Self::Fair => {}
            Self::Uneven => config.changes.push(half_speed(Duration::ZERO)),
            Self::Slowing => config.changes.push(half_speed(span / 2)),
            Self::Small => {
                for engine in &mut config.engines {
                    engine.blocks /= 4;
                }
            }
            Self::Late => {
                config.knowledge = Knowledge::Events {
                    lag: Duration::from_millis(500),
                    loss: 0.0,
                };
            }
            Self::Shadow => config.knowledge = Knowledge::Shadow,
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

    fn case(name: &str, traces: &Traces) -> Option<Case> {
        let settings = Settings {
            router: RouterConfig::default(),
            knowledge: Knowledge::default(),
            slo: Slo::default(),
            seeds: NonZeroU32::new(2).unwrap(),
        };
        let scenario = named(&[name.to_owned()]).unwrap()[0];
        scenario.case(traces, &settings).unwrap()
    }

    #[test]
    fn without_traces_all_is_there_but_what_needs_them() {
        let mut names = Vec::new();
        for scenario in &SCENARIOS {
            assert!(!names.contains(&scenario.name));
            names.push(scenario.name);
            let source = scenario.source(&Traces::default());
            let needs = ["conversation-", "azure"]
                .iter()
                .any(|it| scenario.name.starts_with(it));
            assert_eq!(source.is_none(), needs, "{}", scenario.name);
            let Some(source) = source else { continue };
            let [first, second] = [0, 1].map(|seed| {
                let workload = source.workload(&Traces::default(), seed, seed);
                workload.unwrap().requests
            });
            assert!(first.len() >= 800, "{}", scenario.name);
            // With one prefix and one length there is nothing to decide.
            let is_same = scenario.name == "burst-one-prefix";
            assert_eq!(first == second, is_same, "{}", scenario.name);
        }
        assert!(named(&["seed".to_owned(), "sead".to_owned()]).is_err());
    }

    #[test]
    fn each_seed_has_a_stretch_of_a_trace() {
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
    fn conditions_are_what_their_names_say() {
        let traces = Traces {
            conversation: Some([0, 630].map(request).to_vec()),
            azure: None,
        };
        let of = |name: &str| {
            let with = case(name, &traces).unwrap();
            assert_eq!(with.traffic[0].workload().name, "conversation");
            assert_eq!((with.config.engines.len(), with.traffic.len()), (8, 2));
            let stand_in = named(&[name.to_owned()]).unwrap()[0].source(&Traces::default());
            assert!(matches!(stand_in, Some(Source::Open("agent", ..))));
            with.config
        };
        let slow = FleetChange {
            at: Duration::ZERO,
            worker: 0,
            what: Change::Speed(0.5),
        };
        assert_eq!(of("uneven").changes, [slow]);
        let at = Duration::from_secs(250);
        assert_eq!(of("slowing").changes, [FleetChange { at, ..slow }]);
        assert_eq!(of("small-kv").engines[0].blocks, 437_000 / 16 / 4);
        let lag = Duration::from_millis(500);
        assert_eq!(
            of("late-events").knowledge,
            Knowledge::Events { lag, loss: 0.0 }
        );
        assert_eq!(of("no-events").knowledge, Knowledge::Shadow);
    }
}
