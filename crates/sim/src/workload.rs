//! Workloads: the requests that clients send, and when. Named synthetic workloads and traces.

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

/// Requests and the rules of their arrival, which [`crate::arrivals::Arrivals`] applies.
#[derive(Clone, Debug, PartialEq)]
pub struct Workload {
    /// Name in reports.
    pub name: String,
    /// The requests. A request that arrives [`Arrival::After`] another has a larger index than the
    /// other. Requests that arrive [`Arrival::At`] a time are in the order of these times.
    pub requests: Vec<WorkloadRequest>,
    /// Number of [`Arrival::ClosedLoop`] requests in flight at a time.
    pub concurrency: usize,
}

/// One request of a workload.
#[derive(Clone, Debug, PartialEq)]
pub struct WorkloadRequest {
    /// The prompt.
    pub prompt: Prompt,
    /// The stream of the output's tokens, because a later prompt may contain them; `None` if no
    /// prompt does.
    pub output_stream: Option<u64>,
    /// Length of the output.
    pub output_tokens: u32,
    /// The rule for the time of arrival.
    pub arrival: Arrival,
}

impl WorkloadRequest {
    /// Returns the prompt followed by the output; only the prompt if the output has no stream.
    #[must_use]
    pub fn prompt_and_output(&self) -> Prompt {
        let prompt = self.prompt.clone();
        match self.output_stream {
            Some(stream) => prompt.then(stream, self.output_tokens),
            None => prompt,
        }
    }
}

/// The rule for the time at which a request arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// At this time since the beginning, whether or not other requests have ended.
    At(Duration),
    /// As soon as fewer than [`Workload::concurrency`] such requests are in flight.
    ClosedLoop,
    /// After another request has ended and its client has thought.
    After {
        /// Index of the other request.
        request: usize,
        /// Time from the end of the other request to the arrival.
        think: Duration,
    },
}

/// Error: the factor is no valid change of the arrival rate.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("cannot replay at {rate} times the arrival rate: the factor must be a positive number")]
pub struct InvalidRate {
    /// The invalid factor.
    pub rate: f64,
}

impl Workload {
    /// Returns a workload of [`NAMED`] with its default sizes.
    ///
    /// # Errors
    /// If no workload has this name.
    pub fn named(name: &str, seed: u64) -> Result<Self, UnknownWorkload> {
        let mut workload = Recipe::named(name)?.make(seed);
        workload.name = name.to_owned();
        Ok(workload)
    }

