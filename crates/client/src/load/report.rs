//! Results of several loads side by side: as JSON (serde) and as a table.

use std::fmt;

use foresee_report::table::{Row, write_table};
use foresee_sim::measures::Unit::{Count, Milliseconds, Percent, Ratio, Seconds};
use serde::Serialize;

use crate::load::outcome::LiveOutcome;

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
            ("TTFT mean, s", Seconds, |it| it.time_to_first_token.mean),
            ("TTFT p50, s", Seconds, |it| it.time_to_first_token.p50),
            ("TTFT p99, s", Seconds, |it| it.time_to_first_token.p99),
            ("ITL mean, ms", Milliseconds, |it| {
                it.inter_token_latency.mean
            }),
            ("ITL p99, ms", Milliseconds, |it| it.inter_token_latency.p99),
            ("end to end mean, s", Seconds, |it| it.end_to_end.mean),
            ("end to end p50, s", Seconds, |it| it.end_to_end.p50),
            ("end to end p99, s", Seconds, |it| it.end_to_end.p99),
            ("requests/s", Ratio, |it| it.requests_per_second),
            ("output tokens/s", Count, |it| it.output_tokens_per_second),
            ("makespan, s", Ratio, |it| it.makespan),
            ("prefix hits, % of tokens", Percent, |it| it.hit_fraction),
            ("worst/mean computed tokens", Ratio, |it| {
                it.computed_imbalance.unwrap_or(f64::NAN)
            }),
            ("worst/mean requests", Ratio, |it| {
                it.request_imbalance.unwrap_or(f64::NAN)
            }),
            ("client delay p99, ms", Milliseconds, |it| {
                it.client_delay.p99
            }),
            ("sent", Count, |it| it.sent as f64),
            ("finished", Count, |it| it.finished as f64),
            ("aborted by clients", Count, |it| it.aborted as f64),
            ("failed", Count, |it| it.failures() as f64),
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
