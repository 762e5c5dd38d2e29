//! Live outcomes side by side, for programs (serde) and for people (a table).

use std::fmt;

use serde::Serialize;

use crate::load::outcome::LiveOutcome;
use crate::table::{COUNT, MILLISECONDS, PERCENT, RATIO, Row, SECONDS, write_table};

/// Outcomes of one workload under several names, such as policies.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LiveReport {
    /// The workload's name.
    pub workload: String,
    /// Workers in the fleet.
    pub workers: usize,
    /// In the order they are shown.
    pub outcomes: Vec<NamedOutcome>,
}

/// An outcome and what it is the outcome of.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct NamedOutcome {
    /// The column's heading.
    pub name: String,
    /// What users saw.
    #[serde(flatten)]
    pub outcome: LiveOutcome,
}

/// The outcomes side by side, a column for each, and below them what failed.
impl fmt::Display for LiveReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const ROWS: [Row<LiveOutcome>; 18] = [
            ("TTFT mean, s", SECONDS, |it| it.time_to_first_token.mean),
            ("TTFT p50, s", SECONDS, |it| it.time_to_first_token.p50),
            ("TTFT p99, s", SECONDS, |it| it.time_to_first_token.p99),
            ("ITL mean, ms", MILLISECONDS, |it| {
                it.inter_token_latency.mean
            }),
            ("ITL p99, ms", MILLISECONDS, |it| it.inter_token_latency.p99),
            ("end to end mean, s", SECONDS, |it| it.end_to_end.mean),
            ("end to end p50, s", SECONDS, |it| it.end_to_end.p50),
            ("end to end p99, s", SECONDS, |it| it.end_to_end.p99),
            ("output tokens/s", COUNT, |it| it.output_tokens_per_second),
            ("makespan, s", RATIO, |it| it.makespan),
            ("prefix hits, % of tokens", PERCENT, |it| it.hit_share),
            ("worst/mean computed tokens", RATIO, |it| {
                it.computed_imbalance
            }),
            ("worst/mean requests", RATIO, |it| it.request_imbalance),
            ("client's own delay p99, ms", MILLISECONDS, |it| {
                it.client_delay.p99
            }),
            ("sent", COUNT, |it| it.sent as f64),
            ("finished", COUNT, |it| it.finished as f64),
            ("broken off by clients", COUNT, |it| it.aborted as f64),
            ("failed", COUNT, |it| it.failures() as f64),
        ];
        let title = format!("{}, {} workers", self.workload, self.workers);
        let outcomes = self.outcomes.iter();
        let columns = outcomes.map(|it| (it.name.as_str(), &it.outcome));
        write_table(f, &title, columns, &ROWS)?;
        for NamedOutcome { name, outcome } in &self.outcomes {
            for (kind, failures) in &outcome.failed {
                let messages = failures.messages.join(" | ");
                writeln!(f, "{name}: {} failed, {kind}: {messages}", failures.count)?;
            }
        }
        Ok(())
    }
}
