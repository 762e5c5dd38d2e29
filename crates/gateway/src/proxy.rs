//! Public listener: parses each request, routes it, sends it to a worker and passes the response on.

use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use foresee_core::batch::Batch;
use foresee_core::queue::QueueOrder;
use foresee_core::router::Request as RouteRequest;
use foresee_core::sequence::Sequence;
use foresee_core::workers::WorkerId;
use foresee_engine::error::ApiError;
use foresee_engine::output_text::Continuation;
use foresee_engine::request::{ApiRequest, BodyError, Endpoint, PromptSequences};
use http::header::{CONTENT_ENCODING, EXPECT};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Either, LengthLimitError, Limited};
use hyper::body::{Body as _, Incoming};

use crate::failover::{Failover, UpstreamResponse, no_worker};
use crate::gateway_state::GatewayState;
use crate::metrics::{Metrics, Outcome};
use crate::reply::{self, Body};
use crate::tokenization::TokenizedPrompts;
use crate::tracked_body::{RequestContext, TrackedBody};
use crate::upstream::{UpstreamClient, UpstreamRequest, strip_hop_by_hop};

/// Maximum size of a body that is parsed and hashed on the I/O thread. At about 1 GB/s, such a body
/// delays other streams of the thread by at most 0.3 ms.
const MAX_INLINE_PARSE_BYTES: usize = 256 << 10;

/// Maximum size of a text that is tokenised on the I/O thread, at about 10 MB/s.
pub(crate) const MAX_INLINE_TOKENIZE_BYTES: usize = 4 << 10;

/// Maximum time in which a client may send the rest of a body that was refused.
const DISCARD_TIMEOUT: Duration = Duration::from_secs(5);

/// Request header with the priority in the queue: lower values are dispatched first; the default is 0.
const PRIORITY_HEADER: &str = "x-foresee-priority";

/// Request header with the expected number of output tokens.
const EXPECTED_TOKENS_HEADER: &str = "x-foresee-expected-tokens";

/// Properties of a request that routing and the response's observation need.
#[derive(Debug)]
struct ParsedRequest {
    /// Name of the model as the request gave it. If it gave none, the model that all workers list
    /// first; empty if there is no such model.
    model: String,
    /// Whether the request named the model.
    names_model: bool,
    /// Hashed prompts of the request, one for each output.
    sequences: PromptSequences,
    /// Limit of output tokens.
    max_tokens: Option<u32>,
    /// Whether the output continues to `max_tokens`.
    ignore_eos: bool,
    /// Whether the request offers tools to the model.
    has_tools: bool,
    is_streaming: bool,
    /// Bytes of prompt text, from which bytes per token are learned; 0 if there is nothing to learn.
    prompt_bytes: usize,
    /// Whether the request has one prompt, all of it hashed, and asks for one output.
    is_single: bool,
    /// Where the output continues the prompt's sequence, if that is known.
    continuation: Option<Continuation>,
    /// Whether the request asks the engine to list the cached blocks that it finds (full report mode).
    full_report_mode: bool,
    /// Prompt tokens counted by the tokenizer; `None` if the engine's count can differ from it.
    tokenizer_count: Option<u32>,
    /// Hints from the request's headers.
    hints: RequestHints,
}

/// Routing hints from the headers of a request.
#[derive(Debug, Default)]
struct RequestHints {
    /// Number of output tokens that the client expects.
    expected_output_tokens: Option<u32>,
    /// Priority in the queue; lower values are dispatched first.
    priority: i32,
    /// Hash of the tenant, for the queue order `fair`. All requests without the tenant header are one
    /// tenant.
    tenant: u64,
    /// Workers that the client excluded by naming another data-parallel rank.
    excluded_workers: Vec<WorkerId>,
}

impl ParsedRequest {
    /// Returns the router's view of the request.
    fn request(&self) -> RouteRequest<'_> {
        RouteRequest {
            model: if self.names_model { &self.model } else { "" },
            prompt: &self.sequences.first,
            max_tokens: self.max_tokens,
            ignore_eos: self.ignore_eos,
            expected_output_tokens: self.hints.expected_output_tokens,
            has_tools: self.has_tools,
            is_streaming: self.is_streaming,
            priority: self.hints.priority,
            tenant: self.hints.tenant,
            excluded_workers: &self.hints.excluded_workers,
        }
    }
}

