//! `foresee load`: sends a workload to an OpenAI-compatible address and measures the responses.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail, ensure};
use clap::{Args, ValueEnum};
use foresee_client::load::{
    self, ApiKey, HeaderName, HeaderValue, LiveOutcome, LoadConfig, LoadSummary, OutputRequest,
};
use foresee_gateway::raise_open_file_limit;
use foresee_sim::trace;
use foresee_sim::workload::{Arrival, Workload};

use crate::exit::{ensure_usage, not_carried_out};
use crate::flags::{WorkloadArgs, workload as workload_name};
use crate::output::{print, write_json};
use crate::progress;
use crate::serve::runtime;
use crate::trace_file::read_trace;
use crate::values::{Fraction, positive_duration};

/// End of the long help.
const NOTES: &str = "\
Two routers on the same traffic:
  foresee load http://router-a:8080 --workload chat --rps 20 --seed 7 --json a.json
  foresee load http://router-b:8080 --workload chat --rps 20 --seed 7 --json b.json
Runs with the same flags and seed send the same request bodies, byte for byte, at the same arrival
times. Later turns of a conversation contain prepared outputs, so bodies do not depend on responses.
Clear the engines' prefix caches between two runs, because the second run repeats all prompts.

--concurrency sends independent requests in a closed loop: each next request follows the end of
another, and arrival times of the workload or the trace do not matter.

Prompts are made of random words of four letters. A mock engine counts a word as one token; a real
tokenizer counts more. The report shows the engine's own count.

Exit codes: 0 all requests succeeded; 1 some requests failed; 2 wrong usage; 3 the load could not be
sent, for example because the address refuses connections or serves several models.";

#[derive(Args, Debug)]
#[command(after_long_help = NOTES)]
pub(crate) struct LoadArgs {
    /// Names the engine or router by its base URL, with or without /v1
    #[arg(value_name = "URL")]
    address: String,
    /// Names the model of the requests [default: the only model that /v1/models lists]
    #[arg(long)]
    model: Option<String>,
    /// Selects the API of the requests; chat sends the prompt as one message of the user
    #[arg(long, default_value = "completions")]
    api: Api,
    /// Names the environment variable with the API key, which is sent as `Authorization: Bearer
    /// KEY`
    #[arg(long, value_name = "NAME")]
    api_key_env: Option<String>,
    /// Adds a header to each request, such as `x-session-id: 7`; repeat it for more headers
    #[arg(long = "header", value_name = "NAME: VALUE", value_parser = header)]
    headers: Vec<(HeaderName, HeaderValue)>,
    /// Leaves `ignore_eos` out of requests, for servers that refuse the field; outputs may then be
    /// shorter than in the workload
    #[arg(long, conflicts_with = "max_tokens")]
    no_ignore_eos: bool,
    /// Sets `max_tokens` of each request, and sends the output length as `min_tokens`, where a mock
    /// engine ends the output [default: the output length, with `ignore_eos`]
    ///
    /// With the default, a router can read the length of each output from its request. Clients in
    /// production send a limit that few outputs reach. Other engines than mock engines end the
    /// output where the model does.
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: Option<u32>,

    /// Selects the workload to send
    #[arg(
        long,
        default_value = "chat",
        value_parser = workload_name(),
        help_heading = "Workload"
    )]
    workload: String,
    /// Names a trace to send instead: Mooncake's format, a recording of `serve --record`, or
    /// Azure's tables
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with = "workload",
        help_heading = "Workload"
    )]
    trace: Option<PathBuf>,
    /// Sets the arrival rate in multiples of the trace's or the workload's own
    #[arg(
        long,
        value_name = "FACTOR",
        default_value_t = 1.0,
        help_heading = "Workload"
    )]
    rate: f64,
    /// Sets how long requests are sent, such as 60s or 10m [default: until the workload ends]
    #[arg(long, value_name = "DURATION", value_parser = positive_duration, help_heading = "Workload")]
    duration: Option<humantime::Duration>,
    /// Sets the fraction of streams that the client closes early, at a random point
    #[arg(
        long,
        value_name = "FRACTION",
        default_value_t = Fraction(0.0),
        help_heading = "Workload"
    )]
    abort_fraction: Fraction,
    /// Sets the seed of all random choices; runs with the same seed send the same requests
    #[arg(long, default_value_t = 0, help_heading = "Workload")]
    seed: u64,
    #[command(flatten, next_help_heading = "Workload")]
    shape: WorkloadArgs,

    /// Sets the speed of mock engines in multiples of real time: requests are sent faster by this
    /// factor, and the report is in the engines' time
    #[arg(
        long,
        value_name = "FACTOR",
        default_value_t = 1.0,
        help_heading = "Measurement"
    )]
    speedup: f64,
    /// Sets the maximum time for one request, in real time
    #[arg(
        long,
        value_name = "DURATION",
        default_value = "10m",
        value_parser = positive_duration,
        help_heading = "Measurement"
    )]
    timeout: humantime::Duration,
    /// Writes the report as JSON to a file; - writes to standard output, in place of the text
    #[arg(long, value_name = "FILE", help_heading = "Measurement")]
    json: Option<PathBuf>,
}

impl LoadArgs {
    /// Returns how requests ask for the output length of the workload.
    fn output_request(&self) -> OutputRequest {
        match self.max_tokens {
            Some(max_tokens) => OutputRequest::AtLeast { max_tokens },
            None if self.no_ignore_eos => OutputRequest::AtMost,
            None => OutputRequest::Exact,
        }
    }
}

/// The API that requests use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Api {
    /// `/v1/completions`
    Completions,
    /// `/v1/chat/completions`
    Chat,
}

