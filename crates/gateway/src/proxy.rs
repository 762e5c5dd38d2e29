//! The API: read a request, route it, have it answered, and pass the answer on.

use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use foresee_core::batch::Batch;
use foresee_core::fleet::WorkerId;
use foresee_core::queue::Order;
use foresee_core::router::Request as RouteRequest;
use foresee_core::sequence::Sequence;
use foresee_engine::answer::Continuation;
use foresee_engine::error::ApiError;
use foresee_engine::request::{ApiRequest, BodyError, Endpoint, Sequences};
use http::header::{CONTENT_ENCODING, EXPECT};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Either, LengthLimitError, Limited};
use hyper::body::{Body as _, Incoming};

use crate::attempts::{Answer, Attempts, no_worker};
use crate::forward::{Forwarder, Message, strip_hop_by_hop};
use crate::metrics::{Metrics, Outcome};
use crate::reply::{self, Body};
use crate::shared::Shared;
use crate::watch::{Watch, Watched};

/// Bodies longer than this are parsed and hashed away from the I/O threads: at about 1 GB/s,
/// shorter ones delay nobody by more than 0.3 ms.
const PARSED_IN_PLACE: usize = 256 << 10;

/// The same for bodies that are tokenised, at about 10 MB/s.
pub(crate) const TOKENIZED_IN_PLACE: usize = 4 << 10;

/// How long a client may take to send the rest of a body that was refused.
const DISCARD_TIMEOUT: Duration = Duration::from_secs(5);

/// What routing needs to know of a request.
#[derive(Debug)]
struct Job {
    /// By the name it was asked for or, if by none, the one it is known to go by.
    model: String,
    /// Whether the request named it.
    is_named: bool,
    sequences: Sequences,
    max_tokens: Option<u32>,
    ignores_eos: bool,
    has_tools: bool,
    streams: bool,
    prompt_bytes: usize,
    /// It is one prompt and asks for one answer.
    is_single: bool,
    /// Where the answer goes in the prompt's sequence, if that can be known.
    continuation: Option<Continuation>,
    /// It asks the worker to list what it finds cached among its KV events.
    lists_cached: bool,
    /// How many tokens our tokenizer counted, if the engine ought to count the same.
    counted_tokens: Option<u32>,
    wishes: Wishes,
}

/// What the headers of a request say of it.
#[derive(Debug, Default)]
struct Wishes {
    /// How long the answer will be.
    expected_tokens: Option<u32>,
    /// In line, lower comes first.
    priority: i32,
    /// On whose behalf it comes, where that matters; those who do not say are one.
    tenant: u64,
    /// Workers that the client does not want.
    ruled_out: Vec<WorkerId>,
}

impl Job {
    fn request(&self) -> RouteRequest<'_> {
        RouteRequest {
            model: if self.is_named { &self.model } else { "" },
            sequence: &self.sequences.first,
            max_tokens: self.max_tokens,
            ignores_eos: self.ignores_eos,
            expected_tokens: self.wishes.expected_tokens,
            has_tools: self.has_tools,
            streams: self.streams,
            priority: self.wishes.priority,
            tenant: self.wishes.tenant,
            excluded: &self.wishes.ruled_out,
        }
    }
}

/// A request without an answer yet. Dropped as such, it counts as one whose client left.
#[derive(Debug)]
struct Unanswered<'m>(Option<&'m Metrics>);

impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        if let Some(metrics) = self.0 {
            metrics.ended(Outcome::ClientLeft);
        }
    }
}