/// Guard of a request without a response. Dropping it while it has metrics counts the request as one
/// whose client left.
#[derive(Debug)]
struct OutcomeGuard<'m>(Option<&'m Metrics>);

impl Drop for OutcomeGuard<'_> {
    fn drop(&mut self) {
        if let Some(metrics) = self.0 {
            metrics.record_outcome(Outcome::ClientLeft);
        }
    }
}

impl GatewayState {
    /// Handles one request to the public API. `client` is that of the I/O thread. Errors become
    /// responses. Counts the outcome of each error response, and of a client that leaves before its
    /// response begins; [`TrackedBody`] counts the responses of workers. The response has the
    /// `x-request-id` of the worker, of the client or a new one.
    pub(crate) async fn handle_api(
        self: Arc<Self>,
        client: Arc<UpstreamClient>,
        request: Request<Incoming>,
    ) -> Response<Body> {
        let request_id = self.request_ids.next();
        let client_request_id = request.headers().get("x-request-id").cloned();
        let mut guard = OutcomeGuard(Some(&self.metrics));
        let result = self
            .try_handle_api(&client, request, request_id.clone())
            .await;
        guard.0 = None;
        let mut response = match result {
            Ok(response) => response,
            Err(error) => {
                self.metrics.record_outcome(match error.status {
                    503 => Outcome::Unavailable,
                    500.. => Outcome::WorkerFailed,
                    _ => Outcome::Refused,
                });
                reply::error(&error)
            }
        };
        response
            .headers_mut()
            .entry("x-request-id")
            .or_insert(client_request_id.unwrap_or(request_id));
        response
    }

    /// Responds to `GET /v1/models` and `GET /health` itself, and books and sends every other
    /// request. A compressed body, or one of an unknown path, is not parsed: the request is routed
    /// by load alone. `request_id` is used unless the client sent an id.
    ///
    /// # Errors
    /// Returns the error response for the client: the body or a hint is invalid, or no worker
    /// responded.
    async fn try_handle_api(
        self: &Arc<Self>,
        client: &UpstreamClient,
        request: Request<Incoming>,
        request_id: HeaderValue,
    ) -> Result<Response<Body>, ApiError> {
        let arrived_at = self.clock.now();
        let (head, body) = request.into_parts();
        let endpoint = match (&head.method, head.uri.path()) {
            (&Method::POST, "/v1/chat/completions") => Some(Endpoint::ChatCompletions),
            (&Method::POST, "/v1/completions") => Some(Endpoint::Completions),
            (&Method::POST, "/v1/embeddings") => Some(Endpoint::Embeddings),
            (&Method::GET, "/v1/models") => return Ok(self.models()),
            (&Method::GET, "/health") => return Ok(self.health()),
            // CONNECT asks for a tunnel. Neither the gateway nor an engine offers one.
            (&Method::CONNECT, _) => return Err(ApiError::path_not_found("CONNECT", "tunnel")),
            _ => None,
        };
        let body = self.read_body(&head.headers, body).await?;
        let is_compressed = head.headers.contains_key(CONTENT_ENCODING);
        let mut parsed = match endpoint {
            Some(endpoint) if !is_compressed => {
                self.parse_off_thread(endpoint, body.clone()).await?
            }
            // The gateway cannot parse this body, so it is routed by load alone.
            _ => ParsedRequest {
                model: String::new(),
                names_model: false,
                sequences: PromptSequences::repeated(
                    Sequence::unhashed(0, self.config.router.block_size),
                    1,
                ),
                max_tokens: None,
                ignore_eos: false,
                has_tools: false,
                is_streaming: true,
                prompt_bytes: 0,
                is_single: false,
                continuation: None,
                full_report_mode: false,
                tokenizer_count: None,
                hints: RequestHints::default(),
            },
        };
        parsed.hints = self.request_hints(&head.headers)?;
        let mut batch = self.route(&parsed)?;
        let mut upstream_request = UpstreamRequest::new(head, body, request_id, endpoint.is_some());
        upstream_request.full_report_mode = parsed.full_report_mode;
        let excluded = &parsed.hints.excluded_workers;
        let mut failover = Failover::new(self, client, &upstream_request, excluded);
        let response = failover.send(&mut batch).await?;
        let request_id = upstream_request.request_id();
        Ok(self.pass_through(response, batch, parsed, arrived_at, request_id))
    }

