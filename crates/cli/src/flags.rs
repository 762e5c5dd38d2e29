//! Flags that several subcommands share.

use std::fmt;
use std::num::{NonZeroU32, NonZeroUsize};
use std::sync::LazyLock;

use clap::{Args, ValueEnum};
use foresee_core::policy::{self, NamedPolicy};
use foresee_core::queue::QueueOrder;
use foresee_core::router::RouterConfig;
use foresee_gateway::GatewayConfig;
use foresee_sim::engine::EngineConfig;
use foresee_sim::step_time::{PRESETS, Preset};
use foresee_sim::workload::{NAMED, Recipe, Shape, Spacing, UnknownSpacing, Workload};

use crate::values::{Choice, Fraction, duration};

/// Default settings of the libraries, which are the defaults of the flags.
pub(crate) static DEFAULTS: LazyLock<GatewayConfig> = LazyLock::new(GatewayConfig::default);

/// Returns the parser of `--policy`. The error for the name of another router's policy suggests the
/// corresponding policy of this router.
pub(crate) fn policy() -> Choice<NamedPolicy> {
    let policies = policy::ALL;
    let policies = policies.map(|policy| (policy, policy.name, policy.description));
    Choice::new(policies).suggesting(&[
        ("cache-aware", "marginal-delay"),
        ("prefix-aware", "marginal-delay"),
        ("prefixaware", "marginal-delay"),
        ("kv-aware", "marginal-delay"),
        ("kvaware", "marginal-delay"),
        ("roundrobin", "round-robin"),
        ("manual", "consistent-hash"),
        ("session", "consistent-hash"),
        ("least-loaded", "least-requests"),
    ])
}

/// Settings of the routing decision.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Routing")]
pub(crate) struct RouterArgs {
    /// Sets the cost of a prompt block to compute, in active blocks; 0 balances load only
    ///
    /// Under kv, a higher weight keeps requests at workers that have their prefix in cache. Under
    /// marginal-delay, the weight multiplies the predicted prefill time.
    #[arg(long, value_name = "WEIGHT", default_value_t = DEFAULTS.router.overlap_weight, env = "FORESEE_OVERLAP_WEIGHT")]
    pub(crate) overlap_weight: f64,
    /// Sets how much a second of time to first token weighs against a second of total latency
    ///
    /// A higher weight gives faster first tokens, a lower one faster completion. For
    /// marginal-delay.
    #[arg(long, value_name = "WEIGHT", default_value_t = DEFAULTS.router.ttft_weight, env = "FORESEE_TTFT_WEIGHT")]
    pub(crate) ttft_weight: f64,
    /// Sets the randomness of the choice: 0 takes the least cost, higher values sample by softmax
    #[arg(long, value_name = "NUMBER", default_value_t = DEFAULTS.router.temperature, env = "FORESEE_TEMPERATURE")]
    pub(crate) temperature: f64,
    /// Sets the tokens per KV block; use the engines' own block size
    #[arg(
        long,
        default_value_t = DEFAULTS.router.block_size,
        value_name = "TOKENS",
        env = "FORESEE_BLOCK_SIZE"
    )]
    pub(crate) block_size: NonZeroU32,
    /// Sets the seed of all random choices; change it for an independent run
    #[arg(long, value_name = "NUMBER", default_value_t = DEFAULTS.router.seed, env = "FORESEE_SEED")]
    pub(crate) seed: u64,
}

impl RouterArgs {
    /// Returns the settings of a router under `policy`, with the policy's default queue order.
    pub(crate) fn config(&self, policy: NamedPolicy) -> RouterConfig {
        RouterConfig {
            overlap_weight: self.overlap_weight,
            ttft_weight: self.ttft_weight,
            temperature: self.temperature,
            block_size: self.block_size,
            seed: self.seed,
            ..RouterConfig::for_policy(policy)
        }
    }
}

/// Settings of the router's queues.
#[derive(Args, Clone, Copy, Debug)]
#[command(next_help_heading = "Queue")]
pub(crate) struct QueueArgs {
    /// Sets the order in which requests wait at the router until their worker can take them
    ///
    /// The default is shortest under marginal-delay, and off under other policies.
    #[arg(long, value_name = "ORDER", env = "FORESEE_QUEUE", value_parser = queue())]
    queue: Option<Queue>,
}

impl QueueArgs {
    /// Returns the order of the flag, or the default of `policy`. `None` means no queue.
    pub(crate) fn order(self, policy: NamedPolicy) -> Option<QueueOrder> {
        self.queue
            .map_or(policy.default_queue, |Queue(order)| order)
    }
}

