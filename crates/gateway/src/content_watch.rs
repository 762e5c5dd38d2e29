//! Notices by its hash that the content of files has changed, in looks that a caller takes in intervals.
//!
//! Content is compared, not times or names: files that are replaced are noticed, and so are the links
//! by which Kubernetes replaces a mounted `ConfigMap`.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;
use std::time::Duration;

/// Time between two looks at files.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Observations of a content.
#[derive(Clone, Copy, Debug)]
pub struct ContentWatch {
    /// Hash of the content that was reported last.
    reported: Option<u64>,
    /// Hash at the latest look.
    seen: Option<u64>,
}

impl ContentWatch {
    /// Creates the watch of a content that is in use already; `None` if it cannot be read.
    #[must_use]
    pub fn used(content: Option<&[u8]>) -> Self {
        let hash = content.map(content_hash);
        Self {
            reported: hash,
            seen: hash,
        }
    }

    /// Creates the watch of a content that is not in use yet: the next look reports it, unless it has
    /// changed since.
    #[must_use]
    pub fn unused(content: Option<&[u8]>) -> Self {
        Self {
            reported: None,
            seen: content.map(content_hash),
        }
    }

    /// Returns whether the content differs from the one that was reported last, and is the one of the
    /// look before: a program that writes it may be in the middle of it. `None`, a content that cannot
    /// be read, has not changed.
    pub fn has_changed(&mut self, content: Option<&[u8]>) -> bool {
        let hash = content.map(content_hash);
        let is_stable = hash == self.seen;
        self.seen = hash;
        let has_changed = hash.is_some() && is_stable && hash != self.reported;
        if has_changed {
            self.reported = hash;
        }
        has_changed
    }

    /// Waits until the content that `read` returns [has changed](Self::has_changed), in looks one second
    /// apart. `read` may block: it runs on a thread for that. Must run inside a tokio runtime.
    pub async fn until_changed(
        &mut self,
        read: impl Fn() -> Option<Vec<u8>> + Clone + Send + 'static,
    ) {
        loop {
            tokio::time::sleep(LOOK_INTERVAL).await;
            let content = tokio::task::spawn_blocking(read.clone()).await;
            if self.has_changed(content.ok().flatten().as_deref()) {
                return;
            }
        }
    }
}

/// Returns the content of files, one after the other; `None` if one of them cannot be read. Blocks on
/// the file system.
pub(crate) fn content_of<'p>(paths: impl IntoIterator<Item = &'p PathBuf>) -> Option<Vec<u8>> {
    let mut content = Vec::new();
    for path in paths {
        content.extend(std::fs::read(path).ok()?);
    }
    Some(content)
}

/// Returns the hash of a content.
fn content_hash(content: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    content.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_reported_once_it_has_stayed_for_a_look() {
        let mut watch = ContentWatch::used(Some(b"a"));
        let looks = [
            (Some("a"), false),
            (Some("b"), false),
            (Some("c"), false),
            (Some("c"), true),
            (Some("c"), false),
            (None, false),
            (None, false),
            (Some("c"), false),
            (Some("a"), false),
            (Some("a"), true),
        ];
        for (number, (content, expected)) in looks.into_iter().enumerate() {
            let content = content.map(str::as_bytes);
            assert_eq!(watch.has_changed(content), expected, "look {number}");
        }
        let mut watch = ContentWatch::unused(Some(b"a"));
        assert!(watch.has_changed(Some(b"a")));
        assert!(!watch.has_changed(Some(b"a")));
    }
}
