//! Reads the router's predictions and the engines' metrics at intervals while requests run.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use foresee_api::admin::{Worker, WorkerList};
use foresee_engine::worker_metrics::{CacheConfig, EngineLoad};
use futures_util::future::join_all;
use hyper::Uri;
use parking_lot::Mutex;
use tokio::task::JoinHandle;
use tokio::time::{Interval, MissedTickBehavior};

use super::VerifyConfig;
use crate::http::{ApiKey, HttpClient, client, get, read_whole, send};

/// Limit for the time of one response.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Returns whether a worker may serve the model; any model if `None`. A worker without known models
/// may, a draining worker may not.
pub(super) fn may_serve(worker: &Worker, model: Option<&str>) -> bool {
    let serves =
        |model| worker.models.is_empty() || worker.models.iter().any(|known| known == model);
    worker.state != "draining" && model.is_none_or(serves)
}

/// Returns whether a worker is healthy and has listed its models.
pub(super) fn serves(worker: &Worker) -> bool {
    worker.state == "healthy" && !worker.models.is_empty()
}

/// Returns the router's prediction for a worker as of `at`.
fn prediction(worker: &Worker, at: f64) -> Prediction {
    Prediction {
        at,
        blocks: worker.active_blocks,
        requests: worker.requests.saturating_sub(worker.queued_requests),
    }
}

/// The router's prediction for one engine, valid until the next.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Prediction {
    /// Time of the prediction, in seconds since the reader was created.
    pub(super) at: f64,
    /// Active blocks.
    pub(super) blocks: u64,
    /// Requests that were sent to the engine and have not ended.
    pub(super) requests: u32,
}

/// One reading of an engine's metrics.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reading {
    /// Time of the request, in seconds since the reader was created.
    pub(super) at: f64,
    /// Time of the response, in seconds since the reader was created.
    until: f64,
    /// Active blocks that the engine reports, converted to the router's block size.
    pub(super) active_blocks: f64,
    /// Requests that the engine reports.
    pub(super) requests: u32,
}

/// All readings of one worker.
#[derive(Clone, Debug)]
pub(super) struct WorkerReadings {
    /// The latest description.
    pub(super) worker: Worker,
    /// Every change of the router's prediction.
    pub(super) predicted: Vec<Prediction>,
    pub(super) readings: Vec<Reading>,
    /// Seconds from the creation of a batch of events to its application, for each batch.
    pub(super) lags: Vec<f64>,
    /// The last error when the metrics were read.
    pub(super) metrics_error: Option<String>,
    last_batch: u64,
}

/// Reads a router's admin API and its workers' metrics.
#[derive(Debug)]
pub(super) struct Reader {
    client: HttpClient,
    admin: String,
    /// Key of the admin API; engines do not get it.
    admin_key: Option<ApiKey>,
    /// The router's tokens per block.
    block_size: u32,
    begin: Instant,
    by_worker: Mutex<Vec<WorkerReadings>>,
}

impl Reader {
    pub(super) fn new(config: &VerifyConfig) -> Self {
        Self {
            client: client(),
            admin: config.admin.clone(),
            admin_key: config.admin_key.clone(),
            block_size: config.block_size,
            begin: Instant::now(),
            by_worker: Mutex::default(),
        }
    }

    pub(super) fn seconds(&self) -> f64 {
        self.begin.elapsed().as_secs_f64()
    }

    /// Returns all workers that the router's admin API lists. Records nothing.
    ///
    /// # Errors
    /// A description of the problem if the admin API cannot be read.
    pub(super) async fn workers(&self) -> Result<Vec<Worker>, String> {
        let body = self.get_from_router("/admin/workers").await?;
        let list: WorkerList = serde_json::from_slice(&body).map_err(|error| error.to_string())?;
        Ok(list.workers)
    }

    /// Returns the sum of the router's counters whose line starts with `name` and contains `label`,
    /// since the start of the router; 0 if there are none.
    ///
    /// # Errors
    /// If the router's metrics cannot be read.
    pub(super) async fn counter(&self, name: &str, label: &str) -> Result<u64, String> {
        let body = self.get_from_router("/metrics").await?;
        let text = String::from_utf8_lossy(&body);
        let lines = text
            .lines()
            .filter(|line| line.starts_with(name) && line.contains(label));
        let values = lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
        Ok(values.sum::<f64>() as u64)
    }

