//! `foresee engine`: one model engine over HTTP.

use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, ValueEnum};
use foresee_gateway::raise_open_file_limit;
use foresee_sim::server::{KvEventsConfig, Layout, ServerConfig, bind, serve};

use crate::flags::ModelEngineArgs;
use crate::serve::runtime;

#[derive(Args, Debug)]
pub(crate) struct EngineArgs {
    /// Where it listens
    #[arg(long, default_value = "127.0.0.1:8000")]
    listen: SocketAddr,
    /// Name of the model it serves
    #[arg(long, default_value = "model")]
    model: String,
    /// How many times faster than real it runs
    #[arg(long, default_value_t = 1.0)]
    time_scale: f64,
    /// Tokens per KV block
    #[arg(long, default_value = "16", value_name = "TOKENS")]
    block_size: std::num::NonZeroU32,
    /// Fixes the noise of its step times
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    model_engine: ModelEngineArgs,
    #[command(flatten)]
    kv_events: KvEventsArgs,
}

/// How it publishes what it caches, as vLLM does.
#[derive(Args, Debug)]
#[group(id = "publication")]
struct KvEventsArgs {
    /// Publishes KV events here: tcp://127.0.0.1:5557 or ipc:///path
    #[arg(long, value_name = "ENDPOINT")]
    kv_events: Option<String>,
    /// Sends KV events again to who asks here
    #[arg(long, value_name = "ENDPOINT", requires = "kv_events")]
    kv_replay: Option<String>,
    /// First frame of each message of KV events
    #[arg(long, default_value = "", value_name = "TOPIC")]
    kv_topic: String,
    /// How KV events are laid out: as vLLM has it since 0.24, or before
    #[arg(long, default_value = "map")]
    kv_layout: LayoutName,
    /// Loses every so many batches of KV events, to see what that does
    #[arg(long, value_name = "BATCHES")]
    kv_drop_every: Option<NonZeroU64>,
    /// Holds KV events back for so long, to see what that does
    #[arg(long, default_value_t = 0, value_name = "MILLISECONDS")]
    kv_lag: u64,
    /// Falls silent after so many batches of KV events, to see what that does
    #[arg(long, value_name = "BATCHES")]
    kv_silent_after: Option<NonZeroU64>,
    /// Begins anew with an empty cache after so many batches of KV events, once nothing runs
    #[arg(long, value_name = "BATCHES")]
    kv_restart_every: Option<NonZeroU64>,
    /// Says nothing of evicted blocks, to see what that does
    #[arg(long)]
    kv_hide_removals: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LayoutName {
    Map,
    Array,
}

impl KvEventsArgs {
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
            lag: Duration::from_millis(self.kv_lag),
            silent_after: self.kv_silent_after,
            restart_every: self.kv_restart_every,
            hides_removals: self.kv_hide_removals,
            ..KvEventsConfig::new(endpoint)
        })
    }
}

pub(crate) fn engine(args: EngineArgs) -> anyhow::Result<()> {
    raise_open_file_limit().context("cannot raise the limit of open files")?;
    let engine = args.model_engine.config(args.block_size, args.seed);
    let config = ServerConfig {
        time_scale: args.time_scale,
        kv_events: args.kv_events.config(),
        ..ServerConfig::new(args.model, engine)
    };
    runtime()?.block_on(async {
        let listener =
            bind(args.listen).with_context(|| format!("cannot listen on {}", args.listen))?;
        tracing::info!(
            address = %listener.local_addr()?, model = %config.model,
            blocks = config.engine.blocks, "model engine is listening"
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
