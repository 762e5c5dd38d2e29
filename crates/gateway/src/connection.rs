//! One connection of a client: serves its requests over HTTP/1.1, and follows the phases of a
//! shutdown.
//!
//! The connection's state is shared by three parts that all run in the connection's task: the socket
//! with its deadlines ([`ClientSocket`]), the requests, and the bodies of their responses.

use std::convert::Infallible;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_LENGTH};
use http::{HeaderValue, Method, Request, Response, StatusCode, Version};
use hyper::body::{Body as _, Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;

use crate::client_socket::ClientSocket;
use crate::connection_state::{
    ConnectionConfig, ConnectionHandle, ConnectionState, Peer, RequestStage, begin_request,
};
use crate::reply::Body;
use crate::shutdown::ShutdownSignal;
use crate::tls::ClientStream;

/// Maximum size of a request's head. It also bounds what is buffered of a response for a client that
/// reads slowly. A head has at most 100 headers, which is the HTTP library's default.
const MAX_HEAD_BYTES: usize = 64 << 10;

/// Body of a response on a connection. The connection is idle again when the body is dropped.
#[derive(Debug)]
struct ConnectionBody {
    inner: Body,
    state: Arc<ConnectionState>,
}

impl Drop for ConnectionBody {
    fn drop(&mut self) {
        self.state.set_stage(RequestStage::Idle);
    }
}

impl hyper::body::Body for ConnectionBody {
    type Data = Bytes;
    type Error = <Body as hyper::body::Body>::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        Pin::new(&mut self.inner).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// Serves the requests of one connection with `handle` until the client or the shutdown closes it.
/// Each request has a [`ConnectionHandle`] and the [`Peer`] among its extensions. `is_encrypted` says
/// whether the stream is one of TLS.
pub(crate) async fn serve_connection<S, H, F>(
    stream: S,
    is_encrypted: bool,
    config: ConnectionConfig,
    shutdown: Arc<ShutdownSignal>,
    handle: H,
) where
    S: ClientStream,
    H: Fn(Request<Incoming>) -> F + Send + 'static,
    F: Future<Output = Response<Body>> + Send + 'static,
{
    let peer = Peer::of(stream.tcp(), is_encrypted);
    let mut phases = shutdown.subscribe();
    let state = Arc::new(ConnectionState::new(shutdown));
    let socket = ClientSocket::new(stream, config, Arc::clone(&state));
    let service = service_fn(move |mut request| {
        let connection = begin_request(&state, &mut request);
        if let Some(peer) = peer {
            request.extensions_mut().insert(peer);
        }
        let method = request.method().clone();
        let response = handle(request);
        // The HTTP library keeps a place for this future as long as the connection lasts, so the
        // future is boxed: its memory is free once the response has begun.
        Box::pin(
            async move { Ok::<_, Infallible>(begin_response(connection, &method, response.await)) },
        )
    });
    let mut http = http1::Builder::new();
    http.max_buf_size(MAX_HEAD_BYTES);
    let mut connection = pin!(http.serve_connection(TokioIo::new(socket), service));
    loop {
        tokio::select! {
            result = connection.as_mut() => {
                if let Err(error) = result {
                    tracing::debug!(%error, "connection to a client ended early");
                }
                return;
            }
            // Polls the connection again, whose parts read the phase.
            Ok(()) = phases.changed() => {}
        }
    }
}

/// Records the start of the response to a request with this `method`. Adds `Connection: close` if
/// the request's body was not read, or the gateway shuts down.
fn begin_response(
    connection: ConnectionHandle,
    method: &Method,
    response: Response<Body>,
) -> Response<ConnectionBody> {
    let mut response = response;
    let is_unread = connection.state.stage() == RequestStage::Receiving;
    if is_unread || connection.state.shutdown.has_begun() {
        let close = HeaderValue::from_static("close");
        response.headers_mut().insert(CONNECTION, close);
    }
    let has_body = *method != Method::HEAD
        && !matches!(
            response.status(),
            StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED
        );
    let has_length = response.headers().contains_key(CONTENT_LENGTH)
        || response.body().size_hint().exact().is_some();
    let is_chunked = connection.version == Version::HTTP_11 && has_body && !has_length;
    connection.state.set_stage(if is_chunked {
        RequestStage::SendingChunks
    } else {
        RequestStage::Sending
    });
    let state = connection.state;
    response.map(|inner| ConnectionBody { inner, state })
}
