//! Several cases under the same policies: a table for each measure, with a row for each case.

mod page;

use std::fmt;

use serde::Serialize;

use crate::report::{Report, Summary};
use crate::table::write_cells;

/// Reports on the same policies.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Grid {
    /// The policies, in the order asked for.
    pub policies: Vec<String>,
    /// Which of them the others are compared with over all rows.
    pub reference: String,
    /// One for each case.
    pub rows: Vec<Row>,
    /// What was not replayed, and why.
    pub left_out: Vec<String>,
    /// Time that passed on the virtual clocks of all runs, in seconds.
    pub virtual_seconds: f64,
    /// Time it took, in seconds.
    pub real_seconds: f64,
}

/// One case.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// Its name.
    pub name: String,
    /// A line about it.
    pub what: String,
    /// How many times faster requests arrive than the workload has it, if that is what tells rows
    /// apart.
    pub rate: Option<f64>,
    /// What came out.
    pub report: Report,
}

/// A measure that is shown, and how two of its values are compared over all rows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Shown {
    /// As [`Report`] names it.
    pub(crate) measure: &'static str,
    pub(crate) over_rows: OverRows,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OverRows {
    /// The geometric mean of their ratio, for times.
    Ratio,
    /// The mean of their difference in points, for shares, which may be zero.
    Points,
}

pub(crate) const END_TO_END: Shown = times("end to end mean, s");
pub(crate) const END_TO_END_P99: Shown = times("end to end p99, s");
pub(crate) const TTFT: Shown = times("TTFT mean, s");
pub(crate) const TTFT_P99: Shown = times("TTFT p99, s");
pub(crate) const ITL: Shown = times("ITL mean, ms");
pub(crate) const ITL_P99: Shown = times("ITL p99, ms");
pub(crate) const GOODPUT: Shown = share("within SLO, %");
pub(crate) const HITS: Shown = share("prefix hits, % of tokens");

/// All that is shown, in this order.
pub(crate) const SHOWN: [Shown; 8] = [
    END_TO_END,
    TTFT,
    TTFT_P99,
    ITL,
    ITL_P99,
    END_TO_END_P99,
    GOODPUT,
    HITS,
];

/// What the router learned, by the first policy.
pub(crate) const LEARNED: [(&str, &str); 6] = [
    ("prefill learned, % off", "prefill"),
    ("decode step learned, % off", "decode step"),
    ("  known to a tenth after a change, s", "new speed after, s"),
    ("TTFT forecast, % off", "TTFT"),
    ("answer length forecast, % off", "length"),
    ("  had over forecast, all together", "had/forecast"),
];

const fn times(measure: &'static str) -> Shown {
    Shown {
        measure,
        over_rows: OverRows::Ratio,
    }
}

const fn share(measure: &'static str) -> Shown {
    Shown {
        measure,
        over_rows: OverRows::Points,
    }
}

impl Grid {
    /// Puts rows under each other. They are compared with `delay` if it is among the policies,
    /// else with the first.
    #[must_use]
    pub fn new(
        policies: Vec<String>,
        rows: Vec<Row>,
        left_out: Vec<String>,
        real_seconds: f64,
    ) -> Self {
        let reference = policies.iter().find(|it| *it == "delay");
        let reference = reference.or(policies.first()).cloned().unwrap_or_default();
        Self {
            virtual_seconds: rows.iter().map(|row| row.report.virtual_seconds).sum(),
            policies,
            reference,
            rows,
            left_out,
            real_seconds,
        }
    }

