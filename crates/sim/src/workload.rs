//! What clients send and when: named synthetic workloads, and traces.

use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rand_distr::{Distribution, Exp1};

use crate::prompt::Prompt;
use crate::trace::{TOKENS_PER_HASH_ID, TraceRequest};

/// Requests and the rules by which they arrive. See [`crate::arrivals::Arrivals`].
#[derive(Clone, Debug, PartialEq)]
pub struct Workload {
    /// For reports.
    pub name: String,
    /// In an order in which none comes before one it follows; those that arrive
    /// [`Arrival::At`] a time are in the order of their times.
    pub requests: Vec<WorkloadRequest>,
    /// How many requests that arrive [`Arrival::WhenFree`] are in flight at a time.
    pub concurrency: usize,
}

/// One request of a workload.
#[derive(Clone, Debug, PartialEq)]
pub struct WorkloadRequest {
    /// What it asks.
    pub prompt: Prompt,
    /// The stream its answer's tokens come from, for a later prompt may contain them; `None`
    /// when no other request does.
    pub answer_stream: Option<u64>,
    /// Length of its answer.
    pub output_tokens: u32,
    /// When it is sent.
    pub arrival: Arrival,
}

impl WorkloadRequest {
    /// The prompt followed by the answer, as far as that is known.
    #[must_use]
    pub fn prompt_and_answer(&self) -> Prompt {
        let prompt = self.prompt.clone();
        match self.answer_stream {
            Some(stream) => prompt.then(stream, self.output_tokens),
            None => prompt,
        }
    }
}

/// When a request is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// At this time since the beginning, whatever happens.
    At(Duration),
    /// As soon as fewer than [`Workload::concurrency`] such requests are in flight.
    WhenFree,
    /// When another has been answered and read.
    After {
        /// Index of the other request.
        request: usize,
        /// Time between its end and this one's arrival.
        think: Duration,
    },
}

/// Lengths of prompts and answers, and what prompts share.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    /// Mean prompt length, in tokens.
    pub isl: u32,
    /// Prompt lengths are uniform in `isl × (1 ± isl_spread)`.
    pub isl_spread: f64,
    /// Mean answer length, in tokens.
    pub osl: u32,
    /// Answer lengths are uniform in `osl × (1 ± osl_spread)`.
    pub osl_spread: f64,
    /// Share of requests whose prompts are `heavy_factor` times as long.
    pub heavy_fraction: f64,
    /// See `heavy_fraction`.
    pub heavy_factor: f64,
    /// Number of prefix prompts, one of which each request begins with, chosen at random. 0 for
    /// prompts that share nothing.
    pub prefixes: u32,
    /// Share of each prompt that is its prefix; of a longer prompt, more of the same prefix.
    pub prefix_share: f64,
}

impl Default for Shape {
    /// ISL 7000, OSL 100, ten prefixes of half the ISL.
    fn default() -> Self {
        Self {
            isl: 7000,
            isl_spread: 0.0,
            osl: 100,
            osl_spread: 0.0,
            heavy_fraction: 0.0,
            heavy_factor: 1.0,
            prefixes: 10,
            prefix_share: 0.5,
        }
    }
}

impl Shape {
    fn with_isl_spread(self, isl_spread: f64) -> Self {
        Self { isl_spread, ..self }
    }

    fn request(&self, own_stream: u64, arrival: Arrival, rng: &mut SmallRng) -> WorkloadRequest {
        let mut isl = spread(self.isl, self.isl_spread, rng);
        if rng.random::<f64>() < self.heavy_fraction {
            isl = (f64::from(isl) * self.heavy_factor) as u32;
        }
        let osl = spread(self.osl, self.osl_spread, rng);
        let mut prompt = Prompt::new();
        let mut prefix_tokens = 0;
        if self.prefixes > 0 {
            let prefix = rng.random_range(0..self.prefixes);
            prefix_tokens = (f64::from(isl) * self.prefix_share.clamp(0.0, 1.0)) as u32;
            prompt = prompt.then(u64::from(prefix), prefix_tokens);
        }
        WorkloadRequest {
            prompt: prompt.then(u64::from(self.prefixes) + own_stream, isl - prefix_tokens),
            answer_stream: None,
            output_tokens: osl,
            arrival,
        }
    }
}

