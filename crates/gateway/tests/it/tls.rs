//! TLS of the listeners: certificates that change, certificates of clients, and streams.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use foresee_core::workers::WorkerState;
use foresee_gateway::{ClientAuth, Gateway, TlsConfig};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::client::TlsStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::fake_worker::*;

/// An authority that signs certificates.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// Its own certificate in PEM.
    pub(crate) certificate: String,
}

/// A certificate and its key, in PEM.
#[derive(Clone)]
pub(crate) struct Identity {
    pub(crate) certificate: String,
    key: String,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let mut parameters = CertificateParams::new(Vec::new()).unwrap();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let certificate = parameters.self_signed(&key).unwrap().pem();
        Self {
            issuer: Issuer::new(parameters, key),
            certificate,
        }
    }

    /// Signs a certificate for `localhost` with this common name.
    pub(crate) fn sign(&self, name: &str) -> Identity {
        let mut parameters = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        parameters.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        Identity {
            certificate: parameters.signed_by(&key, &self.issuer).unwrap().pem(),
            key: key.serialize_pem(),
        }
    }
}

impl Identity {
    /// Returns a server's side of TLS; clients need a certificate of `clients`, if given.
    pub(crate) fn acceptor(&self, clients: Option<&Authority>) -> TlsAcceptor {
        let provider = Arc::new(default_provider());
        let builder = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .unwrap();
        let builder = match clients {
            Some(clients) => {
                let mut roots = RootCertStore::empty();
                let root = CertificateDer::from_pem_slice(clients.certificate.as_bytes());
                roots.add(root.unwrap()).unwrap();
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
                builder.with_client_cert_verifier(verifier.build().unwrap())
            }
            None => builder.with_no_client_auth(),
        };
        let certificate = CertificateDer::from_pem_slice(self.certificate.as_bytes()).unwrap();
        let key = PrivateKeyDer::from_pem_slice(self.key.as_bytes()).unwrap();
        let config = builder.with_single_cert(vec![certificate], key).unwrap();
        TlsAcceptor::from(Arc::new(config))
    }
}

/// Files of a listener, which are removed at the end of the test.
pub(crate) struct Files(PathBuf);

impl Files {
    pub(crate) fn new(name: &str, identity: &Identity) -> Self {
        let name = format!("foresee-tls-{}-{name}", std::process::id());
        let files = Self(std::env::temp_dir().join(name));
        std::fs::create_dir_all(&files.0).unwrap();
        files.write(identity);
        files
    }

    /// Replaces the certificate and the key.
    pub(crate) fn write(&self, identity: &Identity) {
        self.write_file("key.pem", &identity.key);
        self.write_file("certificate.pem", &identity.certificate);
    }

    pub(crate) fn write_file(&self, name: &str, text: &str) {
        let new = self.0.join("new");
        std::fs::write(&new, text).unwrap();
        std::fs::rename(new, self.0.join(name)).unwrap();
    }

    /// Returns the configuration; with an authority of clients if `client_auth` is given.
    pub(crate) fn config(&self, client_auth: Option<ClientAuth>) -> TlsConfig {
        TlsConfig {
            certificate: self.0.join("certificate.pem"),
            key: self.0.join("key.pem"),
            client_ca: client_auth.map(|_| self.0.join("clients.pem")),
            client_auth: client_auth.unwrap_or_default(),
        }
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Connects to a listener whose certificate the authority has signed.
async fn connect(
    address: SocketAddr,
    authority: &Authority,
    client: Option<&Identity>,
) -> std::io::Result<TlsStream<TcpStream>> {
    connect_offering(address, authority, client, &[]).await
}

/// As [`connect`], and offers these protocols.
pub(crate) async fn connect_offering(
    address: SocketAddr,
    authority: &Authority,
    client: Option<&Identity>,
    protocols: &[&str],
) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    let root = CertificateDer::from_pem_slice(authority.certificate.as_bytes()).unwrap();
    roots.add(root).unwrap();
    let builder = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match client {
        Some(identity) => {
            let certificate = CertificateDer::from_pem_slice(identity.certificate.as_bytes());
            let key = PrivateKeyDer::from_pem_slice(identity.key.as_bytes()).unwrap();
            builder
                .with_client_auth_cert(vec![certificate.unwrap()], key)
                .unwrap()
        }
        None => builder.with_no_client_auth(),
    };
    let protocols = protocols.iter().map(|name| name.as_bytes().to_vec());
    config.alpn_protocols = protocols.collect();
    let stream = TcpStream::connect(address).await?;
    let name = ServerName::try_from("localhost").unwrap();
    within(
        "a handshake",
        TlsConnector::from(Arc::new(config)).connect(name, stream),
    )
    .await
}

/// Returns the certificate that the listener has sent, in DER.
fn certificate_of(stream: &TlsStream<TcpStream>) -> Vec<u8> {
    let (_, session) = stream.get_ref();
    session.peer_certificates().unwrap()[0].to_vec()
}

/// Sends `GET path` and returns the status. Fails if the connection ends without a response.
async fn get(stream: &mut TlsStream<TcpStream>, path: &str) -> std::io::Result<u16> {
    let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut bytes = [0; 4096];
    let read = within("a response", stream.read(&mut bytes)).await?;
    let text = String::from_utf8_lossy(&bytes[..read]).into_owned();
    let status = text
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok());
    status.ok_or_else(|| std::io::ErrorKind::UnexpectedEof.into())
}

