//! Connections to workers, for one request after another.
//!
//! HTTP clients usually drive each connection in a task of its own, which hands over one part of a
//! response at a time. The events of one read would then reach the client in as many writes, and each
//! would cost two switches of tasks. Here, the future that waits for a response drives the
//! connection, and then its body does. No task drives an idle connection: the pool looks at it when
//! it is to be used again, and in intervals.

use std::collections::HashMap;
use std::error::Error;
use std::fmt;
use std::future::poll_fn;
use std::hash::{Hash, Hasher};
use std::io;
use std::pin::{Pin, pin};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderValue, Request, Response, Uri};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::client::conn::{TrySendError, http1};
use hyper::service::Service;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use parking_lot::Mutex;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::client::TlsStream;
use tokio_util::either::Either;

use crate::workers::worker_tls::WorkerTls;

/// Time after which an idle connection is closed. Engines close idle connections too (vLLM after
/// 5 s); closing them first avoids sending a request on a connection that the engine is about to
/// close.
const IDLE_CONNECTION_TIMEOUT: Duration = Duration::from_secs(4);

/// Time between two searches for idle connections that have to be closed.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// Size of the buffer into which a response is read. Each running stream has one, and the events of a
/// stream are much smaller.
pub(super) const READ_BUFFER_BYTES: usize = 4 << 10;

/// Maximum number of idle connections per worker: about as many as a burst leaves open.
const IDLE_CONNECTIONS: usize = 1024;

/// Where a connection goes, and how it is encrypted.
#[derive(Clone, Debug)]
pub(super) struct Destination {
    /// Host and port.
    pub(super) authority: Authority,
    /// TLS; `None` for plain HTTP.
    pub(super) tls: Option<Arc<WorkerTls>>,
}

impl PartialEq for Destination {
    fn eq(&self, other: &Self) -> bool {
        let is_same_tls = match (&self.tls, &other.tls) {
            (Some(one), Some(other)) => Arc::ptr_eq(one, other),
            (None, None) => true,
            _ => false,
        };
        self.authority == other.authority && is_same_tls
    }
}

impl Eq for Destination {}

impl Hash for Destination {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.authority.hash(state);
    }
}

/// Stream of a connection, encrypted or not. The encrypted one is boxed, because it is much larger.
type WorkerStream = Either<TcpStream, Box<TlsStream<TcpStream>>>;

/// Connection to a worker.
struct Connection {
    /// Where it was opened to.
    destination: Destination,
    /// Value of the `host` header of requests that have none.
    host: HeaderValue,
    sender: http1::SendRequest<Full<Bytes>>,
    /// Future that reads and writes; the connection is closed when it is ready.
    driver: http1::Connection<TokioIo<WorkerStream>, Full<Bytes>>,
}

impl Connection {
    /// Drives the connection as far as it goes without waiting. Returns whether it can carry a
    /// request now.
    fn is_usable(&mut self) -> bool {
        let mut context = Context::from_waker(Waker::noop());
        Pin::new(&mut self.driver).poll(&mut context).is_pending() && self.sender.is_ready()
    }
}

/// Connection without a request.
struct IdleConnection {
    connection: Box<Connection>,
    since: Instant,
}

impl IdleConnection {
    /// Returns whether the connection can carry a request and has not been idle for too long.
    fn is_usable(&mut self) -> bool {
        self.since.elapsed() < IDLE_CONNECTION_TIMEOUT && self.connection.is_usable()
    }
}

/// Idle connections, by where they were opened to. Those used last come last.
type IdleConnections = HashMap<Destination, Vec<IdleConnection>>;

/// Connections to all workers.
pub(super) struct ConnectionPool {
    connector: TowerToHyperService<HttpConnector>,
    /// Maximum time of a handshake of TLS.
    handshake_timeout: Duration,
    idle: Mutex<IdleConnections>,
}

impl ConnectionPool {
    /// Creates a pool without connections. Starts the task that closes idle connections, so this
    /// must run inside a tokio runtime.
    pub(super) fn start(connector: HttpConnector, handshake_timeout: Duration) -> Arc<Self> {
        let pool = Arc::new(Self {
            connector: TowerToHyperService::new(connector),
            handshake_timeout,
            idle: Mutex::default(),
        });
        tokio::spawn(close_unused(Arc::downgrade(&pool)));
        pool
    }

    /// Takes the idle connection to `destination` that was used last; `None` if there is none that is
    /// still open.
    pub(super) fn take_idle(
        self: &Arc<Self>,
        destination: &Destination,
    ) -> Option<ConnectionLease> {
        let mut idle = self.idle.lock();
        let connections = idle.get_mut(destination)?;
        while let Some(mut idle) = connections.pop() {
            if idle.is_usable() {
                return Some(ConnectionLease {
                    connection: Some(idle.connection),
                    pool: Arc::clone(self),
                });
            }
        }
        None
    }

