//! What the router says of its workers and what their engines say of themselves, read side by
//! side again and again while requests run.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use foresee_engine::worker_metrics::{CacheConfig, EngineLoad};
use futures_util::future::join_all;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Request, Uri};
use parking_lot::Mutex;
use serde::Deserialize;
use tokio::task::JoinHandle;
use tokio::time::{Interval, MissedTickBehavior};

use crate::http::{HttpClient, chain, client, refusal};

const LONGEST_BODY: usize = 16 << 20;
const LIMIT: Duration = Duration::from_secs(10);

/// A worker as the router describes it.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct RouterWorker {
    pub(super) name: String,
    pub(super) url: String,
    state: String,
    pub(super) models: Vec<String>,
    /// Which engine behind that address it is, if one of several.
    pub(super) rank: Option<u32>,
    pub(super) active_blocks: u64,
    requests: u32,
    held_requests: u32,
    pub(super) cache_source: String,
    pub(super) capacity_blocks: u32,
    pub(super) kv_events: Option<KvEvents>,
}

impl RouterWorker {
    /// Whether it is to serve requests for the model, as far as its models are known.
    pub(super) fn may_serve(&self, model: Option<&str>) -> bool {
        let serves = |model| self.models.is_empty() || self.models.iter().any(|it| it == model);
        self.state != "draining" && model.is_none_or(serves)
    }

    /// What is predicted of it since `at`.
    fn prediction(&self, at: f64) -> Prediction {
        Prediction {
            at,
            blocks: self.active_blocks,
            requests: self.requests.saturating_sub(self.held_requests),
        }
    }

    pub(super) fn serves(&self) -> bool {
        self.state == "healthy" && !self.models.is_empty()
    }
}

/// Its KV events, as the router has them.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct KvEvents {
    pub(super) exact: bool,
    pub(super) lag_seconds: Option<f64>,
    pub(super) batches: u64,
}

/// What the router predicted of an engine from some time on.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Prediction {
    /// Since when, in seconds since the watch began.
    pub(super) at: f64,
    /// Active blocks.
    pub(super) blocks: u64,
    /// Requests that it was sent, and has not ended.
    pub(super) requests: u32,
}

/// What an engine said of itself at one moment.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reading {
    /// When it was asked, in seconds since the watch began.
    pub(super) at: f64,
    /// When it had answered.
    until: f64,
    /// Active blocks by its own account, of the router's size.
    pub(super) held: f64,
    /// Requests that it has, as far as it has counted them.
    pub(super) requests: u32,
}

/// All that was read of one worker.
#[derive(Clone, Debug)]
pub(super) struct Watched {
    /// As last described.
    pub(super) worker: RouterWorker,
    /// What the router predicted, whenever that changed.
    pub(super) predicted: Vec<Prediction>,
    pub(super) readings: Vec<Reading>,
    /// Seconds from a batch of events to its application, a figure for each batch that was seen.
    pub(super) lags: Vec<f64>,
    /// Why its metrics could not be read, if so.
    pub(super) unread: Option<String>,
    last_batch: u64,
}

/// Reads a router's admin API and its workers' metrics.
#[derive(Debug)]
pub(super) struct Reader {
    client: HttpClient,
    admin: String,
    /// The router's tokens per block.
    block_size: u32,
    begin: Instant,
    watched: Mutex<Vec<Watched>>,
}

impl Reader {
    pub(super) fn new(admin: String, block_size: u32) -> Self {
        Self {
            client: client(),
            admin,
            block_size,
            begin: Instant::now(),
            watched: Mutex::default(),
        }
    }

    pub(super) fn seconds(&self) -> f64 {
        self.begin.elapsed().as_secs_f64()
    }

    pub(super) async fn workers(&self) -> Result<Vec<RouterWorker>, String> {
        #[derive(Deserialize)]
        struct List {
            workers: Vec<RouterWorker>,
        }
        let body = self.get(&format!("{}/admin/workers", self.admin)).await?;
        let list: List = serde_json::from_slice(&body).map_err(|error| error.to_string())?;
        Ok(list.workers)
    }

    /// The sum of the router's counters of that name whose line holds `label`.
    pub(super) async fn counter(&self, name: &str, label: &str) -> Result<u64, String> {
        let body = self.get(&format!("{}/metrics", self.admin)).await?;
        let text = String::from_utf8_lossy(&body);
        let lines = text
            .lines()
            .filter(|line| line.starts_with(name) && line.contains(label));
        let values = lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
        Ok(values.sum::<f64>() as u64)
    }

    /// Reads what the router predicts now.
    async fn read_predictions(&self) -> Result<Vec<RouterWorker>, String> {
        let workers = self.workers().await?;
        let at = self.seconds();
        let mut watched = self.watched.lock();
        for worker in &workers {
            match watched.iter_mut().find(|it| it.worker.name == worker.name) {
                Some(watched) => watched.take(at, worker),
                None => watched.push(Watched {
                    worker: worker.clone(),
                    predicted: vec![worker.prediction(at)],
                    readings: Vec::new(),
                    lags: Vec::new(),
                    unread: None,
                    last_batch: 0,
                }),
            }
        }
        Ok(workers)
    }

    /// Reads every worker once, and what the router predicts.
    pub(super) async fn read(&self) -> Result<(), String> {
        let workers = self.read_predictions().await?;
        let at = self.seconds();
        let read = join_all(workers.iter().map(|worker| self.read_engine(worker, at))).await;
        let mut watched = self.watched.lock();
        for (worker, reading) in workers.iter().zip(read) {
            let known = watched.iter_mut().find(|it| it.worker.name == worker.name);
            match (known, reading) {
                (Some(watched), Ok(reading)) => watched.readings.push(reading),
                (Some(watched), Err(error)) => watched.unread = Some(error),
                (None, _) => {}
            }
        }
        Ok(())
    }