/// Conversations: each turn's prompt is the previous turn's prompt, its answer, and a new
/// message.
#[derive(Clone, Debug, PartialEq)]
pub struct Chat {
    /// How many.
    pub conversations: u32,
    /// Mean time between the beginnings of two; they are a Poisson process.
    pub gap: Duration,
    /// Turns of each conversation are uniform in `1..=max_turns`.
    pub max_turns: u32,
    /// Length of the system prompt that all share.
    pub system_tokens: u32,
    /// Mean length of a message; lengths are uniform between half and one and a half of it.
    pub message_tokens: u32,
    /// Mean length of an answer, spread likewise.
    pub answer_tokens: u32,
    /// Mean time between an answer and the next message; exponential.
    pub think: Duration,
}

impl Default for Chat {
    fn default() -> Self {
        Self {
            conversations: 400,
            gap: Duration::from_millis(250),
            max_turns: 8,
            system_tokens: 1200,
            message_tokens: 600,
            answer_tokens: 250,
            think: Duration::from_secs(8),
        }
    }
}

/// The names [`Workload::named`] knows, with a line each.
pub const NAMED: [(&str, &str); 9] = [
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
];

/// No workload has this name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown workload {name:?}; known: {}", NAMED.map(|(name, _)| name).join(", "))]
pub struct UnknownWorkload {
    /// The name asked for.
    pub name: String,
}

/// A rate that cannot be replayed at.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("cannot replay a trace at {rate} times its rate: it must be a positive number")]
pub struct InvalidRate {
    /// The rate asked for.
    pub rate: f64,
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
    /// Conversations.
    Chat(Chat),
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
            _ => {
                return Err(UnknownWorkload {
                    name: name.to_owned(),
                });
            }
        })
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
            Self::Chat(chat) => Workload::chat(chat, seed),
        }
    }
}

impl Workload {
    /// One of [`NAMED`] with its default sizes.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn named(name: &str, seed: u64) -> Result<Self, UnknownWorkload> {
        let mut workload = Recipe::named(name)?.make(seed);
        workload.name = name.to_owned();
        Ok(workload)
    }

    /// Requests of one shape, `concurrency` of them in flight at a time.
    #[must_use]
    pub fn closed_loop(shape: &Shape, requests: u32, concurrency: usize, seed: u64) -> Self {
        Self {
            name: "closed-loop".to_owned(),
            requests: shaped(shape, requests, Arrival::WhenFree, seed),
            concurrency,
        }
    }

    /// Requests of one shape that all arrive at one instant.
    #[must_use]
    pub fn burst(shape: &Shape, requests: u32, seed: u64) -> Self {
        Self {
            name: "burst".to_owned(),
            requests: shaped(shape, requests, Arrival::At(Duration::ZERO), seed),
            concurrency: 0,
        }
    }

    /// Conversations with a shared system prompt.
    #[must_use]
    pub fn chat(chat: &Chat, seed: u64) -> Self {
        const SYSTEM_STREAM: u64 = 0;
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut requests = Vec::new();
        let mut start = Duration::ZERO;
        let mut next_stream = SYSTEM_STREAM + 1;
        for _ in 0..chat.conversations {
            let gap: f64 = Exp1.sample(&mut rng);
            start += chat.gap.mul_f64(gap);
            let mut arrival = Arrival::At(start);
            let mut prompt = Prompt::new().then(SYSTEM_STREAM, chat.system_tokens);
            for _ in 0..rng.random_range(1..=chat.max_turns.max(1)) {
                let (message, answer) = (next_stream, next_stream + 1);
                next_stream += 2;
                prompt = prompt.then(message, spread(chat.message_tokens, 0.5, &mut rng));
                let request = WorkloadRequest {
                    prompt,
                    answer_stream: Some(answer),
                    output_tokens: spread(chat.answer_tokens, 0.5, &mut rng),
                    arrival,
                };
                prompt = request.prompt_and_answer();
                let patience: f64 = Exp1.sample(&mut rng);
                arrival = Arrival::After {
                    request: requests.len(),
                    think: chat.think.mul_f64(patience),
                };
                requests.push(request);
            }
        }
        Self {
            name: "chat".to_owned(),
            requests,
            concurrency: 0,
        }
    }

    /// A trace's requests, arriving `rate` times as fast as they did. Equal hash ids become
    /// equal tokens.
    ///
    /// # Errors
    /// When `rate` is not a positive number, or so small that the trace never ends.
    pub fn from_trace(trace: &[TraceRequest], rate: f64) -> Result<Self, InvalidRate> {
        if rate <= 0.0 {
            return Err(InvalidRate { rate });
        }
        let requests = trace.iter().map(|request| {
            let seconds = request.arrival.as_secs_f64() / rate;
            let arrival = Duration::try_from_secs_f64(seconds).map_err(|_| InvalidRate { rate })?;
            let mut prompt = Prompt::new();
            let mut left = request.prompt_tokens;
            for &hash_id in &request.hash_ids {
                let tokens = left.min(TOKENS_PER_HASH_ID);
                prompt = prompt.then(hash_id, tokens);
                left -= tokens;
            }
            Ok(WorkloadRequest {
                prompt,
                answer_stream: None,
                output_tokens: request.output_tokens,
                arrival: Arrival::At(arrival),
            })
        });
        Ok(Self {
            name: "trace".to_owned(),
            requests: requests.collect::<Result<_, _>>()?,
            concurrency: 0,
        })
    }
}

