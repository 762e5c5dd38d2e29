//! The admin listener's socket, and its connections.
//!
//! Apart from the API's listener: connections are few and short, and their number, age and time to
//! send a request are bounded, so that probes are served whatever other clients do.

use std::convert::Infallible;
use std::fs::{self, Permissions};
use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response};
use http_body_util::Either;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{Notify, Semaphore, watch};
use tokio::task::JoinSet;

use super::event_stream::EventStream;
use super::settings::AdminListen;
use crate::listen::listen;
use crate::log_limit::warn_limited;
use crate::reply::Body;
use crate::tls::{NewestHttp, ServerStream, TlsTermination};

/// Maximum number of concurrent connections. Further clients wait in the accept queue.
const MAX_CONNECTIONS: usize = 256;

/// Length of the accept queue of a Unix socket.
const UNIX_BACKLOG: i32 = 128;

/// Maximum time in which a client may send the head of a request. Also the maximum idle time of a
/// connection.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);

/// Age at which a connection is closed after its current response. Bounds the time for which a
/// client that does not read can occupy a connection.
const MAX_CONNECTION_AGE: Duration = Duration::from_secs(300);

/// Maximum time for the current response of a connection that is to be closed.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(30);

/// Maximum size of the head of a request.
const MAX_HEAD_BYTES: usize = 64 << 10;

/// Time to wait after a failed `accept`.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(10);

/// Body of a response of the admin listener.
pub(crate) type AdminBody = Either<Body, EventStream>;

/// Closes the connection that a request arrived on, whatever is being sent there. An extension of
/// each request.
#[derive(Clone, Debug, Default)]
pub(super) struct ConnectionCloser(Arc<Notify>);

impl ConnectionCloser {
    /// Closes the connection.
    pub(super) fn close(&self) {
        self.0.notify_one();
    }
}

/// A socket on which the admin listener accepts connections.
#[derive(Debug)]
pub(crate) enum AdminListener {
    /// At a TCP address.
    Tcp(TcpListener),
    /// At a Unix socket, whose file is removed with the listener.
    Unix(UnixListener, SocketFile),
}

/// A connection to the admin listener.
enum AdminStream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl AdminListener {
    /// Uses an inherited socket, or opens one at `address`; `None` for [`AdminListen::Off`] without
    /// an inherited socket. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// Fails if the address cannot be bound, the inherited socket cannot be used, or another process
    /// listens at the Unix socket.
    pub(crate) fn open(
        inherited: Option<std::net::TcpListener>,
        address: &AdminListen,
    ) -> io::Result<Option<Self>> {
        if let Some(socket) = inherited {
            socket.set_nonblocking(true)?;
            return Ok(Some(Self::Tcp(TcpListener::from_std(socket)?)));
        }
        match address {
            AdminListen::Off => Ok(None),
            AdminListen::Tcp(address) => Ok(Some(Self::Tcp(listen(*address)?))),
            AdminListen::Unix(path) => {
                let (listener, file) = listen_unix(path)?;
                Ok(Some(Self::Unix(listener, file)))
            }
        }
    }

    /// Returns where the listener listens, with the port that the operating system chose.
    pub(crate) fn address(&self) -> io::Result<AdminListen> {
        match self {
            Self::Tcp(listener) => listener.local_addr().map(AdminListen::Tcp),
            Self::Unix(_, file) => Ok(AdminListen::Unix(file.path.clone())),
        }
    }

    /// Accepts connections and serves their requests with `handle` until `stopped` is true. Then
    /// closes the socket, removes the file of a Unix socket, and waits at most `timeout` for
    /// running responses. With `tls`, TCP connections are encrypted.
    pub(crate) async fn serve<H, F>(
        self,
        mut stopped: watch::Receiver<bool>,
        timeout: Duration,
        tls: Option<Arc<TlsTermination>>,
        handle: H,
    ) where
        H: Fn(Request<Incoming>) -> F + Clone + Send + 'static,
        F: Future<Output = Response<AdminBody>> + Send + 'static,
    {
        let free = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut connections = JoinSet::new();
        loop {
            let accept = async {
                let permit = Arc::clone(&free).acquire_owned().await;
                (self.accept().await, permit)
            };
            let (stream, permit) = tokio::select! {
                _ = stopped.wait_for(|stopped| *stopped) => break,
                accepted = accept => accepted,
            };
            let (handle, stopped, tls) = (handle.clone(), stopped.clone(), tls.clone());
            connections.spawn(async move {
                match stream {
                    AdminStream::Tcp(stream) => {
                        let stream = match tls {
                            Some(tls) => tls.accept(stream, NewestHttp::One).await,
                            None => Ok(ServerStream::Plain(stream)),
                        };
                        match stream {
                            Ok(ServerStream::Plain(stream)) => {
                                serve_connection(stream, stopped, handle).await;
                            }
                            Ok(ServerStream::Tls(stream)) => {
                                serve_connection(stream, stopped, handle).await;
                            }
                            Err(_) => {}
                        }
                    }
                    AdminStream::Unix(stream) => serve_connection(stream, stopped, handle).await,
                }
                drop(permit);
            });
            // Removes the tasks of connections that have ended.
            while connections.try_join_next().is_some() {}
        }
        drop(self);
        let all_ended = async { while connections.join_next().await.is_some() {} };
        if tokio::time::timeout(timeout, all_ended).await.is_err() {
            tracing::warn!(
                ?timeout,
                "closing connections that still run after the shutdown timeout"
            );
        }
        connections.shutdown().await;
    }

