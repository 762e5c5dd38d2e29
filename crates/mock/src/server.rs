//! Serves the HTTP/1 requests of all connections until the shutdown.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use foresee_engine::error::ApiError;
use foresee_engine::request::Endpoint;
use foresee_sim::engine::EngineConfig;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::header::HeaderValue;
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::JoinSet;

use crate::config::MockEngineConfig;
use crate::engine_loop::EngineLoop;
use crate::fault::Fault;
use crate::kv_publisher::Publication;
use crate::reply::{JSON, PROMETHEUS, ResponseBody, TEXT, error_reply, reply, stopping};
use crate::request::{CompletionRequest, prompt_tokens};
use crate::{metrics, response, wire};

/// Maximum size of a request body, in bytes.
const MAX_BODY_BYTES: usize = 64 << 20;

/// Maximum number of connections that wait to be accepted. The kernel refuses further ones, so the
/// limit is higher than any burst of the workloads.
const BACKLOG: u32 = 4096;

/// Binds a listener whose backlog is large enough for a burst of connections.
///
/// # Errors
/// If the address is in use or cannot be used.
///
/// # Panics
/// If no Tokio runtime with I/O is active.
pub fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Serves until `shutdown` completes. Then all connections are cut, as if the engine had crashed,
/// and the sockets for KV events are closed. A failure to accept a connection does not end the
/// server.
///
/// `config.engine.cache_events` is ignored: `config.kv_events` decides whether events are produced.
///
/// # Errors
/// If the configuration is contradictory, or if a socket for KV events cannot be bound.
pub async fn serve(
    config: MockEngineConfig,
    listener: TcpListener,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    config
        .check()
        .map_err(|message| io::Error::new(io::ErrorKind::InvalidInput, message))?;
    let (publication, publisher) = match config.kv_events.clone() {
        Some(events) => {
            let (publication, publisher) = Publication::open(events).await?;
            (Some(publication), Some(publisher))
        }
        None => (None, None),
    };
    let engine = EngineConfig {
        // Without a publisher, events would accumulate in the engine.
        cache_events: publisher.is_some(),
        ..config.engine.clone()
    };
    let mock_engine = Arc::new(MockEngine {
        engine_loop: EngineLoop::start(engine, config.speedup, publisher),
        published: publication.as_ref().map(Publication::counter),
        config,
        requests: AtomicU64::new(0),
        fault: Mutex::default(),
    });
    let mut connections = JoinSet::new();
    tokio::pin!(shutdown);
    loop {
        let accepted = tokio::select! {
            () = &mut shutdown => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                connections.spawn(mock_engine.clone().serve_connection(stream));
            }
            // The process has no free file descriptors. Some become free when connections end.
            Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
        }
        while connections.try_join_next().is_some() {}
    }
    if let Some(publication) = publication {
        publication.close().await;
    }
    Ok(())
}

/// State shared by all connections.
struct MockEngine {
    config: MockEngineConfig,
    engine_loop: EngineLoop,
    /// Number of requests so far; the source of request ids.
    requests: AtomicU64,
    /// The fault that was set last.
    fault: Mutex<Fault>,
    /// Number of KV event batches published so far; `None` without KV events.
    published: Option<Arc<AtomicU64>>,
}

impl MockEngine {
    /// Serves the HTTP/1 requests of one connection until the client or the server closes it.
    /// Errors of the connection are ignored.
    async fn serve_connection(self: Arc<Self>, stream: TcpStream) {
        // With Nagle's algorithm, each event of a stream would be delayed until the client has
        // acknowledged the previous one. The call fails only on a closed connection.
        let _ = stream.set_nodelay(true);
        let service = service_fn(move |request| {
            let mock_engine = self.clone();
            async move { Ok::<_, Infallible>(mock_engine.handle(request).await) }
        });
        // An error here is caused by the client: it disconnected or sent invalid HTTP.
        let _ = hyper::server::conn::http1::Builder::new()
            .serve_connection(TokioIo::new(stream), service)
            .await;
    }

    /// Returns the response to a request, with its `x-request-id` repeated. Errors become error
    /// responses.
    async fn handle(&self, request: Request<Incoming>) -> Response<ResponseBody> {
        let request_id = request.headers().get("x-request-id").cloned();
        let mut response = self
            .route(request, request_id.as_ref())
            .await
            .unwrap_or_else(|error| error_reply(&error));
        if let Some(id) = request_id {
            response.headers_mut().insert("x-request-id", id);
        }
        response
    }

    /// Returns the response of the endpoint that the method and path name. `request_id` becomes
    /// part of the id of a completion; without one, a number is generated.
    ///
    /// # Errors
    /// If the path is unknown, the body is invalid or too large, the engine rejects a request that
    /// is not streamed, or the engine is shutting down.
    async fn route(
        &self,
        request: Request<Incoming>,
        request_id: Option<&HeaderValue>,
    ) -> Result<Response<ResponseBody>, ApiError> {
        let endpoint = match (request.method(), request.uri().path()) {
            (&Method::POST, "/v1/chat/completions") => Endpoint::ChatCompletions,
            (&Method::POST, "/v1/completions") => Endpoint::Completions,
            (&Method::POST, "/v1/embeddings") => Endpoint::Embeddings,
            (&Method::GET, "/v1/models") => {
                let models = wire::models(&self.config.model, self.config.max_model_len);
                return Ok(reply(JSON, models));
            }
            (&Method::GET, "/health") => return Ok(reply(TEXT, Vec::new())),
            (&Method::GET, "/metrics") => {
                let snapshot = self.engine_loop.snapshot().await.map_err(stopping)?;
                let published = self.published.as_ref();
                let published = published.map(|batches| batches.load(Ordering::Relaxed));
                let text = metrics::render(&self.config, &snapshot, published);
                return Ok(reply(PROMETHEUS, text.into_bytes()));
            }
            (&Method::POST, "/tokenize") => {
                let tokens = prompt_tokens(&read_body(request).await?)?;
                let body = wire::tokens(&tokens, self.config.max_model_len);
                return Ok(reply(JSON, body));
            }
            (&Method::POST, "/fault") => {
                let fault = Fault::parse(&read_body(request).await?)?;
                self.engine_loop.set_slowdown(fault.slowdown);
                *self.fault.lock() = fault;
                return Ok(reply(TEXT, Vec::new()));
            }
            (method, path) => return Err(ApiError::path_not_found(method.as_str(), path)),
        };
        let body = read_body(request).await?;
        self.fault.lock().check()?;
        let number = self.requests.fetch_add(1, Ordering::Relaxed);
        let name = match request_id.and_then(|id| id.to_str().ok()) {
            Some(id) => id.to_owned(),
            None => format!("{number:016x}"),
        };
        let completion = CompletionRequest::read(&self.config, endpoint, name, &body)?;
        response::respond(&self.engine_loop, completion).await
    }
}

/// Reads a request body of at most [`MAX_BODY_BYTES`].
///
/// # Errors
/// Status 413 for a larger body, and status 400 if the client does not send the body to its end.
async fn read_body(request: Request<Incoming>) -> Result<Bytes, ApiError> {
    let body = Limited::new(request.into_body(), MAX_BODY_BYTES).collect();
    match body.await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => {
            Err(ApiError::body_too_large(MAX_BODY_BYTES))
        }
        Err(error) => {
            let message = format!("The request body could not be read: {error}.");
            Err(ApiError::bad_request(message, None))
        }
    }
}