/// The policy, with the settings of routing and queueing under it.
#[derive(Args, Clone, Debug)]
pub(crate) struct RoutingArgs {
    /// Selects how a worker is chosen for a request
    #[arg(
        long,
        default_value_t = DEFAULTS.router.policy,
        value_parser = policy(),
        env = "FORESEE_POLICY",
        help_heading = "Routing"
    )]
    policy: NamedPolicy,
    #[command(flatten)]
    router: RouterArgs,
    #[command(flatten)]
    queue: QueueArgs,
}

impl RoutingArgs {
    /// Returns the settings of the router that the flags describe.
    pub(crate) fn config(&self) -> RouterConfig {
        RouterConfig {
            queue_order: self.queue.order(self.policy),
            ..self.router.config(self.policy)
        }
    }
}

/// A queue order, or `None` for `off`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Queue(pub(crate) Option<QueueOrder>);

/// Value of `--queue` for no queue.
const NO_QUEUE: &str = "off";

/// Returns the parser of `--queue`.
fn queue() -> Choice<Queue> {
    let orders =
        QueueOrder::ALL.map(|(order, name)| (Queue(Some(order)), name, order.description()));
    let off = (Queue(None), NO_QUEUE, "every request is sent at once");
    Choice::new(orders.into_iter().chain([off]))
}

impl fmt::Display for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(order) => order.fmt(f),
            None => f.pad(NO_QUEUE),
        }
    }
}

/// A switch: `on` or `off`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Switch {
    On,
    Off,
}

impl From<bool> for Switch {
    fn from(is_on: bool) -> Self {
        if is_on { Self::On } else { Self::Off }
    }
}

impl fmt::Display for Switch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::On => "on",
            Self::Off => "off",
        })
    }
}

/// The properties of a mock engine.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Mock engine")]
pub(crate) struct EngineArgs {
    /// Selects the model and the accelerator to imitate
    #[arg(
        long = "engine",
        default_value = PRESETS[0].name,
        value_name = "PRESET",
        value_parser = preset()
    )]
    pub(crate) preset: &'static Preset,
    /// Sets the number of KV blocks of each engine, in place of the preset's
    #[arg(long)]
    pub(crate) blocks: Option<NonZeroU32>,
    /// Sets the maximum number of tokens in one engine step, in place of the preset's
    #[arg(long, value_name = "TOKENS")]
    pub(crate) max_num_batched_tokens: Option<NonZeroU32>,
    /// Sets the maximum number of requests that an engine runs at a time, in place of the preset's
    #[arg(long, value_name = "REQUESTS")]
    pub(crate) max_num_seqs: Option<NonZeroU32>,
    /// Selects whether requests share cached blocks in an engine
    #[arg(long, value_name = "SWITCH", default_value_t = Switch::On)]
    pub(crate) prefix_caching: Switch,
}

/// Returns the parser of `--engine`.
fn preset() -> Choice<&'static Preset> {
    Choice::new(PRESETS.map(|preset| (preset, preset.name, preset.description)))
}

impl EngineArgs {
    /// Returns the configuration of an engine whose noise in step times has this seed. A value
    /// without a flag is that of the preset.
    pub(crate) fn config(&self, block_size: NonZeroU32, seed: u64) -> EngineConfig {
        let mut config = EngineConfig::from_preset(self.preset, block_size);
        config.prefix_caching = self.prefix_caching == Switch::On;
        config.seed = seed;
        if let Some(blocks) = self.blocks {
            config.blocks = blocks.get();
        }
        if let Some(requests) = self.max_num_seqs {
            config.max_num_seqs = requests.get();
        }
        if let Some(tokens) = self.max_num_batched_tokens {
            config.max_num_batched_tokens = tokens.get();
        }
        config
    }
}

/// Returns the parser of `--workload`.
pub(crate) fn workload() -> Choice<String> {
    Choice::new(NAMED.map(|(name, description)| (name.to_owned(), name, description)))
}