/// Starts a gateway with one worker and these files.
async fn start(worker: &FakeWorker, tls: TlsConfig) -> Gateway {
    let mut config = config(&[worker]);
    config.tls = Some(tls);
    gateway_with(config).await
}

#[tokio::test]
async fn a_stream_passes_through_tls_and_ends_with_its_client() {
    let mut worker = FakeWorker::start().await;
    let authority = Authority::new();
    let files = Files::new("stream", &authority.sign("a"));
    let gateway = start(&worker, files.config(None)).await;
    let mut client = connect(gateway.address(), &authority, None).await.unwrap();
    client
        .write_all(&http("POST", CHAT, chat("hi", true)))
        .await
        .unwrap();
    let mut exchange = worker.request().await;
    assert_eq!(exchange.head.get("x-forwarded-proto"), Some("https"));
    exchange.start_stream().await;
    let mut received = String::new();
    for text in ["one", "two"] {
        exchange.send_chunk(token(text)).await;
        // Each event arrives before the next one is sent.
        while !received.contains(text) {
            let mut bytes = [0; 4096];
            let read = within("an event", client.read(&mut bytes)).await.unwrap();
            received += std::str::from_utf8(&bytes[..read]).unwrap();
        }
    }
    drop(client);
    within("the connection to be closed", exchange.closed()).await;
    until_released(&gateway).await;
    // Plain HTTP gets no response.
    let mut plain = Client::sending(gateway.address(), http("GET", "/health", "")).await;
    assert!(plain.try_response().await.is_err());
}

#[tokio::test]
async fn changed_files_apply_to_new_connections_without_a_failed_handshake() {
    let worker = FakeWorker::start().await;
    let authority = Authority::new();
    let first = authority.sign("first");
    let files = Files::new("change", &first);
    let gateway = start(&worker, files.config(None)).await;
    let address = gateway.address();
    let mut open = connect(address, &authority, None).await.unwrap();
    let original = certificate_of(&open);

    // A key that belongs to no certificate, and half a certificate, change nothing.
    files.write_file("key.pem", &authority.sign("other").key);
    files.write_file("certificate.pem", &first.certificate[..100]);
    for round in 0..100 {
        let mut client = connect(address, &authority, None).await.unwrap();
        assert_eq!(get(&mut client, "/health").await.unwrap(), 200, "{round}");
        assert_eq!(certificate_of(&client), original);
    }
    files.write(&authority.sign("second"));
    let mut handshakes = 0;
    loop {
        let mut client = connect(address, &authority, None).await.unwrap();
        assert_eq!(get(&mut client, "/health").await.unwrap(), 200);
        handshakes += 1;
        if certificate_of(&client) != original {
            break;
        }
        assert!(handshakes < 100_000, "the certificate never changed");
    }
    // The open connection keeps its certificate and works.
    assert_eq!(get(&mut open, "/health").await.unwrap(), 200);
    let text = metrics(&gateway).await;
    assert_eq!(
        value(&text, "foresee_tls_handshake_failures_total"),
        Some(0.0)
    );
    let expiry = value(&text, "foresee_tls_certificate_expiry_timestamp_seconds");
    assert!(expiry.unwrap() > 1.7e9, "{expiry:?}");
}

