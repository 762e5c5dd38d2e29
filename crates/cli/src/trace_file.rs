//! Traces in files.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use anyhow::Context;
use foresee_sim::trace::{self, TraceRequest};

/// Reads a trace from a file.
///
/// # Errors
/// If the file cannot be read, or is not a trace.
pub(crate) fn read_trace(path: &Path) -> anyhow::Result<Vec<TraceRequest>> {
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    trace::read(BufReader::new(file)).with_context(|| format!("in {}", path.display()))
}