fn shaped(shape: &Shape, requests: u32, arrival: Arrival, seed: u64) -> Vec<WorkloadRequest> {
    let mut rng = SmallRng::seed_from_u64(seed);
    (0..requests)
        .map(|index| shape.request(u64::from(index), arrival, &mut rng))
        .collect()
}

/// A length uniform in `mean × (1 ± share)`, at least 1.
fn spread(mean: u32, share: f64, rng: &mut SmallRng) -> u32 {
    let share = share.clamp(0.0, 1.0);
    let factor = 1.0 + share * rng.random_range(-1.0..=1.0);
    ((f64::from(mean) * factor).round() as u32).max(1)
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use super::*;

    #[test]
    fn the_seed_workload_has_ten_prefixes_of_half_the_prompt() {
        let workload = Workload::named("seed", 1).unwrap();
        assert_eq!((workload.requests.len(), workload.concurrency), (1000, 20));
        let mut prefixes: Vec<_> = workload
            .requests
            .iter()
            .map(|it| it.prompt.pieces()[0])
            .collect();
        prefixes.sort_by_key(|piece| piece.stream);
        prefixes.dedup();
        assert_eq!(prefixes.len(), 10);
        assert!(prefixes.iter().all(|piece| piece.tokens == 3500));
        assert!(workload.requests.iter().all(|it| it.prompt.len() == 7000));
    }

    #[test]
    fn lengths_vary_as_told() {
        let workload = Workload::named("seed-isl", 1).unwrap();
        let lengths: Vec<u32> = workload.requests.iter().map(|it| it.prompt.len()).collect();
        assert!(lengths.iter().all(|length| (700..=13_300).contains(length)));
        let mean = lengths.iter().sum::<u32>() / 1000;
        assert!((6500..7500).contains(&mean), "{mean}");
        let heavy = Workload::named("burst-heavy", 1).unwrap();
        let heavy = heavy.requests.iter().filter(|it| it.prompt.len() == 22_500);
        assert!((50..110).contains(&heavy.count()));
    }

    #[test]
    fn a_turn_continues_the_one_before() {
        let block_size = NonZeroU32::new(16).unwrap();
        let workload = Workload::named("chat", 1).unwrap();
        let mut followers = 0;
        for turn in &workload.requests {
            let Arrival::After { request, .. } = turn.arrival else {
                continue;
            };
            followers += 1;
            if followers > 50 {
                break;
            }
            let before = workload.requests[request]
                .prompt_and_answer()
                .sequence(block_size);
            let now = turn.prompt.sequence(block_size);
            assert!(now.hashes().starts_with(before.hashes()));
        }
        assert!(followers > 0);
    }

    #[test]
    fn a_seed_decides_everything() {
        for (name, _) in NAMED {
            assert_eq!(Workload::named(name, 3), Workload::named(name, 3));
            // With one prefix and one length there is nothing to decide.
            if name != "burst-one-prefix" {
                assert_ne!(Workload::named(name, 3), Workload::named(name, 4));
            }
        }
        assert!(Workload::named("sead", 0).is_err());
    }

    #[test]
    fn a_trace_keeps_shared_prefixes_and_scales_time() {
        let request = |hash_ids: [u64; 2]| TraceRequest {
            arrival: Duration::from_secs(10),
            prompt_tokens: 700,
            output_tokens: 5,
            hash_ids: hash_ids.to_vec(),
        };
        let trace = [request([4, 5]), request([4, 6])];
        let workload = Workload::from_trace(&trace, 2.0).unwrap();
        let prompts = [&workload.requests[0].prompt, &workload.requests[1].prompt];
        let expected = [5, 6].map(|own| Prompt::new().then(4, 512).then(own, 188));
        assert_eq!(prompts, [&expected[0], &expected[1]]);
        assert_eq!(
            workload.requests[0].arrival,
            Arrival::At(Duration::from_secs(5))
        );
        for rate in [0.0, -1.0, f64::NAN, 1e-300] {
            assert!(Workload::from_trace(&trace, rate).is_err());
        }
    }
}