    /// Reads the router's current predictions and records every change. Returns the workers as the
    /// router lists them.
    ///
    /// # Errors
    /// If the router's admin API cannot be read.
    async fn read_predictions(&self) -> Result<Vec<Worker>, String> {
        let workers = self.workers().await?;
        let at = self.seconds();
        let mut by_worker = self.by_worker.lock();
        for worker in &workers {
            match by_worker
                .iter_mut()
                .find(|readings| readings.worker.name == worker.name)
            {
                Some(readings) => readings.take(at, worker),
                None => by_worker.push(WorkerReadings {
                    worker: worker.clone(),
                    predicted: vec![prediction(worker, at)],
                    readings: Vec::new(),
                    lags: Vec::new(),
                    metrics_error: None,
                    last_batch: 0,
                }),
            }
        }
        Ok(workers)
    }

    /// Reads and records the router's predictions and each engine's metrics once. A failure to read
    /// an engine's metrics is recorded for its worker.
    ///
    /// # Errors
    /// If the router's admin API cannot be read.
    pub(super) async fn read(&self) -> Result<(), String> {
        let workers = self.read_predictions().await?;
        let at = self.seconds();
        let read = join_all(workers.iter().map(|worker| self.read_engine(worker, at))).await;
        let mut by_worker = self.by_worker.lock();
        for (worker, reading) in workers.iter().zip(read) {
            let known = by_worker
                .iter_mut()
                .find(|readings| readings.worker.name == worker.name);
            match (known, reading) {
                (Some(readings), Ok(reading)) => readings.readings.push(reading),
                (Some(readings), Err(error)) => readings.metrics_error = Some(error),
                (None, _) => {}
            }
        }
        Ok(())
    }

    pub(super) fn readings(&self) -> Vec<WorkerReadings> {
        self.by_worker.lock().clone()
    }

    /// Reads the metrics of a worker's engine. A worker without a rank gets the sum over all
    /// engines of its address. An engine that does not report its block size is assumed to have the
    /// router's.
    ///
    /// `at` is the time of the request and is only recorded.
    ///
    /// # Errors
    /// If the metrics cannot be read, or do not report the KV cache.
    async fn read_engine(&self, worker: &Worker, at: f64) -> Result<Reading, String> {
        let Some(url) = &worker.url else {
            return Err("the router is removing the worker".to_owned());
        };
        let body = self.get(&format!("{url}/metrics"), None).await?;
        let text = String::from_utf8_lossy(&body);
        let mut engines = EngineLoad::parse(&text);
        engines.retain(|(rank, _)| worker.rank.is_none_or(|own_rank| own_rank == *rank));
        if engines.is_empty() {
            return Err("the engine's /metrics do not report its KV cache".to_owned());
        }
        let caches = CacheConfig::parse(&text);
        let engine_block_size = caches.iter().find_map(|(_, cache)| cache.block_size);
        let per_block =
            f64::from(engine_block_size.unwrap_or(self.block_size)) / f64::from(self.block_size);
        let blocks: f64 = engines.iter().map(|(_, load)| load.active_blocks).sum();
        let requests = engines.iter().map(|(_, load)| load.running + load.waiting);
        Ok(Reading {
            at,
            until: self.seconds(),
            // Engines report a fraction of their blocks as a float.
            active_blocks: (blocks * per_block).round(),
            requests: requests.sum(),
        })
    }

    /// Returns the body of the admin API's response to a GET request of `path`.
    ///
    /// # Errors
    /// As for [`get`](Self::get).
    async fn get_from_router(&self, path: &str) -> Result<Bytes, String> {
        let url = format!("{}{path}", self.admin);
        self.get(&url, self.admin_key.as_ref()).await
    }

    /// Returns the body of the response to a GET request with `key`.
    ///
    /// # Errors
    /// A message with the URL if it is invalid, the request fails, or the response takes longer
    /// than [`TIMEOUT`].
    async fn get(&self, url: &str, key: Option<&ApiKey>) -> Result<Bytes, String> {
        let uri: Uri = url.parse().map_err(|error| format!("{url}: {error}"))?;
        let read = async {
            let opened = send(&self.client, get(&uri, key)).await?;
            read_whole(opened.body).await
        };
        match tokio::time::timeout(TIMEOUT, read).await {
            Ok(read) => read.map_err(|failure| format!("GET {url}: {failure}")),
            Err(_) => Err(format!("GET {url}: no response within {TIMEOUT:?}")),
        }
    }
}

