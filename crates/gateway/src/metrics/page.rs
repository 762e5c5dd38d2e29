//! Reference page of all metrics, `docs/metrics.md`.

use std::fmt::Write as _;

use crate::metrics::{LabelInfo, metric_reference};

/// Part of the page that is written by hand.
const TEMPLATE: &str = include_str!("../../../../docs/metrics.in.md");

/// Line of the template that the table replaces.
const TABLE_MARK: &str = "<!-- table of metrics -->\n";

/// Returns the text of `docs/metrics.md`: an introduction and a table of all metrics.
#[must_use]
pub fn metrics_page() -> String {
    let mut table =
        "| Metric | Type | Unit | Labels | Meaning |\n|---|---|---|---|---|\n".to_owned();
    for metric in metric_reference() {
        let suffix = if metric.kind == "counter" {
            "_total"
        } else {
            ""
        };
        let labels: Vec<String> = metric.labels.iter().map(label_cell).collect();
        // Writing to a string does not fail.
        let _ = writeln!(
            table,
            "| `{}{suffix}` | {} | {} | {} | {} |",
            metric.name,
            metric.kind,
            metric.unit,
            labels.join(", "),
            metric.help
        );
    }
    TEMPLATE.replace(TABLE_MARK, &table)
}

/// Returns a label's name and values, as in `result`: `equal`, `different`.
fn label_cell(label: &LabelInfo) -> String {
    if label.values.is_empty() {
        return format!("`{}`", label.name);
    }
    let values: Vec<String> = label
        .values
        .iter()
        .map(|value| format!("`{value}`"))
        .collect();
    format!("`{}`: {}", label.name, values.join(", "))
}
