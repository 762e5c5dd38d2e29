//! TLS of connections to one worker: which certificates are trusted, and which one the gateway shows.

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};

use parking_lot::RwLock;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::ring::default_provider;
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::content_watch::{ContentWatch, content_of};
use crate::tls::{TlsError, certificates, roots_of};

/// Authorities that the system trusts, read once. Certificates that cannot be parsed are left out.
static SYSTEM_ROOTS: LazyLock<Arc<RootCertStore>> = LazyLock::new(|| {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    Arc::new(roots)
});

/// Files and checks of TLS with a worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerTlsConfig {
    /// Certificates in PEM of the authorities that sign the worker's; `None` for those that the
    /// system trusts.
    pub ca: Option<PathBuf>,
    /// Certificate chain and key in PEM that the gateway shows to the worker.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// Name that the worker's certificate must have; `None` for the host of its URL.
    pub server_name: Option<String>,
    /// Whether the worker's certificate is verified.
    pub verifies: bool,
}

impl Default for WorkerTlsConfig {
    fn default() -> Self {
        Self {
            ca: None,
            identity: None,
            server_name: None,
            verifies: true,
        }
    }
}

impl WorkerTlsConfig {
    /// Returns whether files of this machine are named.
    pub(crate) fn names_files(&self) -> bool {
        self.ca.is_some() || self.identity.is_some()
    }

    /// Returns this configuration with the files of `defaults` where it names none.
    pub(crate) fn or(&self, defaults: &Self) -> Self {
        Self {
            ca: self.ca.clone().or_else(|| defaults.ca.clone()),
            identity: self.identity.clone().or_else(|| defaults.identity.clone()),
            ..self.clone()
        }
    }

    /// Reads the files. `host` is that of the worker's URL.
    ///
    /// # Errors
    /// Fails if a file cannot be used, or the name is not one of a host.
    pub(crate) fn load(&self, host: &str) -> Result<WorkerTls, TlsError> {
        let name = self.server_name.as_deref().unwrap_or(host);
        let server_name = ServerName::try_from(name.to_owned());
        let server_name = server_name.map_err(|_| TlsError::ServerName(name.to_owned()))?;
        let mut config = self.client_config()?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(WorkerTls {
            connector: TlsConnector::from(Arc::new(config)),
            server_name,
        })
    }

    /// Reads the files, and returns settings of TLS without a protocol (ALPN).
    ///
    /// # Errors
    /// Fails if a file cannot be used.
    pub(crate) fn client_config(&self) -> Result<ClientConfig, TlsError> {
        let provider = Arc::new(default_provider());
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider));
        let builder = builder.with_safe_default_protocol_versions();
        let builder = builder.map_err(|error| TlsError::Provider(error.to_string()))?;
        let builder = if self.verifies {
            builder.with_root_certificates(self.roots()?)
        } else {
            let verifier = Arc::new(NoVerification(provider));
            builder
                .dangerous()
                .with_custom_certificate_verifier(verifier)
        };
        Ok(match &self.identity {
            Some((certificate, key)) => {
                let chain = certificates(certificate)?;
                let private_key = PrivateKeyDer::from_pem_file(key);
                let private_key = private_key.map_err(|error| TlsError::File {
                    path: key.clone(),
                    error,
                })?;
                let identity = builder.with_client_auth_cert(chain, private_key);
                identity.map_err(|error| TlsError::Certificate {
                    certificate: certificate.clone(),
                    key: key.clone(),
                    error,
                })?
            }
            None => builder.with_no_client_auth(),
        })
    }

    /// Returns the content of all files; `None` if one of them cannot be read.
    fn content(&self) -> Option<Vec<u8>> {
        let identity = self.identity.iter();
        let identity = identity.flat_map(|(certificate, key)| [certificate, key]);
        content_of(identity.chain(&self.ca))
    }

    /// Returns the trusted authorities.
    fn roots(&self) -> Result<Arc<RootCertStore>, TlsError> {
        match &self.ca {
            Some(path) => roots_of(path).map(Arc::new),
            None => Ok(Arc::clone(&SYSTEM_ROOTS)),
        }
    }
}

/// TLS of connections to one worker, from files that can change.
#[derive(Debug)]
pub(crate) struct WorkerTlsFiles {
    config: WorkerTlsConfig,
    /// Host of the worker's URL.
    host: String,
    /// Content of the files when they were loaded first.
    first_content: Option<Vec<u8>>,
    /// TLS of new connections, or why it cannot be used.
    in_force: RwLock<Result<Arc<WorkerTls>, String>>,
}

impl WorkerTlsFiles {
    /// Reads the files of a worker at `host`.
    pub(crate) fn load(config: WorkerTlsConfig, host: &str) -> Self {
        // Read first, so that a change while the files are loaded is noticed later.
        let first_content = config.content();
        let loaded = config.load(host);
        Self {
            first_content,
            in_force: RwLock::new(loaded.map(Arc::new).map_err(|error| error.to_string())),
            host: host.to_owned(),
            config,
        }
    }

    /// Returns the TLS of new connections.
    ///
    /// # Errors
    /// Fails with a text if the files could not be used.
    pub(crate) fn in_force(&self) -> Result<Arc<WorkerTls>, String> {
        self.in_force.read().clone()
    }

    /// Looks at the files in intervals, and puts a new content in force once it has not changed for
    /// one interval. Content that cannot be used is logged, and the one in force stays. Never
    /// returns, unless no files are named. `worker` is the worker's name, for log lines.
    pub(crate) async fn watch(self: Arc<Self>, worker: String) {
        if !self.config.names_files() {
            return;
        }
        let files = Arc::clone(&self);
        let read = move || files.config.content();
        let mut watch = ContentWatch::used(self.first_content.as_deref());
        loop {
            watch.until_changed(read.clone()).await;
            match self.config.load(&self.host) {
                Ok(loaded) => {
                    tracing::info!(%worker, "loaded changed TLS files of a worker");
                    *self.in_force.write() = Ok(Arc::new(loaded));
                }
                Err(error) => tracing::error!(
                    %worker, %error,
                    "cannot use the changed TLS files of a worker; keeping those in force"
                ),
            }
        }
    }
}

/// TLS of connections to one worker.
#[derive(Clone)]
pub(crate) struct WorkerTls {
    connector: TlsConnector,
    server_name: ServerName<'static>,
}

impl WorkerTls {
    /// Performs the handshake of a new connection.
    ///
    /// # Errors
    /// Fails if the connection is lost, or a side does not accept the other's certificate.
    pub(crate) async fn connect(&self, stream: TcpStream) -> std::io::Result<TlsStream<TcpStream>> {
        self.connector
            .connect(self.server_name.clone(), stream)
            .await
    }
}

impl fmt::Debug for WorkerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = &self.server_name;
        f.debug_struct("WorkerTls")
            .field("server_name", name)
            .finish_non_exhaustive()
    }
}

/// Accepts every certificate of a worker.
#[derive(Debug)]
struct NoVerification(Arc<CryptoProvider>);

impl ServerCertVerifier for NoVerification {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
