//! Compares routing decisions of Foresee's core with those of NVIDIA Dynamo's router, in one process
//! and one run. `README.md` says what is compared and how.

#![allow(
    clippy::expect_used,
    reason = "a benchmark has no error to recover from"
)]

mod dynamo;
mod events;
mod foresee;
mod scenario;

use foresee_core::policy::{KV, NamedPolicy};
use foresee_core::router::CacheSource;

use crate::events::{CachedPrompt, Traffic};
use crate::scenario::Measurement;

const FLEETS: [usize; 3] = [8, 64, 512];
const ROUNDS: usize = 2;
/// Tasks for each thread, where Dynamo's actor may have several requests to schedule at a time.
const MANY_TASKS: usize = 8;

/// What is measured on each fleet.
#[derive(Clone, Copy)]
enum Subject {
    Decisions { threads: usize },
    DecisionsWithoutHashing,
    Events { traffic: Traffic, threads: usize },
}

impl Subject {
    const ALL: [Self; 6] = [
        Self::Decisions { threads: 1 },
        Self::Decisions { threads: 2 },
        Self::DecisionsWithoutHashing,
        Self::Events {
            traffic: Traffic::Replacing,
            threads: 1,
        },
        Self::Events {
            traffic: Traffic::Replacing,
            threads: 2,
        },
        Self::Events {
            traffic: Traffic::Filling,
            threads: 1,
        },
    ];

    fn name(self) -> String {
        match self {
            Self::Decisions { threads } => format!("decisions/s, threads: {threads}"),
            Self::DecisionsWithoutHashing => "decisions/s without hashing, threads: 1".to_owned(),
            Self::Events { traffic, threads } => match traffic {
                Traffic::Replacing => format!("prompts replaced/s, threads: {threads}"),
                Traffic::Filling => format!("prompts stored/s, threads: {threads}"),
            },
        }
    }

    fn contenders(self) -> &'static [Contender] {
        match self {
            Self::Decisions { .. } => &Contender::ALL,
            Self::DecisionsWithoutHashing => &Contender::ALL_WITH_ONE_TASK,
            Self::Events { .. } => &Contender::ALL_WITH_EVENTS,
        }
    }
}

/// A router in one configuration.
#[derive(Clone, Copy)]
enum Contender {
    Dynamo {
        tasks: usize,
    },
    Foresee {
        name: &'static str,
        policy: fn() -> NamedPolicy,
        source: CacheSource,
    },
}

impl Contender {
    const DYNAMO: Self = Self::Dynamo { tasks: 1 };
    const DYNAMO_MANY: Self = Self::Dynamo { tasks: MANY_TASKS };
    const DEFAULT: Self = Self::Foresee {
        name: "Foresee, default",
        policy: NamedPolicy::default,
        source: CacheSource::Events,
    };
    const ESTIMATED: Self = Self::Foresee {
        name: "Foresee, default, estimated caches",
        policy: NamedPolicy::default,
        source: CacheSource::Estimated,
    };
    const KV: Self = Self::Foresee {
        name: "Foresee, `kv`",
        policy: || KV,
        source: CacheSource::Events,
    };
    const ALL: [Self; 5] = [
        Self::DYNAMO,
        Self::DYNAMO_MANY,
        Self::DEFAULT,
        Self::ESTIMATED,
        Self::KV,
    ];
    const ALL_WITH_ONE_TASK: [Self; 4] = [Self::DYNAMO, Self::DEFAULT, Self::ESTIMATED, Self::KV];
    const ALL_WITH_EVENTS: [Self; 2] = [Self::DYNAMO, Self::DEFAULT];

    fn name(self) -> String {
        match self {
            Self::Dynamo { tasks: 1 } => "Dynamo".to_owned(),
            Self::Dynamo { tasks } => format!("Dynamo, {tasks} requests at a time per thread"),
            Self::Foresee { name, .. } => name.to_owned(),
        }
    }

    fn is_dynamo(self) -> bool {
        matches!(self, Self::Dynamo { .. })
    }

