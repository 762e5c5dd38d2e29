//! `--state FILE`: keeps what the gateway has learned over a restart.
//!
//! The file is read before workers are added, and written in intervals and at the shutdown. A file
//! that is missing, damaged or of another version costs only the knowledge in it.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use foresee_api::state_file::{self, ReadError};
use foresee_core::router::Router;
use parking_lot::Mutex;

use crate::placement::Placement;

/// Time between two writes.
const INTERVAL: Duration = Duration::from_secs(300);

/// The file, and the parts of the gateway whose knowledge it keeps.
#[derive(Debug)]
pub(crate) struct StateFile {
    path: PathBuf,
    router: Router,
    placement: Arc<Placement>,
    /// Locked during a write.
    writing: Mutex<()>,
}

impl StateFile {
    /// Reads the file, if there is one, into `router` and `placement`, which must have no workers
    /// yet. A file that cannot be used is logged.
    pub(crate) fn open(path: PathBuf, router: Router, placement: Arc<Placement>) -> Self {
        match state_file::read(&path, &router, placement.text_ratios()) {
            Ok(learned) => tracing::info!(
                path = %path.display(), models = learned.models.len(), workers = learned.workers.len(),
                "restored what an earlier router has learned"
            ),
            Err(ReadError::Io(error)) if error.kind() == io::ErrorKind::NotFound => {
                tracing::info!(
                    path = %path.display(),
                    "no state file yet; starting without learned speeds"
                );
            }
            Err(error) => tracing::warn!(
                path = %path.display(), %error,
                "cannot use the state file; starting without learned speeds"
            ),
        }
        Self {
            path,
            router,
            placement,
            writing: Mutex::default(),
        }
    }

    /// Writes the file. A failure is logged.
    fn write(&self) {
        let _writing = self.writing.lock();
        let text_ratios = self.placement.text_ratios();
        if let Err(error) = state_file::write(&self.path, &self.router, text_ratios) {
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
