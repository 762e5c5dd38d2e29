//! `foresee verify`: compares a router's predictions with running engines.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, anyhow, bail};
use clap::{ArgMatches, Args};
use foresee_client::verify::{self, Lengths, Verdict, VerifyConfig};
use foresee_gateway::{AdminListen, Gateway, GatewayConfig, ShutdownConfig, raise_open_file_limit};

use crate::exit::not_carried_out;
use crate::flags::{RoutingArgs, Switch};
use crate::load::api_key;
use crate::output::{print, write_file, write_json};
use crate::progress;
use crate::serve::{PromptArgs, WorkerAccessArgs, WorkerArgs, runtime};
use crate::values::{Fraction, positive_duration};

#[derive(Args, Debug)]
pub(crate) struct VerifyArgs {
    /// Sets the number of requests of each phase
    #[arg(long, value_name = "N", default_value_t = 300)]
    requests: usize,
    /// Sets the number of requests in flight at a time, one phase for each number; phases with
    /// equal numbers are judged together
    #[arg(long, value_delimiter = ',', value_name = "N", default_value = "1,8")]
    concurrency: Vec<usize>,
    /// Names the model of the requests [default: the first model that the workers serve]
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// Sets the longest prompt, in tokens
    #[arg(long, default_value_t = 1000, value_name = "TOKENS")]
    max_prompt: u32,
    /// Sets the longest output, in tokens
    #[arg(long, default_value_t = 64, value_name = "TOKENS")]
    max_output: u32,
    /// Sets the fraction of responses that are streamed; the router cannot see the progress of the
    /// rest
    #[arg(long, value_name = "FRACTION", default_value_t = Fraction(0.6))]
    stream_fraction: Fraction,
    /// Sets the fraction of streams that the client closes early, in phases with several in flight
    #[arg(long, value_name = "FRACTION", default_value_t = Fraction(0.05))]
    abort_fraction: Fraction,
    /// Sets the time between two reads of the engines' metrics, such as 250ms
    #[arg(
        long,
        default_value = "250ms",
        value_name = "DURATION",
        value_parser = positive_duration
    )]
    sample_interval: humantime::Duration,
    /// Sets the seed of all prompts [default: the time, because engines remember earlier prompts]
    #[arg(long, value_name = "NUMBER")]
    prompt_seed: Option<u64>,
    /// Names a running router by its URL without /v1, to verify in place of a new one
    ///
    /// The running router's workers are verified. Set --block-size and --tokenizer to its values.
    #[arg(long, value_name = "URL", requires = "router_admin")]
    router: Option<String>,
    /// Sets the URL of the running router's admin API
    #[arg(long, value_name = "URL", requires = "router")]
    router_admin: Option<String>,
    /// Names the environment variable with the key of the running router's admin API
    #[arg(long, value_name = "NAME", requires = "router_admin")]
    router_admin_key_env: Option<String>,
    /// Writes the report as an HTML page with charts to a file
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Writes the report as JSON to a file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    #[command(flatten)]
    workers: WorkerArgs,
    #[command(flatten)]
    worker_access: WorkerAccessArgs,
    #[command(flatten)]
    prompts: PromptArgs,
    #[command(flatten)]
    routing: RoutingArgs,
}

impl VerifyArgs {
    /// Resolves the workers, which flags and variables can set.
    pub(crate) fn resolve(mut self, matches: &ArgMatches) -> Self {
        self.workers = self.workers.resolve(matches);
        self
    }
}

/// Runs the subcommand and returns its exit code: failure if the predictions do not hold, and [the
/// code of no result](not_carried_out) after an error or without a measured response. If too few
/// responses were measured for a verdict, the code is success.
pub(crate) fn verify(args: VerifyArgs) -> ExitCode {
    let verdict = raise_open_file_limit()
        .context("cannot raise the limit of open files")
        .and_then(|_| runtime()?.block_on(run(args)));
    match verdict {
        Ok(Verdict::Holds | Verdict::NotShown) => ExitCode::SUCCESS,
        Ok(Verdict::Fails) => ExitCode::FAILURE,
        Ok(Verdict::NotMeasured) => not_carried_out(&anyhow!(
            "no response reported both a prediction and cached_tokens"
        )),
        Err(error) => not_carried_out(&error),
    }
}

/// Starts a gateway unless `--router` names one, verifies it, and writes the reports, whatever the
/// verdict. With `--router`, only the block size and the presence of a tokenizer are used of the
/// router's settings. Without `--prompt-seed`, the seed is the time in seconds since 1970.
///
/// # Errors
/// If there is no worker, the gateway cannot start, the verification cannot be carried out, or a
/// file cannot be written.
async fn run(args: VerifyArgs) -> anyhow::Result<Verdict> {
    let any_port = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let gateway_config = GatewayConfig {
        listen: any_port,
        admin_listen: AdminListen::Tcp(any_port),
        workers: args.workers.workers(),
        worker_key: args.worker_access.key_config(),
        worker_tls: args.worker_access.tls_config(),
        dns: args.worker_access.dns_config(),
        // The report names the worker of each wrong prediction.
        expose_worker_header: true,
        router: args.routing.config(),
        prefix_caching: args.prompts.prefix_caching == Switch::On,
        tokenizer: args.prompts.tokenizer,
        shutdown: ShutdownConfig {
            delay: Duration::ZERO,
        },
        ..GatewayConfig::default()
    };
    let block_size = gateway_config.router.block_size;
    let has_tokenizer = gateway_config.tokenizer.is_some();
    let since_1970 = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let seed = args.prompt_seed.unwrap_or(since_1970.as_secs());
    let (own_gateway, api, admin) = match (args.router, args.router_admin) {
        (Some(api), Some(admin)) => {
            let without_slash = |url: String| url.trim_end_matches('/').to_owned();
            (None, without_slash(api), without_slash(admin))
        }
        _ if gateway_config.workers.is_empty() => {
            bail!("no worker to verify; add the engines with --worker URL")
        }
        _ => {
            let gateway = Gateway::start(gateway_config)?;
            let api = format!("http://{}", gateway.address());
            let admin = format!("http://{}", gateway.admin_listen());
            (Some(gateway), api, admin)
        }
    };
    let admin_key = args.router_admin_key_env.as_deref().map(api_key);
    let config = VerifyConfig {
        api,
        admin,
        admin_key: admin_key.transpose()?,
        model: args.model,
        block_size: block_size.get(),
        has_tokenizer,
        requests: args.requests,
        concurrency: args.concurrency,
        lengths: Lengths {
            prompt: args.max_prompt,
            output: args.max_output,
        },
        stream_fraction: args.stream_fraction.0,
        abort_fraction: args.abort_fraction.0,
        sample_interval: args.sample_interval.into(),
        seed,
        timeout: Duration::from_secs(600),
    };
    let bar = progress::bar("", 0)?;
    let verification = verify::run(&config, |progress| {
        bar.set_prefix(format!("{} in flight", progress.concurrency));
        bar.set_length(progress.total as u64);
        bar.set_position(progress.ended as u64);
    })
    .await?;
    bar.finish_and_clear();
    if let Some(gateway) = own_gateway {
        gateway.shut_down().await;
    }
    print(&verification)?;
    if let Some(path) = &args.html {
        write_file(path, &verification.html())?;
    }
    write_json(args.json.as_deref(), &verification)?;
    Ok(verification.verdict())
}
