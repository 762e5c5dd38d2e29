//! Reference page of all metrics, `docs/metrics.md`.

use std::fmt::Write as _;

use crate::metrics::{CompatName, LabelInfo, compat_reference, metric_reference};

/// Part of the page that is written by hand.
const TEMPLATE: &str = include_str!("../../../../docs/metrics.in.md");

/// Line of the template that the table replaces.
const TABLE_MARK: &str = "<!-- table of metrics -->\n";

/// Line of the template that the table of llm-d's names replaces.
const COMPAT_MARK: &str = "<!-- table of llm-d's names -->\n";

/// Returns the text of `docs/metrics.md`: an introduction, a table of all metrics, and one of the names
/// of `--metrics-compat`.
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
    let mut compat = "| llm-d's name | Type | The same number |\n|---|---|---|\n".to_owned();
    for CompatName { name, kind, query } in compat_reference() {
        let suffix = if *kind == "counter" { "_total" } else { "" };
        let _ = writeln!(compat, "| `{name}{suffix}` | {kind} | `{query}` |");
    }
    TEMPLATE
        .replace(TABLE_MARK, &table)
        .replace(COMPAT_MARK, &compat)
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
