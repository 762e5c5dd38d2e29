//! The named synthetic workloads, and their parameters.

use crate::workload::{Agent, Chat, Gaps, InvalidRequestRate, Rag, Shape, Spacing, Workload};

/// Name and description of each synthetic workload that [`Workload::named`] generates.
pub const NAMED: [(&str, &str); 12] = [
    (
        "shared-prefix",
        "1,000 requests, ISL 7000, OSL 100, 10 prefixes of half the ISL, 20 in flight",
    ),
    (
        "shared-prefix-c10",
        "1,000 requests, ISL 7000, OSL 100, 10 prefixes of half the ISL, 10 in flight",
    ),
    (
        "shared-prefix-isl",
        "1,000 requests, ISL 7000 ±90 %, OSL 100, 10 prefixes of half the ISL, 20 in flight",
    ),
    (
        "shared-prefix-osl",
        "1,000 requests, ISL 7000, OSL 100 ±90 %, 10 prefixes of half the ISL, 20 in flight",
    ),
    (
        "burst",
        "1,000 requests at one instant, ISL 7000, OSL 100, 10 prefixes of half the ISL",
    ),
    (
        "burst-isl",
        "1,000 requests at one instant, ISL 7000 ±90 %, OSL 100, 10 prefixes of half the ISL",
    ),
    (
        "burst-one-prefix",
        "1,000 requests at one instant, ISL 7000, OSL 100, one prefix of half the ISL",
    ),
    (
        "burst-heavy",
        "800 requests at one instant, ISL 1500, OSL 100, one prompt in ten 15 times as long",
    ),
    (
        "chat",
        "400 conversations of up to 8 turns with a shared system prompt, 4 started per second",
    ),
    (
        "agent",
        "300 tasks of about 12 short calls with one of 4 long tool prompts, 20 calls per second",
    ),
    (
        "rag",
        "2,000 questions about 4 of 200 shared documents in random order, ISL 6600, 8 per second",
    ),
    (
        "n-samples",
        "1,000 identical prompts at one instant, ISL 2000, OSL 300 ±50 %",
    ),
];

/// Error: no workload has this name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown workload {name:?}; known: {}", NAMED.map(|(name, _)| name).join(", "))]
pub struct UnknownWorkload {
    /// The unknown name.
    pub name: String,
}

/// Parameters of a synthetic workload. Each name of [`NAMED`] stands for one recipe.
#[derive(Clone, Debug, PartialEq)]
pub enum Recipe {
    /// Requests of one shape, with `concurrency` of them in flight at a time.
    ClosedLoop {
        /// Lengths and shared prefixes.
        shape: Shape,
        /// Number of requests.
        requests: u32,
        /// Number of requests in flight at a time.
        concurrency: usize,
    },
    /// Requests of one shape that arrive at one instant.
    Burst {
        /// Lengths and shared prefixes.
        shape: Shape,
        /// Number of requests.
        requests: u32,
    },
    /// Requests of one shape that arrive whether or not others have ended.
    OpenLoop {
        /// Lengths and shared prefixes.
        shape: Shape,
        /// Number of requests.
        requests: u32,
        /// Times between arrivals.
        gaps: Gaps,
    },
    /// Conversations.
    Chat(Chat),
    /// Agents: tasks of many calls.
    Agent(Agent),
    /// Questions about documents.
    Rag(Rag),
}

impl Recipe {
    /// Returns the recipe of a workload of [`NAMED`] with its default sizes.
    ///
    /// # Errors
    /// If no workload has this name.
    pub fn named(name: &str) -> Result<Self, UnknownWorkload> {
        let closed_loop = |shape, concurrency| Self::ClosedLoop {
            shape,
            requests: 1000,
            concurrency,
        };
        let burst = |shape, requests| Self::Burst { shape, requests };
        let shape = Shape::default();
        Ok(match name {
            "shared-prefix" => closed_loop(shape, 20),
            "shared-prefix-c10" => closed_loop(shape, 10),
            "shared-prefix-isl" => closed_loop(shape.with_isl_spread(0.9), 20),
            "shared-prefix-osl" => {
                let osl_spread = 0.9;
                closed_loop(
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
                    prefix_fraction: 1.0,
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

    /// Returns the recipe with `rate` requests per second on average that arrive whether or not
    /// others have ended. Of conversations and tasks, the starts are distributed like this; each
    /// further request waits for the end of the previous one. A closed loop or burst becomes an
    /// open loop and loses its limit of requests in flight.
    ///
    /// # Errors
    /// If the rate is not a positive number, or below one arrival in a million seconds.
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

    /// Returns the recipe with another number of requests, conversations or tasks.
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

    /// Generates the requests. Equal seeds give equal requests.
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