    /// Accepts one connection. Retries until that succeeds; errors are logged, at a limited rate.
    async fn accept(&self) -> AdminStream {
        loop {
            let accepted = match self {
                Self::Tcp(listener) => listener.accept().await.and_then(|(stream, _)| {
                    stream.set_nodelay(true)?;
                    Ok(AdminStream::Tcp(stream))
                }),
                Self::Unix(listener, _) => {
                    let accepted = listener.accept().await;
                    accepted.map(|(stream, _)| AdminStream::Unix(stream))
                }
            };
            match accepted {
                Ok(stream) => return stream,
                Err(error) => {
                    warn_limited!(
                        key: "", %error,
                        "cannot accept a connection; if files are the limit, raise `ulimit -n`"
                    );
                    tokio::time::sleep(ACCEPT_RETRY_DELAY).await;
                }
            }
        }
    }
}

/// Serves the requests of one connection. When `stopped` becomes true, and at
/// [`MAX_CONNECTION_AGE`], the connection is closed after its current response.
async fn serve_connection<S, H, F>(stream: S, mut stopped: watch::Receiver<bool>, handle: H)
where
    S: AsyncRead + AsyncWrite + Unpin,
    H: Fn(Request<Incoming>) -> F,
    F: Future<Output = Response<AdminBody>>,
{
    let closer = ConnectionCloser::default();
    let must_drop = closer.clone();
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(closer.clone());
        let response = handle(request);
        async move { Ok::<_, Infallible>(response.await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = pin!(connection);
    let must_close = async {
        tokio::select! {
            _ = stopped.wait_for(|stopped| *stopped) => {}
            () = tokio::time::sleep(MAX_CONNECTION_AGE) => {}
        }
    };
    let ended = tokio::select! {
        ended = connection.as_mut() => Some(ended),
        () = must_close => None,
        () = must_drop.0.notified() => return,
    };
    let ended = match ended {
        Some(ended) => ended,
        None => {
            connection.as_mut().graceful_shutdown();
            let Ok(ended) = tokio::time::timeout(CLOSE_TIMEOUT, connection).await else {
                tracing::debug!("closing a connection to the admin listener that takes too long");
                return;
            };
            ended
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "connection to a client ended early");
    }
}

/// The file of a Unix socket. Dropping it removes the file, unless another file has the path by
/// then.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    /// Device and inode of the file.
    identity: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|identity| identity == self.identity) {
            // A file that remains is replaced at the next start.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Returns the device and inode of a file. Does not follow a symbolic link.
fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Listens at a Unix socket that only the user of this process can open. Replaces the file of a
/// socket at which no process listens.
///
/// # Errors
/// Fails if a process listens at the socket, the path is another kind of file, or the socket cannot
/// be created.
fn listen_unix(path: &Path) -> io::Result<(UnixListener, SocketFile)> {
    remove_stale(path)?;
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.bind(&SockAddr::unix(path)?)?;
    let file = SocketFile {
        path: path.to_owned(),
        identity: identity(path)?,
    };
    // Connections are refused until `listen`, so none is accepted with other permissions.
    fs::set_permissions(path, Permissions::from_mode(0o600))?;
    socket.listen(UNIX_BACKLOG)?;
    socket.set_nonblocking(true)?;
    let listener = std::os::unix::net::UnixListener::from(OwnedFd::from(socket));
    Ok((UnixListener::from_std(listener)?, file))
}

/// Removes the file of a Unix socket at which no process listens. Has no effect if there is no
/// file.
///
/// # Errors
/// Fails if a process listens at the socket, or the path is another kind of file.
fn remove_stale(path: &Path) -> io::Result<()> {
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if !metadata.file_type().is_socket() {
        let message = "the file exists and is not a socket; choose another path";
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, message));
    }
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // A blocking connect would wait while the accept queue of the other process is full.
    socket.set_nonblocking(true)?;
    match socket.connect(&SockAddr::unix(path)?) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
        _ => {
            let message = "another process listens at the socket; stop it or choose another path";
            Err(io::Error::new(io::ErrorKind::AddrInUse, message))
        }
    }
}
