//! HTTP client for servers that are not workers: lists of workers, and the collector of traces.

use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;

use crate::tls::TlsError;
use crate::workers::worker_tls::WorkerTlsConfig;

/// HTTP client for `http://` and `https://` URLs.
pub(crate) type HttpsClient = Client<HttpsConnector<HttpConnector>, Full<Bytes>>;

/// Returns a client that opens connections when it needs them, each within `connect_timeout`.
/// Certificates of servers must be signed by an authority of the file `ca`, or else by one that the
/// system trusts. Blocks on the file system.
///
/// # Errors
/// Fails if the file of authorities cannot be used.
pub(crate) fn https_client(
    ca: Option<PathBuf>,
    connect_timeout: Duration,
) -> Result<HttpsClient, TlsError> {
    let tls = WorkerTlsConfig {
        ca,
        ..WorkerTlsConfig::default()
    };
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    connector.set_connect_timeout(Some(connect_timeout));
    let connector = HttpsConnectorBuilder::new()
        .with_tls_config(tls.client_config()?)
        .https_or_http()
        .enable_http1()
        .wrap_connector(connector);
    Ok(Client::builder(TokioExecutor::new()).build(connector))
}
