//! Flags that several subcommands share.

use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, ValueEnum};
use foresee_core::DEFAULT_TTFT_WEIGHT;
use foresee_core::choose::Policy;
use foresee_core::queue::{Order, UnknownOrder};
use foresee_core::router::RouterConfig;
use foresee_sim::engine::EngineConfig;
use foresee_sim::law::{Preset, UnknownPreset};
use foresee_sim::workload::{NAMED, Recipe, Shape, Spacing, UnknownSpacing, Workload};

/// How the router decides.
#[derive(Args, Clone, Debug)]
pub(crate) struct RouterArgs {
    /// What computing a prompt block costs, in active blocks; 0 is pure load balancing
    #[arg(long, default_value_t = 1.0, env = "FORESEE_OVERLAP_WEIGHT")]
    pub(crate) overlap_weight: f64,
    /// What a second until the first token counts, in seconds of anybody's delay
    #[arg(long, default_value_t = DEFAULT_TTFT_WEIGHT, env = "FORESEE_TTFT_WEIGHT")]
    pub(crate) ttft_weight: f64,
    /// 0 takes the least cost; above, samples by softmax over costs
    #[arg(long, default_value_t = 0.0, env = "FORESEE_TEMPERATURE")]
    pub(crate) temperature: f64,
    /// Tokens per KV block: the engine's own
    #[arg(
        long,
        default_value = "16",
        value_name = "TOKENS",
        env = "FORESEE_BLOCK_SIZE"
    )]
    pub(crate) block_size: NonZeroU32,
    /// Fixes every random choice
    #[arg(long, default_value_t = 0, env = "FORESEE_SEED")]
    pub(crate) seed: u64,
}

impl RouterArgs {
    pub(crate) fn config(&self, policy: Policy) -> RouterConfig {
        RouterConfig {
            policy,
            overlap_weight: self.overlap_weight,
            ttft_weight: self.ttft_weight,
            temperature: self.temperature,
            block_size: self.block_size,
            queue: None,
            seed: self.seed,
        }
    }
}

/// Whether requests wait here, and in which order.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct QueueArgs {
    /// In which order requests wait here until their worker has room: shortest (least to compute
    /// first, with ageing), fcfs, fair (tenants alike), or off to send each at once. By default
    /// shortest under --policy delay, and off under others
    #[arg(long, value_name = "ORDER", env = "FORESEE_QUEUE")]
    queue: Option<Queue>,
}

impl QueueArgs {
    /// What is asked for, or is best under this policy.
    pub(crate) fn order(self, policy: Policy) -> Option<Order> {
        let best = (policy == Policy::Delay).then_some(Order::Shortest);
        self.queue.map_or(best, |Queue(asked_for)| asked_for)
    }
}

/// An order, or `off`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Queue(pub(crate) Option<Order>);

impl FromStr for Queue {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "off" {
            return Ok(Self(None));
        }
        let order = text.parse().map(|order| Self(Some(order)));
        order.map_err(|error: UnknownOrder| format!("{error}; or off"))
    }
}

impl fmt::Display for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(order) => order.fmt(f),
            None => f.pad("off"),
        }
    }
}

/// `on` or `off`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Switch {
    On,
    Off,
}

/// What a model engine is like.
#[derive(Args, Clone, Debug)]
pub(crate) struct ModelEngineArgs {
    /// Model and accelerator it imitates: l40s-8b or h100-70b-tp4
    #[arg(long, default_value = "l40s-8b", value_name = "PRESET", value_parser = preset)]
    pub(crate) engine: &'static Preset,
    /// KV blocks of each engine, if not the preset's
    #[arg(long)]
    pub(crate) blocks: Option<NonZeroU32>,
    /// Most tokens an engine computes in one step, if not the preset's
    #[arg(long)]
    pub(crate) max_num_batched_tokens: Option<NonZeroU32>,
    /// Most requests an engine runs at once
    #[arg(long, default_value = "256")]
    pub(crate) max_num_seqs: NonZeroU32,
    /// Whether an engine shares blocks between requests
    #[arg(long, default_value = "on")]
    pub(crate) prefix_caching: Switch,
}

impl ModelEngineArgs {
    pub(crate) fn config(&self, block_size: NonZeroU32, seed: u64) -> EngineConfig {
        let mut config = EngineConfig::from_preset(self.engine, block_size);
        config.max_num_seqs = self.max_num_seqs.get();
        config.prefix_caching = self.prefix_caching == Switch::On;
        config.seed = seed;
        if let Some(blocks) = self.blocks {
            config.blocks = blocks.get();
        }
        if let Some(tokens) = self.max_num_batched_tokens {
            config.max_num_batched_tokens = tokens.get();
        }
        config
    }
}

