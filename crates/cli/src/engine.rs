//! `foresee engine`: one model engine over HTTP.

use std::net::SocketAddr;

use anyhow::Context;
use clap::Args;
use foresee_gateway::raise_open_file_limit;
use foresee_sim::server::{ServerConfig, bind, serve};

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
}

pub(crate) fn engine(args: EngineArgs) -> anyhow::Result<()> {
    raise_open_file_limit().context("cannot raise the limit of open files")?;
    let engine = args.model_engine.config(args.block_size, args.seed);
    let config = ServerConfig {
        time_scale: args.time_scale,
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
