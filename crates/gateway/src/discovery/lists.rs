//! Lists of workers in files and at URLs.
//!
//! An empty list changes nothing unless that is allowed, because the program that writes it may only
//! have lost its own source.

use std::path::PathBuf;
use std::time::Duration;

use tokio::time::sleep;

use super::fetch::Page;
use super::jitter::Jitter;
use super::source_workers::SourceWorkers;
use super::targets::{Trust, parse};
use crate::content_watch::ContentWatch;

/// Time between two looks at a file.
const FILE_INTERVAL: Duration = Duration::from_secs(1);

/// A list of workers.
#[derive(Debug)]
pub(super) struct List {
    workers: SourceWorkers,
    /// Whether an empty list removes the workers of its source.
    allows_empty: bool,
}

impl List {
    /// Prepares a list.
    pub(super) fn new(workers: SourceWorkers, allows_empty: bool) -> Self {
        Self {
            workers,
            allows_empty,
        }
    }

    /// Reads a file at the start, and again when its content has changed and then stayed the same
    /// between two looks. Never returns.
    pub(super) async fn follow_file(self, path: PathBuf) {
        let mut watch: Option<ContentWatch> = None;
        loop {
            let path = path.clone();
            let read = move || std::fs::read_to_string(&path);
            let read = tokio::task::spawn_blocking(read).await;
            let text = read.unwrap_or_else(|error| Err(std::io::Error::other(error)));
            let content = text.as_ref().ok().map(String::as_bytes);
            let watch = watch.get_or_insert_with(|| ContentWatch::unused(content));
            let has_changed = watch.has_changed(content);
            match text {
                Ok(text) if has_changed => {
                    self.apply(&text, Trust::Local);
                }
                Ok(_) => {}
                Err(error) => self.workers.fail(&error.to_string()),
            }
            sleep(FILE_INTERVAL).await;
        }
    }

    /// Reads a URL in intervals, which vary by a tenth. Never returns.
    pub(super) async fn follow_url(self, page: Page, refresh: Duration) {
        let mut jitter = Jitter::new(page.url());
        let mut applied = None;
        loop {
            match page.fetch().await {
                Ok(text) if applied.as_ref() == Some(&text) => self.workers.succeed(),
                Ok(text) => {
                    if self.apply(&text, Trust::Remote) {
                        applied = Some(text);
                    }
                }
                Err(error) => self.workers.fail(&error),
            }
            sleep(jitter.vary(refresh)).await;
        }
    }

    /// Makes the workers of the source those of its list. Returns whether the list was used.
    fn apply(&self, text: &str, trust: Trust) -> bool {
        let engines = match parse(text, trust) {
            Ok(engines) => engines,
            Err(error) => {
                self.workers.fail(&error);
                return false;
            }
        };
        if engines.is_empty() && !self.allows_empty {
            let error = "the list is empty; --discovery-allow-empty accepts that";
            self.workers.fail(error);
            return false;
        }
        self.workers.apply(engines)
    }
}