impl WorkerReadings {
    /// Replaces the worker's description with that of time `at`. Records its prediction if it has
    /// changed, and its event lag if a batch has been applied since the last call.
    fn take(&mut self, at: f64, worker: &Worker) {
        let now = prediction(worker, at);
        let is_same = |last: &Prediction| Prediction { at, ..*last } == now;
        if !self.predicted.last().is_some_and(is_same) {
            self.predicted.push(now);
        }
        if let Some(events) = &worker.kv_events
            && events.batches > self.last_batch
        {
            self.last_batch = events.batches;
            self.lags.extend(events.lag_seconds);
        }
        self.worker = worker.clone();
    }

    /// Returns whether the predicted number of requests equals the reported number from before the
    /// reading until after it.
    pub(super) fn agrees(&self, reading: &Reading) -> bool {
        let predicted = [reading.at, reading.until].map(|at| self.predicted_at(at).requests);
        predicted == [reading.requests; 2]
    }

    /// Returns the prediction that was valid at a time; the first for an earlier time, and zeros
    /// without any prediction.
    pub(super) fn predicted_at(&self, at: f64) -> Prediction {
        let after = self
            .predicted
            .partition_point(|prediction| prediction.at <= at);
        let index = after.saturating_sub(1);
        self.predicted.get(index).copied().unwrap_or_default()
    }
}

/// Tasks that read at intervals until the value is dropped.
#[derive(Debug)]
pub(super) struct Poller([JoinHandle<()>; 2]);

/// Interval between readings of the router's predictions. A reading takes a fraction of a
/// millisecond.
const PREDICTION_INTERVAL: Duration = Duration::from_millis(20);

impl Poller {
    /// Starts to read the predictions every [`PREDICTION_INTERVAL`], and the engines' metrics every
    /// `interval`. Failures are recorded as the workers' `metrics_error`.
    ///
    /// Must be called within a Tokio runtime.
    pub(super) fn start(reader: Arc<Reader>, interval: Duration) -> Self {
        let predictions = Arc::clone(&reader);
        let predictions = tokio::spawn(async move {
            let mut ticks = every(PREDICTION_INTERVAL);
            loop {
                ticks.tick().await;
                // A failure is recorded by the other task, which reads the router as well.
                let _ = predictions.read_predictions().await;
            }
        });
        let engines = tokio::spawn(async move {
            let mut ticks = every(interval);
            loop {
                ticks.tick().await;
                // A single failure is repaired by the next reading; a lasting one is reported.
                if let Err(error) = reader.read().await {
                    reader
                        .by_worker
                        .lock()
                        .iter_mut()
                        .for_each(|readings| readings.metrics_error = Some(error.clone()));
                }
            }
        });
        Self([predictions, engines])
    }
}

/// Returns an interval that delays ticks after a slow reading instead of making them up.
fn every(interval: Duration) -> Interval {
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

impl Drop for Poller {
    fn drop(&mut self) {
        self.0.iter().for_each(JoinHandle::abort);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reading_agrees_if_no_request_started_or_ended_while_it_was_taken() {
        let worker = |requests, queued_requests| {
            let worker = serde_json::json!({
                "name": "a", "url": "", "state": "healthy", "models": [], "rank": null,
                "active_blocks": 7, "requests": requests, "queued_requests": queued_requests,
                "cache_source": "estimated", "capacity_blocks": 100, "kv_events": null,
            });
            serde_json::from_value::<Worker>(worker).unwrap()
        };
        let mut readings = WorkerReadings {
            worker: worker(0, 0),
            predicted: Vec::new(),
            readings: Vec::new(),
            lags: Vec::new(),
            metrics_error: None,
            last_batch: 0,
        };
        // Queued requests are not yet at the engine.
        readings.take(1.0, &worker(5, 2));
        readings.take(1.5, &worker(3, 0));
        readings.take(2.0, &worker(4, 0));
        assert_eq!(
            readings.predicted.len(),
            2,
            "an unchanged prediction is not recorded"
        );
        let agrees = |at, until, requests| {
            readings.agrees(&Reading {
                at,
                until,
                active_blocks: 7.0,
                requests,
            })
        };
        assert!(agrees(1.1, 1.9, 3));
        assert!(agrees(2.1, 2.2, 4));
        assert!(!agrees(1.1, 1.9, 4), "the engine counts one request more");
        assert!(!agrees(1.9, 2.1, 3), "a request was sent meanwhile");
    }
}
