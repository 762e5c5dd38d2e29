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
    const LABEL: usize = 28;
    let width = |name: &str| name.chars().count().max(8) + 2;
    write!(f, "{title:LABEL$}")?;
    for (name, _) in columns.clone() {
        write!(f, "{name:>width$}", width = width(name))?;
    }
    writeln!(f)?;
    for (label, show, value) in rows {
        write!(f, "{label:LABEL$}")?;
        for (name, outcome) in columns.clone() {
            let shown = show(value(outcome));
            write!(f, "{shown:>width$}", width = width(name))?;
        }
        writeln!(f)?;
    }
    Ok(())
}
