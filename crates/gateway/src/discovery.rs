//! Discovery: workers that files, URLs, names in DNS and Kubernetes list, besides those of the
//! configuration.
//!
//! Each source has a task, which makes its list the workers of the source (`source_workers`). A list
//! that cannot be read, or is invalid, changes nothing.

pub(crate) mod config;
mod dns;
mod fetch;
mod jitter;
#[cfg(feature = "kubernetes")]
mod kubernetes;
mod lists;
mod source_workers;
mod targets;

use std::sync::Arc;

use http::Uri;
use tokio::task::JoinHandle;

use crate::metrics::Metrics;
use crate::workers::reconcile::{Reconciler, Source};
use config::{DiscoveryConfig, shown_url};
use source_workers::SourceWorkers;

/// A source of workers that this build of the program cannot follow.
#[derive(Debug, thiserror::Error)]
#[error(
    "this program was built without Kubernetes, so --kubernetes-selector and --kubernetes-pool cannot \
     be used; build it with `--features kubernetes`"
)]
pub struct UnsupportedSource;

impl DiscoveryConfig {
    /// Checks that this build of the program can follow the sources.
    ///
    /// # Errors
    /// Fails if pods are to be followed, and the program was built without the feature `kubernetes`.
    pub fn check(&self) -> Result<(), UnsupportedSource> {
        if cfg!(feature = "kubernetes") || !self.kubernetes.is_used() {
            Ok(())
        } else {
            Err(UnsupportedSource)
        }
    }
}

/// Returns the name of a URL in logs and metrics: without its query, which may have a token, and with a
/// number if an earlier URL has the same name.
fn label_of(urls: &[Uri], index: usize) -> String {
    let name = shown_url(&urls[index]);
    let earlier = urls[..index].iter().map(shown_url);
    match earlier.filter(|earlier| *earlier == name).count() {
        0 => name,
        same => format!("{name} ({})", same + 1),
    }
}

/// Starts a task for each source of workers. Must run inside a tokio runtime.
pub(crate) fn start(
    config: &DiscoveryConfig,
    reconciler: &Arc<Reconciler>,
    metrics: &Arc<Metrics>,
) -> Vec<JoinHandle<()>> {
    let workers = |source| SourceWorkers::new(source, Arc::clone(reconciler), Arc::clone(metrics));
    let mut tasks = Vec::new();
    for path in &config.files {
        let workers = workers(Source::File(path.clone()));
        let list = lists::List::new(workers, config.allows_empty);
        tasks.push(tokio::spawn(list.follow_file(path.clone())));
    }
    for (index, url) in config.urls.iter().enumerate() {
        let workers = workers(Source::Url(label_of(&config.urls, index)));
        let list = lists::List::new(workers, config.allows_empty);
        let page = fetch::Page::new(url.clone(), config.url_ca.clone(), config.refresh);
        tasks.push(tokio::spawn(list.follow_url(page, config.refresh)));
    }
    for name in &config.names {
        let workers = workers(Source::Dns(name.to_string()));
        let following = dns::follow(name.clone(), config, workers);
        tasks.push(tokio::spawn(following));
    }
    #[cfg(feature = "kubernetes")]
    for pods in kubernetes::sources(&config.kubernetes) {
        let workers = workers(Source::Kubernetes(pods.to_string()));
        tasks.push(tokio::spawn(pods.follow(workers)));
    }
    tasks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_urls_have_no_secrets_and_differ() {
        let urls = [
            "http://user:s3cret@lists:9/a?token=s3cret",
            "http://lists:9/a?token=other",
            "http://lists:9/b",
        ];
        let urls = urls.map(|url| url.parse().unwrap());
        let names = [0, 1, 2].map(|index| label_of(&urls, index));
        let expected = [
            "http://lists:9/a",
            "http://lists:9/a (2)",
            "http://lists:9/b",
        ];
        assert_eq!(names, expected);
    }
}
