//! Progress bars on standard error, all in one style. They are hidden without a terminal.

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// Template of a bar.
const STYLE: &str = "{prefix:24} {bar:40} {pos}/{len} {msg} {elapsed}, {eta} left";
/// Template of a line for a search, whose number of steps is unknown.
const MESSAGE_STYLE: &str = "{prefix:24} {msg}";

/// Returns a bar that ends at `requests` requests.
pub(crate) fn bar(name: impl ToString, requests: usize) -> anyhow::Result<ProgressBar> {
    let style = ProgressStyle::with_template(STYLE)?;
    let bar = ProgressBar::new(requests as u64).with_style(style);
    Ok(bar.with_prefix(name.to_string()))
}

/// Returns a bar for each name, each of which ends at `requests` requests. The bars stand below
/// each other.
pub(crate) fn bars<T: ToString>(names: &[T], requests: usize) -> anyhow::Result<Vec<ProgressBar>> {
    let all = MultiProgress::new();
    let bars = names
        .iter()
        .map(|name| Ok(all.add(bar(name.to_string(), requests)?)));
    bars.collect()
}

/// Returns a line for each name, which shows a message and no bar.
pub(crate) fn messages<T: ToString>(names: &[T]) -> anyhow::Result<Vec<ProgressBar>> {
    let all = MultiProgress::new();
    let style = ProgressStyle::with_template(MESSAGE_STYLE)?;
    let lines = names.iter().map(|name| {
        let line = ProgressBar::no_length().with_style(style.clone());
        all.add(line.with_prefix(name.to_string()))
    });
    Ok(lines.collect())
}
