//! The command line: flags in, the other crates do the work.

mod config_file;
mod demo;
mod engine;
mod flags;
mod replay;
mod serve;
mod suite;
mod verify;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

// The proxy makes many small allocations on one thread and frees them on another.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// A router for LLM engines that predicts each worker's load and cache instead of polling.
#[derive(Debug, Parser)]
#[command(
    name = "foresee",
    version,
    args_override_self = true,
    allow_negative_numbers = true
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Put workers behind one OpenAI-compatible address
    ///
    /// Example: foresee serve --worker http://gpu1:8000 --worker http://gpu2:8000
    ///
    /// FORESEE_LOG=info,foresee::answer=debug also logs each answer: what was predicted of it, and
    /// what came true.
    Serve(serve::ServeArgs),
    /// Read the configuration that `serve` would use, and say what it comes to
    CheckConfig(serve::ServeArgs),
    /// See it work: eight model engines, the gateway, and a comparison of policies over HTTP
    Demo(demo::DemoArgs),
    /// Run a trace or a named workload through model engines on a virtual clock
    ///
    /// Example: foresee replay --workload chat --policy kv,round-robin
    Replay(replay::ReplayArgs),
    /// Hold the router's predictions against engines that run, yours for instance
    ///
    /// Starts a router of its own, with the flags of `serve`, or takes one that serves already
    /// (--router), sends requests through it and compares what it predicted with what the engines
    /// report. They should serve nobody else meanwhile. Fails if the predictions do not hold.
    ///
    /// Example: foresee verify --worker http://gpu1:8000,kv-events=tcp://gpu1:5557 --html report.html
    Verify(verify::VerifyArgs),
    /// Serve one model engine over HTTP: stands in for vLLM, without a GPU
    Engine(engine::EngineArgs),
}

fn main() -> ExitCode {
    let arguments = match config_file::expand(std::env::args_os().collect()) {
        Ok(arguments) => arguments,
        Err(error) => return fail(&error),
    };
    let cli = Cli::parse_from(arguments);
    let filter = EnvFilter::try_from_env("FORESEE_LOG").unwrap_or_else(|_| match cli.command {
        // Their output is a report, and eight engines would talk into it.
        Command::Demo(_) | Command::Replay(_) | Command::Verify(_) => EnvFilter::new("error"),
        _ => EnvFilter::new("info"),
    });
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let done = match cli.command {
        Command::Verify(args) => return verify::verify(args).unwrap_or_else(|error| fail(&error)),
        Command::Serve(args) => serve::serve(args),
        Command::CheckConfig(args) => serve::check_config(args),
        Command::Demo(args) => demo::demo(args),
        Command::Replay(args) => replay::replay(args),
        Command::Engine(args) => engine::engine(args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("foresee: {error:#}");
    ExitCode::FAILURE
}