    /// Returns the routing hints in `headers`. The tenant is 0 unless the queue order is `fair` and
    /// the request has the tenant header. Fails with a 400 if the priority or the expected number
    /// of tokens is not an integer in range.
    fn request_hints(&self, headers: &HeaderMap) -> Result<RequestHints, ApiError> {
        let priority = "an integer; lower values are served first (default 0)";
        let tokens = "an integer: the expected number of output tokens";
        let tenant = match self.config.router.queue_order {
            Some(QueueOrder::FairByTenant) => headers.get(&self.config.tenant_header),
            _ => None,
        };
        let hasher = BuildHasherDefault::<DefaultHasher>::default();
        Ok(RequestHints {
            expected_output_tokens: integer_header(headers, EXPECTED_TOKENS_HEADER, tokens)?,
            priority: integer_header(headers, PRIORITY_HEADER, priority)?.unwrap_or_default(),
            tenant: tenant.map_or(0, |tenant| hasher.hash_one(tenant)),
            excluded_workers: self.workers.workers_excluded_by_rank(headers),
        })
    }

    /// Reads a whole request body, up to the size limit. `headers` are used only to find out
    /// whether the client waits for `100 Continue` before it sends the body.
    ///
    /// # Errors
    /// Fails with a 413 if the body exceeds the limit, and with a 400 if the client breaks off. A
    /// separate task discards the rest of a body that is too large.
    pub(crate) async fn read_body(
        &self,
        headers: &HeaderMap,
        mut body: Incoming,
    ) -> Result<Bytes, ApiError> {
        let limit = self.config.max_body_bytes;
        if body.size_hint().lower() > limit as u64 {
            // A client that sent `Expect: 100-continue` has not sent the body yet.
            if !headers.contains_key(EXPECT) {
                tokio::spawn(discard(body));
            }
            return Err(ApiError::body_too_large(limit));
        }
        match Limited::new(&mut body, limit).collect().await {
            Ok(body) => Ok(body.to_bytes()),
            Err(error) if error.is::<LengthLimitError>() => {
                tokio::spawn(discard(body));
                Err(ApiError::body_too_large(limit))
            }
            Err(error) => {
                let message = format!("The request body is incomplete: {error}.");
                Err(ApiError::bad_request(message, None))
            }
        }
    }

    /// Parses a body: a short one on this thread, a long one on a thread for blocking work. With a
    /// tokenizer, the limit for a short body is lower, and a long body waits for a permit. Fails
    /// with a 400 if the body is invalid or the parser panics. The hints of the result are empty.
    async fn parse_off_thread(
        self: &Arc<Self>,
        endpoint: Endpoint,
        body: Bytes,
    ) -> Result<ParsedRequest, ApiError> {
        let max_inline_bytes = match self.tokenizer {
            Some(_) => MAX_INLINE_TOKENIZE_BYTES,
            None => MAX_INLINE_PARSE_BYTES,
        };
        if body.len() <= max_inline_bytes {
            return Ok(self.parse_request(endpoint, &body)?);
        }
        let permit = match &self.tokenizer {
            Some(tokenizer) => tokenizer.permit().await,
            None => None,
        };
        let shared = Arc::clone(self);
        let parsing = tokio::task::spawn_blocking(move || {
            // The work continues even if the client disconnects, so it owns the permit.
            let _permit = permit;
            shared.parse_request(endpoint, &body)
        });
        match parsing.await {
            Ok(parsed) => Ok(parsed?),
            Err(error) => {
                tracing::error!(%error, "parsing a request body failed");
                Err(ApiError::bad_request("The body cannot be parsed.", None))
            }
        }
    }

