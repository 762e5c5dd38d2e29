//! Pods of Kubernetes as workers.
//!
//! The pods of a selector are listed, and then watched for changes. Kubernetes may stop to send changes
//! without closing the watch, so the pods are listed again after some time whatever the watch says;
//! the same happens after every error. A list replaces everything that was known.

mod api;
mod pods;
mod target;

use std::fmt;
use std::future::pending;
use std::pin::pin;
use std::time::Duration;

use futures_util::StreamExt;
use tokio::time::{Instant, sleep, sleep_until};

use super::config::{KubernetesConfig, PoolName};
use super::jitter::Jitter;
use super::source_workers::SourceWorkers;
use api::{ApiServer, PodEvent};
use pods::KnownPods;
use target::Target;

/// Maximum time of a request, up to the head of the response for a watch.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Time between two requests for the description of a pool.
const POOL_INTERVAL: Duration = Duration::from_secs(10);

/// Shortest time between the starts of two lists, if no error occurred.
const MIN_LIST_INTERVAL: Duration = Duration::from_millis(500);

/// Delay after the first failure in a row; each further one doubles it, up to [`MAX_RETRY_DELAY`].
const FIRST_RETRY_DELAY: Duration = Duration::from_millis(200);

/// Longest delay after a failure.
const MAX_RETRY_DELAY: Duration = Duration::from_secs(10);

/// Time after a change of a pod in which further ones are collected, before all are applied.
const COALESCING_TIME: Duration = Duration::from_millis(10);

/// Pods that one source follows.
#[derive(Clone, Debug)]
pub(super) struct PodSource {
    config: KubernetesConfig,
    /// Pool whose selector and ports are used; `None` for those of the configuration.
    pool: Option<PoolName>,
}

impl fmt::Display for PodSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.pool, &self.config.selector) {
            (Some(pool), _) => write!(f, "pool/{pool}"),
            (None, selector) => f.write_str(selector.as_deref().unwrap_or("")),
        }
    }
}

/// Returns the sources of pods: one for the selector and one for each pool.
pub(super) fn sources(config: &KubernetesConfig) -> Vec<PodSource> {
    let selector = config.selector.as_ref().map(|_| None);
    let pools = config.pools.iter().cloned().map(Some);
    let pools = selector.into_iter().chain(pools);
    pools
        .map(|pool| PodSource {
            config: config.clone(),
            pool,
        })
        .collect()
}

impl PodSource {
    /// Follows the pods, and makes them the workers of the source. Never returns.
    pub(super) async fn follow(self, workers: SourceWorkers) {
        let mut jitter = Jitter::new(self.to_string());
        let mut pods = KnownPods::default();
        let mut delay = FIRST_RETRY_DELAY;
        loop {
            let started = Instant::now();
            let resync = jitter.vary(self.config.resync);
            match self.list_and_watch(&workers, &mut pods, resync).await {
                Ok(()) => {
                    delay = FIRST_RETRY_DELAY;
                    sleep_until(started + MIN_LIST_INTERVAL.min(resync)).await;
                }
                Err(error) => {
                    workers.fail(&error);
                    sleep(jitter.scale(delay, 0.5..1.0)).await;
                    delay = (delay * 2).min(MAX_RETRY_DELAY);
                }
            }
        }
    }

    /// Lists the pods and then watches them, until `resync` has passed, the watch ends or the pool
    /// changes. Every call reads the credentials anew, because tokens rotate.
    ///
    /// # Errors
    /// Fails with the cause as text if the API server does not respond with a list. Then nothing
    /// changes.
    async fn list_and_watch(
        &self,
        workers: &SourceWorkers,
        pods: &mut KnownPods,
        resync: Duration,
    ) -> Result<(), String> {
        let deadline = Instant::now() + resync;
        let config = &self.config;
        let time_limit = REQUEST_TIMEOUT.min(config.resync);
        let server = ApiServer::connect(config.kubeconfig.as_deref(), time_limit).await?;
        let target = Target::read(&server, config, self.pool.as_ref()).await?;
        let (list, version) = server.list_pods(&target.path, &target.selector).await?;
        let mut errors = pods.replace(&list, &target.ports);
        self.apply(workers, pods, &mut errors);

        let watch = server.watch_pods(&target.path, &target.selector, &version);
        let mut watch = pin!(watch.await?);
        let mut pool_changes = pin!(self.until_pool_changes(&server, &target, workers));
        let mut apply_at: Option<Instant> = None;
        loop {
            tokio::select! {
                // Timers first: a stream of changes must not postpone them.
                biased;
                () = sleep_until(deadline) => break,
                () = sleep_until(apply_at.unwrap_or(deadline)), if apply_at.is_some() => {
                    apply_at = None;
                    self.apply(workers, pods, &mut errors);
                }
                () = &mut pool_changes => break,
                event = watch.next() => {
                    match event {
                        Some(PodEvent::Applied(pod)) => {
                            errors.extend(pods.update(&pod, &target.ports));
                        }
                        Some(PodEvent::Deleted(pod)) => pods.remove(&pod),
                        Some(PodEvent::Other) => continue,
                        Some(PodEvent::Ended) | None => break,
                    }
                    apply_at.get_or_insert_with(|| Instant::now() + COALESCING_TIME);
                }
            }
        }
        if apply_at.is_some() {
            self.apply(workers, pods, &mut errors);
        }
        Ok(())
    }

    /// Reads the description of the pool in intervals, until it differs from `target`. Never returns
    /// without a pool.
    async fn until_pool_changes(
        &self,
        server: &ApiServer,
        target: &Target,
        workers: &SourceWorkers,
    ) {
        if self.pool.is_none() {
            return pending().await;
        }
        loop {
            sleep(POOL_INTERVAL.min(self.config.resync)).await;
            match Target::read(server, &self.config, self.pool.as_ref()).await {
                Ok(read) if read == *target => {}
                Ok(_) => return,
                Err(error) => workers.fail(&error),
            }
        }
    }

    /// Makes the known pods the workers of the source, and reports the errors of their annotations.
    fn apply(&self, workers: &SourceWorkers, pods: &KnownPods, errors: &mut Vec<String>) {
        workers.apply(pods.engines());
        for error in errors.drain(..) {
            workers.fail(&error);
        }
    }
}
