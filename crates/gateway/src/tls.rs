//! TLS of the listeners: certificates from files, which are read again when they change.
//!
//! A connection takes the certificate in force when it begins. New files replace it only if they can be
//! used: the key must belong to the certificate.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use parking_lot::Mutex;
use rustls::RootCertStore;
use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::content_watch::{ContentWatch, content_of};
use crate::log_limit::warn_limited;
use crate::metrics::Metrics;

/// Maximum time of a handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Name of HTTP/2 in the negotiation of TLS.
pub(crate) const HTTP2_PROTOCOL: &[u8] = b"h2";
/// Name of HTTP/1.1 in the negotiation of TLS.
const HTTP1_PROTOCOL: &[u8] = b"http/1.1";

/// Which clients need a certificate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ClientAuth {
    /// A client may have a certificate; one that is not signed by the authority is refused.
    Optional,
    /// Every client needs a certificate that the authority has signed.
    #[default]
    Required,
}

/// Files of a listener's TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsConfig {
    /// Certificate chain in PEM, the server's own certificate first.
    pub certificate: PathBuf,
    /// Private key in PEM.
    pub key: PathBuf,
    /// Certificates in PEM of the authorities that sign clients' certificates; `None` to ask clients
    /// for none.
    pub client_ca: Option<PathBuf>,
    /// Which clients need a certificate. Has no effect without `client_ca`.
    pub client_auth: ClientAuth,
}

/// Why a file cannot be used for TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read, or is not PEM.
    #[error("cannot use {}: {error}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        error: pem::Error,
    },
    /// A file has no certificate.
    #[error("{} has no certificate in PEM", .0.display())]
    NoCertificate(PathBuf),
    /// The certificate cannot be used with the key.
    #[error("cannot use the certificate in {} with the key in {}: {error}", certificate.display(), key.display())]
    Certificate {
        /// File of the certificate.
        certificate: PathBuf,
        /// File of the key.
        key: PathBuf,
        /// What is wrong with it.
        error: rustls::Error,
    },
    /// The certificates of the authorities cannot be used.
    #[error("cannot use the authorities in {}: {error}", path.display())]
    Ca {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        error: String,
    },
    /// The admin listener is to have TLS, and there is no certificate.
    #[error("--admin-tls needs a certificate: set --tls-certificate and --tls-key")]
    NoAdminCertificate,
    /// A worker's name is neither that of a host nor an address.
    #[error("`{0}` is not the name of a host: set tls-server-name=NAME")]
    ServerName(String),
    /// The cryptography cannot be used.
    #[error("cannot use TLS: {0}")]
    Provider(String),
}

impl TlsConfig {
    /// Reads the files.
    ///
    /// # Errors
    /// Fails if a file cannot be read, or the key does not belong to the certificate.
    pub(crate) fn load(&self) -> Result<LoadedTls, TlsError> {
        // Read first, so that a change while the files are loaded is noticed later.
        let content = self.content();
        let chain = certificates(&self.certificate)?;
        let expires = chain.first().and_then(expiry);
        let key = PrivateKeyDer::from_pem_file(&self.key);
        let key = key.map_err(|error| TlsError::File {
            path: self.key.clone(),
            error,
        })?;
        let invalid = |error| TlsError::Certificate {
            certificate: self.certificate.clone(),
            key: self.key.clone(),
            error,
        };
        let provider = Arc::new(default_provider());
        let builder = rustls::ServerConfig::builder_with_provider(provider);
        let builder = builder.with_safe_default_protocol_versions();
        let builder = builder.map_err(invalid)?;
        let builder = match &self.client_ca {
            Some(path) => builder.with_client_cert_verifier(self.client_verifier(path)?),
            None => builder.with_no_client_auth(),
        };
        let mut http1 = builder.with_single_cert(chain, key).map_err(invalid)?;
        let mut http2 = http1.clone();
        http1.alpn_protocols = vec![HTTP1_PROTOCOL.to_vec()];
        http2.alpn_protocols = vec![HTTP2_PROTOCOL.to_vec(), HTTP1_PROTOCOL.to_vec()];
        Ok(LoadedTls {
            server: ServerTls {
                http1: Arc::new(http1),
                http2: Arc::new(http2),
            },
            expires,
            content,
        })
    }