#[tokio::test]
async fn clients_need_a_certificate_of_their_authority() {
    let worker = FakeWorker::start().await;
    let (servers, clients, others) = (Authority::new(), Authority::new(), Authority::new());
    for (client_auth, expected) in [
        (ClientAuth::Required, [false, true, false]),
        (ClientAuth::Optional, [true, true, false]),
    ] {
        let files = Files::new(&format!("{client_auth:?}"), &servers.sign("a"));
        files.write_file("clients.pem", &clients.certificate);
        let gateway = start(&worker, files.config(Some(client_auth))).await;
        let identities = [None, Some(clients.sign("c")), Some(others.sign("o"))];
        for (identity, expected) in identities.iter().zip(expected) {
            // A client of TLS 1.3 learns only from the first read that it was refused.
            let response = async {
                let mut client = connect(gateway.address(), &servers, identity.as_ref()).await?;
                get(&mut client, "/health").await
            };
            assert_eq!(response.await.is_ok(), expected, "{client_auth:?}");
        }
        gateway.shut_down().await;
    }
}

#[tokio::test]
async fn the_admin_listener_has_tls_if_that_is_configured() {
    let worker = FakeWorker::start().await;
    let authority = Authority::new();
    let files = Files::new("admin", &authority.sign("a"));
    let mut config = config(&[&worker]);
    config.tls = Some(files.config(None));
    config.admin_tls = true;
    let mut without_certificate = config.clone();
    without_certificate.tls = None;
    let gateway = gateway_with(config).await;
    let address = gateway.admin_address().unwrap();
    // It speaks HTTP/1.1 also with clients that prefer HTTP/2.
    for protocols in [&[][..], &["h2", "http/1.1"]] {
        let client = connect_offering(address, &authority, None, protocols).await;
        let mut client = client.unwrap();
        assert_ne!(client.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
        assert_eq!(get(&mut client, "/health/live").await.unwrap(), 200);
    }
    let error = Gateway::start(without_certificate).unwrap_err().to_string();
    assert!(error.contains("--tls-certificate"), "{error}");
}

#[tokio::test]
async fn files_that_cannot_be_used_fail_the_start() {
    let worker = FakeWorker::start().await;
    let authority = Authority::new();
    let files = Files::new("invalid", &authority.sign("a"));
    files.write_file("other.pem", &authority.sign("b").key);
    files.write_file("empty.pem", "");
    let valid = files.config(None);
    for (change, part) in [
        (
            TlsConfig {
                key: files.0.join("other.pem"),
                ..valid.clone()
            },
            "other.pem",
        ),
        (
            TlsConfig {
                key: files.0.join("missing.pem"),
                ..valid.clone()
            },
            "missing.pem",
        ),
        (
            TlsConfig {
                certificate: files.0.join("empty.pem"),
                ..valid.clone()
            },
            "no certificate",
        ),
        (
            TlsConfig {
                client_ca: Some(files.0.join("empty.pem")),
                ..valid
            },
            "empty.pem",
        ),
    ] {
        let mut config = config(&[&worker]);
        config.tls = Some(change);
        let error = Gateway::start(config).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}

/// Starts an engine that speaks TLS, and responds to every request with a model list. With `clients`,
/// it needs a certificate of that authority.
async fn tls_engine(authority: &Authority, clients: Option<&Authority>) -> SocketAddr {
    let acceptor = authority.sign("engine").acceptor(clients);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let Ok(mut stream) = acceptor.accept(stream).await else {
                    return;
                };
                let list = format!("{{\"data\": [{{\"id\": \"{MODEL}\"}}]}}");
                let response = whole("200 OK", "application/json", list);
                let mut bytes = [0; 65536];
                // Requests of the test are shorter than a read.
                while let Ok(1..) = stream.read(&mut bytes).await {
                    stream.write_all(&response).await.unwrap();
                }
            });
        }
    });
    address
}

