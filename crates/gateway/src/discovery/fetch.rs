//! Requests for a list of workers, over HTTP or HTTPS.

use std::error::Error;
use std::path::PathBuf;
use std::time::Duration;

use http::header::{ACCEPT, USER_AGENT};
use http::{Request, StatusCode, Uri};
use http_body_util::{BodyExt, Full, Limited};
use tokio::time::timeout;

use crate::https_client::https_client;
use crate::upstream::root_cause;

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
    /// Time between two requests, which each request reports to the server.
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
            Ok(Err(error)) => Err(root_cause(&*error)),
            Err(_) => Err(format!("no response within {REQUEST_TIMEOUT:?}")),
        }
    }

    async fn try_fetch(&self) -> Result<String, FetchError> {
        let ca = self.ca.clone();
        let client = tokio::task::spawn_blocking(move || https_client(ca, REQUEST_TIMEOUT));
        let client = client.await??;
        let request = Request::get(self.url.clone())
            .header(ACCEPT, "application/json")
            .header(USER_AGENT, "foresee")
            .header(
                "x-prometheus-refresh-interval-seconds",
                self.refresh.as_secs().max(1),
            )
            .body(Full::default())?;
        let response = client.request(request).await?;
        if response.status() != StatusCode::OK {
            return Err(format!("the response has status {}", response.status()).into());
        }
        let body = Limited::new(response.into_body(), MAX_BYTES);
        let body = body.collect().await?;
        Ok(String::from_utf8(body.to_bytes().to_vec())?)
    }
}
