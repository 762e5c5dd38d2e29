//! The synthetic workloads by name, and how each is made.

use crate::workload::{Agent, Chat, Gaps, InvalidRequestRate, Rag, Shape, Spacing, Workload};

/// The names [`Workload::named`] knows, with a line each.
pub const NAMED: [(&str, &str); 12] = [
    (
        "seed",
        "1,000 requests, ISL 7000, OSL 100, 10 prefixes of half the ISL, 20 at a time",
    ),
    ("seed-10", "the same, 10 at a time"),
    ("seed-isl", "seed with ISL varied by ±90 %"),
    ("seed-osl", "seed with OSL varied by ±90 %"),
    ("burst", "1,000 requests of seed's shape at one instant"),
    ("burst-isl", "burst with ISL varied by ±90 %"),
    ("burst-one-prefix", "burst with one prefix for all"),
    (
        "burst-heavy",
        "800 requests of ISL 1500 at one instant, one in ten 15 times as long",
    ),
    (
        "chat",
        "conversations of up to 8 turns with a shared system prompt",
    ),
    (
        "agent",
        "tasks of some 12 short calls behind one of 4 long tool prompts, 20 calls a second",
    ),
    (
        "rag",
        "questions about 4 of 200 shared documents in any order, ISL 6600, 8 a second",
    ),
    (
        "n-samples",
        "1,000 identical prompts at one instant, ISL 2000, OSL 300 ±50 %",
    ),
];

/// No workload has this name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown workload {name:?}; known: {}", NAMED.map(|(name, _)| name).join(", "))]
pub struct UnknownWorkload {
    /// The name asked for.
    pub name: String,
}

/// How a synthetic workload is made; the names of [`NAMED`] stand for one each.
#[derive(Clone, Debug, PartialEq)]
pub enum Recipe {
    /// So many requests of one shape, `concurrency` of them in flight at a time.
    ClosedLoop {
        /// What they are like.
        shape: Shape,
        /// How many there are.
        requests: u32,
        /// How many are in flight.
        concurrency: usize,
    },
    /// So many requests of one shape at one instant.
    Burst {
        /// What they are like.
        shape: Shape,
        /// How many there are.
        requests: u32,
    },
    /// So many requests of one shape that arrive whether or not others have ended.
    OpenLoop {
        /// What they are like.
        shape: Shape,
        /// How many there are.
        requests: u32,
        /// Times between two.
        gaps: Gaps,
    },
    /// Conversations.
    Chat(Chat),
    /// Tasks of many calls.
    Agent(Agent),
    /// Questions about documents.
    Rag(Rag),
}

impl Recipe {
    /// One of [`NAMED`] with its default sizes.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn named(name: &str) -> Result<Self, UnknownWorkload> {
        let seed = |shape, concurrency| Self::ClosedLoop {
            shape,
            requests: 1000,
            concurrency,
        };
        let burst = |shape, requests| Self::Burst { shape, requests };
        let shape = Shape::default();
        Ok(match name {
            "seed" => seed(shape, 20),
            "seed-10" => seed(shape, 10),
            "seed-isl" => seed(shape.with_isl_spread(0.9), 20),
            "seed-osl" => {
                let osl_spread = 0.9;
                seed(
                    Shape {
                        osl_spread,
                        ..shape
                    },
                    20,
                )
            }
            "burst" => burst(shape, 1000),
            "burst-isl" => burst(shape.with_isl_spread(0.9), 1000),
            "burst-one-prefix" => {
                let prefixes = 1;
                burst(Shape { prefixes, ..shape }, 1000)
            }
            "burst-heavy" => {
                let heavy_tail = Shape {
                    isl: 1500,
                    heavy_fraction: 0.1,
                    heavy_factor: 15.0,
                    ..shape
                };
                burst(heavy_tail, 800)
            }
            "chat" => Self::Chat(Chat::default()),
            "agent" => Self::Agent(Agent::default()),
            "rag" => Self::Rag(Rag::default()),
            "n-samples" => {
                let identical = Shape {
                    isl: 2000,
                    osl: 300,
                    osl_spread: 0.5,
                    prefixes: 1,
                    prefix_share: 1.0,
                    ..shape
                };
                burst(identical, 1000)
            }
            _ => {
                return Err(UnknownWorkload {
                    name: name.to_owned(),
                });
            }
        })
    }

    /// The same requests, arriving `rate` a second on average, whether or not others have ended.
    /// Of conversations and tasks it is the beginnings that are spread so; what follows in each
    /// waits for what was before.
    ///
    /// # Errors
    /// When the rate is not a positive number, or next to none.
    pub fn open(self, rate: f64, spacing: Spacing) -> Result<Self, InvalidRequestRate> {
        let gaps = |requests_each: f64| spacing.at(rate / requests_each);
        Ok(match self {
            Self::ClosedLoop {
                shape, requests, ..
            }
            | Self::Burst { shape, requests }
            | Self::OpenLoop {
                shape, requests, ..
            } => Self::OpenLoop {
                shape,
                requests,
                gaps: gaps(1.0)?,
            },
            Self::Chat(chat) => Self::Chat(Chat {
                starts: gaps(chat.mean_turns())?,
                ..chat
            }),
            Self::Agent(agent) => Self::Agent(Agent {
                starts: gaps(f64::from(agent.calls.max(1)))?,
                ..agent
            }),
            Self::Rag(rag) => Self::Rag(Rag {
                gaps: gaps(1.0)?,
                ..rag
            }),
        })
    }

    /// The same with so many requests, conversations or tasks.
    #[must_use]
    pub fn with_requests(mut self, number: u32) -> Self {
        match &mut self {
            Self::ClosedLoop { requests, .. }
            | Self::Burst { requests, .. }
            | Self::OpenLoop { requests, .. } => *requests = number,
            Self::Chat(chat) => chat.conversations = number,
            Self::Agent(agent) => agent.tasks = number,
            Self::Rag(rag) => rag.requests = number,
        }
        self
    }

    /// Makes the requests.
    #[must_use]
    pub fn make(&self, seed: u64) -> Workload {
        match self {
            Self::ClosedLoop {
                shape,
                requests,
                concurrency,
            } => Workload::closed_loop(shape, *requests, *concurrency, seed),
            Self::Burst { shape, requests } => Workload::burst(shape, *requests, seed),
            Self::OpenLoop {
                shape,
                requests,
                gaps,
            } => Workload::open_loop(shape, *requests, gaps, seed),
            Self::Chat(chat) => Workload::chat(chat, seed),
            Self::Agent(agent) => Workload::agent(agent, seed),
            Self::Rag(rag) => Workload::rag(rag, seed),
        }
    }
}
