//! Grid of results: one table for each measure, with a row for each case and a column for each
//! policy.

mod page;

use std::fmt;

use serde::Serialize;

use foresee_sim::compare::Comparison;
use foresee_sim::measures::Summary;

use crate::table::{shown_mean, write_cells};

/// Reports of several cases under the same policies.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Grid {
    /// Policies in the given order.
    pub policies: Vec<String>,
    /// Policy with which the others are compared over all rows.
    pub reference: String,
    /// Rows, one for each case.
    pub rows: Vec<Row>,
    /// Cases that were not replayed, each with the reason.
    pub skipped: Vec<String>,
    /// Time that passed on the virtual clocks of all runs, in seconds.
    pub virtual_seconds: f64,
    /// Real time that all runs took, in seconds.
    pub real_seconds: f64,
}

/// Results of one case.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// Name of the case.
    pub name: String,
    /// Description of one line.
    pub description: String,
    /// Arrival rate relative to the workload's own rate, if the rows differ by it.
    pub rate: Option<f64>,
    /// Results of all policies.
    pub report: Comparison,
}

/// A measure that the grid shows, and how two policies are compared by it over all rows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct GridMeasure {
    /// Name of the measure in [`Comparison`].
    pub(crate) name: &'static str,
    /// Comparison over all rows.
    pub(crate) over_rows: OverRows,
}

/// How the values of two policies are compared over all rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OverRows {
    /// Geometric mean of the ratios: for times.
    Ratio,
    /// Mean of the differences in percentage points: for fractions, which may be zero.
    Points,
}

pub(crate) const END_TO_END: GridMeasure = times("end to end mean, s");
pub(crate) const END_TO_END_P99: GridMeasure = times("end to end p99, s");
pub(crate) const TTFT: GridMeasure = times("TTFT mean, s");
pub(crate) const TTFT_P99: GridMeasure = times("TTFT p99, s");
pub(crate) const ITL: GridMeasure = times("ITL mean, ms");
pub(crate) const ITL_P99: GridMeasure = times("ITL p99, ms");
pub(crate) const GOODPUT: GridMeasure = fraction("within SLO, %");
pub(crate) const HITS: GridMeasure = fraction("prefix hits, % of tokens");

/// All measures that the grid shows, in order.
pub(crate) const MEASURES: [GridMeasure; 8] = [
    END_TO_END,
    TTFT,
    TTFT_P99,
    ITL,
    ITL_P99,
    END_TO_END_P99,
    GOODPUT,
    HITS,
];

/// Accuracy of the router's forecasts: name of the measure in [`Comparison`], and heading of its
/// column.
pub(crate) const FORECAST_ERRORS: [(&str, &str); 6] = [
    ("prefill model, error %", "prefill, %"),
    ("decode step model, error %", "decode step, %"),
    ("  within 10 % after a change, s", "new speed, s"),
    ("TTFT forecast, error %", "TTFT, %"),
    ("output length forecast, error %", "output length, %"),
    ("  actual over forecast, sum", "actual/forecast"),
];

/// Returns a measure of times.
const fn times(name: &'static str) -> GridMeasure {
    GridMeasure {
        name,
        over_rows: OverRows::Ratio,
    }
}

/// Returns a measure of fractions.
const fn fraction(name: &'static str) -> GridMeasure {
    GridMeasure {
        name,
        over_rows: OverRows::Points,
    }
}

impl Grid {
    /// Creates a grid of `rows`, which have results of all `policies`. The reference is
    /// `marginal-delay` if it is one of the policies, and otherwise the first policy.
    #[must_use]
    pub fn new(
        policies: Vec<String>,
        rows: Vec<Row>,
        skipped: Vec<String>,
        real_seconds: f64,
    ) -> Self {
        let reference = policies.iter().find(|policy| *policy == "marginal-delay");
        let reference = reference.or(policies.first()).cloned().unwrap_or_default();
        Self {
            virtual_seconds: rows.iter().map(|row| row.report.virtual_seconds).sum(),
            policies,
            reference,
            rows,
            skipped,
            real_seconds,
        }
    }

    /// Compares `policy` with `other` over all rows: the mean ratio of the two for times, or the
    /// mean of `policy` minus `other` for fractions, where 0.01 is one percentage point. `None` if
    /// a row lacks the result of one of them.
    pub(crate) fn over_rows(&self, measure: GridMeasure, policy: &str, other: &str) -> Option<f64> {
        let pairs = self.rows.iter().map(|row| {
            let mean_of = |policy| Some(row.report.summary_of(measure.name, policy)?.mean);
            Some((mean_of(policy)?, mean_of(other)?))
        });
        let pairs: Vec<(f64, f64)> = pairs.collect::<Option<_>>()?;
        let count = pairs.len().max(1) as f64;
        let compare = |&(value, other): &(f64, f64)| match measure.over_rows {
            OverRows::Ratio => (value.max(1e-9) / other.max(1e-9)).ln(),
            OverRows::Points => value - other,
        };
        let mean = pairs.iter().map(compare).sum::<f64>() / count;
        Some(match measure.over_rows {
            OverRows::Ratio => mean.exp(),
            OverRows::Points => mean,
        })
    }

