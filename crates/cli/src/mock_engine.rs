//! `foresee mock-engine`: one mock engine over HTTP.

use std::net::SocketAddr;
use std::num::{NonZeroU32, NonZeroU64};

use anyhow::Context;
use clap::{Args, ValueEnum};
use foresee_gateway::raise_open_file_limit;
use foresee_mock::{KvEventsConfig, Layout, MockEngineConfig, bind, serve};

use crate::flags::{DEFAULTS, EngineArgs};
use crate::serve::runtime;
use crate::values::{address, duration};

#[derive(Args, Debug)]
pub(crate) struct MockEngineArgs {
    /// Sets the address of the engine's OpenAI-compatible API
    #[arg(
        long,
        value_name = "HOST:PORT",
        default_value = "127.0.0.1:8000",
        value_parser = address
    )]
    listen: SocketAddr,
    /// Sets the name of the model that the engine serves
    #[arg(long, value_name = "NAME", default_value = "model")]
    model: String,
    /// Sets the speed of the engine in multiples of real time
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0)]
    speedup: f64,
    /// Sets the number of tokens per KV block
    #[arg(long, default_value_t = DEFAULTS.router.block_size, value_name = "TOKENS")]
    block_size: NonZeroU32,
    /// Sets the seed of the noise in step times
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    kv_events: KvEventsArgs,
}

/// Publication of KV events, in the format of vLLM.
#[derive(Args, Debug)]
#[group(id = "publication")]
#[command(next_help_heading = "KV events")]
struct KvEventsArgs {
    /// Publishes KV events at an endpoint: tcp://127.0.0.1:5557 or ipc:///path
    #[arg(long, value_name = "ENDPOINT")]
    kv_events: Option<String>,
    /// Sends earlier KV events again, on request, at an endpoint
    #[arg(long, value_name = "ENDPOINT", requires = "kv_events")]
    kv_replay: Option<String>,
    /// Sets the topic of KV events, which is the first frame of a message
    #[arg(long, default_value = "", value_name = "TOPIC")]
    kv_topic: String,
    /// Selects the layout of KV events: map as in vLLM since 0.24, array as in earlier versions
    #[arg(long, value_name = "LAYOUT", default_value = "map")]
    kv_layout: LayoutName,
    /// Drops every Nth batch of KV events, to test the recovery of the router
    #[arg(long, value_name = "N")]
    kv_drop_every: Option<NonZeroU64>,
    /// Delays KV events, such as 200ms, to test late events
    #[arg(long, default_value = "0s", value_name = "DURATION", value_parser = duration)]
    kv_lag: humantime::Duration,
    /// Stops publishing after N batches of KV events, to test a silent event stream
    #[arg(long, value_name = "N")]
    kv_silent_after: Option<NonZeroU64>,
    /// Restarts the idle engine with an empty cache after every N batches of KV events
    #[arg(long, value_name = "N")]
    kv_restart_every: Option<NonZeroU64>,
    /// Omits evicted blocks from KV events, to test events that contradict responses
    #[arg(long)]
    kv_hide_removals: bool,
}

/// A layout of KV events.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum LayoutName {
    Map,
    Array,
}

impl KvEventsArgs {
    /// Returns the settings of the publication, or `None` without an endpoint.
    fn config(self) -> Option<KvEventsConfig> {
        let endpoint = self.kv_events?;
        Some(KvEventsConfig {
            replay: self.kv_replay,
            topic: self.kv_topic,
            layout: match self.kv_layout {
                LayoutName::Map => Layout::Map,
                LayoutName::Array => Layout::Array,
            },
            drop_every: self.kv_drop_every,
            lag: self.kv_lag.into(),
            silent_after: self.kv_silent_after,
            restart_every: self.kv_restart_every,
            hide_removals: self.kv_hide_removals,
            ..KvEventsConfig::new(endpoint)
        })
    }
}

/// Serves one mock engine until an interrupt, which cuts all connections.
///
/// # Errors
/// If an address cannot be bound, or the configuration is contradictory.
pub(crate) fn mock_engine(args: MockEngineArgs) -> anyhow::Result<()> {
    raise_open_file_limit().context("cannot raise the limit of open files")?;
    let engine = args.engine.config(args.block_size, args.seed);
    let config = MockEngineConfig {
        speedup: args.speedup,
        kv_events: args.kv_events.config(),
        ..MockEngineConfig::new(args.model, engine)
    };
    runtime()?.block_on(async {
        let listener =
            bind(args.listen).with_context(|| format!("cannot listen on {}", args.listen))?;
        tracing::info!(
            address = %listener.local_addr()?, model = %config.model,
            blocks = config.engine.blocks, "mock engine is listening"
        );
        let interrupted = async {
            if let Err(error) = tokio::signal::ctrl_c().await {
                tracing::error!(%error, "cannot wait for an interrupt");
            }
        };
        serve(config, listener, interrupted).await?;
        Ok(())
    })
}