impl Shared {
    /// Answers one request to the public API.
    pub(crate) async fn answer(
        self: Arc<Self>,
        forwarder: Arc<Forwarder>,
        request: Request<Incoming>,
    ) -> Response<Body> {
        let request_id = self.request_ids.next();
        let given_id = request.headers().get("x-request-id").cloned();
        let mut unanswered = Unanswered(Some(&self.metrics));
        let answered = self
            .try_answer(&forwarder, request, request_id.clone())
            .await;
        unanswered.0 = None;
        let mut response = match answered {
            Ok(response) => response,
            Err(error) => {
                self.metrics.ended(match error.status {
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
            .or_insert(given_id.unwrap_or(request_id));
        response
    }

    async fn try_answer(
        self: &Arc<Self>,
        forwarder: &Forwarder,
        request: Request<Incoming>,
        request_id: HeaderValue,
    ) -> Result<Response<Body>, ApiError> {
        let arrived = self.clock.now();
        let (head, body) = request.into_parts();
        let endpoint = match (&head.method, head.uri.path()) {
            (&Method::POST, "/v1/chat/completions") => Some(Endpoint::ChatCompletions),
            (&Method::POST, "/v1/completions") => Some(Endpoint::Completions),
            (&Method::POST, "/v1/embeddings") => Some(Endpoint::Embeddings),
            (&Method::GET, "/v1/models") => return Ok(self.models()),
            (&Method::GET, "/health") => return Ok(self.health()),
            // A tunnel, which neither we nor an engine can be.
            (&Method::CONNECT, _) => return Err(ApiError::path_not_found("CONNECT", "tunnel")),
            _ => None,
        };
        let body = self.read_body(&head.headers, body).await?;
        let compressed = head.headers.contains_key(CONTENT_ENCODING);
        let mut job = match endpoint {
            Some(endpoint) if !compressed => self.read_job(endpoint, body.clone()).await?,
            // Not for us to read: placed by load alone.
            _ => Job {
                model: String::new(),
                is_named: false,
                sequences: Sequences::of_one(Sequence::opaque(0, self.config.router.block_size), 1),
                max_tokens: None,
                ignores_eos: false,
                has_tools: false,
                streams: true,
                prompt_bytes: 0,
                is_single: false,
                continuation: None,
                lists_cached: false,
                counted_tokens: None,
                wishes: Wishes::default(),
            },
        };
        job.wishes = self.wishes(&head.headers)?;
        let mut batch = self.route(&job)?;
        let mut message = Message::new(head, body, request_id, endpoint.is_some());
        message.lists_cached = job.lists_cached;
        let mut attempts = Attempts::new(self, forwarder, &message, &job.wishes.ruled_out);
        let answer = attempts.until_answered(&mut batch).await?;
        Ok(self.pass_through(answer, batch, job, arrived, message.request_id()))
    }

    fn wishes(&self, headers: &HeaderMap) -> Result<Wishes, ApiError> {
        let order = "be a whole number: lower is sent first, and 0 is what others have";
        let tokens = "be the number of tokens that the answer is expected to have";
        let tenant = match self.config.router.queue {
            Some(Order::Fair) => headers.get(&self.config.tenant_header),
            _ => None,
        };
        let hasher = BuildHasherDefault::<DefaultHasher>::default();
        Ok(Wishes {
            expected_tokens: number(headers, EXPECTED_HEADER, tokens)?,
            priority: number(headers, PRIORITY_HEADER, order)?.unwrap_or_default(),
            tenant: tenant.map_or(0, |it| hasher.hash_one(it)),
            ruled_out: self.workers.ruled_out(headers),
        })
    }

    pub(crate) async fn read_body(
        &self,
        headers: &HeaderMap,
        mut body: Incoming,
    ) -> Result<Bytes, ApiError> {
        let limit = self.config.max_body_bytes;
        if body.size_hint().lower() > limit as u64 {
            // A client that asks first is still waiting to be told to send.
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
                let message = format!("The request body did not arrive whole: {error}.");
                Err(ApiError::bad_request(message, None))
            }
        }
    }

    async fn read_job(self: &Arc<Self>, endpoint: Endpoint, body: Bytes) -> Result<Job, ApiError> {
        let in_place = match self.tokens {
            Some(_) => TOKENIZED_IN_PLACE,
            None => PARSED_IN_PLACE,
        };
        if body.len() <= in_place {
            return Ok(self.parse_job(endpoint, &body)?);
        }
        let permit = match &self.tokens {
            Some(tokens) => tokens.permit().await,
            None => None,
        };
        let shared = Arc::clone(self);
        let parsed = tokio::task::spawn_blocking(move || {
            // Goes on even if the client leaves, so the permit goes with it.
            let _permit = permit;
            shared.parse_job(endpoint, &body)
        });
        let parsed = parsed.await;
        match parsed {
            Ok(job) => Ok(job?),
            Err(error) => {
                tracing::error!(%error, "reading a body failed");
                Err(ApiError::bad_request("The body cannot be read.", None))
            }
        }
    }

    fn parse_job(&self, endpoint: Endpoint, body: &[u8]) -> Result<Job, BodyError> {
        let mut request = ApiRequest::parse(endpoint, body)?;
        let is_named = !request.model.is_empty();
        if !is_named {
            // Engines take it for their own, so it is hashed as what they say they have cached.
            request.model = self.workers.only_model().unwrap_or_default();
        }
        let bytes_per_token = self.text.get(&request.model);
        let block_size = self.config.router.block_size;
        let ids = self.tokens.as_ref().map_or_else(Vec::new, |tokens| {
            tokens.encode(endpoint, &request, body, &self.metrics)
        });
        // What is sent on, counted and logged keeps the name it came under.
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
        let all_encoded = !ids.is_empty() && ids.iter().all(Option::is_some);
        let comparable = all_encoded && request.is_matched_whole();
        Ok(Job {
            counted_tokens: comparable.then_some(sequences.prompt_tokens),
            is_single: sequences.further.is_empty() && request.is_matched_whole(),
            continuation: continuation.filter(|it| !it.is_of_tokens() || self.tokens.is_some()),
            is_named,
            lists_cached: request.lists_cached,
            sequences,
            max_tokens: request.max_tokens,
            ignores_eos: request.ignores_eos,
            has_tools: request.has_tools,
            streams: request.stream,
            prompt_bytes: request.prompt_bytes(),
            model,
            wishes: Wishes::default(),
        })
    }

    fn route(&self, job: &Job) -> Result<Batch, ApiError> {
        let before = self.clock.now();
        let batch = self
            .router
            .route_batch(&job.request(), &job.sequences.further, before)
            .map_err(no_worker)?;
        let after = self.clock.now();
        let metrics = &self.metrics;
        metrics
            .decision_duration
            .observe(after.saturating_sub(before).as_secs_f64());
        let prompt_tokens = job.sequences.prompt_tokens;
        metrics.prompt_tokens.inc_by(prompt_tokens.into());
        Ok(batch)
    }

    fn pass_through(
        self: &Arc<Self>,
        answer: Answer,
        batch: Batch,
        job: Job,
        arrived: Duration,
        request_id: HeaderValue,
    ) -> Response<Body> {
        let (mut head, body) = answer.response.into_parts();
        strip_hop_by_hop(&mut head.headers);
        let decision = batch.decision();
        let overlap_blocks = decision.cost.overlap_blocks;
        self.metrics.overlap("predicted", overlap_blocks);
        self.metrics.overlap("best", decision.best_overlap_blocks);
        let block_size = self.config.router.block_size.get();
        let overlap_tokens = overlap_blocks.saturating_mul(block_size);
        let headers = &mut head.headers;
        headers.insert("x-foresee-worker", answer.worker.header.clone());
        headers.insert("x-foresee-overlap-tokens", overlap_tokens.into());
        let watch = Watch {
            shared: Arc::clone(self),
            worker: answer.worker,
            batch,
            arrived,
            request_id,
            model: job.model,
            is_single: job.is_single,
            prompt_tokens: job.sequences.prompt_tokens,
            continuation: job.continuation,
            foretold: answer.foretold,
            prompt_bytes: job.prompt_bytes,
            counted_tokens: job.counted_tokens,
            recorded: self.recorder.is_some().then_some(job.sequences),
        };
        let watched = Watched::new(&head, body, answer.first, watch);
        Response::from_parts(head, Either::Right(watched))
    }

    /// Every model some worker serves, as the first worker to serve it describes it.
    fn models(&self) -> Response<Body> {
        let mut listed: Vec<(String, String)> = Vec::new();
        for worker in self.workers.all() {
            for (id, model) in worker.models.read().iter() {
                if !listed.iter().any(|(known, _)| known == id) {
                    listed.push((id.clone(), model.get().to_owned()));
                }
            }
        }
        let models: Vec<&str> = listed.iter().map(|(_, model)| model.as_str()).collect();
        let list = format!(r#"{{"object":"list","data":[{}]}}"#, models.join(","));
        reply::json(StatusCode::OK, list)
    }

    /// As engines answer it: 200 and nothing, if a request could be served now.
    fn health(&self) -> Response<Body> {
        let status = if self.router.is_ready() {
            StatusCode::OK
        } else {
            StatusCode::SERVICE_UNAVAILABLE
        };
        reply::whole(status, "text/plain", "")
    }

    /// Reads the body of an API request and says how it would be routed now.
    pub(crate) fn explain(
        &self,
        endpoint: Endpoint,
        body: &[u8],
    ) -> Result<foresee_core::router::Explanation, ApiError> {
        let job = self.parse_job(endpoint, body)?;
        let now = self.clock.now();
        let explained = self
            .router
            .explain_batch(&job.request(), &job.sequences.further, now);
        explained.map_err(no_worker)
    }
}

/// A request's place among those that wait: lower is sent first, 0 if it does not say.
const PRIORITY_HEADER: &str = "x-foresee-priority";

/// How many tokens its answer is expected to have.
const EXPECTED_HEADER: &str = "x-foresee-expected-tokens";

/// The number in a header, if there is that header.
fn number<N: FromStr>(
    headers: &HeaderMap,
    name: &'static str,
    must: &str,
) -> Result<Option<N>, ApiError> {
    let Some(given) = headers.get(name) else {
        return Ok(None);
    };
    let number = given.to_str().ok().and_then(|it| it.trim().parse().ok());
    let wrong = || ApiError::bad_request(format!("The header `{name}` must {must}."), Some(name));
    number.map(Some).ok_or_else(wrong)
}

/// Reads the rest of a body that was refused: most clients read no answer before they have sent
/// everything, and breaking the connection would lose it.
async fn discard(mut body: Incoming) {
    let rest = async { while let Some(Ok(_)) = body.frame().await {} };
    // One that takes longer finds the connection closed.
    let _ = tokio::time::timeout(DISCARD_TIMEOUT, rest).await;
}