/// Runs the subcommand and returns its exit code: failure if some requests failed, and [the code of
/// no result](not_carried_out) after an error.
pub(crate) fn load(args: &LoadArgs) -> ExitCode {
    match run(args) {
        Ok(outcome) if outcome.failures() == 0 => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => not_carried_out(&error),
    }
}

/// Sends the workload and writes the report. Failed requests are counted in the outcome.
///
/// # Errors
/// If a setting, the workload or the API key is invalid, the server cannot be reached or its model
/// is unclear, or the report cannot be written.
fn run(args: &LoadArgs) -> anyhow::Result<LiveOutcome> {
    raise_open_file_limit().context("cannot raise the limit of open files")?;
    let api_key = args.api_key_env.as_deref().map(api_key).transpose()?;
    let workload = workload(args)?;
    ensure!(
        !workload.requests.is_empty(),
        "the workload has no requests"
    );
    runtime()?.block_on(async {
        let named_model = args.model.as_deref();
        let model = load::find_model(&args.address, api_key.as_ref(), named_model).await?;
        let config = LoadConfig {
            chat: args.api == Api::Chat,
            output_request: args.output_request(),
            api_key,
            headers: args.headers.iter().cloned().collect(),
            speedup: args.speedup,
            abort_fraction: args.abort_fraction.0,
            duration: args.duration.map(Into::into),
            seed: args.seed,
            timeout: args.timeout.into(),
            ..LoadConfig::new(&args.address, model)
        };
        let outcome = send(&config, &workload).await?;
        let summary = LoadSummary::new(&config, &workload, outcome);
        write_report(args.json.as_deref(), &summary)?;
        Ok(summary.outcome)
    })
}

/// Parses a header, written `NAME: VALUE`.
fn header(text: &str) -> Result<(HeaderName, HeaderValue), String> {
    let (name, value) = text.split_once(':').ok_or("write NAME: VALUE")?;
    let name = name
        .trim()
        .parse()
        .map_err(|_| "the name is not one of a header");
    let value = value
        .trim()
        .parse()
        .map_err(|_| "the value has characters that no header has");
    Ok((name?, value?))
}

/// Reads an API key from an environment variable.
pub(crate) fn api_key(name: &str) -> anyhow::Result<ApiKey> {
    let key = std::env::var(name)
        .with_context(|| format!("cannot read the API key from the environment variable {name}"))?;
    Ok(ApiKey::new(&key)?)
}

/// Returns the workload or trace with the arrivals that the flags set.
///
/// # Errors
/// If the trace cannot be read, `--rps` is combined with a trace or with `--concurrency`, or there
/// is no arrival rate that `--rate` could scale.
fn workload(args: &LoadArgs) -> anyhow::Result<Workload> {
    let shape = &args.shape;
    let mut workload = match &args.trace {
        Some(path) => {
            ensure_usage(
                shape.rps.is_none(),
                "a trace has its own arrival times: use --rate to scale them, not --rps",
            )?;
            trace_workload(path, shape.requests)?
        }
        None => shape.make(&args.workload, args.seed)?,
    };
    ensure_usage(
        shape.concurrency.is_none() || shape.rps.is_none(),
        "--concurrency (a closed loop) and --rps (an open loop) exclude each other",
    )?;
    if let Some(concurrency) = shape.concurrency {
        close_loop(&mut workload, concurrency.get())?;
    }
    ensure!(
        args.rate == 1.0 || workload.has_rate(),
        "{} has no arrival rate that --rate could scale: set one with --rps",
        workload.name
    );
    Ok(workload.at_rate(args.rate)?)
}

/// Reads the first `max_requests` requests of a trace, or all of them for `None`. The workload is
/// named after the path.
fn trace_workload(path: &Path, max_requests: Option<u32>) -> anyhow::Result<Workload> {
    let mut requests = read_trace(path)?;
    trace::truncate(&mut requests, max_requests.map(|max| max as usize), None);
    let mut workload = Workload::from_trace(&requests, 1.0)?;
    workload.name = path.display().to_string();
    Ok(workload)
}

/// Replaces arrival times with a closed loop of `concurrency` requests in flight.
///
/// # Errors
/// If a request follows another, as the turns of a conversation do.
fn close_loop(workload: &mut Workload, concurrency: usize) -> anyhow::Result<()> {
    for request in &mut workload.requests {
        if let Arrival::After { .. } = request.arrival {
            bail!(
                "--concurrency needs a workload of independent requests; the turns of {} follow \
                 each other: set the rate with --rps",
                workload.name
            );
        }
        request.arrival = Arrival::ClosedLoop;
    }
    workload.concurrency = concurrency;
    Ok(())
}

/// Sends the workload, with a progress bar if standard error is a terminal.
///
/// # Errors
/// If the configuration is invalid. Failed requests are counted in the outcome.
async fn send(config: &LoadConfig, workload: &Workload) -> anyhow::Result<LiveOutcome> {
    let bar = progress::bar(&workload.name, workload.requests.len())?;
    let outcome = load::run(config, workload, |progress| {
        bar.set_position(progress.ended as u64);
        let in_flight = progress.sent - progress.ended;
        bar.set_message(match progress.failed {
            0 => format!("{in_flight} in flight"),
            failed => format!("{in_flight} in flight, {failed} failed"),
        });
    });
    let outcome = outcome.await?;
    bar.finish_and_clear();
    Ok(outcome)
}

/// Writes the text to standard output, and the JSON to the file or, for `-`, to standard output in
/// place of the text.
fn write_report(json_path: Option<&Path>, summary: &LoadSummary) -> anyhow::Result<()> {
    match json_path {
        Some(path) if path == Path::new("-") => {
            print(serde_json::to_string_pretty(summary)? + "\n")
        }
        path => {
            print(summary)?;
            write_json(path, summary)
        }
    }
}
