//! Discovery: workers that files and URLs list, besides those of the configuration.
//!
//! A list that cannot be read, or is invalid, changes nothing. An empty list changes nothing either
//! unless that is allowed, because the program that writes it may only have lost its own source.

mod targets;

use std::error::Error;
use std::hash::{BuildHasher, RandomState};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http::header::{ACCEPT, USER_AGENT};
use http::{Request, Uri};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use crate::content_watch::ContentWatch;
use crate::log_limit::warn_limited;
use crate::metrics::Metrics;
use crate::workers::reconcile::{Reconciler, Source};
use targets::{Trust, parse};

/// Time between two looks at a file.
const FILE_INTERVAL: Duration = Duration::from_secs(1);

/// Maximum time of a request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Largest list, in bytes.
const MAX_BYTES: usize = 4 << 20;

/// Where workers are listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiscoveryConfig {
    /// Files in JSON or YAML, which are read again when they change.
    pub files: Vec<PathBuf>,
    /// `http://` URLs, which are read in intervals.
    pub urls: Vec<Uri>,
    /// Time between two requests to a URL.
    pub refresh: Duration,
    /// Whether an empty list removes the workers of its source.
    pub allows_empty: bool,
}

impl Default for DiscoveryConfig {
    fn default() -> Self {
        Self {
            files: Vec::new(),
            urls: Vec::new(),
            refresh: Duration::from_secs(30),
            allows_empty: false,
        }
    }
}

/// Follows the lists of a gateway.
#[derive(Debug)]
pub(crate) struct Discovery {
    config: DiscoveryConfig,
    reconciler: Arc<Reconciler>,
    metrics: Arc<Metrics>,
}

impl Discovery {
    /// Starts a task for each list. Must run inside a tokio runtime.
    pub(crate) fn start(
        config: DiscoveryConfig,
        reconciler: Arc<Reconciler>,
        metrics: Arc<Metrics>,
    ) -> Vec<JoinHandle<()>> {
        let (files, urls) = (config.files.clone(), config.urls.clone());
        let discovery = Arc::new(Self {
            config,
            reconciler,
            metrics,
        });
        let mut tasks = Vec::new();
        for path in files {
            tasks.push(tokio::spawn(Arc::clone(&discovery).follow_file(path)));
        }
        for url in urls {
            tasks.push(tokio::spawn(Arc::clone(&discovery).follow_url(url)));
        }
        tasks
    }

    /// Reads a file at the start, and again when its content has changed and then stayed the same
    /// between two looks. Never returns.
    async fn follow_file(self: Arc<Self>, path: PathBuf) {
        let source = Source::File(path.clone());
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
                    self.apply(&source, &text, Trust::Local);
                }
                Ok(_) => {}
                Err(error) => self.fail(&source, &error.to_string()),
            }
            sleep(FILE_INTERVAL).await;
        }
    }

    /// Reads a URL in intervals, which vary by a tenth. Never returns.
    async fn follow_url(self: Arc<Self>, url: Uri) {
        let source = Source::Url(url.to_string());
        let mut random = SmallRng::seed_from_u64(RandomState::new().hash_one(&url));
        let client = Client::builder(TokioExecutor::new()).build_http();
        let mut applied = None;
        loop {
            match timeout(REQUEST_TIMEOUT, self.fetch(&client, &url)).await {
                Ok(Ok(text)) if applied.as_ref() == Some(&text) => self.succeed(),
                Ok(Ok(text)) => {
                    if self.apply(&source, &text, Trust::Remote) {
                        applied = Some(text);
                    }
                }
                Ok(Err(error)) => self.fail(&source, &error.to_string()),
                Err(_) => self.fail(&source, "no response in time"),
            }
            let refresh = self.config.refresh.mul_f64(random.random_range(0.9..1.1));
            sleep(refresh).await;
        }
    }

    /// Returns the list at a URL.
    async fn fetch(
        &self,
        client: &Client<HttpConnector, Empty<Bytes>>,
        url: &Uri,
    ) -> Result<String, Box<dyn Error + Send + Sync>> {
        let refresh = self.config.refresh.as_secs().max(1);
        let request = Request::get(url.clone())
            .header(ACCEPT, "application/json")
            .header(USER_AGENT, "foresee")
            .header("x-prometheus-refresh-interval-seconds", refresh)
            .body(Empty::new())?;
        let response = client.request(request).await?;
        if response.status() != http::StatusCode::OK {
            return Err(format!("the response has status {}", response.status()).into());
        }
        let body = Limited::new(response.into_body(), MAX_BYTES)
            .collect()
            .await?;
        Ok(String::from_utf8(body.to_bytes().to_vec())?)
    }

    /// Makes the workers of a source those of its list. Returns whether the list was used.
    fn apply(&self, source: &Source, text: &str, trust: Trust) -> bool {
        let engines = match parse(text, trust) {
            Ok(engines) => engines,
            Err(error) => {
                self.fail(source, &error);
                return false;
            }
        };
        if engines.is_empty() && !self.config.allows_empty {
            self.fail(
                source,
                "the list is empty; --discovery-allow-empty accepts that",
            );
            return false;
        }
        let (changes, errors) = self.reconciler.reconcile_each(source, engines);
        for error in &errors {
            self.fail(source, &error.to_string());
        }
        if !changes.is_empty() {
            tracing::info!(
                %source, added = changes.added.len(), replaced = changes.replaced.len(),
                removed = changes.removed.len(), "list of workers changed"
            );
        }
        if errors.is_empty() {
            self.succeed();
        }
        errors.is_empty()
    }

    /// Counts and logs a list that was not used, or not as a whole.
    fn fail(&self, source: &Source, error: &str) {
        self.metrics.discovery_errors.inc();
        let key = source.to_string();
        warn_limited!(
            key: &key, %source, error,
            "cannot use a list of workers; keeping the workers of the last one"
        );
    }

    /// Notes that a list is in force.
    fn succeed(&self) {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH);
        self.metrics
            .discovery_last_success_timestamp_seconds
            .set(since_epoch.unwrap_or_default().as_secs_f64());
    }
}