    /// How `policy` compares with `other` over all rows, as `shown` says; `None` if either is not
    /// there.
    pub(crate) fn over_rows(&self, shown: Shown, policy: &str, other: &str) -> Option<f64> {
        let pairs = self.rows.iter().map(|row| {
            let of = |policy| row.report.summary_of(shown.measure, policy);
            Some((of(policy)?.mean, of(other)?.mean))
        });
        let pairs: Vec<(f64, f64)> = pairs.collect::<Option<_>>()?;
        let count = pairs.len().max(1) as f64;
        let compare = |&(it, other): &(f64, f64)| match shown.over_rows {
            OverRows::Ratio => (it.max(1e-9) / other.max(1e-9)).ln(),
            OverRows::Points => it - other,
        };
        let mean = pairs.iter().map(compare).sum::<f64>() / count;
        Some(match shown.over_rows {
            OverRows::Ratio => mean.exp(),
            OverRows::Points => mean,
        })
    }

    /// In how many rows no policy is better, but for luck.
    pub(crate) fn firsts(&self, shown: Shown, policy: &str) -> usize {
        let summaries = self.rows.iter().map(|row| &row.report);
        let summaries = summaries.filter_map(|it| it.summary_of(shown.measure, policy));
        summaries.filter(|it| it.is_first()).count()
    }

    /// How far what the first policy's router learned was from the truth.
    pub(crate) fn learned(&self) -> (Vec<&str>, Vec<(&str, Vec<String>)>) {
        let policy = self.policies.first().map_or("", String::as_str);
        let rows = self.rows.iter().map(|row| {
            let cells = LEARNED.iter().map(|(measure, _)| {
                let summary = row.report.summary_of(measure, policy);
                summary.map_or(String::new(), Summary::shown)
            });
            (row.name.as_str(), cells.collect())
        });
        (LEARNED.map(|(_, name)| name).to_vec(), rows.collect())
    }

    fn table(&self, shown: Shown) -> (Vec<&str>, Vec<(&str, Vec<String>)>) {
        let columns: Vec<&str> = self.policies.iter().map(String::as_str).collect();
        let mut rows: Vec<(&str, Vec<String>)> = Vec::new();
        for row in &self.rows {
            let cells = columns.iter().map(|policy| {
                let summary = row.report.summary_of(shown.measure, policy);
                summary.map_or(String::new(), marked)
            });
            rows.push((&row.name, cells.collect()));
        }
        let reference = self.reference.as_str();
        let over_rows = columns.iter().map(|policy| {
            let compared = self.over_rows(shown, policy, reference);
            compared.map_or(String::new(), |it| match shown.over_rows {
                OverRows::Ratio => format!("{it:.3} "),
                OverRows::Points => format!("{:+.1} ", it * 100.0),
            })
        });
        let label = match shown.over_rows {
            OverRows::Ratio => "geometric mean of ratios",
            OverRows::Points => "mean difference",
        };
        rows.push((label, over_rows.collect()));
        let firsts = columns.iter();
        let firsts = firsts.map(|policy| format!("{} ", self.firsts(shown, policy)));
        rows.push(("rows first or tied", firsts.collect()));
        (columns, rows)
    }
}

/// A value with its mark: the best, no worse but for luck, or neither.
pub(crate) fn marked(summary: &Summary) -> String {
    let mark = match summary.against_best {
        _ if summary.is_best => '*',
        Some(difference) if difference.is_tie => '≈',
        _ => ' ',
    };
    format!("{}{mark}", summary.shown())
}