    /// Parses, tokenises and hashes an uncompressed body on this thread. The hints of the result
    /// are empty. A request without a model name gets
    /// [`Workers::only_model`](crate::workers::Workers::only_model), or an empty name if there is
    /// none. Prompts that cannot be tokenised are hashed as text. With a tokenizer, the text
    /// prompts are counted in the metrics, even if the caller does not send the request.
    fn parse_request(&self, endpoint: Endpoint, body: &[u8]) -> Result<ParsedRequest, BodyError> {
        let mut request = ApiRequest::parse(endpoint, body)?;
        let names_model = !request.model.is_empty();
        if !names_model {
            // Engines use their own model then, so the prompt is hashed like the blocks that they
            // report.
            request.model = self.workers.only_model().unwrap_or_default();
        }
        let bytes_per_token = self.text_ratios.get(&request.model);
        let block_size = self.config.router.block_size;
        let TokenizedPrompts { ids, token_count } = match &self.tokenizer {
            Some(tokenizer) => tokenizer.encode(endpoint, &request, body, &self.metrics),
            None => TokenizedPrompts::default(),
        };
        // The request is sent, counted and logged under the name that the client used.
        let model = request.model.clone();
        if let Some(alias) = self.workers.alias_of(&model) {
            request.model = alias;
        }
        let sequences = request.sequences(&ids, block_size, bytes_per_token);
        let continuation = match endpoint {
            Endpoint::Embeddings => None,
            _ => request.continuation(
                ids.first().and_then(Option::as_deref),
                block_size,
                bytes_per_token,
            ),
        };
        Ok(ParsedRequest {
            tokenizer_count: token_count.filter(|_| request.is_fully_hashed()),
            is_single: sequences.rest.is_empty() && request.is_fully_hashed(),
            continuation: continuation
                .filter(|place| !place.is_token_based() || self.tokenizer.is_some()),
            names_model,
            full_report_mode: request.full_report_mode,
            sequences,
            max_tokens: request.max_tokens,
            ignore_eos: request.ignore_eos,
            has_tools: request.has_tools,
            is_streaming: request.stream,
            prompt_bytes: request.prompt_bytes(),
            model,
            hints: RequestHints::default(),
        })
    }

    /// Chooses a worker and books the request there, all prompts and outputs as one batch. With a
    /// queue, the request is not dispatched yet: [`Failover::send`] waits for that. Counts the
    /// prompt tokens and the duration of the decision. If no worker can be chosen, fails with the
    /// response of [`no_worker`], and books and counts nothing.
    fn route(&self, parsed: &ParsedRequest) -> Result<Batch, ApiError> {
        let started = self.clock.now();
        let batch = self
            .router
            .route_batch(&parsed.request(), &parsed.sequences.rest, started)
            .map_err(no_worker)?;
        let duration = self.clock.now().saturating_sub(started);
        let metrics = &self.metrics;
        metrics
            .decision_duration_seconds
            .observe(duration.as_secs_f64());
        metrics
            .prompt_tokens
            .inc_by(parsed.sequences.prompt_tokens.into());
        Ok(batch)
    }

