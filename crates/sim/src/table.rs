//! Tables as plain text: a column for each outcome, a row for each measure.

use std::fmt;

/// A row: its label, the format of its numbers, and the measure.
pub(crate) type Row<T> = (&'static str, fn(f64) -> String, fn(&T) -> f64);

/// Formats seconds, with three decimals.
pub(crate) const SECONDS: fn(f64) -> String = |seconds| format!("{seconds:.3}");
/// Formats seconds as milliseconds.
pub(crate) const MILLISECONDS: fn(f64) -> String = |seconds| format!("{:.1}", seconds * 1e3);
/// Formats a fraction as a percentage.
pub(crate) const PERCENT: fn(f64) -> String = |fraction| format!("{:.1}", fraction * 100.0);
/// Formats a number with two decimals.
pub(crate) const RATIO: fn(f64) -> String = |ratio| format!("{ratio:.2}");
/// Formats a number without decimals.
pub(crate) const COUNT: fn(f64) -> String = |count| format!("{count:.0}");

/// Writes a table of outcomes: a line with the title and the names of the columns, then a line for
/// each row.
pub(crate) fn write_table<'a, T: 'a>(
    f: &mut fmt::Formatter<'_>,
    title: &str,
    columns: impl Iterator<Item = (&'a str, &'a T)> + Clone,
    rows: &[Row<T>],
) -> fmt::Result {
    let names: Vec<&str> = columns.clone().map(|(name, _)| name).collect();
    let cells = rows.iter().map(|(label, show, value)| {
        let columns = columns.clone();
        (
            *label,
            columns.map(|(_, outcome)| show(value(outcome))).collect(),
        )
    });
    write_cells(f, title, &names, &cells.collect::<Vec<_>>())
}

/// Writes a table of cells that are text: for each row a label and one cell for each column.
/// Columns are as wide as their widest cell. Cells beyond the last column are ignored.
pub(crate) fn write_cells(
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
