//! What clients send and when: named synthetic workloads, and traces.

use std::time::Duration;

use rand::Rng;
use rand::rngs::SmallRng;

use crate::prompt::Prompt;
use crate::trace::TraceRequest;

mod agent;
mod chat;
mod gaps;
mod rag;
mod recipe;
mod shape;

pub use agent::Agent;
pub use chat::Chat;
pub use gaps::{Gaps, InvalidRequestRate, Spacing, UnknownSpacing};
pub use rag::Rag;
pub use recipe::{NAMED, Recipe, UnknownWorkload};
pub use shape::Shape;

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

/// A rate that cannot be replayed at.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("cannot replay at {rate} times the rate: it must be a positive number")]
pub struct InvalidRate {
    /// The rate asked for.
    pub rate: f64,
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

    /// A trace's requests, arriving `rate` times as fast as they did. Equal hash ids become
    /// equal tokens.
    ///
    /// # Errors
    /// When `rate` is not a positive number, or so small that the trace never ends.
    pub fn from_trace(trace: &[TraceRequest], rate: f64) -> Result<Self, InvalidRate> {
        let requests = trace.iter().map(|request| {
            let mut prompt = Prompt::new();
            let mut left = request.prompt_tokens;
            for &hash_id in &request.hash_ids {
                let tokens = left.min(request.tokens_per_hash_id.get());
                prompt = prompt.then(hash_id, tokens);
                left -= tokens;
            }
            WorkloadRequest {
                prompt,
                answer_stream: None,
                output_tokens: request.output_tokens,
                arrival: Arrival::At(request.arrival),
            }
        });
        let workload = Self {
            name: "trace".to_owned(),
            requests: requests.collect(),
            concurrency: 0,
        };
        workload.at_rate(rate)
    }

    /// The same requests, those that arrive at a time arriving `rate` times as fast. How long
    /// people think and tools take stays as it is.
    ///
    /// # Errors
    /// When `rate` is not a positive number, or so small that the workload never ends.
    pub fn at_rate(mut self, rate: f64) -> Result<Self, InvalidRate> {
        if rate <= 0.0 {
            return Err(InvalidRate { rate });
        }
        for request in &mut self.requests {
            if let Arrival::At(time) = &mut request.arrival {
                let seconds = time.as_secs_f64() / rate;
                let scaled = Duration::try_from_secs_f64(seconds);
                *time = scaled.map_err(|_| InvalidRate { rate })?;
            }
        }
        Ok(self)
    }

    /// Whether its requests arrive at a rate that can be changed, rather than all at once or as
    /// others end.
    #[must_use]
    pub fn has_rate(&self) -> bool {
        !self.arrivals_span().is_zero()
    }

    /// From the first of the requests that arrive at a time to the last.
    #[must_use]
    pub fn arrivals_span(&self) -> Duration {
        let times = self.requests.iter().filter_map(|it| match it.arrival {
            Arrival::At(time) => Some(time),
            Arrival::WhenFree | Arrival::After { .. } => None,
        });
        let (first, last) = (times.clone().min(), times.max());
        last.unwrap_or_default() - first.unwrap_or_default()
    }
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
    fn an_open_loop_has_the_rate_asked_for_whatever_it_is_made_of() {
        let burst = "gamma:2".parse::<Spacing>().unwrap();
        for (name, _) in NAMED {
            let workload = Recipe::named(name).unwrap().open(20.0, burst).unwrap();
            let workload = workload.make(1);
            assert!(workload.has_rate(), "{name}");
            let starts = workload.requests.iter().filter_map(|it| match it.arrival {
                Arrival::At(time) => Some(time),
                _ => None,
            });
            let rate = workload.requests.len() as f64 / starts.max().unwrap().as_secs_f64();
            assert!((14.0..27.0).contains(&rate), "{name}: {rate}");
        }
        assert!(!Workload::named("seed", 1).unwrap().has_rate());
        assert!(!Workload::named("n-samples", 1).unwrap().has_rate());
    }

    #[test]
    fn an_agent_keeps_its_long_prompt_and_adds_to_it() {
        let workload = Workload::named("agent", 1).unwrap();
        let tool_prompts = workload.requests.iter().map(|it| it.prompt.pieces()[0]);
        let mut tool_prompts: Vec<_> = tool_prompts.collect();
        tool_prompts.sort_by_key(|it| it.stream);
        tool_prompts.dedup();
        assert_eq!(tool_prompts.len(), 4);
        assert!(tool_prompts.iter().all(|it| it.tokens >= 4000));
        let calls = workload.requests.len() as f64 / 300.0;
        assert!((11.0..13.0).contains(&calls), "{calls}");
        for call in &workload.requests {
            if let Arrival::After { request, .. } = call.arrival {
                let before = workload.requests[request].prompt_and_answer();
                assert!(call.prompt.pieces().starts_with(before.pieces()));
            }
        }
    }

    #[test]
    fn retrieved_documents_are_shared_in_varying_order() {
        let workload = Workload::named("rag", 1).unwrap();
        let documents = |it: &WorkloadRequest| {
            let pieces = it.prompt.pieces();
            assert_eq!((pieces.len(), pieces[0].tokens), (6, 500));
            [1, 2, 3, 4].map(|at| pieces[at].stream)
        };
        let all: Vec<[u64; 4]> = workload.requests.iter().map(documents).collect();
        let with_the_first = all.iter().filter(|it| it.contains(&1)).count();
        assert!((800..1400).contains(&with_the_first), "{with_the_first}");
        for place in 0..4 {
            let here = all.iter().filter(|it| it[place] == 1).count();
            assert!((150..400).contains(&here), "{here} at place {place}");
        }
    }

    #[test]
    fn samples_of_one_prompt_differ_in_their_answers_only() {
        let workload = Workload::named("n-samples", 1).unwrap();
        let first = &workload.requests[0];
        assert!(workload.requests.iter().all(|it| it.prompt == first.prompt));
        assert_eq!((workload.requests.len(), first.prompt.len()), (1000, 2000));
        let answers = workload.requests.iter().map(|it| it.output_tokens);
        assert!(answers.clone().min() < Some(170) && answers.max() > Some(430));
    }

    #[test]
    fn a_trace_keeps_shared_prefixes_and_scales_time() {
        let request = |hash_ids: [u64; 2]| TraceRequest {
            arrival: Duration::from_secs(10),
            tokens_per_hash_id: NonZeroU32::new(512).unwrap(),
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
