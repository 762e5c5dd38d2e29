//! The report on one load: as JSON (serde) and as text.

use std::fmt;

use foresee_report::table::{shown, write_cells};
use foresee_sim::measures::Unit;
use foresee_sim::outcome::Latency;
use foresee_sim::workload::Workload;
use serde::Serialize;

use crate::load::LoadConfig;
use crate::load::outcome::LiveOutcome;

/// A load and its results. Two loads with the same `workload`, `requests`, `model`, `api` and
/// `seed` sent the same request bodies, if their workloads have the same shape and no limit of
/// duration.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LoadSummary {
    /// Base URL of the server.
    pub address: String,
    /// `chat` or `completions`.
    pub api: &'static str,
    /// The model named in each request.
    pub model: String,
    /// The workload's name, or the path of the trace.
    pub workload: String,
    /// Requests of the workload, sent or not.
    pub requests: usize,
    /// The seed of all random choices.
    pub seed: u64,
    /// Seconds of the engine's time, in which the results are, in one second of real time.
    pub speedup: f64,
    /// Fraction of streams that the client was to close early.
    pub abort_fraction: f64,
    /// The results.
    pub outcome: LiveOutcome,
}

impl LoadSummary {
    /// Returns the report on `workload` after it was sent.
    #[must_use]
    pub fn new(config: &LoadConfig, workload: &Workload, outcome: LiveOutcome) -> Self {
        Self {
            address: config.address.clone(),
            api: if config.chat { "chat" } else { "completions" },
            model: config.model.clone(),
            workload: workload.name.clone(),
            requests: workload.requests.len(),
            seed: config.seed,
            speedup: config.speedup,
            abort_fraction: config.abort_fraction,
            outcome,
        }
    }
}

impl fmt::Display for LoadSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let outcome = &self.outcome;
        writeln!(
            f,
            "{} on {} ({}, model {}, seed {})",
            self.workload, self.address, self.api, self.model, self.seed
        )?;
        writeln!(
            f,
            "sent {} of {} requests in {:.1} s: finished {}, aborted by the client {}, failed {}",
            outcome.sent,
            self.requests,
            outcome.makespan,
            outcome.finished,
            outcome.aborted,
            outcome.failures()
        )?;
        writeln!(
            f,
            "throughput: {:.2} requests/s, {:.1} output tokens/s\n",
            outcome.requests_per_second, outcome.output_tokens_per_second
        )?;
        write_latencies(f, outcome)?;
        writeln!(
            f,
            "\nwithin the SLO ({}): {:.1} % of requests, {:.2} requests/s",
            outcome.slo,
            outcome.goodput.fraction * 100.0,
            outcome.goodput.per_second
        )?;
        if outcome.cached_tokens_reports > 0 {
            writeln!(
                f,
                "\nprefix cache: {} of {} prompt tokens cached ({:.1} %)",
                outcome.cached_tokens,
                outcome.prompt_tokens,
                outcome.hit_fraction * 100.0
            )?;
        }
        if !outcome.workers.is_empty() {
            writeln!(f)?;
            write_workers(f, outcome)?;
        }
        for (kind, failures) in &outcome.failed {
            let messages = failures.messages.join(" | ");
            writeln!(f, "\nfailed, {kind}: {}: {messages}", failures.count)?;
        }
        Ok(())
    }
}

/// Writes the table of latencies: a row for each, with its mean and percentiles.
fn write_latencies(f: &mut fmt::Formatter<'_>, outcome: &LiveOutcome) -> fmt::Result {
    let row = |label, unit, latency: &Latency| {
        let values = [latency.mean, latency.p50, latency.p90, latency.p99];
        (label, values.map(|value| shown(unit, value)).to_vec())
    };
    let rows = [
        row(
            "time to first token, s",
            Unit::Seconds,
            &outcome.time_to_first_token,
        ),
        row(
            "inter-token latency, ms",
            Unit::Milliseconds,
            &outcome.inter_token_latency,
        ),
        row("end to end, s", Unit::Seconds, &outcome.end_to_end),
        row(
            "client delay, ms",
            Unit::Milliseconds,
            &outcome.client_delay,
        ),
    ];
    write_cells(f, "latency", &["mean", "p50", "p90", "p99"], &rows)
}

/// Writes the table of workers. Fractions are of the requests whose response named a worker.
fn write_workers(f: &mut fmt::Formatter<'_>, outcome: &LiveOutcome) -> fmt::Result {
    let total: u64 = outcome.workers.values().map(|worker| worker.requests).sum();
    let rows = outcome.workers.iter().map(|(name, worker)| {
        let percent = worker.requests as f64 / total.max(1) as f64 * 100.0;
        let cells = vec![
            worker.requests.to_string(),
            format!("{percent:.1} %"),
            worker.uncached_prompt_tokens.to_string(),
        ];
        (name.as_str(), cells)
    });
    let columns = ["requests", "fraction", "uncached tokens"];
    write_cells(f, "worker", &columns, &rows.collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::{FailureKind, Failures, WorkerTotals};

    #[test]
    fn the_text_has_every_part_that_was_measured() {
        let mut outcome = LiveOutcome {
            sent: 4,
            finished: 3,
            makespan: 2.0,
            requests_per_second: 1.5,
            cached_tokens_reports: 3,
            cached_tokens: 25,
            prompt_tokens: 100,
            hit_fraction: 0.25,
            ..LiveOutcome::default()
        };
        let failures = Failures {
            count: 1,
            messages: vec!["busy".to_owned()],
        };
        outcome.failed.insert(FailureKind::Status(503), failures);
        let totals = WorkerTotals {
            requests: 3,
            uncached_prompt_tokens: 75,
        };
        outcome.workers.insert("a".to_owned(), totals);
        let workload = Workload {
            name: "test".to_owned(),
            requests: Vec::new(),
            concurrency: 1,
        };
        let mut summary = LoadSummary::new(&LoadConfig::new("x:1", "m"), &workload, outcome);
        let text = summary.to_string();
        for part in [
            "test on x:1 (completions, model m, seed 0)\n",
            "sent 4 of 0 requests in 2.0 s: finished 3, aborted by the client 0, failed 1\n",
            "throughput: 1.50 requests/s",
            "prefix cache: 25 of 100 prompt tokens cached (25.0 %)\n",
            "100.0 %",
            "failed, status 503: 1: busy\n",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        summary.outcome = LiveOutcome::default();
        let text = summary.to_string();
        assert!(
            !text.contains("prefix cache") && !text.contains("worker"),
            "{text}"
        );
    }
}