    /// Returns the check of clients' certificates.
    fn client_verifier(&self, path: &Path) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
        let roots = roots_of(path)?;
        let provider = Arc::new(default_provider());
        let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
        let builder = match self.client_auth {
            ClientAuth::Optional => builder.allow_unauthenticated(),
            ClientAuth::Required => builder,
        };
        builder.build().map_err(|error| TlsError::Ca {
            path: path.to_owned(),
            error: error.to_string(),
        })
    }

    /// Returns the content of all files; `None` if one of them cannot be read.
    fn content(&self) -> Option<Vec<u8>> {
        content_of(
            [&self.certificate, &self.key]
                .into_iter()
                .chain(&self.client_ca),
        )
    }
}

/// Returns the certificates in a file, at least one.
pub(crate) fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    let certificates: Vec<_> = read.map_err(|error| TlsError::File {
        path: path.to_owned(),
        error,
    })?;
    if certificates.is_empty() {
        return Err(TlsError::NoCertificate(path.to_owned()));
    }
    Ok(certificates)
}

/// Returns the authorities in a file.
pub(crate) fn roots_of(path: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots.add(certificate).map_err(|error| TlsError::Ca {
            path: path.to_owned(),
            error: error.to_string(),
        })?;
    }
    Ok(roots)
}

/// Returns when a certificate expires, in seconds since 1970; `None` if it cannot be parsed.
fn expiry(certificate: &CertificateDer<'_>) -> Option<i64> {
    let (_, certificate) = x509_parser::parse_x509_certificate(certificate).ok()?;
    Some(certificate.validity().not_after.timestamp())
}

/// The most recent version of HTTP that a listener serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NewestHttp {
    /// HTTP/1.1.
    One,
    /// HTTP/2.
    Two,
}

/// TLS of one certificate, by the versions of HTTP that clients are offered.
#[derive(Clone, Debug)]
struct ServerTls {
    http1: Arc<rustls::ServerConfig>,
    http2: Arc<rustls::ServerConfig>,
}

/// Content of the files.
#[derive(Clone, Debug)]
pub(crate) struct LoadedTls {
    server: ServerTls,
    /// When the certificate expires, in seconds since 1970.
    expires: Option<i64>,
    /// The files' bytes when they were loaded; `None` if one of them could not be read.
    content: Option<Vec<u8>>,
}

/// TLS of the listeners: the certificate in force, or none.
#[derive(Debug)]
pub(crate) struct TlsTermination {
    in_force: ArcSwapOption<ServerTls>,
    /// Files of the certificate in force. Locked while another one is put in force.
    config: Mutex<Option<TlsConfig>>,
    /// Content of the files at the start.
    first_content: Option<Vec<u8>>,
    metrics: Arc<Metrics>,
}

impl TlsTermination {
    /// Creates the TLS of files whose content was loaded; without any, connections are not encrypted.
    pub(crate) fn new(
        config: Option<TlsConfig>,
        loaded: Option<LoadedTls>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let termination = Self {
            in_force: ArcSwapOption::empty(),
            config: Mutex::default(),
            first_content: loaded.as_ref().and_then(|loaded| loaded.content.clone()),
            metrics,
        };
        termination.install(config, loaded);
        termination
    }

    /// Puts files in force whose content was loaded. Connections that are open keep theirs.
    pub(crate) fn install(&self, config: Option<TlsConfig>, loaded: Option<LoadedTls>) {
        let mut in_force = self.config.lock();
        *in_force = config;
        self.store(loaded);
    }

