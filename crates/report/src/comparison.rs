//! The text of a comparison of policies on one workload.

use std::fmt;

use foresee_sim::compare::Comparison;
use foresee_sim::measures::Summary;
use foresee_sim::significance::Difference;

use crate::table::{shown, shown_mean, write_cells};

/// The table of a comparison: a row for each measure, a column for each policy.
#[derive(Clone, Copy, Debug)]
pub struct ComparisonTable<'c>(pub &'c Comparison);

impl fmt::Display for ComparisonTable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let comparison = self.0;
        let seeds = comparison.seeds;
        let policies = comparison.outcomes.iter().step_by(seeds.max(1));
        let policies: Vec<&str> = policies.map(|outcome| outcome.policy.as_str()).collect();
        let rows = comparison.summary.chunks(policies.len().max(1));
        let rows = rows.map(|row| {
            let cells = row.iter().map(|summary| cell(summary, seeds));
            (row[0].measure, cells.collect())
        });
        let rows: Vec<(&str, Vec<String>)> = rows.collect();
        let title = format!("{}, {} workers", comparison.workload, comparison.workers);
        write_cells(f, &title, &policies, &rows)?;
        if seeds > 1 {
            writeln!(
                f,
                "Means over {seeds} seeds. *: best. ±: 95 % confidence interval of the difference from \
                 the best (paired by seed). ≈: the interval contains zero."
            )?;
        }
        writeln!(
            f,
            "SLO {}; {:.0} s of traffic in {:.1} s, {:.0} times real time",
            comparison.slo,
            comparison.virtual_seconds,
            comparison.real_seconds,
            comparison.virtual_seconds / comparison.real_seconds.max(1e-9)
        )
    }
}

/// Returns a cell of the table: the mean, and its comparison with the best policy. With a single
/// seed, only the mean. `*` marks the best policy, and `≈` a difference within chance.
fn cell(summary: &Summary, seeds: usize) -> String {
    let mean = shown_mean(summary);
    match summary.against_best {
        _ if seeds == 1 => mean,
        Some(Difference { margin, is_tie, .. }) => {
            let sign = if is_tie { "≈" } else { " " };
            format!("{mean} ±{}{sign}", shown(summary.unit, margin))
        }
        None if summary.is_best => format!("{mean} *"),
        None => format!("{mean}  "),
    }
}

#[cfg(test)]
mod tests {
    use foresee_sim::measures::summarise;
    use foresee_sim::outcome::{Latency, Outcome};

    use super::*;

    /// Returns a comparison of three policies with four seeds, given the means of their end-to-end
    /// latencies.
    fn comparison(means: [[f64; 4]; 3]) -> Comparison {
        let policies = ["kv", "round-robin", "random"].into_iter().zip(means);
        let outcomes = policies.flat_map(|(policy, means)| {
            means.map(|mean| Outcome {
                policy: policy.to_owned(),
                end_to_end: Latency {
                    mean,
                    ..Latency::default()
                },
                ..Outcome::default()
            })
        });
        let outcomes: Vec<Outcome> = outcomes.collect();
        Comparison {
            workload: "chat".to_owned(),
            workers: 8,
            seeds: 4,
            summary: summarise(&outcomes, 4),
            outcomes,
            virtual_seconds: 90.0,
            real_seconds: 1.5,
            ..Comparison::default()
        }
    }

    #[test]
    fn the_best_policy_and_ties_are_marked() {
        let comparison = comparison([
            [1.0, 1.2, 1.1, 1.3],
            [1.1, 1.1, 1.2, 1.4],
            [2.0, 2.2, 2.1, 2.3],
        ]);
        let table = ComparisonTable(&comparison).to_string();
        let row = table
            .lines()
            .find(|line| line.starts_with("end to end mean, s"));
        let cells: Vec<&str> = row.unwrap().split_whitespace().collect();
        assert_eq!(
            cells[5..],
            ["1.150", "*", "1.200", "±0.159≈", "2.150", "±0.000"]
        );
        assert!(table.starts_with("chat, 8 workers "), "{table}");
        assert!(table.contains("Means over 4 seeds."), "{table}");
        let end = "90 s of traffic in 1.5 s, 60 times real time\n";
        assert!(table.ends_with(end), "{table}");
    }

    #[test]
    fn a_single_seed_has_no_marks() {
        let mut comparison = comparison([[1.0; 4], [2.0; 4], [3.0; 4]]);
        comparison.outcomes = comparison.outcomes.into_iter().step_by(4).collect();
        comparison.seeds = 1;
        comparison.summary = summarise(&comparison.outcomes, 1);
        let table = ComparisonTable(&comparison).to_string();
        assert!(table.contains("1.000"), "{table}");
        assert!(!table.contains(['*', '±', '≈']), "{table}");
    }
}
