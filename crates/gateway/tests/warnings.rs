//! Faults that clients cannot observe are logged, with the action to take.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

#[path = "it/fake_worker.rs"]
#[allow(dead_code, reason = "this test uses only a part of it")]
mod fake_worker;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use fake_worker::*;
use foresee_gateway::WorkerConfig;
use parking_lot::Mutex;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// Subscriber that stores the warnings of this process.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<String>>>);

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::WARN
    }

    fn event(&self, event: &Event<'_>) {
        let mut fields = Fields(String::new());
        event.record(&mut fields);
        self.0.lock().push(fields.0);
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

/// Fields of an event as text.
struct Fields(String);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0 += &format!("{field}={value:?} ");
    }
}

#[tokio::test]
async fn ignoring_events_because_of_unreadable_models_is_logged_once() {
    let log = Log::default();
    tracing::subscriber::set_global_default(log.clone()).unwrap();
    let worker = FakeWorker::start().await;
    worker.set_model_list("no list");
    let mut config = config(&[]);
    config.events_grace = Duration::from_millis(20);
    let description = format!("{},kv-events=tcp://127.0.0.1:1", worker.spec("locked"));
    config.workers = vec![description.parse::<WorkerConfig>().unwrap()];
    let gateway = gateway_with(config).await;

    let model_warnings = || {
        let warnings = log.0.lock();
        let about_models = warnings.iter().filter(|text| text.contains("/v1/models"));
        about_models.cloned().collect::<Vec<_>>()
    };
    until("a warning", || !model_warnings().is_empty()).await;
    a_few_probe_intervals().await;
    let warnings = model_warnings();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(warnings[0].contains("worker=locked"), "{warnings:?}");
    assert!(warnings[0].contains(&format!("http://{}/v1/models", worker.address)));

    // The subscription continues as soon as the models can be read.
    worker.set_model_list(r#"{"data": [{"id": "m"}]}"#);
    let waiting_ends = async {
        while worker_json(&gateway, "locked").await.unwrap()["kv_events"]["state"] == "waiting" {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    within("the subscription to continue", waiting_ends).await;
}
