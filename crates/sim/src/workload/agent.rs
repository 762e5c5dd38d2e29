//! Agents: programs that call a model many times and add a tool's result to the prompt each time.

use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rand_distr::{Distribution, Exp1};

use crate::prompt::Prompt;
use crate::workload::gaps::Gaps;
use crate::workload::{Arrival, Workload, WorkloadRequest, spread};

/// Tasks of a few kinds. Every call of a task sends the long prompt of its kind, which describes
/// the tools, followed by all outputs and tool results so far. The output is a short tool call.
/// Nearly all of a prompt is cached on the worker that had the task's previous call, and most of it
/// on workers that had other tasks of the kind.
#[derive(Clone, Debug, PartialEq)]
pub struct Agent {
    /// Number of tasks.
    pub tasks: u32,
    /// Times between the starts of tasks.
    pub starts: Gaps,
    /// Number of kinds. The kind of a task is random.
    pub kinds: u32,
    /// Mean length of a kind's prompt; uniform in 0.5 to 1.5 times the mean.
    pub tool_prompt_tokens: u32,
    /// Mean number of calls of a task; uniform in 0.5 to 1.5 times the mean, at least 1.
    pub calls: u32,
    /// Mean length of the text added for each call: the task's description or a tool's result;
    /// uniform in 0.5 to 1.5 times the mean.
    pub result_tokens: u32,
    /// Mean length of an output; uniform in 0.5 to 1.5 times the mean.
    pub output_tokens: u32,
    /// Mean time of a tool's execution; exponentially distributed.
    pub tool_time: Duration,
}

impl Default for Agent {
    /// Returns tasks with about 20 calls per second. Eight 8B models on L40S serve most calls within
    /// the default SLO only if routing follows the caches.
    fn default() -> Self {
        Self {
            tasks: 300,
            starts: Gaps::poisson(Duration::from_millis(600)),
            kinds: 4,
            tool_prompt_tokens: 8000,
            calls: 12,
            result_tokens: 400,
            output_tokens: 60,
            tool_time: Duration::from_secs(1),
        }
    }
}

impl Workload {
    /// Returns the calls of an agent workload, task by task. Only the first call of a task arrives
    /// at a given time; each further call arrives after the end of the previous one and a tool's
    /// execution. Equal seeds give equal requests.
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
                let (result, output) = (next_stream, next_stream + 1);
                next_stream += 2;
                prompt = prompt.then(result, spread(agent.result_tokens, 0.5, &mut rng));
                let request = WorkloadRequest {
                    prompt,
                    output_stream: Some(output),
                    output_tokens: spread(agent.output_tokens, 0.5, &mut rng),
                    arrival,
                };
                prompt = request.prompt_and_output();
                let tool_factor: f64 = Exp1.sample(&mut rng);
                arrival = Arrival::After {
                    request: requests.len(),
                    think: agent.tool_time.mul_f64(tool_factor),
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