    /// Returns the number of rows in which no policy is significantly better. Rows without a result
    /// of `policy` do not count.
    pub(crate) fn firsts(&self, measure: GridMeasure, policy: &str) -> usize {
        let reports = self.rows.iter().map(|row| &row.report);
        let summaries = reports.filter_map(|report| report.summary_of(measure.name, policy));
        summaries.filter(|summary| summary.is_first()).count()
    }

    /// Returns the accuracy of the first policy's forecasts: names of the columns, then rows. A
    /// cell is empty if the measure has no result.
    pub(crate) fn forecast_errors(&self) -> (Vec<&str>, Vec<(&str, Vec<String>)>) {
        let policy = self.policies.first().map_or("", String::as_str);
        let rows = self.rows.iter().map(|row| {
            let cells = FORECAST_ERRORS.iter().map(|(measure, _)| {
                let summary = row.report.summary_of(measure, policy);
                summary.map_or(String::new(), shown_mean)
            });
            (row.name.as_str(), cells.collect())
        });
        let columns = FORECAST_ERRORS.map(|(_, heading)| heading);
        (columns.to_vec(), rows.collect())
    }

    /// Returns the table of a measure: names of the columns, then rows, the last two of which
    /// compare the policies over all rows. A cell without a result is empty.
    fn table(&self, measure: GridMeasure) -> (Vec<&str>, Vec<(&str, Vec<String>)>) {
        let columns: Vec<&str> = self.policies.iter().map(String::as_str).collect();
        let mut rows: Vec<(&str, Vec<String>)> = Vec::new();
        for row in &self.rows {
            let cells = columns.iter().map(|policy| {
                let summary = row.report.summary_of(measure.name, policy);
                summary.map_or(String::new(), marked)
            });
            rows.push((&row.name, cells.collect()));
        }
        let reference = self.reference.as_str();
        let over_rows = columns.iter().map(|policy| {
            let compared = self.over_rows(measure, policy, reference);
            compared.map_or(String::new(), |value| match measure.over_rows {
                OverRows::Ratio => format!("{value:.3} "),
                OverRows::Points => format!("{:+.1} ", value * 100.0),
            })
        });
        let label = match measure.over_rows {
            OverRows::Ratio => "geometric mean of ratios",
            OverRows::Points => "mean difference",
        };
        rows.push((label, over_rows.collect()));
        let firsts = columns.iter();
        let firsts = firsts.map(|policy| format!("{} ", self.firsts(measure, policy)));
        rows.push(("rows best or tied", firsts.collect()));
        (columns, rows)
    }
}

/// Formats a value with its mark: `*` for the best, `≈` for one that is not significantly worse.
pub(crate) fn marked(summary: &Summary) -> String {
    let mark = match summary.against_best {
        _ if summary.is_best => '*',
        Some(difference) if difference.is_tie => '≈',
        _ => ' ',
    };
    format!("{}{mark}", shown_mean(summary))
}

