//! The text of a search for capacity.

use std::fmt;

use foresee_sim::capacity::{Capacity, CapacityResult};

use crate::table::write_cells;

/// The table of a search for capacity: a column for each policy.
#[derive(Clone, Copy, Debug)]
pub struct CapacityTable<'c>(pub &'c Capacity);

impl fmt::Display for CapacityTable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let capacity = self.0;
        let policies = capacity.results.iter().map(|result| result.policy.as_str());
        let policies: Vec<&str> = policies.collect();
        let row = |show: fn(&CapacityResult) -> String| capacity.results.iter().map(show).collect();
        let mut rows: Vec<(&str, Vec<String>)> = Vec::new();
        let title = if let Some(workers) = capacity.workers {
            rows.push(("highest rate, times", row(|result| number(result.rate))));
            let per_second = row(|result| number(result.requests_per_second));
            rows.push(("  requests/s", per_second));
            format!("{}, {workers} workers", capacity.workload)
        } else {
            let workers = |result: &CapacityResult| match result.workers {
                Some(workers) => workers.to_string(),
                None => "-".to_owned(),
            };
            rows.push(("fewest workers", row(workers)));
            capacity.workload.clone()
        };
        write_cells(f, &title, &policies, &rows)?;
        let percent = capacity.target * 100.0;
        writeln!(f, "for {percent} % of requests within {}", capacity.slo)
    }
}

/// Formats a number of the table; `-` for `None`.
fn number(value: Option<f64>) -> String {
    value.map_or("-".to_owned(), |value| format!("{value:.2}"))
}

#[cfg(test)]
mod tests {
    use foresee_sim::slo::Slo;

    use super::*;

    fn capacity(workers: Option<usize>) -> Capacity {
        let result = |policy: &str, rate: Option<f64>, workers: Option<u32>| CapacityResult {
            policy: policy.to_owned(),
            rate,
            requests_per_second: rate.map(|rate| 10.0 * rate),
            workers,
        };
        Capacity {
            workload: "chat".to_owned(),
            workers,
            slo: Slo::default(),
            target: 0.9,
            results: match workers {
                Some(_) => vec![result("kv", Some(1.5), None)],
                None => vec![result("kv", None, Some(3)), result("random", None, None)],
            },
        }
    }

    #[test]
    fn a_search_for_the_rate_shows_rates() {
        let table = CapacityTable(&capacity(Some(8))).to_string();
        let words: Vec<&str> = table.split_whitespace().collect();
        let words = words.join(" ");
        assert_eq!(
            words,
            "chat, 8 workers kv highest rate, times 1.50 requests/s 15.00 \
             for 90 % of requests within ttft=2s,itl=60ms"
        );
    }

    #[test]
    fn a_search_for_the_number_of_workers_shows_numbers() {
        let table = CapacityTable(&capacity(None)).to_string();
        let row = table.lines().nth(1).unwrap();
        let cells: Vec<&str> = row.split_whitespace().collect();
        assert_eq!(cells, ["fewest", "workers", "3", "-"]);
    }
}
