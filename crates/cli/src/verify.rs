//! `foresee verify`: a router in front of engines that run, and what it got right.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use clap::Args;
use foresee_gateway::{Gateway, GatewayConfig, raise_open_file_limit};
use foresee_sim::verify::{self, Lengths, VerifyConfig};
use indicatif::{ProgressBar, ProgressStyle};

use crate::serve::{ServeArgs, runtime};

#[derive(Args, Debug)]
pub(crate) struct VerifyArgs {
    /// Requests of each phase
    #[arg(long, default_value_t = 300)]
    requests: usize,
    /// Requests in flight at a time: a phase for each number; those alike are judged together
    #[arg(long, value_delimiter = ',', value_name = "N", default_value = "1,8")]
    concurrency: Vec<usize>,
    /// The model to ask for; the first that the workers serve by default
    #[arg(long)]
    model: Option<String>,
    /// Tokens of the longest prompt
    #[arg(long, default_value_t = 1000, value_name = "TOKENS")]
    max_prompt: u32,
    /// Tokens of the longest answer
    #[arg(long, default_value_t = 64, value_name = "TOKENS")]
    max_answer: u32,
    /// Share of answers that are streamed; how far others are, nobody can see
    #[arg(long, default_value_t = 0.6)]
    stream_share: f64,
    /// Share of streams that the client leaves before their end, where several run
    #[arg(long, default_value_t = 0.05)]
    abort_share: f64,
    /// Seconds between two looks at the engines' metrics
    #[arg(long, default_value_t = 0.25, value_name = "SECONDS")]
    sample_interval: f64,
    /// Decides every prompt; by default no two runs share one, because engines would remember
    #[arg(long, value_name = "NUMBER")]
    prompt_seed: Option<u64>,
    /// The address of a router that serves already (without /v1), to be verified in place of one of
    /// its own: the workers are its, and --block-size and --tokenizer must be as it has them
    #[arg(long, value_name = "URL", requires = "router_admin")]
    router: Option<String>,
    /// The address of its admin API
    #[arg(long, value_name = "URL", requires = "router")]
    router_admin: Option<String>,
    /// Writes the report as a page with pictures
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Writes the report as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    #[command(flatten)]
    serve: ServeArgs,
}

pub(crate) fn verify(args: VerifyArgs) -> anyhow::Result<ExitCode> {
    raise_open_file_limit().context("cannot raise the limit of open files")?;
    runtime()?.block_on(run(args))
}

async fn run(args: VerifyArgs) -> anyhow::Result<ExitCode> {
    let shares = [
        ("--stream-share", args.stream_share),
        ("--abort-share", args.abort_share),
    ];
    for (flag, share) in shares {
        if !(0.0..=1.0).contains(&share) {
            bail!("`{flag}` is {share}: it must be from 0 to 1");
        }
    }
    let sample_interval = Duration::try_from_secs_f64(args.sample_interval).ok();
    let sample_interval = sample_interval
        .filter(|interval| !interval.is_zero())
        .context("`--sample-interval` must be more than 0 seconds")?;
    let any_port = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let config = GatewayConfig {
        listen: any_port,
        admin_listen: any_port,
        ..args.serve.gateway()
    };
    let (block_size, has_tokenizer) = (config.router.block_size, config.tokenizer.is_some());
    let since_1970 = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let seed = args.prompt_seed.unwrap_or(since_1970.as_secs());
    let (own, api, admin) = match (args.router, args.router_admin) {
        (Some(api), Some(admin)) => {
            let bare = |url: String| url.trim_end_matches('/').to_owned();
            (None, bare(api), bare(admin))
        }
        _ if config.workers.is_empty() => {
            bail!("there is nothing to verify: name the engines with --worker URL")
        }
        _ => {
            let gateway = Gateway::start(config)?;
            let api = format!("http://{}", gateway.address());
            let admin = format!("http://{}", gateway.admin_address());
            (Some(gateway), api, admin)
        }
    };
    let config = VerifyConfig {
        api,
        admin,
        model: args.model,
        block_size: block_size.get(),
        has_tokenizer,
        requests: args.requests,
        concurrency: args.concurrency,
        lengths: Lengths {
            prompt: args.max_prompt,
            answer: args.max_answer,
        },
        stream_share: args.stream_share,
        abort_share: args.abort_share,
        sample_interval,
        seed,
        timeout: Duration::from_secs(600),
    };
    let style = ProgressStyle::with_template("{prefix:16} {bar:40} {pos}/{len} {eta}")?;
    let bar = ProgressBar::new(0).with_style(style);
    let found = verify::run(&config, |progress| {
        bar.set_prefix(format!("{} at a time", progress.concurrency));
        bar.set_length(progress.total as u64);
        bar.set_position(progress.ended as u64);
    })
    .await?;
    bar.finish_and_clear();
    if let Some(gateway) = own {
        gateway.shut_down().await;
    }
    print!("{found}");
    if let Some(path) = &args.html {
        std::fs::write(path, found.html())
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    if let Some(path) = &args.json {
        let json = serde_json::to_string_pretty(&found)?;
        std::fs::write(path, json).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(if found.passed() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
