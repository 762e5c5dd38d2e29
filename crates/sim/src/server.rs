//! The engine behind HTTP in real time: a stand-in for vLLM that needs no GPU.
//!
//! It answers what a router asks of vLLM, in vLLM's shapes: completions, chats and embeddings,
//! streamed or not, `/v1/models`, `/health`, `/metrics`, errors, and KV events over ZMQ. A request whose client goes
//! away is aborted at once.

mod clockwork;
mod completion;
mod job;
mod metrics;
mod publish;
mod wire;

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
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::JoinSet;

use crate::engine::EngineConfig;
use crate::server::clockwork::Clockwork;
use crate::server::job::Job;
use crate::server::publish::Publication;

pub use crate::server::publish::KvEventsConfig;
pub use foresee_engine::kv_events::Layout;

/// Largest request body, in bytes.
const BODY_LIMIT: usize = 64 << 20;

/// Connections that may wait to be accepted: a burst must not be turned away by the kernel.
const BACKLOG: u32 = 4096;

type ResponseBody = UnsyncBoxBody<Bytes, io::Error>;

/// What is served.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// The model's name. Requests for another are answered with 404.
    pub model: String,
    /// The engine behind it.
    pub engine: EngineConfig,
    /// How many times faster than real the engine runs; above 0.
    pub time_scale: f64,
    /// Most tokens of prompt and output together. At most what the KV cache holds.
    pub max_model_len: u32,
    /// How it publishes what it caches; `None` for not at all.
    pub kv_events: Option<KvEventsConfig>,
}

impl ServerConfig {
    /// A model that runs at its real speed, with as long a context as fits, up to 128k tokens.
    #[must_use]
    pub fn new(model: impl Into<String>, engine: EngineConfig) -> Self {
        let capacity = engine.blocks.saturating_mul(engine.block_size.get());
        Self {
            model: model.into(),
            engine,
            time_scale: 1.0,
            max_model_len: capacity.min(131_072),
            kv_events: None,
        }
    }

    fn check(&self) -> Result<(), &'static str> {
        let engine = &self.engine;
        let capacity = engine.blocks.saturating_mul(engine.block_size.get());
        if !(self.time_scale > 0.0 && self.time_scale.is_finite()) {
            return Err("the time scale must be above 0");
        }
        if engine.max_num_batched_tokens == 0 || engine.max_num_seqs == 0 {
            return Err("the most tokens and sequences in a step must be at least 1");
        }
        if self.max_model_len < 2 || self.max_model_len > capacity {
            return Err("the model's length must be at least 2 and fit into the KV cache");
        }
        Ok(())
    }
}

/// Listens at an address with a backlog that takes a burst.
///
/// # Errors
/// When the address is taken or cannot be used.
pub fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Serves until `shutdown` completes; then connections are cut, as when an engine dies.
///
/// # Errors
/// When the configuration is contradictory, or KV events cannot be published where it says.
pub async fn serve(
    config: ServerConfig,
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
        // Without a publisher nobody would take them.
        cache_events: publisher.is_some(),
        ..config.engine.clone()
    };
    let server = Arc::new(Server {
        clockwork: Clockwork::start(engine, config.time_scale, publisher),
        published: publication.as_ref().map(Publication::counter),
        config,
        requests: AtomicU64::new(0),
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
                connections.spawn(server.clone().serve_connection(stream));
            }
            // Out of descriptors: they come back when connections end.
            Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
        }
        while connections.try_join_next().is_some() {}
    }
    if let Some(publication) = publication {
        publication.close().await;
    }
    Ok(())
}

struct Server {
    config: ServerConfig,
    clockwork: Clockwork,
    /// Requests so far, to name them.
    requests: AtomicU64,
    /// Batches of KV events published so far.
    published: Option<Arc<AtomicU64>>,
}

impl Server {
    async fn serve_connection(self: Arc<Self>, stream: TcpStream) {
        // Without this every event of a stream would wait for the one before to be acknowledged.
        // It fails only on a connection that is gone already.
        let _ = stream.set_nodelay(true);
        let service = service_fn(move |request| {
            let server = self.clone();
            async move { Ok::<_, Infallible>(server.answer(request).await) }
        });
        // An error here is the client's: it left, or did not speak HTTP.
        let _ = hyper::server::conn::http1::Builder::new()
            .serve_connection(TokioIo::new(stream), service)
            .await;
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<ResponseBody> {
        let request_id = request.headers().get("x-request-id").cloned();
        let mut response = self
            .route(request, request_id.as_ref())
            .await
            .unwrap_or_else(|error| error_response(&error));
        if let Some(id) = request_id {
            response.headers_mut().insert("x-request-id", id);
        }
        response
    }

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
                return Ok(response(JSON, models));
            }
            (&Method::GET, "/health") => return Ok(response(TEXT, Vec::new())),
            (&Method::GET, "/metrics") => {
                let snapshot = self.clockwork.snapshot().await.map_err(stopping)?;
                let published = self.published.as_ref();
                let published = published.map(|batches| batches.load(Ordering::Relaxed));
                let text = metrics::render(&self.config, &snapshot, published);
                return Ok(response(PROMETHEUS, text.into_bytes()));
            }
            (method, path) => return Err(ApiError::path_not_found(method.as_str(), path)),
        };
        let body = read_body(request).await?;
        let number = self.requests.fetch_add(1, Ordering::Relaxed);
        let name = match request_id.and_then(|id| id.to_str().ok()) {
            Some(id) => id.to_owned(),
            None => format!("{number:016x}"),
        };
        let job = Job::read(&self.config, endpoint, name, &body)?;
        completion::answer(&self.clockwork, job).await
    }
}

async fn read_body(request: Request<Incoming>) -> Result<Bytes, ApiError> {
    let body = Limited::new(request.into_body(), BODY_LIMIT).collect();
    match body.await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(ApiError::body_too_large(BODY_LIMIT)),
        Err(error) => {
            let message = format!("The body could not be read: {error}.");
            Err(ApiError::bad_request(message, None))
        }
    }
}

const JSON: &str = "application/json";
const TEXT: &str = "text/plain; charset=utf-8";
const PROMETHEUS: &str = "text/plain; version=0.0.4; charset=utf-8";
const EVENTS: &str = "text/event-stream; charset=utf-8";

fn response(content_type: &'static str, body: Vec<u8>) -> Response<ResponseBody> {
    let body = Full::from(body).map_err(|never| match never {});
    respond_with(content_type, body.boxed_unsync())
}

fn respond_with(content_type: &'static str, body: ResponseBody) -> Response<ResponseBody> {
    let mut response = Response::new(body);
    let content_type = HeaderValue::from_static(content_type);
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    response
}

fn error_response(error: &ApiError) -> Response<ResponseBody> {
    let mut response = response(JSON, error.to_json());
    *response.status_mut() =
        StatusCode::from_u16(error.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response
}

fn stopping(_: clockwork::Stopped) -> ApiError {
    ApiError::unavailable("The engine is shutting down.")
}
