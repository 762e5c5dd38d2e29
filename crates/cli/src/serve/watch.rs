//! `--watch-config`: notices changes of the configuration file.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;
use std::time::Duration;

/// Time between two looks at the file.
const INTERVAL: Duration = Duration::from_secs(1);

/// Watches one file by its content, so that it also notices a file that is replaced, and the links by
/// which Kubernetes replaces a `ConfigMap`.
#[derive(Debug)]
pub(super) struct FileWatch {
    path: PathBuf,
    /// Hash of the content that was reported last, or of the first one.
    reported: Option<u64>,
    /// Hash at the latest look.
    seen: Option<u64>,
}

impl FileWatch {
    /// Creates the watch of a file whose present content has been read.
    pub(super) fn new(path: PathBuf) -> Self {
        let reported = content_hash(&path);
        Self {
            path,
            reported,
            seen: reported,
        }
    }

    /// Waits until the file has another content, which has not changed for the time between two
    /// looks: a program that writes the file may be in the middle of it. A file that cannot be read
    /// has not changed.
    pub(super) async fn changed(&mut self) {
        loop {
            tokio::time::sleep(INTERVAL).await;
            let path = self.path.clone();
            let hash = tokio::task::spawn_blocking(move || content_hash(&path)).await;
            let hash = hash.ok().flatten();
            let is_stable = hash == self.seen;
            self.seen = hash;
            if hash.is_some() && is_stable && hash != self.reported {
                self.reported = hash;
                return;
            }
        }
    }
}

/// Returns the hash of a file's content; `None` if it cannot be read.
fn content_hash(path: &PathBuf) -> Option<u64> {
    let content = std::fs::read(path).ok()?;
    let mut hasher = DefaultHasher::new();
    content.hash(&mut hasher);
    Some(hasher.finish())
}
