//! Agents: programs that call a model again and again, with a tool's result added each time.

use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rand_distr::{Distribution, Exp1};

use crate::prompt::Prompt;
use crate::workload::gaps::Gaps;
use crate::workload::{Arrival, Workload, WorkloadRequest, spread};

/// Tasks of a few kinds. Every call of a task sends the long prompt of its kind, which describes
/// the tools, and all that was said since; its answer is a short tool call. Nearly all of a prompt
/// is cached where the task ran before, and most of it wherever its kind did.
#[derive(Clone, Debug, PartialEq)]
pub struct Agent {
    /// How many tasks.
    pub tasks: u32,
    /// Times between the beginnings of two.
    pub starts: Gaps,
    /// Kinds of task; each task is of one at random.
    pub kinds: u32,
    /// Mean length of a kind's prompt; lengths are uniform between half and one and a half of it.
    pub tool_prompt_tokens: u32,
    /// Mean calls of a task; at least 1, spread likewise.
    pub calls: u32,
    /// Mean length of what is added for each call: the task, then a tool's result; spread
    /// likewise.
    pub result_tokens: u32,
    /// Mean length of an answer, spread likewise.
    pub answer_tokens: u32,
    /// Mean time a tool takes; exponential.
    pub tool_time: Duration,
}

impl Default for Agent {
    /// Some 20 calls a second: eight 8B models on L40S keep the default SLO for nine of ten if they
    /// are routed to what they have cached, and for half if they are not.
    fn default() -> Self {
        Self {
            tasks: 300,
            starts: Gaps::poisson(Duration::from_millis(600)),
            kinds: 4,
            tool_prompt_tokens: 8000,
            calls: 12,
            result_tokens: 400,
            answer_tokens: 60,
            tool_time: Duration::from_secs(1),
        }
    }
}

impl Workload {
    /// Tasks with shared tool prompts.
    #[must_use]
    pub fn agent(agent: &Agent, seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let kinds = u64::from(agent.kinds.max(1));
        let tool_prompts: Vec<Prompt> = (0..kinds)
            .map(|kind| {
                let tokens = spread(agent.tool_prompt_tokens, 0.5, &mut rng);
                Prompt::new().then(kind, tokens)
            })
            .collect();
        let mut requests = Vec::new();
        let mut start = Duration::ZERO;
        let mut next_stream = kinds;
        for _ in 0..agent.tasks {
            start += agent.starts.sample(&mut rng);
            let mut arrival = Arrival::At(start);
            let mut prompt = tool_prompts[rng.random_range(0..tool_prompts.len())].clone();
            for _ in 0..spread(agent.calls, 0.5, &mut rng) {
                let (result, answer) = (next_stream, next_stream + 1);
                next_stream += 2;
                prompt = prompt.then(result, spread(agent.result_tokens, 0.5, &mut rng));
                let request = WorkloadRequest {
                    prompt,
                    answer_stream: Some(answer),
                    output_tokens: spread(agent.answer_tokens, 0.5, &mut rng),
                    arrival,
                };
                prompt = request.prompt_and_answer();
                let tool: f64 = Exp1.sample(&mut rng);
                arrival = Arrival::After {
                    request: requests.len(),
                    think: agent.tool_time.mul_f64(tool),
                };
                requests.push(request);
            }
        }
        Self {
            name: "agent".to_owned(),
            requests,
            concurrency: 0,
        }
    }
}
