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

/// Number of looks at a file after which a list is tried again, of which a worker could not be added:
/// its name may be free by then.
const RETRY_LOOKS: u32 = 30;

/// How much of a list was used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ListUse {
    Whole,
    /// Some workers could not be added.
    Part,
    /// No worker: the list is invalid, or it is empty and empty lists are not allowed.
    None,
}

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
        // Looks until a list of which only a part was used is tried again; `None` for any other list.
        let mut looks_until_retry: Option<u32> = None;
        loop {
            let path = path.clone();
            let read = move || std::fs::read_to_string(&path);
            let read = tokio::task::spawn_blocking(read).await;
            let text = read.unwrap_or_else(|error| Err(std::io::Error::other(error)));
            let content = text.as_ref().ok().map(String::as_bytes);
            let watch = watch.get_or_insert_with(|| ContentWatch::unused(content));
            let has_changed = watch.has_changed(content);
            match text {
                Ok(text) if has_changed || looks_until_retry == Some(0) => {
                    let list_use = self.apply(&text, Trust::Local);
                    looks_until_retry = (list_use == ListUse::Part).then_some(RETRY_LOOKS);
                }
                Ok(_) => looks_until_retry = looks_until_retry.map(|looks| looks.saturating_sub(1)),
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
                    if self.apply(&text, Trust::Remote) == ListUse::Whole {
                        applied = Some(text);
                    }
                }
                Err(error) => self.workers.fail(&error),
            }
            sleep(jitter.vary(refresh)).await;
        }
    }

    /// Makes the workers of the source those of its list.
    fn apply(&self, text: &str, trust: Trust) -> ListUse {
        let engines = match parse(text, trust) {
            Ok(engines) => engines,
            Err(error) => {
                self.workers.fail(&error);
                return ListUse::None;
            }
        };
        if engines.is_empty() && !self.allows_empty {
            let error = "the list is empty; --discovery-allow-empty accepts that";
            self.workers.fail(error);
            return ListUse::None;
        }
        match self.workers.apply(engines) {
            true => ListUse::Whole,
            false => ListUse::Part,
        }
    }
}
