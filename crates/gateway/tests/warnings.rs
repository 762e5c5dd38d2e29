//! What goes wrong without anybody seeing it is said in the log, with what to do about it.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

#[path = "it/fake_worker.rs"]
#[allow(dead_code, reason = "the test needs a part of it")]
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

/// Keeps the warnings of this process.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<String>>>);

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::WARN
    }

    fn event(&self, event: &Event<'_>) {
        let mut said = Said(String::new());
        event.record(&mut said);
        self.0.lock().push(said.0);
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

struct Said(String);

impl Visit for Said {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0 += &format!("{field}={value:?} ");
    }
}

#[tokio::test]
async fn models_that_cannot_be_read_are_why_events_are_not_followed() {
    let log = Log::default();
    tracing::subscriber::set_global_default(log.clone()).unwrap();
    let worker = FakeWorker::start().await;
    worker.set_model_list("no list");
    let mut config = config(&[]);
    config.events_grace = Duration::from_millis(20);
    let written = format!("{},kv-events=tcp://127.0.0.1:1", worker.spec("locked"));
    config.workers = vec![written.parse::<WorkerConfig>().unwrap()];
    let gateway = gateway_with(config).await;

    let told = || {
        let said = log.0.lock();
        let of_models = said.iter().filter(|it| it.contains("/v1/models"));
        of_models.cloned().collect::<Vec<_>>()
    };
    until("a warning", || !told().is_empty()).await;
    a_few_probe_intervals().await;
    let told = told();
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].contains("worker=locked"), "{told:?}");
    assert!(told[0].contains(&format!("http://{}/v1/models", worker.address)));

    // It goes on as soon as they can be.
    worker.set_model_list(r#"{"data": [{"id": "m"}]}"#);
    let waits = async {
        while shown(&gateway, "locked").await.unwrap()["kv_events"]["state"] == "waiting" {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    within("its events to be looked for", waits).await;
}
