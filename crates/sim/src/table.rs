//! Numbers side by side as plain text: a column for each outcome, a row for each number.

use std::fmt;

/// A label, how to show the number, and which number it is.
pub(crate) type Row<T> = (&'static str, fn(f64) -> String, fn(&T) -> f64);

pub(crate) const SECONDS: fn(f64) -> String = |seconds| format!("{seconds:.3}");
/// Of a number of seconds.
pub(crate) const MILLISECONDS: fn(f64) -> String = |seconds| format!("{:.1}", seconds * 1e3);
/// Of a share between 0 and 1.
pub(crate) const PERCENT: fn(f64) -> String = |share| format!("{:.1}", share * 100.0);
pub(crate) const RATIO: fn(f64) -> String = |ratio| format!("{ratio:.2}");
pub(crate) const COUNT: fn(f64) -> String = |count| format!("{count:.0}");

/// Writes a table: the title and the columns' names, then a line for each row.
pub(crate) fn write_table<'a, T: 'a>(
    f: &mut fmt::Formatter<'_>,
    title: &str,
    columns: impl Iterator<Item = (&'a str, &'a T)> + Clone,
    rows: &[Row<T>],
) -> fmt::Result {
    let names: Vec<&str> = columns.clone().map(|(name, _)| name).collect();
    let cells = rows.iter().map(|(label, show, value)| {
        let columns = columns.clone();
        (*label, columns.map(|(_, it)| show(value(it))).collect())
    });
    write_cells(f, title, &names, &cells.collect::<Vec<_>>())
}

/// Writes a table of cells that are text already: for each row its label and a cell a column.
pub(crate) fn write_cells(
    f: &mut fmt::Formatter<'_>,
    title: &str,
    columns: &[&str],
    rows: &[(&str, Vec<String>)],
) -> fmt::Result {
    const LABEL: usize = 28;
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|(_, cells)| cells.get(column));
        let texts = cells.map(String::as_str).chain([columns[column]]);
        texts.map(|it| it.chars().count()).max().unwrap_or(0).max(8) + 2
    };
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    write!(f, "{title:LABEL$}")?;
    for (name, width) in columns.iter().zip(&widths) {
        write!(f, "{name:>width$}")?;
    }
    writeln!(f)?;
    for (label, cells) in rows {
        write!(f, "{label:LABEL$}")?;
        for (cell, width) in cells.iter().zip(&widths) {
            write!(f, "{cell:>width$}")?;
        }
        writeln!(f)?;
    }
    Ok(())
}
