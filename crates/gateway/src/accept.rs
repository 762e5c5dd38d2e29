//! Accepts the connections of one listener, up to a maximum number, and serves them until a shutdown
//! ends them.

use std::future::Future;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::server::TlsStream;

use crate::client_socket::set_tcp_options;
use crate::connection::serve_connection;
use crate::connection_limit::{ConnectionLimit, PlaceKind, too_many_connections};
use crate::connection_state::ConnectionConfig;
use crate::http2_connection::serve_http2;
use crate::listen::Listener;
use crate::log_limit::warn_limited;
use crate::reply::Body;
use crate::shutdown::{ShutdownPhase, ShutdownSignal};
use crate::tls::{HTTP2_PROTOCOL, NewestHttp, ServerStream, TlsTermination};

/// Time to wait after a failed `accept`. The usual cause is that no file descriptor is left; some may
/// be closed in that time.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(10);

/// Maximum time to tell a client that its connection is one too many.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(1);

/// Limits and shutdown of the connections of one listener.
#[derive(Clone, Debug)]
pub(crate) struct ConnectionSettings {
    pub(crate) config: ConnectionConfig,
    pub(crate) limit: Arc<ConnectionLimit>,
    pub(crate) tls: Arc<TlsTermination>,
    pub(crate) shutdown: Arc<ShutdownSignal>,
}

impl ConnectionSettings {
    /// Serves a new connection with `handle`, or refuses it if there are too many. Adds its task to
    /// `connections`.
    fn admit<H, F>(&self, stream: TcpStream, handle: &H, connections: &mut JoinSet<()>)
    where
        H: Fn(Request<Incoming>) -> F + Clone + Send + 'static,
        F: Future<Output = Response<Body>> + Send + 'static,
    {
        set_tcp_options(&stream, self.config.write_timeout);
        let Some(place) = self.limit.take() else {
            return;
        };
        if place.kind() == PlaceKind::Connection {
            let limit = Arc::clone(&self.limit);
            let (config, handle) = (self.config, handle.clone());
            let (tls, shutdown) = (Arc::clone(&self.tls), Arc::clone(&self.shutdown));
            connections.spawn(async move {
                // The place is taken until the end of the connection, or of a failed handshake.
                let _place = place;
                match tls.accept(stream, NewestHttp::Two).await {
                    Ok(ServerStream::Plain(stream)) => {
                        serve_connection(stream, false, config, shutdown, handle).await;
                    }
                    Ok(ServerStream::Tls(stream)) if is_http2(&stream) => {
                        serve_http2(stream, config, limit, shutdown, handle).await;
                    }
                    Ok(ServerStream::Tls(stream)) => {
                        serve_connection(stream, true, config, shutdown, handle).await;
                    }
                    Err(_) => {}
                }
            });
            return;
        }
        let max = self.limit.max();
        warn_limited!(key: "", max, "too many client connections; raise --max-connections");
        // A response without TLS would be of no use to a client that expects a handshake.
        if self.tls.is_on() {
            return;
        }
        connections.spawn(async move {
            let _place = place;
            let _ = timeout(REFUSAL_TIMEOUT, refuse(stream)).await;
        });
    }
}

/// Accepts connections and serves their requests with `handle` until the phase
/// [`Draining`](ShutdownPhase::Draining), then waits for the connections to end. In the phase
/// [`Closed`](ShutdownPhase::Closed), closes the remaining ones, which releases their bookings.
pub(crate) async fn serve<H, F>(listener: Listener, settings: ConnectionSettings, handle: H)
where
    H: Fn(Request<Incoming>) -> F + Clone + Send + 'static,
    F: Future<Output = Response<Body>> + Send + 'static,
{
    let mut connections = JoinSet::new();
    let mut draining = pin!(settings.shutdown.reached(ShutdownPhase::Draining));
    loop {
        tokio::select! {
            biased;
            () = draining.as_mut() => break,
            // Frees the tasks of connections that have ended.
            Some(_) = connections.join_next() => {}
            stream = accept(&listener.socket) => {
                settings.admit(stream, &handle, &mut connections);
            }
        }
    }
    // The next process accepts the connections that wait at an inherited socket. At a socket of this
    // process, they would be reset.
    if !listener.is_inherited {
        match accept_waiting(listener.socket) {
            Ok(waiting) => {
                for stream in waiting {
                    settings.admit(stream, &handle, &mut connections);
                }
            }
            Err(error) => tracing::debug!(%error, "cannot accept the last connections"),
        }
    }
    let ended = async { while connections.join_next().await.is_some() {} };
    tokio::select! {
        () = ended => {}
        () = settings.shutdown.reached(ShutdownPhase::Closed) => {}
    }
    connections.shutdown().await;
}

/// Returns whether the handshake has selected HTTP/2.
fn is_http2(stream: &TlsStream<TcpStream>) -> bool {
    let (_, session) = stream.get_ref();
    session.alpn_protocol() == Some(HTTP2_PROTOCOL)
}

/// Accepts one connection. Retries until that succeeds; errors are logged, at a limited rate.
async fn accept(listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return stream,
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

/// Closes the listener, and returns the connections that waited to be accepted, up to the first
/// error.
fn accept_waiting(listener: TcpListener) -> io::Result<Vec<TcpStream>> {
    let listener = listener.into_std()?;
    let mut waiting = Vec::new();
    while let Ok((stream, _)) = listener.accept() {
        stream.set_nonblocking(true)?;
        waiting.push(TcpStream::from_std(stream)?);
    }
    Ok(waiting)
}

/// Responds with a 503 before the client's request is read, then closes the connection once the client
/// has closed it. The caller sets the time limit.
async fn refuse(mut stream: TcpStream) -> io::Result<()> {
    let body = too_many_connections().to_json();
    let head = format!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\n\
         content-length: {}\r\nretry-after: 1\r\nconnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(&[head.as_bytes(), &body].concat()).await?;
    stream.shutdown().await?;
    let mut discarded = [0; 1024];
    while stream.read(&mut discarded).await? > 0 {}
    Ok(())
}
