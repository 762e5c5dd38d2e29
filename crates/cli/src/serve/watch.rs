//! `--watch-config`: notices changes of the configuration file.

use std::path::PathBuf;

use foresee_gateway::ContentWatch;

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
        let path = self.path.clone();
        let read = move || std::fs::read(&path).ok();
        self.content.until_changed(read).await;
    }
}
