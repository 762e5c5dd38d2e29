//! `foresee check-config`: checks the settings of `serve` and prints all of them as TOML.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::{Arg, ArgAction, ArgMatches, Args};
use foresee_gateway::{AdminListen, Gateway, GatewayConfig, WorkerCheck, WorkerConfig};
use toml::Value;

use crate::config_file::{from_flag, keys};
use crate::flags::{Queue, Switch};
use crate::output::print;
use crate::serve::{ServeArgs, check_settings, runtime};
use crate::value_kind::Kind;
use crate::{FAILURE, InvalidConfiguration, command};

/// Time that the first checks may take in addition to their own limits.
const EXTRA_TIME: Duration = Duration::from_secs(1);

/// Settings of `serve`, and what is checked of them.
#[derive(Args, Debug)]
pub(crate) struct CheckConfigArgs {
    #[command(flatten)]
    pub(crate) serve: ServeArgs,
    /// Selects whether the health of each worker is checked, too
    #[arg(
        long,
        default_value_t = Switch::Off,
        default_missing_value = "on",
        num_args = 0..=1,
        require_equals = true,
        value_name = "SWITCH"
    )]
    check_workers: Switch,
}

impl CheckConfigArgs {
    /// Returns whether the health of each worker is checked.
    pub(crate) fn checks_workers(&self) -> bool {
        self.check_workers == Switch::On
    }
}

/// Checks all settings and prints them as a file for `--config`. Workers are contacted only if
/// `checks_workers`; a worker that is not healthy makes the exit code a failure. `args` must be
/// [resolved](ServeArgs::resolve), and `matches` must be those of the subcommand. `tables` are the
/// tables of the file that have no flag, as text.
///
/// # Errors
/// If a setting is invalid, or the tokenizer cannot be loaded.
pub(crate) fn check_config(
    args: ServeArgs,
    matches: &ArgMatches,
    tables: &str,
    checks_workers: bool,
) -> anyhow::Result<ExitCode> {
    let config = args.gateway();
    check_settings(&config)?;
    config.check_tokenizer().context(InvalidConfiguration)?;
    print(format!("{}\n{tables}", effective(&config, matches)?).trim_end())?;
    print("\n")?;
    eprintln!("Configuration is valid.");
    if checks_workers {
        return check_workers(config);
    }
    Ok(ExitCode::SUCCESS)
}

/// Starts a gateway at a free port, waits until each worker has passed or failed a health check,
/// and prints the results.
fn check_workers(config: GatewayConfig) -> anyhow::Result<ExitCode> {
    let limit = config.health.timeout + config.connect_timeout + EXTRA_TIME;
    let has_sources = config.discovery.has_sources();
    let config = GatewayConfig {
        listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        admin_listen: AdminListen::Off,
        tokenizer: None,
        record: None,
        access_log: None,
        state: None,
        ..config
    };
    let runtime = runtime()?;
    let checks = runtime.block_on(async {
        let gateway = Gateway::start(config)?;
        let started = Instant::now();
        loop {
            let checks = gateway.worker_checks();
            let is_done = |check: &WorkerCheck| check.is_healthy || check.problem.is_some();
            // Workers of lists are added once the lists have been read.
            let is_complete = !checks.is_empty() || !has_sources;
            if is_complete && checks.iter().all(is_done) || started.elapsed() > limit {
                return Ok::<_, anyhow::Error>(checks);
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })?;
    runtime.shutdown_background();
    for WorkerCheck {
        name,
        url,
        is_healthy,
        models,
        problem,
    } in &checks
    {
        if *is_healthy {
            eprintln!("{name} ({url}): healthy; models: {}", models.join(", "));
        } else {
            let problem = problem.as_deref().unwrap_or("no result in time");
            eprintln!("{name} ({url}): not healthy: {problem}");
        }
    }
    if checks.is_empty() {
        eprintln!("There is no worker to check.");
    }
    let are_healthy = checks.iter().all(|check| check.is_healthy);
    Ok(if are_healthy && (!checks.is_empty() || !has_sources) {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(FAILURE)
    })
}

/// Returns all settings as a file for `--config`: a comment for each setting without a value, and a
/// `[[worker]]` table for each worker of `config`.
fn effective(config: &GatewayConfig, matches: &ArgMatches) -> anyhow::Result<String> {
    let mut program = command();
    program.build();
    let serve = program
        .find_subcommand("serve")
        .context("`serve` has no settings")?;
    let mut text = String::new();
    let mut heading = None;
    for (argument, name) in keys(serve).filter(|(_, name)| !is_worker(name)) {
        if argument.get_help_heading() != heading {
            heading = argument.get_help_heading();
            let separator = if text.is_empty() { "" } else { "\n" };
            writeln!(text, "{separator}# {}", heading.unwrap_or("Settings"))?;
        }
        // The defaults of these keys depend on other settings or on the machine.
        let value = match name {
            "listen" => Some(config.listen.to_string()),
            "queue" => Some(Queue(config.router.queue_order).to_string()),
            "io-threads" => Some(config.io_threads.to_string()),
            _ => raw(argument, matches).into_iter().next(),
        };
        match value {
            Some(_) if matches!(argument.get_action(), ArgAction::Append) => {
                let values = raw(argument, matches).into_iter();
                let values: Vec<_> = values.map(|value| in_toml(argument, value)).collect();
                writeln!(text, "{name} = [{}]", values.join(", "))?;
            }
            Some(value) => writeln!(text, "{name} = {}", in_toml(argument, value))?,
            None => writeln!(text, "# {name} is not set")?,
        }
    }
    let flags = keys(serve).filter(|(_, name)| is_worker(name));
    let flags = flags.flat_map(|(argument, _)| {
        let values = matches.get_raw(argument.get_id().as_str());
        let values = values
            .into_iter()
            .flatten()
            .map(|value| value.to_string_lossy());
        let separators: &[char] = match argument.get_long() {
            Some("worker") => &[' ', '\t', '\n'],
            _ => &[' ', '\t', '\n', ','],
        };
        let lists = values.map(|list| list.split(separators).map(str::to_owned).collect());
        lists.collect::<Vec<Vec<String>>>()
    });
    for flag in flags.flatten() {
        // `matches` also has workers of a variable that a flag overrides; `config` does not.
        let Ok(worker) = flag.parse::<WorkerConfig>() else {
            continue;
        };
        if config.workers.contains(&worker) {
            write!(text, "\n{}", from_flag(&flag, &worker.name))?;
        }
    }
    Ok(text)
}

/// Returns whether a key sets workers.
fn is_worker(name: &str) -> bool {
    ["worker", "worker-urls"].contains(&name)
}

/// Returns the texts of a flag's values, or of its default.
fn raw(argument: &Arg, matches: &ArgMatches) -> Vec<String> {
    let values = matches.get_raw(argument.get_id().as_str());
    let values = values.into_iter().flatten();
    values
        .map(|value| value.to_string_lossy().into_owned())
        .collect()
}

/// Returns whether a text is a number in TOML.
fn is_toml_number(text: &str) -> bool {
    let value: Result<Value, _> = text.parse();
    value.is_ok_and(|value| value.is_integer() || value.is_float())
}

/// Returns a value in the syntax of TOML.
fn in_toml(argument: &Arg, text: String) -> String {
    match (Kind::of(argument), text.as_str()) {
        // TOML does not know every form of a number that a flag accepts, such as `.5`.
        (kind, _) if kind.is_numeric() && is_toml_number(&text) => text,
        (Kind::Switch, "on") => true.to_string(),
        (Kind::Switch, "off") => false.to_string(),
        _ => Value::String(text).to_string(),
    }
}