    /// Returns the requests of a trace, at `rate` times its arrival rate. Equal hash ids become
    /// equal tokens. Prompt tokens that no hash id covers are left out, and no prompt contains an
    /// earlier output.
    ///
    /// `trace` must be in order of arrival.
    ///
    /// # Errors
    /// If `rate` is not a positive number, or so small that times exceed the clock's range.
    pub fn from_trace(trace: &[TraceRequest], rate: f64) -> Result<Self, InvalidRate> {
        let requests = trace.iter().map(|request| {
            let mut prompt = Prompt::new();
            let mut remaining = request.prompt_tokens;
            for &hash_id in &request.hash_ids {
                let tokens = remaining.min(request.tokens_per_hash_id.get());
                prompt = prompt.then(hash_id, tokens);
                remaining -= tokens;
            }
            WorkloadRequest {
                prompt,
                output_stream: None,
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

    /// Returns the workload with the arrival rate of [`Arrival::At`] requests multiplied by `rate`.
    /// The times that clients think and tools take do not change, and neither do closed loops.
    ///
    /// # Errors
    /// If `rate` is not a positive number, or so small that times exceed the clock's range.
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

    /// Returns whether the workload has an arrival rate, which [`at_rate`](Self::at_rate) can
    /// change. A burst and a closed loop have none.
    #[must_use]
    pub fn has_rate(&self) -> bool {
        !self.arrivals_span().is_zero()
    }

    /// Returns the time from the first [`Arrival::At`] request to the last; zero with fewer than
    /// two.
    #[must_use]
    pub fn arrivals_span(&self) -> Duration {
        let times = self
            .requests
            .iter()
            .filter_map(|request| match request.arrival {
                Arrival::At(time) => Some(time),
                Arrival::ClosedLoop | Arrival::After { .. } => None,
            });
        let (first, last) = (times.clone().min(), times.max());
        last.unwrap_or_default() - first.unwrap_or_default()
    }
}

/// Draws a length uniform in `mean × (1 ± fraction)`, at least 1.
fn spread(mean: u32, fraction: f64, rng: &mut SmallRng) -> u32 {
    let fraction = fraction.clamp(0.0, 1.0);
    let factor = 1.0 + fraction * rng.random_range(-1.0..=1.0);
    ((f64::from(mean) * factor).round() as u32).max(1)
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use super::*;

    #[test]
    fn the_shared_prefix_workload_has_ten_prefixes_of_half_the_prompt() {
        let workload = Workload::named("shared-prefix", 1).unwrap();
        assert_eq!((workload.requests.len(), workload.concurrency), (1000, 20));
        let mut prefixes: Vec<_> = workload
            .requests
            .iter()
            .map(|request| request.prompt.runs()[0])
            .collect();
        prefixes.sort_by_key(|run| run.stream);
        prefixes.dedup();
        assert_eq!(prefixes.len(), 10);
        assert!(prefixes.iter().all(|run| run.tokens == 3500));
        assert!(
            workload
                .requests
                .iter()
                .all(|request| request.prompt.len() == 7000)
        );
    }

    #[test]
    fn lengths_vary_within_their_limits() {
        let workload = Workload::named("shared-prefix-isl", 1).unwrap();
        let lengths: Vec<u32> = workload
            .requests
            .iter()
            .map(|request| request.prompt.len())
            .collect();
        assert!(lengths.iter().all(|length| (700..=13_300).contains(length)));
        let mean = lengths.iter().sum::<u32>() / 1000;
        assert!((6500..7500).contains(&mean), "{mean}");
        let workload = Workload::named("burst-heavy", 1).unwrap();
        let heavy = workload
            .requests
            .iter()
            .filter(|request| request.prompt.len() == 22_500);
        assert!((50..110).contains(&heavy.count()));
    }

    #[test]
    fn a_turn_continues_the_turn_before_it() {
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
                .prompt_and_output()
                .sequence(block_size);
            let now = turn.prompt.sequence(block_size);
            assert!(now.hashes().starts_with(before.hashes()));
        }
        assert!(followers > 0);
    }

    #[test]
    fn equal_seeds_give_equal_workloads() {
        for (name, _) in NAMED {
            assert_eq!(Workload::named(name, 3), Workload::named(name, 3));
            // A workload with one prefix and one length has no random choice.
            if name != "burst-one-prefix" {
                assert_ne!(Workload::named(name, 3), Workload::named(name, 4));
            }
        }
        assert!(Workload::named("shared-prefx", 0).is_err());
    }

    #[test]
    fn an_open_loop_of_every_workload_has_the_requested_rate() {
        let burst = "gamma:2".parse::<Spacing>().unwrap();
        for (name, _) in NAMED {
            let workload = Recipe::named(name).unwrap().open(20.0, burst).unwrap();
            let workload = workload.make(1);
            assert!(workload.has_rate(), "{name}");
            let starts = workload
                .requests
                .iter()
                .filter_map(|request| match request.arrival {
                    Arrival::At(time) => Some(time),
                    _ => None,
                });
            let rate = workload.requests.len() as f64 / starts.max().unwrap().as_secs_f64();
            assert!((14.0..27.0).contains(&rate), "{name}: {rate}");
        }
        assert!(!Workload::named("shared-prefix", 1).unwrap().has_rate());
        assert!(!Workload::named("n-samples", 1).unwrap().has_rate());
    }

    #[test]
    fn each_call_of_an_agent_extends_the_prompt_of_the_call_before() {
        let workload = Workload::named("agent", 1).unwrap();
        let tool_prompts = workload
            .requests
            .iter()
            .map(|request| request.prompt.runs()[0]);
        let mut tool_prompts: Vec<_> = tool_prompts.collect();
        tool_prompts.sort_by_key(|run| run.stream);
        tool_prompts.dedup();
        assert_eq!(tool_prompts.len(), 4);
        assert!(tool_prompts.iter().all(|run| run.tokens >= 4000));
        let calls = workload.requests.len() as f64 / 300.0;
        assert!((11.0..13.0).contains(&calls), "{calls}");
        for call in &workload.requests {
            if let Arrival::After { request, .. } = call.arrival {
                let before = workload.requests[request].prompt_and_output();
                assert!(call.prompt.runs().starts_with(before.runs()));
            }
        }
    }

    #[test]
    fn retrieved_documents_are_shared_in_varying_order() {
        let workload = Workload::named("rag", 1).unwrap();
        let documents = |request: &WorkloadRequest| {
            let runs = request.prompt.runs();
            assert_eq!((runs.len(), runs[0].tokens), (6, 500));
            [1, 2, 3, 4].map(|position| runs[position].stream)
        };
        let all: Vec<[u64; 4]> = workload.requests.iter().map(documents).collect();
        let with_the_first = all
            .iter()
            .filter(|documents| documents.contains(&1))
            .count();
        assert!((800..1400).contains(&with_the_first), "{with_the_first}");
        for position in 0..4 {
            let here = all
                .iter()
                .filter(|documents| documents[position] == 1)
                .count();
            assert!((150..400).contains(&here), "{here} at position {position}");
        }
    }

    #[test]
    fn samples_of_one_prompt_differ_only_in_their_outputs() {
        let workload = Workload::named("n-samples", 1).unwrap();
        let first = &workload.requests[0];
        assert!(
            workload
                .requests
                .iter()
                .all(|request| request.prompt == first.prompt)
        );
        assert_eq!((workload.requests.len(), first.prompt.len()), (1000, 2000));
        let outputs = workload
            .requests
            .iter()
            .map(|request| request.output_tokens);
        assert!(outputs.clone().min() < Some(170) && outputs.max() > Some(430));
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