    pub(super) fn watched(&self) -> Vec<Watched> {
        self.watched.lock().clone()
    }

    /// What the engine behind a worker says, which is asked `at` that time.
    async fn read_engine(&self, worker: &RouterWorker, at: f64) -> Result<Reading, String> {
        let body = self.get(&format!("{}/metrics", worker.url)).await?;
        let text = String::from_utf8_lossy(&body);
        let mut engines = EngineLoad::parse(&text);
        engines.retain(|(rank, _)| worker.rank.is_none_or(|ours| ours == *rank));
        if engines.is_empty() {
            return Err("its /metrics tell nothing of its KV cache".to_owned());
        }
        let caches = CacheConfig::parse(&text);
        let theirs = caches.iter().find_map(|(_, cache)| cache.block_size);
        let per_block = f64::from(theirs.unwrap_or(self.block_size)) / f64::from(self.block_size);
        let blocks: f64 = engines.iter().map(|(_, load)| load.active_blocks).sum();
        let requests = engines.iter().map(|(_, load)| load.running + load.waiting);
        Ok(Reading {
            at,
            until: self.seconds(),
            // Engines report a share of their blocks, rounded by a float's last digits.
            held: (blocks * per_block).round(),
            requests: requests.sum(),
        })
    }

    async fn get(&self, url: &str) -> Result<Bytes, String> {
        let uri: Uri = url.parse().map_err(|error| format!("{url}: {error}"))?;
        let mut request = Request::new(Full::new(Bytes::new()));
        *request.uri_mut() = uri;
        let asked = async {
            let response = self.client.request(request).await;
            let response = response.map_err(|error| chain(&error))?;
            if !response.status().is_success() {
                let status = response.status();
                return Err(format!("{status}: {}", refusal(response).await));
            }
            let body = Limited::new(response.into_body(), LONGEST_BODY).collect();
            let body = body.await.map_err(|error| chain(error.as_ref()))?;
            Ok(body.to_bytes())
        };
        let answered = tokio::time::timeout(LIMIT, asked).await;
        let answered = answered.unwrap_or_else(|_| Err(format!("no answer within {LIMIT:?}")));
        answered.map_err(|error| format!("GET {url}: {error}"))
    }
}

impl Watched {
    fn take(&mut self, at: f64, worker: &RouterWorker) {
        let now = worker.prediction(at);
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

    /// Whether it was predicted to have as many requests as it says, from before it was asked until
    /// it had answered.
    pub(super) fn agrees(&self, reading: &Reading) -> bool {
        let predicted = [reading.at, reading.until].map(|at| self.predicted_at(at).requests);
        predicted == [reading.requests; 2]
    }

    /// What was predicted at some time.
    pub(super) fn predicted_at(&self, at: f64) -> Prediction {
        let after = self.predicted.partition_point(|it| it.at <= at);
        let index = after.saturating_sub(1);
        self.predicted.get(index).copied().unwrap_or_default()
    }
}

/// Reads at intervals until it is dropped.
#[derive(Debug)]
pub(super) struct Watch([JoinHandle<()>; 2]);

/// Time between two looks at what the router predicts: it costs a fraction of a millisecond.
const PREDICTIONS: Duration = Duration::from_millis(20);

impl Watch {
    pub(super) fn start(reader: Arc<Reader>, interval: Duration) -> Self {
        let predictions = Arc::clone(&reader);
        let predictions = tokio::spawn(async move {
            let mut ticks = every(PREDICTIONS);
            loop {
                ticks.tick().await;
                // The engines are asked as well, and then it is said what is wrong.
                let _ = predictions.read_predictions().await;
            }
        });
        let engines = tokio::spawn(async move {
            let mut ticks = every(interval);
            loop {
                ticks.tick().await;
                // What is missing once is there the next time, or shows as missing in the report.
                if let Err(error) = reader.read().await {
                    reader
                        .watched
                        .lock()
                        .iter_mut()
                        .for_each(|it| it.unread = Some(error.clone()));
                }
            }
        });
        Self([predictions, engines])
    }
}

/// Whoever is slow is asked less often, not in bursts.
fn every(interval: Duration) -> Interval {
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.iter().for_each(JoinHandle::abort);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reading_agrees_if_nothing_came_or_went_while_it_was_taken() {
        let worker = |requests, held_requests| {
            let worker = serde_json::json!({
                "name": "a", "url": "", "state": "healthy", "models": [], "rank": null,
                "active_blocks": 7, "requests": requests, "held_requests": held_requests,
                "cache_source": "shadow", "capacity_blocks": 100, "kv_events": null,
            });
            serde_json::from_value::<RouterWorker>(worker).unwrap()
        };
        let mut watched = Watched {
            worker: worker(0, 0),
            predicted: Vec::new(),
            readings: Vec::new(),
            lags: Vec::new(),
            unread: None,
            last_batch: 0,
        };
        // Those in the router's line are not the engine's.
        watched.take(1.0, &worker(5, 2));
        watched.take(1.5, &worker(3, 0));
        watched.take(2.0, &worker(4, 0));
        assert_eq!(watched.predicted.len(), 2, "what is as before is not noted");
        let agrees = |at, until, requests| {
            watched.agrees(&Reading {
                at,
                until,
                held: 7.0,
                requests,
            })
        };
        assert!(agrees(1.1, 1.9, 3));
        assert!(agrees(2.1, 2.2, 4));
        assert!(!agrees(1.1, 1.9, 4), "the engine counts another one");
        assert!(!agrees(1.9, 2.1, 3), "one was sent meanwhile");
    }
}