/// Writes all tables, one below the other, and a legend.
impl fmt::Display for Grid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for measure in MEASURES {
            let (columns, rows) = self.table(measure);
            write_cells(f, measure.name, &columns, &rows)?;
            writeln!(f)?;
        }
        let (columns, rows) = self.forecast_errors();
        write_cells(f, "forecast errors", &columns, &rows)?;
        writeln!(f)?;
        let seeds = self.rows.iter().map(|row| row.report.seeds).max();
        writeln!(
            f,
            "Means over {} seeds. *: best. ≈: not significantly worse than the best (95 %, paired \
             by seed). Comparisons over all rows are with {}. Forecast errors are those of the \
             first policy.",
            seeds.unwrap_or(0),
            self.reference
        )?;
        for note in &self.skipped {
            writeln!(f, "Left out: {note}")?;
        }
        if let Some(row) = self.rows.first() {
            write!(f, "SLO {}; ", row.report.slo)?;
        }
        writeln!(
            f,
            "{:.0} s of traffic simulated in {:.1} s, {:.0} times real time",
            self.virtual_seconds,
            self.real_seconds,
            self.virtual_seconds / self.real_seconds.max(1e-9)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use foresee_sim::measures::summarise;
    use foresee_sim::outcome::{Latency, Outcome};

    /// Returns an outcome of `policy` for each seed, given its mean end-to-end latency and its hit
    /// fraction.
    fn outcomes(policy: &str, seeds: [(f64, f64); 3]) -> Vec<Outcome> {
        let outcome = |(mean, hit_fraction)| Outcome {
            policy: policy.to_owned(),
            end_to_end: Latency {
                mean,
                ..Latency::default()
            },
            hit_fraction,
            ..Outcome::default()
        };
        seeds.map(outcome).to_vec()
    }

    fn row(name: &str, policies: [(&str, [(f64, f64); 3]); 3]) -> Row {
        let outcomes: Vec<Outcome> = policies
            .into_iter()
            .flat_map(|(name, seeds)| outcomes(name, seeds))
            .collect();
        Row {
            name: name.to_owned(),
            description: String::new(),
            rate: None,
            report: Comparison {
                seeds: 3,
                summary: summarise(&outcomes, 3),
                outcomes,
                virtual_seconds: 50.0,
                ..Comparison::default()
            },
        }
    }

    fn grid() -> Grid {
        let equal = [(1.0, 0.5), (1.0, 0.5), (1.0, 0.5)];
        let twice = equal.map(|(mean, hits)| (2.0 * mean, hits + 0.1));
        let noisy = [(0.9, 0.5), (1.3, 0.5), (1.0, 0.5)];
        let rows = vec![
            row(
                "easy",
                [("kv", twice), ("marginal-delay", equal), ("oracle", noisy)],
            ),
            row(
                "hard",
                [
                    ("kv", twice.map(|(mean, hits)| (4.0 * mean, hits))),
                    ("marginal-delay", equal),
                    ("oracle", equal),
                ],
            ),
        ];
        let policies = ["kv", "marginal-delay", "oracle"]
            .map(str::to_owned)
            .to_vec();
        Grid::new(
            policies,
            rows,
            vec!["azure (no trace given)".to_owned()],
            2.0,
        )
    }

    #[test]
    fn over_all_rows_times_are_compared_by_ratio_and_fractions_by_difference() {
        let grid = grid();
        assert_eq!(grid.reference, "marginal-delay");
        let kv = grid.over_rows(END_TO_END, "kv", "marginal-delay").unwrap();
        assert!((kv - 4.0).abs() < 1e-9, "geometric mean of 2 and 8: {kv}");
        let hits = grid.over_rows(HITS, "kv", "marginal-delay").unwrap();
        assert!((hits - 0.1).abs() < 1e-9);
        assert_eq!(grid.over_rows(HITS, "kv", "random"), None);
    }

    #[test]
    fn a_policy_that_is_not_significantly_worse_counts_as_best() {
        let grid = grid();
        let firsts =
            ["kv", "marginal-delay", "oracle"].map(|policy| grid.firsts(END_TO_END, policy));
        assert_eq!(firsts, [0, 2, 2]);
        let table = grid.to_string();
        for part in [
            "1.067≈",
            "1.000*",
            "8.000 ",
            "4.000 ",
            "+10.0",
            "Left out: azure",
            "50 times",
        ] {
            assert!(table.contains(part), "{part}\n{table}");
        }
    }

    #[test]
    fn a_page_has_every_row_and_only_sections_with_data() {
        let page = grid().html();
        for part in [
            "<h1>2 scenarios, 3 policies",
            "<b>hard</b>",
            "Forecast errors",
            "8.00",
            "Left out: azure",
        ] {
            assert!(page.contains(part), "{part}");
        }
        for part in ["NaN", "inf<", "ttft-weight", "Ablations", "By arrival rate"] {
            assert!(!page.contains(part), "{part}");
        }
        let equal = [(1.0, 0.5); 3];
        let rows = [0.5, 2.0].map(|rate| Row {
            rate: Some(rate),
            ..row(
                "r",
                [
                    ("marginal-delay", equal),
                    ("marginal-delay:ttft=6", equal),
                    ("marginal-delay:no-queue-wait", equal),
                ],
            )
        });
        let policies = [
            "marginal-delay",
            "marginal-delay:ttft=6",
            "marginal-delay:no-queue-wait",
        ]
        .map(str::to_owned)
        .to_vec();
        let page = Grid::new(policies, rows.to_vec(), Vec::new(), 1.0).html();
        for part in [
            "ttft-weight",
            "Ablations",
            "By arrival rate",
            "<td>queue-wait<td>1.000",
        ] {
            assert!(page.contains(part), "{part}");
        }
        assert!(!page.contains("NaN"));
    }
}
