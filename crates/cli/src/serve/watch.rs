//! `--watch-config`: notices changes of the configuration file.

use std::path::PathBuf;
use std::time::Duration;

use foresee_gateway::ContentWatch;

/// Time between two looks at the file.
const INTERVAL: Duration = Duration::from_secs(1);

/// Watches one file by its content.
#[derive(Debug)]
pub(super) struct FileWatch {
    path: PathBuf,
    content: ContentWatch,
}

impl FileWatch {
    /// Creates the watch of a file whose present content has been read.
    pub(super) fn new(path: PathBuf) -> Self {
        let content = ContentWatch::used(std::fs::read(&path).ok().as_deref());
        Self { path, content }
    }

    /// Waits until the file has [changed](ContentWatch::has_changed).
    pub(super) async fn changed(&mut self) {
        loop {
            tokio::time::sleep(INTERVAL).await;
            let path = self.path.clone();
            let read = tokio::task::spawn_blocking(move || std::fs::read(&path).ok()).await;
            let content = read.ok().flatten();
            if self.content.has_changed(content.as_deref()) {
                return;
            }
        }
    }
}