/// Changes to a named workload. What is not given stays as the name has it.
#[derive(Args, Clone, Debug)]
pub(crate) struct WorkloadArgs {
    /// Requests (conversations for chat, tasks for agent); of a trace, the first so many
    #[arg(long)]
    pub(crate) requests: Option<u32>,
    /// Requests in flight at a time, for the seed workloads
    #[arg(long)]
    pub(crate) concurrency: Option<usize>,
    /// Mean prompt length, in tokens
    #[arg(long)]
    pub(crate) isl: Option<u32>,
    /// Mean answer length, in tokens
    #[arg(long)]
    pub(crate) osl: Option<u32>,
    /// Prompt lengths vary by this share, up and down
    #[arg(long)]
    pub(crate) isl_spread: Option<f64>,
    /// Answer lengths vary by this share, up and down
    #[arg(long)]
    pub(crate) osl_spread: Option<f64>,
    /// Share of prompts that are longer by --heavy-factor
    #[arg(long)]
    pub(crate) heavy_fraction: Option<f64>,
    /// How many times longer those are
    #[arg(long)]
    pub(crate) heavy_factor: Option<f64>,
    /// Number of prefixes that prompts begin with; 0 for none
    #[arg(long)]
    pub(crate) prefixes: Option<u32>,
    /// Share of a prompt that is its prefix
    #[arg(long)]
    pub(crate) prefix_share: Option<f64>,
    /// Mean time between two conversations, for chat, in milliseconds
    #[arg(long, conflicts_with = "rps")]
    pub(crate) gap_ms: Option<u32>,
    /// Requests a second, on average: they arrive whether or not others have ended
    ///
    /// Of conversations and tasks it is the beginnings that come at the rate that makes so many.
    #[arg(long, value_name = "REQUESTS")]
    pub(crate) rps: Option<f64>,
    /// How arrivals at --rps are spread: poisson, even, or gamma:CV, whose standard deviation is
    /// CV times the mean: bursts and lulls
    #[arg(long, value_name = "SPACING", default_value = "poisson", value_parser = spacing)]
    pub(crate) arrivals: Spacing,
}

impl WorkloadArgs {
    /// Makes the workload of that name, changed as asked.
    pub(crate) fn make(&self, name: &str, seed: u64) -> anyhow::Result<Workload> {
        let mut recipe = Recipe::named(name)?;
        match &mut recipe {
            Recipe::ClosedLoop {
                shape,
                requests,
                concurrency,
            } => {
                self.reshape(shape);
                replace(requests, self.requests);
                replace(concurrency, self.concurrency);
            }
            Recipe::Burst { shape, requests }
            | Recipe::OpenLoop {
                shape, requests, ..
            } => {
                self.reshape(shape);
                replace(requests, self.requests);
            }
            Recipe::Chat(chat) => {
                replace(&mut chat.conversations, self.requests);
                replace(&mut chat.message_tokens, self.isl);
                replace(&mut chat.answer_tokens, self.osl);
                let gap = self.gap_ms.map(|ms| Duration::from_millis(ms.into()));
                replace(&mut chat.starts.mean, gap);
            }
            Recipe::Agent(agent) => {
                replace(&mut agent.tasks, self.requests);
                replace(&mut agent.tool_prompt_tokens, self.isl);
                replace(&mut agent.answer_tokens, self.osl);
            }
            Recipe::Rag(rag) => {
                replace(&mut rag.requests, self.requests);
                replace(
                    &mut rag.document_tokens,
                    self.isl.map(|it| it / rag.per_prompt),
                );
                replace(&mut rag.answer_tokens, self.osl);
            }
        }
        if let Some(rate) = self.rps {
            recipe = recipe.open(rate, self.arrivals)?;
        }
        let mut workload = recipe.make(seed);
        workload.name = name.to_owned();
        Ok(workload)
    }

    fn reshape(&self, shape: &mut Shape) {
        replace(&mut shape.isl, self.isl);
        replace(&mut shape.osl, self.osl);
        replace(&mut shape.isl_spread, self.isl_spread);
        replace(&mut shape.osl_spread, self.osl_spread);
        replace(&mut shape.heavy_fraction, self.heavy_fraction);
        replace(&mut shape.heavy_factor, self.heavy_factor);
        replace(&mut shape.prefixes, self.prefixes);
        replace(&mut shape.prefix_share, self.prefix_share);
    }
}

fn replace<T>(setting: &mut T, given: Option<T>) {
    if let Some(given) = given {
        *setting = given;
    }
}

/// The workloads there are, for `--help`.
pub(crate) fn list_workloads() -> String {
    let lines = NAMED.map(|(name, what)| format!("  {name:<18} {what}"));
    format!("Workloads:\n{}", lines.join("\n"))
}

fn spacing(text: &str) -> Result<Spacing, UnknownSpacing> {
    text.parse()
}

fn preset(name: &str) -> Result<&'static Preset, UnknownPreset> {
    name.parse()
}