#[tokio::test]
async fn workers_are_reached_over_tls_if_their_certificate_is_trusted() {
    let (authority, other, clients) = (Authority::new(), Authority::new(), Authority::new());
    let identity = clients.sign("router");
    let files = Files::new("workers", &identity);
    files.write_file("ca.pem", &authority.certificate);
    files.write_file("other.pem", &other.certificate);
    let path = |name: &str| files.0.join(name).display().to_string();
    let (ca, other) = (path("ca.pem"), path("other.pem"));
    let shown = format!(
        "tls-certificate={},tls-key={}",
        path("certificate.pem"),
        path("key.pem")
    );
    let open = tls_engine(&authority, None).await.port();
    let closed = tls_engine(&authority, Some(&clients)).await.port();
    for (worker, is_healthy) in [
        (
            format!("https://localhost:{open},resolve=off,tls-ca={ca}"),
            true,
        ),
        (
            format!("https://localhost:{open},resolve=off,tls-ca={other}"),
            false,
        ),
        (format!("https://localhost:{open},resolve=off"), false),
        (
            format!("https://localhost:{open},resolve=off,tls-verify=off"),
            true,
        ),
        (format!("https://127.0.0.1:{open},tls-ca={ca}"), false),
        (
            format!("https://127.0.0.1:{open},tls-ca={ca},tls-server-name=localhost"),
            true,
        ),
        (format!("http://127.0.0.1:{open}"), false),
        (
            format!("https://localhost:{closed},resolve=off,tls-ca={ca}"),
            false,
        ),
        (
            format!("https://localhost:{closed},resolve=off,tls-ca={ca},{shown}"),
            true,
        ),
    ] {
        let mut config = config(&[]);
        config.workers = vec![worker.parse().unwrap()];
        let gateway = Gateway::start(config).unwrap();
        let name = workers(&gateway).into_keys().next().unwrap();
        if is_healthy {
            until("a healthy worker", || {
                state(&gateway, &name) == WorkerState::Healthy
            })
            .await;
            let response = call(gateway.address(), "POST", CHAT, chat("hi", false)).await;
            assert_eq!(response.status(), 200, "{worker}");
        } else {
            a_few_probe_intervals().await;
            assert_eq!(state(&gateway, &name), WorkerState::Unhealthy, "{worker}");
        }
        gateway.shut_down().await;
    }
}

#[tokio::test]
async fn files_of_workers_are_checked_at_the_start_and_not_taken_from_clients() {
    let mut with_missing = config(&[]);
    let worker = "https://localhost:1,tls-ca=/nonexistent";
    with_missing.workers = vec![worker.parse().unwrap()];
    let error = Gateway::start(with_missing).unwrap_err().to_string();
    assert!(error.contains("/nonexistent"), "{error}");
    let gateway = gateway(&[]).await;
    let body = format!("{{\"url\": \"{worker}\"}}");
    let response = call(gateway.admin_address(), "POST", "/admin/workers", body).await;
    let error = response.error(400);
    assert!(
        error["message"].as_str().unwrap().contains("tls-ca"),
        "{error}"
    );
    for invalid in [
        "http://a:1,tls-ca=/x",
        "https://a:1,tls-verify=maybe",
        "https://a:1,tls-certificate=/x",
        "https://a:1,tls-unknown=x",
        "ftp://a:1",
    ] {
        assert!(
            invalid.parse::<foresee_gateway::WorkerConfig>().is_err(),
            "{invalid}"
        );
    }
}

#[tokio::test]
async fn changed_files_of_a_worker_apply_to_new_connections() {
    let (authority, clients) = (Authority::new(), Authority::new());
    let files = Files::new("worker-change", &Authority::new().sign("stranger"));
    files.write_file("ca.pem", &authority.certificate);
    let port = tls_engine(&authority, Some(&clients)).await.port();
    let path = |name: &str| files.0.join(name).display().to_string();
    let worker = format!(
        "https://localhost:{port},resolve=off,tls-ca={},tls-certificate={},tls-key={}",
        path("ca.pem"),
        path("certificate.pem"),
        path("key.pem")
    );
    let mut config = config(&[]);
    config.workers = vec![worker.parse().unwrap()];
    let gateway = Gateway::start(config).unwrap();
    let name = workers(&gateway).into_keys().next().unwrap();
    a_few_probe_intervals().await;
    assert_eq!(state(&gateway, &name), WorkerState::Unhealthy);
    files.write(&clients.sign("router"));
    until("a healthy worker", || {
        state(&gateway, &name) == WorkerState::Healthy
    })
    .await;
    // Files that cannot be used change nothing.
    files.write_file("key.pem", "no key");
    let response = call(gateway.address(), "POST", CHAT, chat("hi", false)).await;
    assert_eq!(response.status(), 200);
}
