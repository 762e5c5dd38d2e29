//! Conversations of people with a model.

use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rand_distr::{Distribution, Exp1};

use crate::prompt::Prompt;
use crate::workload::gaps::Gaps;
use crate::workload::{Arrival, Workload, WorkloadRequest, spread};

/// Conversations. The prompt of each turn is the prompt of the previous turn, its output, and a new
/// message.
#[derive(Clone, Debug, PartialEq)]
pub struct Chat {
    /// Number of conversations.
    pub conversations: u32,
    /// Times between the starts of conversations.
    pub starts: Gaps,
    /// Maximum number of turns; uniform in `1..=max_turns`.
    pub max_turns: u32,
    /// Length of the system prompt, which is the same in all conversations.
    pub system_tokens: u32,
    /// Mean length of a message; uniform in 0.5 to 1.5 times the mean.
    pub message_tokens: u32,
    /// Mean length of an output; uniform in 0.5 to 1.5 times the mean.
    pub output_tokens: u32,
    /// Mean time from the end of an output to the next message; exponentially distributed.
    pub think: Duration,
}

impl Default for Chat {
    fn default() -> Self {
        Self {
            conversations: 400,
            starts: Gaps::poisson(Duration::from_millis(250)),
            max_turns: 8,
            system_tokens: 1200,
            message_tokens: 600,
            output_tokens: 250,
            think: Duration::from_secs(8),
        }
    }
}

impl Chat {
    /// Returns the mean number of turns of a conversation.
    #[must_use]
    pub fn mean_turns(&self) -> f64 {
        f64::midpoint(1.0, f64::from(self.max_turns.max(1)))
    }
}

impl Workload {
    /// Returns the turns of conversations with a shared system prompt, conversation by
    /// conversation. Only the first turn arrives at a given time; each further turn arrives after
    /// the end of the previous one and a pause. Equal seeds give equal requests.
    #[must_use]
    pub fn chat(chat: &Chat, seed: u64) -> Self {
        const SYSTEM_STREAM: u64 = 0;
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut requests = Vec::new();
        let mut start = Duration::ZERO;
        let mut next_stream = SYSTEM_STREAM + 1;
        for _ in 0..chat.conversations {
            start += chat.starts.sample(&mut rng);
            let mut arrival = Arrival::At(start);
            let mut prompt = Prompt::new().then(SYSTEM_STREAM, chat.system_tokens);
            for _ in 0..rng.random_range(1..=chat.max_turns.max(1)) {
                let (message, output) = (next_stream, next_stream + 1);
                next_stream += 2;
                prompt = prompt.then(message, spread(chat.message_tokens, 0.5, &mut rng));
                let request = WorkloadRequest {
                    prompt,
                    output_stream: Some(output),
                    output_tokens: spread(chat.output_tokens, 0.5, &mut rng),
                    arrival,
                };
                prompt = request.prompt_and_output();
                let think_factor: f64 = Exp1.sample(&mut rng);
                arrival = Arrival::After {
                    request: requests.len(),
                    think: chat.think.mul_f64(think_factor),
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
}