    /// Measures this contender once, in a new fleet.
    fn measure(self, subject: Subject, workers: usize, prompts: &[CachedPrompt]) -> Measurement {
        match (subject, self) {
            (Subject::Decisions { threads }, Self::Dynamo { tasks }) => {
                dynamo::Fleet::new(workers, threads).measure(tasks)
            }
            (Subject::Decisions { threads }, Self::Foresee { policy, source, .. }) => {
                foresee::Fleet::new(policy(), source, workers).measure(threads)
            }
            (Subject::DecisionsWithoutHashing, Self::Dynamo { .. }) => {
                dynamo::Fleet::new(workers, 1).measure_without_hashing()
            }
            (Subject::DecisionsWithoutHashing, Self::Foresee { policy, source, .. }) => {
                foresee::Fleet::new(policy(), source, workers).measure_without_hashing()
            }
            (
                Subject::Events {
                    traffic,
                    threads: 1,
                },
                Self::Dynamo { .. },
            ) => events::measure(traffic, prompts, events::apply_to_dynamo_on_one_thread),
            (Subject::Events { traffic, .. }, Self::Dynamo { .. }) => {
                events::measure(traffic, prompts, events::apply_to_dynamo_on_two_threads)
            }
            (Subject::Events { traffic, threads }, Self::Foresee { .. }) => {
                events::measure(traffic, prompts, |before, measured| {
                    events::apply_to_foresee(workers, threads, before, measured)
                })
            }
        }
    }
}

/// All rounds of all contenders on one subject and one fleet.
struct Results {
    /// For each contender, its measurement in every round.
    measurements: Vec<Vec<Measurement>>,
    /// The highest rate of Dynamo in each round.
    dynamo: Vec<f64>,
}

impl Results {
    fn measure(subject: Subject, workers: usize, prompts: &[CachedPrompt]) -> Self {
        let contenders = subject.contenders();
        let mut measurements = vec![Vec::new(); contenders.len()];
        let mut dynamo = Vec::new();
        for _ in 0..ROUNDS {
            let mut best = 0.0_f64;
            for (contender, measurements) in contenders.iter().zip(&mut measurements) {
                let measurement = contender.measure(subject, workers, prompts);
                if contender.is_dynamo() {
                    best = best.max(measurement.per_second);
                }
                measurements.push(measurement);
            }
            dynamo.push(best);
        }
        Self {
            measurements,
            dynamo,
        }
    }

    /// Returns the rates of a contender, each with its ratio to Dynamo in the same round.
    fn cell(&self, contender: usize, is_dynamo: bool) -> String {
        let rounds = self.measurements[contender].iter().zip(&self.dynamo);
        let rounds = rounds.map(|(measurement, dynamo)| {
            let rate = thousands(measurement.per_second);
            match is_dynamo {
                true => rate,
                false => format!("{rate} ({:.1}×)", measurement.per_second / dynamo),
            }
        });
        join(rounds, ", ")
    }

    /// Returns the mean number of cached blocks of a contender's decisions.
    fn cached_blocks(&self, contender: usize) -> Option<f64> {
        let rounds = &self.measurements[contender];
        let sum: Option<f64> = rounds.iter().map(|round| round.cached_blocks).sum();
        sum.map(|sum| sum / rounds.len() as f64)
    }
}

/// Writes a rate in thousands.
fn thousands(rate: f64) -> String {
    match rate {
        100_000.0.. => format!("{:.0}k", rate / 1e3),
        _ => format!("{:.1}k", rate / 1e3),
    }
}

fn main() {
    println!(
        "Each cell has {ROUNDS} rounds. In brackets: the ratio to Dynamo's best in the round."
    );
    println!("Last column: cached blocks per decision, of 256, in each fleet.\n");
    println!("| | | 8 workers | 64 | 512 | cached |");
    println!("|---|---|---|---|---|---|");
    let prompts = FLEETS.map(events::prompts);
    let memory = events::measure_memory(FLEETS.into_iter().zip(&prompts));
    let selected = std::env::args().nth(1).unwrap_or_default();
    for subject in Subject::ALL {
        if !subject.name().contains(&selected) {
            continue;
        }
        let fleets = FLEETS.iter().zip(&prompts);
        let results: Vec<Results> = fleets
            .map(|(&workers, prompts)| Results::measure(subject, workers, prompts))
            .collect();
        for (index, contender) in subject.contenders().iter().enumerate() {
            let name = contender.name();
            let cells = results.iter();
            let cells = cells.map(|results| results.cell(index, contender.is_dynamo()));
            let cached = results.iter();
            let cached = cached.filter_map(|results| results.cached_blocks(index));
            let cached = cached.map(|blocks| format!("{blocks:.0}"));
            let (cells, cached) = (join(cells, " | "), join(cached, ", "));
            println!("| {} | {name} | {cells} | {cached} |", subject.name());
        }
    }
    let dynamo = memory.iter().map(|memory| format!("{:.0}", memory.dynamo));
    let foresee = memory.iter().map(|memory| format!("{:.0}", memory.foresee));
    for (name, cells) in [
        ("Dynamo", join(dynamo, " | ")),
        ("Foresee", join(foresee, " | ")),
    ] {
        println!("| bytes per cached block of a worker | {name} | {cells} | |");
    }
}

fn join(cells: impl Iterator<Item = String>, separator: &str) -> String {
    cells.collect::<Vec<_>>().join(separator)
}