/// Changes of a named workload. Without a flag, the workload keeps its own value.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Shape of the workload")]
pub(crate) struct WorkloadArgs {
    /// Sets the number of requests: conversations for chat, tasks for agent, and the first requests
    /// of a trace
    #[arg(long)]
    pub(crate) requests: Option<u32>,
    /// Sets the number of requests in flight at a time, for workloads without an arrival rate
    #[arg(long, value_name = "REQUESTS")]
    pub(crate) concurrency: Option<NonZeroUsize>,
    /// Sets the mean length of prompts, in tokens: of a message for chat, of the tool prompt for agent,
    /// of all documents for rag
    #[arg(long, value_name = "TOKENS")]
    pub(crate) isl: Option<u32>,
    /// Sets the mean output length, in tokens
    #[arg(long, value_name = "TOKENS")]
    pub(crate) osl: Option<u32>,
    /// Sets how far prompt lengths vary in both directions, as a fraction of the mean
    #[arg(long, value_name = "FRACTION")]
    pub(crate) isl_spread: Option<f64>,
    /// Sets how far output lengths vary in both directions, as a fraction of the mean
    #[arg(long, value_name = "FRACTION")]
    pub(crate) osl_spread: Option<f64>,
    /// Sets the fraction of prompts that are longer by --heavy-factor
    #[arg(long, value_name = "FRACTION")]
    pub(crate) heavy_fraction: Option<Fraction>,
    /// Sets the length of heavy prompts, in multiples of the mean
    #[arg(long, value_name = "FACTOR")]
    pub(crate) heavy_factor: Option<f64>,
    /// Sets the number of different prefixes that prompts begin with; 0 for none
    #[arg(long, value_name = "N")]
    pub(crate) prefixes: Option<u32>,
    /// Sets the fraction of a prompt that is its prefix
    #[arg(long, value_name = "FRACTION")]
    pub(crate) prefix_fraction: Option<Fraction>,
    /// Sets the mean time between the starts of two conversations, for chat, such as 500ms
    #[arg(long, conflicts_with = "rps", value_name = "DURATION", value_parser = duration)]
    pub(crate) gap: Option<humantime::Duration>,
    /// Sets the mean arrivals per second, whether or not earlier requests have ended
    ///
    /// Conversations and tasks start at the rate that gives this many requests per second.
    #[arg(long, value_name = "REQUESTS")]
    pub(crate) rps: Option<f64>,
    /// Sets how arrivals at --rps are spaced: poisson, even, or gamma:CV for bursts and lulls
    ///
    /// CV is the standard deviation of the time between two arrivals, divided by its mean.
    #[arg(long, value_name = "SPACING", default_value = "poisson", value_parser = spacing)]
    pub(crate) arrivals: Spacing,
}

impl WorkloadArgs {
    /// Generates the workload `name`, changed by the flags. Equal flags and seeds give equal
    /// requests.
    ///
    /// A flag that does not apply to the kind of workload has no effect. `--isl` sets the mean
    /// length of a message for chat, of the prompt that tasks of a kind share for agent, and of all
    /// documents of a prompt together for rag. With `--rps`, bursts and workloads with a fixed
    /// concurrency become open-loop workloads.
    ///
    /// # Errors
    /// If no workload has this name, or `--rps` is not a positive number or gives fewer than one
    /// start in a million seconds.
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
                replace(concurrency, self.concurrency.map(NonZeroUsize::get));
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
                replace(&mut chat.output_tokens, self.osl);
                replace(&mut chat.starts.mean, self.gap.map(Into::into));
            }
            Recipe::Agent(agent) => {
                replace(&mut agent.tasks, self.requests);
                replace(&mut agent.tool_prompt_tokens, self.isl);
                replace(&mut agent.output_tokens, self.osl);
            }
            Recipe::Rag(rag) => {
                replace(&mut rag.requests, self.requests);
                replace(
                    &mut rag.document_tokens,
                    self.isl.map(|tokens| tokens / rag.per_prompt),
                );
                replace(&mut rag.output_tokens, self.osl);
            }
        }
        if let Some(rate) = self.rps {
            recipe = recipe.open(rate, self.arrivals)?;
        }
        let mut workload = recipe.make(seed);
        workload.name = name.to_owned();
        Ok(workload)
    }

    /// Applies the flags to the shape of a synthetic workload.
    fn reshape(&self, shape: &mut Shape) {
        replace(&mut shape.isl, self.isl);
        replace(&mut shape.osl, self.osl);
        replace(&mut shape.isl_spread, self.isl_spread);
        replace(&mut shape.osl_spread, self.osl_spread);
        replace(
            &mut shape.heavy_fraction,
            self.heavy_fraction.map(|fraction| fraction.0),
        );
        replace(&mut shape.heavy_factor, self.heavy_factor);
        replace(&mut shape.prefixes, self.prefixes);
        replace(
            &mut shape.prefix_fraction,
            self.prefix_fraction.map(|fraction| fraction.0),
        );
    }
}

/// Overwrites a setting if its flag is given.
fn replace<T>(setting: &mut T, given: Option<T>) {
    if let Some(given) = given {
        *setting = given;
    }
}

/// Parses `--arrivals`.
fn spacing(text: &str) -> Result<Spacing, UnknownSpacing> {
    text.parse()
}
