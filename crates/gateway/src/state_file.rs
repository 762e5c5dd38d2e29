//! `--state FILE`: keeps what the gateway has learned over a restart.
//!
//! The file is read before workers are added, and written in intervals and at the shutdown. It has
//! speeds, lengths and ratios, and no text of a request. A file that is missing, damaged or of another
//! version costs only the knowledge in it.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use foresee_core::learned::Learned;
use foresee_core::router::Router;
use serde::{Deserialize, Serialize};

use crate::placement::Placement;

/// Version of the file's content. A file of another version is not used.
const VERSION: u32 = 1;

/// Time between two writes.
const INTERVAL: Duration = Duration::from_secs(300);

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
enum ReadError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("the file has more than {MAX_BYTES} bytes")]
    TooLarge,
    #[error(transparent)]
    Json(#[from] serde_json::Error),
    #[error("the file has version {0}, and this program writes version {VERSION}")]
    Version(u32),
    #[error("invalid value: {0}")]
    Value(#[from] foresee_core::learned::InvalidLearned),
}

/// The file, and the parts of the gateway whose knowledge it keeps.
#[derive(Debug)]
pub(crate) struct StateFile {
    path: PathBuf,
    router: Router,
    placement: Arc<Placement>,
}

impl StateFile {
    /// Reads the file, if there is one, into `router` and `placement`, which must have no workers
    /// yet. A file that cannot be used is logged.
    pub(crate) fn open(path: PathBuf, router: Router, placement: Arc<Placement>) -> Self {
        let file = Self {
            path,
            router,
            placement,
        };
        let path = file.path.display();
        match file.restore() {
            Ok(learned) => tracing::info!(
                %path, models = learned.models.len(), workers = learned.workers.len(),
                "restored what an earlier router has learned"
            ),
            Err(ReadError::Io(error)) if error.kind() == io::ErrorKind::NotFound => {
                tracing::info!(%path, "no state file yet; starting without learned speeds");
            }
            Err(error) => tracing::warn!(
                %path, %error,
                "cannot use the state file; starting without learned speeds"
            ),
        }
        file
    }

    /// Reads the file and gives its content to the parts of the gateway.
    fn restore(&self) -> Result<Learned, ReadError> {
        if std::fs::metadata(&self.path)?.len() > MAX_BYTES {
            return Err(ReadError::TooLarge);
        }
        let text = std::fs::read(&self.path)?;
        let content: Content = serde_json::from_slice(&text)?;
        if content.version != VERSION {
            return Err(ReadError::Version(content.version));
        }
        self.router.restore(&content.router)?;
        self.placement
            .text_ratios()
            .restore(&content.bytes_per_token);
        Ok(content.router)
    }

    /// Writes the file: a new one beside it, which then replaces it. A failure is logged.
    fn write(&self) {
        let content = Content {
            version: VERSION,
            router: self.router.learned(),
            bytes_per_token: self.placement.text_ratios().learned(),
        };
        let text = serde_json::to_vec(&content).map_err(io::Error::from);
        if let Err(error) = text.and_then(|text| replace(&self.path, &text)) {
            tracing::warn!(path = %self.path.display(), %error, "cannot write the state file");
        }
    }

    /// Writes the file without blocking the thread.
    pub(crate) async fn save(self: &Arc<Self>) {
        let file = Arc::clone(self);
        // Fails only if the task panicked.
        let _ = tokio::task::spawn_blocking(move || file.write()).await;
    }

    /// Writes the file in intervals. Never returns.
    pub(crate) async fn save_in_intervals(self: Arc<Self>) {
        loop {
            tokio::time::sleep(INTERVAL).await;
            self.save().await;
        }
    }
}

/// Replaces a file, so that a reader finds the old content or the new one.
fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    std::fs::write(&new, content)?;
    std::fs::rename(&new, path)
}