    /// Puts the new content of files in force, unless other files have been put in force meanwhile.
    /// Returns whether it did.
    fn renew(&self, config: &TlsConfig, loaded: LoadedTls) -> bool {
        let in_force = self.config.lock();
        let is_current = in_force.as_ref() == Some(config);
        if is_current {
            self.store(Some(loaded));
        }
        is_current
    }

    /// Makes new connections use a certificate, or none. The files must be locked.
    fn store(&self, loaded: Option<LoadedTls>) {
        let expires = loaded.as_ref().and_then(|loaded| loaded.expires);
        self.metrics
            .tls_certificate_expiry_timestamp_seconds
            .set(expires.unwrap_or_default() as f64);
        let server = loaded.map(|loaded| Arc::new(loaded.server));
        self.in_force.store(server);
    }

    /// Returns whether new connections are encrypted.
    pub(crate) fn is_on(&self) -> bool {
        self.in_force.load().is_some()
    }

    /// Performs the handshake of a new connection to a listener that serves HTTP up to `newest`.
    /// Returns the stream as it is without TLS.
    ///
    /// # Errors
    /// Fails if the client does not complete a handshake in time.
    pub(crate) async fn accept(
        &self,
        stream: TcpStream,
        newest: NewestHttp,
    ) -> io::Result<ServerStream> {
        let in_force = self.in_force.load_full();
        let Some(server) = in_force else {
            return Ok(ServerStream::Plain(stream));
        };
        let config = match newest {
            NewestHttp::One => Arc::clone(&server.http1),
            NewestHttp::Two => Arc::clone(&server.http2),
        };
        let handshake = TlsAcceptor::from(config).accept(stream);
        let result = timeout(HANDSHAKE_TIMEOUT, handshake).await;
        let result = result.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        match result {
            Ok(stream) => Ok(ServerStream::Tls(Box::new(stream))),
            Err(error) => {
                self.metrics.tls_handshake_failures.inc();
                warn_limited!(key: "", %error, "handshake with a client failed");
                Err(error)
            }
        }
    }

    /// Looks at the files in intervals, and puts a new content in force once it has not changed for
    /// one interval. Content that cannot be used is logged. Never returns.
    pub(crate) async fn watch(self: Arc<Self>) {
        let termination = Arc::clone(&self);
        let read = move || termination.config.lock().clone()?.content();
        let mut watch = ContentWatch::used(self.first_content.as_deref());
        loop {
            watch.until_changed(read.clone()).await;
            let termination = Arc::clone(&self);
            // A panic has been logged.
            let _ = tokio::task::spawn_blocking(move || termination.load_again()).await;
        }
    }

    /// Loads the files in force again. Blocks on the file system.
    fn load_again(&self) {
        let Some(config) = self.config.lock().clone() else {
            return;
        };
        match config.load() {
            Ok(loaded) => {
                if self.renew(&config, loaded) {
                    let path = config.certificate.display();
                    tracing::info!(%path, "loaded a changed certificate");
                }
            }
            Err(error) => tracing::error!(
                %error,
                "cannot use the changed certificate; keeping the one in force"
            ),
        }
    }
}

/// Connection of a client, encrypted or not.
pub(crate) enum ServerStream {
    Plain(TcpStream),
    /// Boxed, because it is much larger than a plain one.
    Tls(Box<TlsStream<TcpStream>>),
}

/// Stream of a client's connection, and the TCP connection below it.
pub(crate) trait ClientStream: AsyncRead + AsyncWrite + Unpin {
    /// Returns the TCP connection.
    fn tcp(&self) -> &TcpStream;
}

impl ClientStream for TcpStream {
    fn tcp(&self) -> &TcpStream {
        self
    }
}

impl ClientStream for Box<TlsStream<TcpStream>> {
    fn tcp(&self) -> &TcpStream {
        self.get_ref().0
    }
}
