//! The queue of finished spans, and the task that sends them to the collector in batches.
//!
//! The SDK's own batch processor runs on a thread without an async runtime, in which an async HTTP
//! client fails, and counts what it drops only for its log. Here, a task of the gateway's runtime
//! sends the spans, and a metric says what became of them.

use std::time::Duration;

use opentelemetry::Context;
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{Span, SpanData, SpanExporter as _, SpanProcessor};
use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout, timeout_at};

use crate::log_limit::warn_limited;
use crate::metrics::Metrics;
use crate::traces::collector_client::CollectorClient;
use crate::traces::config::{TraceConfig, TraceError};

/// Maximum number of spans that wait to be sent.
const MAX_QUEUED_SPANS: usize = 8192;

/// Maximum number of spans in one request to the collector.
const MAX_BATCH_SPANS: usize = 512;

/// Time for which a batch is collected.
const BATCH_DELAY: Duration = Duration::from_secs(1);

/// Puts finished spans into the queue. Drops a span if the queue is full.
#[derive(Debug)]
pub(super) struct SpanQueue {
    spans: mpsc::Sender<SpanData>,
    /// Counts spans that found the queue full, or closed.
    dropped: Counter,
}

impl SpanProcessor for SpanQueue {
    fn on_start(&self, _span: &mut Span, _context: &Context) {}

    fn on_end(&self, span: SpanData) {
        if self.spans.try_send(span).is_err() {
            self.dropped.inc();
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _timeout: Duration) -> OTelSdkResult {
        Ok(())
    }
}

/// Task that sends spans.
#[derive(Debug)]
pub(super) struct Exporter {
    /// Whether the task has to end once the queue is empty.
    is_ending: watch::Sender<bool>,
    /// Handle of the task; `None` after [`finish`](Self::finish).
    task: Mutex<Option<JoinHandle<()>>>,
}

impl Exporter {
    /// Starts the task, and returns the queue that it sends from.
    ///
    /// # Errors
    /// Fails if a client for the collector cannot be built.
    pub(super) fn start(
        config: &TraceConfig,
        resource: &Resource,
        metrics: &Metrics,
    ) -> Result<(Self, SpanQueue), TraceError> {
        let exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(CollectorClient::new(config)?)
            .with_endpoint(config.endpoint.as_str())
            .with_protocol(Protocol::HttpBinary)
            .with_timeout(config.timeout)
            .build();
        let mut exporter = exporter.map_err(|error| TraceError::Exporter(error.to_string()))?;
        exporter.set_resource(resource);
        let (spans, queue) = mpsc::channel(MAX_QUEUED_SPANS);
        let (is_ending, ending) = watch::channel(false);
        let batches = Batches {
            exporter,
            queue,
            ending,
            timeout: config.timeout,
            sent: metrics.trace_span_counter("sent"),
            failed: metrics.trace_span_counter("failed"),
        };
        let exporter = Self {
            is_ending,
            task: Mutex::new(Some(tokio::spawn(batches.send_all()))),
        };
        let dropped = metrics.trace_span_counter("queue_full");
        Ok((exporter, SpanQueue { spans, dropped }))
    }

    /// Closes the queue and waits until the task has sent what is in it, for at most `limit`.
    pub(super) async fn finish(&self, limit: Duration) {
        let Some(mut task) = self.task.lock().take() else {
            return;
        };
        self.is_ending.send_replace(true);
        if timeout(limit, &mut task).await.is_err() {
            task.abort();
            tracing::warn!(
                ?limit,
                "the OTLP collector did not take the last spans in time; they are lost"
            );
        }
    }
}

/// State of the task.
struct Batches {
    exporter: SpanExporter,
    queue: mpsc::Receiver<SpanData>,
    ending: watch::Receiver<bool>,
    /// Maximum time of one export.
    timeout: Duration,
    /// Counts spans that the collector has accepted.
    sent: Counter,
    /// Counts spans that could not be sent.
    failed: Counter,
}

impl Batches {
    /// Sends batches until the queue is closed and empty.
    async fn send_all(mut self) {
        loop {
            let batch = self.next_batch().await;
            if batch.is_empty() {
                return;
            }
            let spans = batch.len();
            let exported = timeout(self.timeout, self.exporter.export(batch)).await;
            let error = match exported {
                Ok(Ok(())) => {
                    self.sent.inc_by(spans as u64);
                    continue;
                }
                Ok(Err(error)) => error.to_string(),
                Err(_) => format!("no response within {:?}", self.timeout),
            };
            self.failed.inc_by(spans as u64);
            warn_limited!(
                key: "", spans, %error,
                "cannot send spans to the OTLP collector; they are dropped, requests are still served"
            );
        }
    }

    /// Returns the next spans: a full batch, or those of [`BATCH_DELAY`] from the first one. Empty once
    /// the queue is closed and empty.
    async fn next_batch(&mut self) -> Vec<SpanData> {
        let mut batch = Vec::with_capacity(MAX_BATCH_SPANS);
        let mut deadline = None;
        while batch.len() < MAX_BATCH_SPANS {
            let room = MAX_BATCH_SPANS - batch.len();
            let Self { queue, ending, .. } = self;
            let is_ending = *ending.borrow();
            let received = async {
                tokio::select! {
                    received = queue.recv_many(&mut batch, room) => received > 0,
                    // The rest is read without waiting.
                    Ok(()) = ending.changed(), if !is_ending => true,
                }
            };
            let continues = match deadline {
                None => received.await,
                Some(deadline) => timeout_at(deadline, received).await.unwrap_or(false),
            };
            if *self.ending.borrow() {
                self.queue.close();
            }
            if !continues {
                break;
            }
            if deadline.is_none() && !batch.is_empty() {
                deadline = Some(Instant::now() + BATCH_DELAY);
            }
        }
        batch
    }
}
