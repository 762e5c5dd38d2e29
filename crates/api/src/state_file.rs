//! The file in which a router keeps what it has learned: speeds, lengths and ratios, and no text of a
//! request.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use foresee_core::learned::{InvalidLearned, Learned};
use foresee_core::router::Router;
use foresee_core::text_ratios::TextRatios;
use serde::{Deserialize, Serialize};

/// Version of the file's content. A file of another version is not used.
const VERSION: u32 = 1;

/// Largest file that is read, in bytes. The knowledge of a full router takes less.
const MAX_BYTES: u64 = 64 << 20;

/// Content of the file.
#[derive(Debug, Serialize, Deserialize)]
struct Content {
    version: u32,
    router: Learned,
    /// Bytes per token of each model, for prompts that are matched as text.
    bytes_per_token: BTreeMap<String, f64>,
}

/// Why a file is not used.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The file cannot be read.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The file is longer than any that a router writes.
    #[error("the file has more than {MAX_BYTES} bytes")]
    TooLarge,
    /// The file is not JSON of the expected form.
    #[error(transparent)]
    Json(#[from] serde_json::Error),
    /// The file was written by another version.
    #[error("the file has version {0}, and this program writes version {VERSION}")]
    Version(u32),
    /// A number is not finite or out of range.
    #[error("invalid value: {0}")]
    Value(#[from] InvalidLearned),
}

/// Reads the file into `router`, which should have no workers yet, and `text_ratios`. Returns what
/// the file says about the router.
///
/// # Errors
/// If the file cannot be used. Then nothing changes.
pub fn read(path: &Path, router: &Router, text_ratios: &TextRatios) -> Result<Learned, ReadError> {
    if std::fs::metadata(path)?.len() > MAX_BYTES {
        return Err(ReadError::TooLarge);
    }
    let text = std::fs::read(path)?;
    let content: Content = serde_json::from_slice(&text)?;
    if content.version != VERSION {
        return Err(ReadError::Version(content.version));
    }
    router.restore(&content.router)?;
    text_ratios.restore(&content.bytes_per_token);
    Ok(content.router)
}

/// Writes what `router` and `text_ratios` have learned: a new file beside `path`, which then
/// replaces it, so that a reader finds the old content or the new one.
///
/// # Errors
/// If the file cannot be written.
pub fn write(path: &Path, router: &Router, text_ratios: &TextRatios) -> io::Result<()> {
    let content = Content {
        version: VERSION,
        router: router.learned(),
        bytes_per_token: text_ratios.learned(),
    };
    let text = serde_json::to_vec(&content)?;
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    std::fs::write(&new, text)?;
    std::fs::rename(&new, path)
}
