//! Requests for a list of workers, over HTTP or HTTPS.

use std::error::Error;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT, HOST, USER_AGENT};
use http::{Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::workers::worker_tls::WorkerTlsConfig;

/// Maximum time of a request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Largest list, in bytes.
const MAX_BYTES: usize = 4 << 20;

/// Any error of a request.
type FetchError = Box<dyn Error + Send + Sync>;

/// A list at a URL.
#[derive(Debug)]
pub(super) struct Page {
    url: Uri,
    /// Certificates of the authorities that sign the server's; `None` for those of the system.
    ca: Option<PathBuf>,
    /// Time between two requests, which the server is told.
    refresh: Duration,
}

impl Page {
    /// Prepares requests to a URL.
    pub(super) fn new(url: Uri, ca: Option<PathBuf>, refresh: Duration) -> Self {
        Self { url, ca, refresh }
    }

    /// Returns the URL.
    pub(super) fn url(&self) -> &Uri {
        &self.url
    }

    /// Returns the list. Each request has a connection of its own, and reads the certificates anew.
    ///
    /// # Errors
    /// Fails with the cause as text if there is no whole response with status 200 in time.
    pub(super) async fn fetch(&self) -> Result<String, String> {
        match timeout(REQUEST_TIMEOUT, self.try_fetch()).await {
            Ok(Ok(text)) => Ok(text),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("no response within {REQUEST_TIMEOUT:?}")),
        }
    }

    async fn try_fetch(&self) -> Result<String, FetchError> {
        let host = self.url.host().ok_or("the URL has no host")?;
        let host = host.trim_matches(['[', ']']);
        let is_https = self.url.scheme_str() == Some("https");
        let port = self
            .url
            .port_u16()
            .unwrap_or(if is_https { 443 } else { 80 });
        let stream = TcpStream::connect((host, port)).await?;
        let response = if is_https {
            let tls = WorkerTlsConfig {
                ca: self.ca.clone(),
                ..WorkerTlsConfig::default()
            };
            let host = host.to_owned();
            let tls = tokio::task::spawn_blocking(move || tls.load(&host)).await??;
            self.exchange(tls.connect(stream).await?).await?
        } else {
            self.exchange(stream).await?
        };
        if response.status() != StatusCode::OK {
            return Err(format!("the response has status {}", response.status()).into());
        }
        let body = Limited::new(response.into_body(), MAX_BYTES);
        let body = body.collect().await?;
        Ok(String::from_utf8(body.to_bytes().to_vec())?)
    }

    /// Sends the request and returns the head of its response.
    async fn exchange<S>(&self, stream: S) -> Result<Response<Incoming>, FetchError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        // Ends with the body, or when the response is dropped.
        tokio::spawn(connection);
        let authority = self.url.authority().ok_or("the URL has no host")?;
        let path = self.url.path_and_query().map_or("/", |path| path.as_str());
        let request = Request::get(path)
            .header(HOST, authority.as_str())
            .header(ACCEPT, "application/json")
            .header(USER_AGENT, "foresee")
            .header(
                "x-prometheus-refresh-interval-seconds",
                self.refresh.as_secs().max(1),
            )
            .body(Empty::<Bytes>::new())?;
        Ok(sender.send_request(request).await?)
    }
}
