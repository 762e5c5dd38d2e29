//! Tables as plain text: a column for each outcome, a row for each measure.

use std::fmt;

use foresee_sim::measures::{Summary, Unit};

/// A row: its label, the unit of its numbers, and the measure.
pub type Row<T> = (&'static str, Unit, fn(&T) -> f64);

/// Formats a number in its unit: seconds with three decimals, milliseconds and percentages with
/// one, ratios with two, counts with none.
#[must_use]
pub fn shown(unit: Unit, value: f64) -> String {
    match unit {
        Unit::Seconds => format!("{value:.3}"),
        Unit::Milliseconds => format!("{:.1}", value * 1e3),
        Unit::Percent => format!("{:.1}", value * 100.0),
        Unit::Ratio => format!("{value:.2}"),
        Unit::Count => format!("{value:.0}"),
    }
}

/// Formats the mean of a measure in its unit.
#[must_use]
pub fn shown_mean(summary: &Summary) -> String {
    shown(summary.unit, summary.mean)
}

/// Writes a table of outcomes: a line with the title and the names of the columns, then a line for
/// each row.
///
/// # Errors
/// If the formatter fails.
pub fn write_table<'a, T: 'a>(
    f: &mut fmt::Formatter<'_>,
    title: &str,
    columns: impl Iterator<Item = (&'a str, &'a T)> + Clone,
    rows: &[Row<T>],
) -> fmt::Result {
    let names: Vec<&str> = columns.clone().map(|(name, _)| name).collect();
    let cells = rows.iter().map(|(label, unit, value)| {
        let columns = columns.clone();
        (
            *label,
            columns
                .map(|(_, outcome)| shown(*unit, value(outcome)))
                .collect(),
        )
    });
    write_cells(f, title, &names, &cells.collect::<Vec<_>>())
}

/// Writes a table of cells that are text: for each row a label and one cell for each column.
/// Columns are as wide as their widest cell. Cells beyond the last column are ignored.
///
/// # Errors
/// If the formatter fails.
pub fn write_cells(
    f: &mut fmt::Formatter<'_>,
    title: &str,
    columns: &[&str],
    rows: &[(&str, Vec<String>)],
) -> fmt::Result {
    const LABEL_WIDTH: usize = 28;
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|(_, cells)| cells.get(column));
        let texts = cells.map(String::as_str).chain([columns[column]]);
        texts
            .map(|text| text.chars().count())
            .max()
            .unwrap_or(0)
            .max(8)
            + 2
    };
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    write!(f, "{title:LABEL_WIDTH$}")?;
    for (name, width) in columns.iter().zip(&widths) {
        write!(f, "{name:>width$}")?;
    }
    writeln!(f)?;
    for (label, cells) in rows {
        write!(f, "{label:LABEL_WIDTH$}")?;
        for (cell, width) in cells.iter().zip(&widths) {
            write!(f, "{cell:>width$}")?;
        }
        writeln!(f)?;
    }
    Ok(())
}