    /// Returns the client's response: the worker's, with the gateway's headers and a body that
    /// reports its tokens to the bookings. Removes hop-by-hop headers and counts the predicted
    /// overlap. `arrived_at` is a time of the gateway's clock; `request_id` is used only in log
    /// lines.
    fn pass_through(
        self: &Arc<Self>,
        upstream: UpstreamResponse,
        batch: Batch,
        parsed: ParsedRequest,
        arrived_at: Duration,
        request_id: HeaderValue,
    ) -> Response<Body> {
        let (mut head, body) = upstream.response.into_parts();
        strip_hop_by_hop(&mut head.headers);
        let decision = batch.decision();
        let overlap_blocks = decision.cost.overlap_blocks;
        self.metrics.add_overlap_blocks("predicted", overlap_blocks);
        self.metrics
            .add_overlap_blocks("best", decision.best_overlap_blocks);
        let block_size = self.config.router.block_size.get();
        let overlap_tokens = overlap_blocks.saturating_mul(block_size);
        let headers = &mut head.headers;
        headers.insert("x-foresee-worker", upstream.worker.header.clone());
        headers.insert("x-foresee-overlap-tokens", overlap_tokens.into());
        let context = RequestContext {
            shared: Arc::clone(self),
            worker: upstream.worker,
            batch,
            arrived_at,
            request_id,
            model: parsed.model,
            is_single: parsed.is_single,
            prompt_tokens: parsed.sequences.prompt_tokens,
            continuation: parsed.continuation,
            predicted_tokens: upstream.predicted_tokens,
            prompt_bytes: parsed.prompt_bytes,
            tokenizer_count: parsed.tokenizer_count,
            recorded: self.recorder.is_some().then_some(parsed.sequences),
        };
        let body = TrackedBody::new(&head, body, upstream.first_frame, context);
        Response::from_parts(head, Either::Right(body))
    }

    /// Lists the models of all workers. Each entry is as the first worker that serves the model
    /// wrote it. Workers are taken in the order in which they were added, unhealthy ones included.
    /// A worker that has not listed its models yet adds none.
    fn models(&self) -> Response<Body> {
        let mut listed: Vec<(String, String)> = Vec::new();
        for worker in self.workers.all() {
            for (id, entry) in worker.models.read().iter() {
                if !listed.iter().any(|(known, _)| known == id) {
                    listed.push((id.clone(), entry.get().to_owned()));
                }
            }
        }
        let entries: Vec<&str> = listed.iter().map(|(_, entry)| entry.as_str()).collect();
        let list = format!(r#"{{"object":"list","data":[{}]}}"#, entries.join(","));
        reply::json(StatusCode::OK, list)
    }

    /// Returns an empty 200 if a worker can serve a request now, and otherwise a 503, as engines do.
    fn health(&self) -> Response<Body> {
        let status = if self.router.is_ready() {
            StatusCode::OK
        } else {
            StatusCode::SERVICE_UNAVAILABLE
        };
        reply::whole(status, "text/plain", "")
    }

    /// Returns how a request with this body would be routed now. Books nothing. Headers are not
    /// considered, so the request has the default hints. `body` must be uncompressed; with a
    /// tokenizer, its prompts count as tokenised.
    ///
    /// # Errors
    /// Returns the error response for the client: the body is invalid, or no worker can be chosen.
    pub(crate) fn explain(
        &self,
        endpoint: Endpoint,
        body: &[u8],
    ) -> Result<foresee_core::router::Explanation, ApiError> {
        let parsed = self.parse_request(endpoint, body)?;
        let now = self.clock.now();
        self.router
            .explain_batch(&parsed.request(), &parsed.sequences.rest, now)
            .map_err(no_worker)
    }
}

/// Returns the number in the header `name`, or `None` without that header. Fails with a 400 if the
/// value is not a number of type `N`. `requirement` completes the error message "Header `name` must
/// be …".
fn integer_header<N: FromStr>(
    headers: &HeaderMap,
    name: &'static str,
    requirement: &str,
) -> Result<Option<N>, ApiError> {
    let Some(value) = headers.get(name) else {
        return Ok(None);
    };
    let number = value
        .to_str()
        .ok()
        .and_then(|text| text.trim().parse().ok());
    let invalid = || {
        let message = format!("Header `{name}` must be {requirement}.");
        ApiError::bad_request(message, Some(name))
    };
    number.map(Some).ok_or_else(invalid)
}

/// Reads and discards the rest of a refused body. Most clients read no response before they have sent
/// the whole body, and closing the connection earlier would lose the response.
async fn discard(mut body: Incoming) {
    let rest = async { while let Some(Ok(_)) = body.frame().await {} };
    // After the timeout the body is dropped, which closes the connection.
    let _ = tokio::time::timeout(DISCARD_TIMEOUT, rest).await;
}
