//! Certificates and keys of clients are swapped under load, by reloads.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use foresee_gateway::{Gateway, InheritedListeners, KeyConfig, KeyHash, ProgramParts};
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::fake_worker::*;
use crate::tls::{Authority, Files, connect_offering};

/// Number of swaps.
const SWAPS: usize = 100;

/// Returns the keys of one swap: one that is always there, and one of its own.
fn keys(swap: usize) -> Vec<KeyConfig> {
    let key = |id: &str, key: &str| KeyConfig::new(id, KeyHash::of(key.as_bytes()));
    vec![key("always", "always"), key("swapped", &swap.to_string())]
}

/// Lists the models with a key on a connection of its own, and returns the status.
async fn status_with(gateway: &Gateway, authority: &Authority, key: &str) -> u16 {
    let stream = connect_offering(gateway.address(), authority, None, &[]);
    let mut stream = stream.await.expect("the handshake failed");
    let request = format!(
        "GET /v1/models HTTP/1.1\r\nhost: g\r\nx-api-key: {key}\r\nconnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut response = Vec::new();
    within("a response", stream.read_to_end(&mut response))
        .await
        .unwrap();
    let response = String::from_utf8(response).unwrap();
    response.split(' ').nth(1).unwrap().parse().unwrap()
}

#[tokio::test]
async fn no_handshake_fails_and_no_key_is_misjudged() {
    let worker = FakeWorker::start().await;
    let authority = Arc::new(Authority::new());
    let files = Files::new("swaps", &authority.sign("0"));
    let mut initial = config(&[&worker]);
    initial.tls = Some(files.config(None));
    initial.keys = Some(keys(0));
    let next = Arc::new(Mutex::new(initial.clone()));
    let program = ProgramParts {
        config_source: Some({
            let next = Arc::clone(&next);
            Arc::new(move || Ok(next.lock().clone()))
        }),
        ..ProgramParts::default()
    };
    let listeners = InheritedListeners::default();
    let gateway = Gateway::start_on(listeners, initial, program).unwrap();
    let gateway = Arc::new(gateway);

    let is_done = Arc::new(AtomicBool::new(false));
    let served = Arc::new(AtomicUsize::new(0));
    let clients = ["always", "never"].map(|key| {
        let (gateway, authority) = (Arc::clone(&gateway), Arc::clone(&authority));
        let (is_done, served) = (Arc::clone(&is_done), Arc::clone(&served));
        let expected = if key == "always" { 200 } else { 401 };
        tokio::spawn(async move {
            while !is_done.load(Ordering::Relaxed) {
                let status = status_with(&gateway, &authority, key).await;
                assert_eq!(status, expected, "{key}");
                served.fetch_add(1, Ordering::Relaxed);
            }
        })
    });
    for swap in 1..=SWAPS {
        let identity = authority.sign(&swap.to_string());
        // Half of a file changes nothing.
        files.write_file("certificate.pem", &identity.certificate[..200]);
        next.lock().keys = Some(keys(swap));
        gateway.reload().await.unwrap_err();
        let old = (swap - 1).to_string();
        assert_eq!(status_with(&gateway, &authority, &old).await, 200);
        files.write(&identity);
        gateway.reload().await.unwrap();
        assert_eq!(status_with(&gateway, &authority, &old).await, 401);
        let new = swap.to_string();
        assert_eq!(status_with(&gateway, &authority, &new).await, 200);
    }
    is_done.store(true, Ordering::Relaxed);
    for client in clients {
        client.await.unwrap();
    }
    assert!(served.load(Ordering::Relaxed) > SWAPS);
    let text = metrics(&gateway).await;
    let failures = value(&text, "foresee_tls_handshake_failures_total");
    assert_eq!(failures, Some(0.0));
}