/// The tables, one under the other.
impl fmt::Display for Grid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for shown in SHOWN {
            let (columns, rows) = self.table(shown);
            write_cells(f, shown.measure, &columns, &rows)?;
            writeln!(f)?;
        }
        let (columns, rows) = self.learned();
        write_cells(f, "what was learned, % off", &columns, &rows)?;
        writeln!(f)?;
        let seeds = self.rows.iter().map(|row| row.report.seeds).max();
        writeln!(
            f,
            "Means over {} seeds. *: the best. ≈: it may be as good (95 %, paired by seed). Over \
             all rows, policies are compared with {}.",
            seeds.unwrap_or(0),
            self.reference
        )?;
        for note in &self.left_out {
            writeln!(f, "Left out: {note}")?;
        }
        if let Some(row) = self.rows.first() {
            write!(f, "SLO {}; ", row.report.slo)?;
        }
        writeln!(
            f,
            "{:.0} s of traffic in {:.1} s, {:.0} times real time",
            self.virtual_seconds,
            self.real_seconds,
            self.virtual_seconds / self.real_seconds.max(1e-9)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Latency, Outcome, summarise};

    /// Of one policy, with an outcome for each seed: its mean time to the end, and its hit share.
    fn outcomes(policy: &str, seeds: [(f64, f64); 3]) -> Vec<Outcome> {
        let outcome = |(mean, hit_share)| Outcome {
            policy: policy.to_owned(),
            end_to_end: Latency {
                mean,
                ..Latency::default()
            },
            hit_share,
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
            what: String::new(),
            rate: None,
            report: Report {
                seeds: 3,
                summary: summarise(&outcomes, 3),
                outcomes,
                virtual_seconds: 50.0,
                ..Report::default()
            },
        }
    }

    fn grid() -> Grid {
        let sure = [(1.0, 0.5), (1.0, 0.5), (1.0, 0.5)];
        let twice = sure.map(|(it, share)| (2.0 * it, share + 0.1));
        let unsure = [(0.9, 0.5), (1.3, 0.5), (1.0, 0.5)];
        let rows = vec![
            row("easy", [("kv", twice), ("delay", sure), ("oracle", unsure)]),
            row(
                "hard",
                [
                    ("kv", twice.map(|(it, share)| (4.0 * it, share))),
                    ("delay", sure),
                    ("oracle", sure),
                ],
            ),
        ];
        let policies = ["kv", "delay", "oracle"].map(str::to_owned).to_vec();
        Grid::new(
            policies,
            rows,
            vec!["azure, which is not there".to_owned()],
            2.0,
        )
    }

    #[test]
    fn over_all_rows_times_have_a_ratio_and_shares_a_difference() {
        let grid = grid();
        assert_eq!(grid.reference, "delay");
        let kv = grid.over_rows(END_TO_END, "kv", "delay").unwrap();
        assert!((kv - 4.0).abs() < 1e-9, "of 2 and 8: {kv}");
        let hits = grid.over_rows(HITS, "kv", "delay").unwrap();
        assert!((hits - 0.1).abs() < 1e-9);
        assert_eq!(grid.over_rows(HITS, "kv", "random"), None);
    }

    #[test]
    fn who_may_only_have_been_unlucky_is_first_too() {
        let grid = grid();
        let firsts = ["kv", "delay", "oracle"].map(|policy| grid.firsts(END_TO_END, policy));
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
    fn a_page_shows_every_row_and_only_what_there_is() {
        let page = grid().html();
        for part in [
            "<h1>2 scenarios, 3 policies",
            "<b>hard</b>",
            "What was learned",
            "8.00",
            "Left out: azure",
        ] {
            assert!(page.contains(part), "{part}");
        }
        for part in ["NaN", "inf<", "ttft-weight", "each term", "Against rate"] {
            assert!(!page.contains(part), "{part}");
        }
        let sure = [(1.0, 0.5); 3];
        let rows = [0.5, 2.0].map(|rate| Row {
            rate: Some(rate),
            ..row(
                "r",
                [
                    ("delay", sure),
                    ("delay:ttft=6", sure),
                    ("delay:no-wait", sure),
                ],
            )
        });
        let policies = ["delay", "delay:ttft=6", "delay:no-wait"]
            .map(str::to_owned)
            .to_vec();
        let page = Grid::new(policies, rows.to_vec(), Vec::new(), 1.0).html();
        for part in [
            "ttft-weight",
            "each term",
            "Against rate",
            "<td>wait<td>1.000",
        ] {
            assert!(page.contains(part), "{part}");
        }
        assert!(!page.contains("NaN"));
    }
}
