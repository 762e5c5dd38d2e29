//! What the router says of its workers and what their engines say of themselves, read side by
//! side again and again while requests run.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use foresee_engine::worker_metrics::EngineLoad;
use futures_util::future::join_all;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Request, Uri};
use parking_lot::Mutex;
use serde::Deserialize;
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;

use crate::http::{HttpClient, chain, client, refusal};

const LONGEST_BODY: usize = 16 << 20;
const LIMIT: Duration = Duration::from_secs(10);

/// A worker as the router describes it.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct RouterWorker {
    pub(super) name: String,
    pub(super) url: String,
    /// Which engine behind that address it is, if one of several.
    pub(super) rank: Option<u32>,
    pub(super) active_blocks: u64,
    pub(super) cache_source: String,
    pub(super) capacity_blocks: u32,
    pub(super) kv_events: Option<KvEvents>,
}

/// Its KV events, as the router has them.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct KvEvents {
    pub(super) exact: bool,
    pub(super) lag_seconds: Option<f64>,
    pub(super) batches: u64,
}

/// One worker at one moment.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reading {
    /// Seconds since the watch began.
    pub(super) at: f64,
    /// Active blocks the router predicted just before the engine was asked, and just after: the
    /// engine's figure is of some moment between.
    pub(super) predicted: (u64, u64),
    /// Active blocks by the engine's own account.
    pub(super) held: f64,
    pub(super) waiting: u32,
}

/// All that was read of one worker.
#[derive(Clone, Debug)]
pub(super) struct Watched {
    /// As last described.
    pub(super) worker: RouterWorker,
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
    begin: Instant,
    watched: Mutex<Vec<Watched>>,
}

impl Reader {
    pub(super) fn new(admin: String) -> Self {
        Self {
            client: client(),
            admin,
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

    /// Reads every worker once.
    pub(super) async fn read(&self) -> Result<(), String> {
        let before = self.workers().await?;
        let metrics = before.iter().map(|worker| self.load_of(worker));
        let loads = join_all(metrics).await;
        let after = self.workers().await?;
        let at = self.seconds();
        let mut watched = self.watched.lock();
        for (before, load) in before.iter().zip(loads) {
            let Some(after) = after.iter().find(|it| it.name == before.name) else {
                continue;
            };
            let index = match watched.iter().position(|it| it.worker.name == before.name) {
                Some(index) => index,
                None => {
                    watched.push(Watched {
                        worker: before.clone(),
                        readings: Vec::new(),
                        lags: Vec::new(),
                        unread: None,
                        last_batch: 0,
                    });
                    watched.len() - 1
                }
            };
            watched[index].take(at, before, after, load);
        }
        Ok(())
    }

    pub(super) fn watched(&self) -> Vec<Watched> {
        self.watched.lock().clone()
    }

    async fn load_of(&self, worker: &RouterWorker) -> Result<EngineLoad, String> {
        let body = self.get(&format!("{}/metrics", worker.url)).await?;
        let text = String::from_utf8_lossy(&body);
        let mut engines = EngineLoad::parse(&text);
        engines.retain(|(rank, _)| worker.rank.is_none_or(|ours| ours == *rank));
        if engines.is_empty() {
            return Err("its /metrics tell nothing of its KV cache".to_owned());
        }
        Ok(EngineLoad {
            active_blocks: engines.iter().map(|(_, load)| load.active_blocks).sum(),
            running: engines.iter().map(|(_, load)| load.running).sum(),
            waiting: engines.iter().map(|(_, load)| load.waiting).sum(),
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
    fn take(
        &mut self,
        at: f64,
        before: &RouterWorker,
        after: &RouterWorker,
        load: Result<EngineLoad, String>,
    ) {
        match load {
            Ok(load) => self.readings.push(Reading {
                at,
                predicted: (before.active_blocks, after.active_blocks),
                held: load.active_blocks,
                waiting: load.waiting,
            }),
            Err(error) => self.unread = Some(error),
        }
        if let Some(events) = &after.kv_events
            && events.batches > self.last_batch
        {
            self.last_batch = events.batches;
            self.lags.extend(events.lag_seconds);
        }
        self.worker = after.clone();
    }
}

/// Reads at intervals until it is dropped.
#[derive(Debug)]
pub(super) struct Watch(JoinHandle<()>);

impl Watch {
    pub(super) fn start(reader: Arc<Reader>, interval: Duration) -> Self {
        Self(tokio::spawn(async move {
            let mut ticks = tokio::time::interval(interval);
            // A slow engine is asked less often, not in bursts.
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
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
        }))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.abort();
    }
}
