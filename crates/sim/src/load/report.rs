//! Results of several loads side by side: as JSON (serde) and as a table.

use std::fmt;

use serde::Serialize;

use crate::load::outcome::LiveOutcome;
use crate::table::{COUNT, MILLISECONDS, PERCENT, RATIO, Row, SECONDS, write_table};

/// Results of one workload under several names, such as policies.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LiveReport {
    /// The workload's name.
    pub workload: String,
    /// Workers in the fleet.
    pub workers: usize,
    /// The columns, in the order of the table.
    pub outcomes: Vec<NamedOutcome>,
}

/// A column of the table.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct NamedOutcome {
    /// The column's heading.
    pub name: String,
    /// The results.
    #[serde(flatten)]
    pub outcome: LiveOutcome,
}

/// Writes a column for each outcome, and the failures below the table.
impl fmt::Display for LiveReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const ROWS: [Row<LiveOutcome>; 19] = [
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
            ("requests/s", RATIO, |it| it.requests_per_second),
            ("output tokens/s", COUNT, |it| it.output_tokens_per_second),
            ("makespan, s", RATIO, |it| it.makespan),
            ("prefix hits, % of tokens", PERCENT, |it| it.hit_fraction),
            ("worst/mean computed tokens", RATIO, |it| {
                it.computed_imbalance
            }),
            ("worst/mean requests", RATIO, |it| it.request_imbalance),
            ("client delay p99, ms", MILLISECONDS, |it| {
                it.client_delay.p99
            }),
            ("sent", COUNT, |it| it.sent as f64),
            ("finished", COUNT, |it| it.finished as f64),
            ("aborted by clients", COUNT, |it| it.aborted as f64),
            ("failed", COUNT, |it| it.failures() as f64),
        ];
        let title = format!("{}, {} workers", self.workload, self.workers);
        let outcomes = self.outcomes.iter();
        let columns = outcomes.map(|column| (column.name.as_str(), &column.outcome));
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