    /// Opens a connection to `destination`.
    ///
    /// # Errors
    /// Returns the error of the connector or of the handshake, with the I/O error that caused it among
    /// its sources.
    pub(super) async fn connect(
        self: &Arc<Self>,
        destination: &Destination,
    ) -> Result<ConnectionLease, Box<dyn Error + Send + Sync>> {
        let Destination { authority, tls } = destination;
        let url = Uri::builder()
            .scheme(Scheme::HTTP)
            .authority(authority.clone())
            .path_and_query(PathAndQuery::from_static("/"))
            .build()?;
        // As HTTP clients write it: the port is left out if it is the scheme's.
        let host = match authority.port_u16() {
            Some(port) if port != default_port(tls.is_some()) => {
                format!("{}:{port}", authority.host())
            }
            _ => authority.host().to_owned(),
        };
        let host = HeaderValue::try_from(host)?;
        let stream = self.connector.call(url).await?.into_inner();
        let stream = match tls {
            None => Either::Left(stream),
            Some(tls) => {
                let handshake = timeout(self.handshake_timeout, tls.connect(stream)).await;
                let timed_out = |_| io::Error::from(io::ErrorKind::TimedOut);
                Either::Right(Box::new(handshake.map_err(timed_out)??))
            }
        };
        let (sender, driver) = http1::Builder::new()
            .read_buf_exact_size(Some(READ_BUFFER_BYTES))
            .handshake(TokioIo::new(stream))
            .await?;
        let connection = Connection {
            destination: destination.clone(),
            host,
            sender,
            driver,
        };
        Ok(ConnectionLease {
            connection: Some(Box::new(connection)),
            pool: Arc::clone(self),
        })
    }
}

/// Returns the port of a URL that names none.
fn default_port(is_encrypted: bool) -> u16 {
    if is_encrypted { 443 } else { 80 }
}

impl fmt::Debug for ConnectionPool {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("ConnectionPool")
            .finish_non_exhaustive()
    }
}

/// Closes idle connections that are not used again, or that the worker has closed, for as long as the
/// pool exists.
async fn close_unused(pool: Weak<ConnectionPool>) {
    loop {
        tokio::time::sleep(SWEEP_INTERVAL).await;
        let Some(pool) = pool.upgrade() else {
            return;
        };
        pool.idle.lock().retain(|_, connections| {
            connections.retain_mut(IdleConnection::is_usable);
            !connections.is_empty()
        });
    }
}

/// Connection that a request uses. When it is dropped, the connection becomes idle if the exchange is
/// complete, and is closed otherwise.
pub(super) struct ConnectionLease {
    /// `None` once the connection is closed.
    connection: Option<Box<Connection>>,
    pool: Arc<ConnectionPool>,
}

impl ConnectionLease {
    /// Sends a request whose URL is a path and query, and waits for the head of the response. Adds
    /// the `host` header if the request has none. Dropping the future closes the connection. The
    /// body of the response arrives only while the returned lease is driven.
    ///
    /// # Errors
    /// Fails if the connection is lost. The error contains the request if nothing of it was sent.
    pub(super) async fn send(
        mut self,
        mut request: Request<Full<Bytes>>,
    ) -> Result<(Response<Incoming>, Self), TrySendError<Request<Full<Bytes>>>> {
        let Some(connection) = &mut self.connection else {
            unreachable!("a lease is created with a connection");
        };
        let headers = request.headers_mut();
        let host = headers.entry(http::header::HOST);
        host.or_insert_with(|| connection.host.clone());
        let response = connection.sender.try_send_request(request);
        let mut response = pin!(response);
        let response = poll_fn(|context| {
            self.drive(context);
            response.as_mut().poll(context)
        });
        let response = response.await?;
        Ok((response, self))
    }

    /// Drives the connection until it has to wait, or until it has a part of a response that was not
    /// taken yet. Has no effect once the connection is closed.
    pub(super) fn drive(&mut self, context: &mut Context<'_>) {
        if let Some(connection) = &mut self.connection
            && let Poll::Ready(_) = Pin::new(&mut connection.driver).poll(context)
        {
            // The request or the body has got the error, if there is one.
            self.connection = None;
        }
    }
}

impl Drop for ConnectionLease {
    fn drop(&mut self) {
        let Some(mut connection) = self.connection.take() else {
            return;
        };
        if !connection.is_usable() {
            return;
        }
        let mut idle = self.pool.idle.lock();
        let connections = idle.entry(connection.destination.clone()).or_default();
        if connections.len() < IDLE_CONNECTIONS {
            connections.push(IdleConnection {
                connection,
                since: Instant::now(),
            });
        }
    }
}

impl fmt::Debug for ConnectionLease {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("ConnectionLease")
            .finish_non_exhaustive()
    }
}
