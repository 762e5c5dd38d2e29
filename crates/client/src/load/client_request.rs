//! One request as its client sees it: sent, read token by token, ended.

use std::ops::ControlFlow;
use std::time::Duration;

use bytes::Bytes;
use foresee_engine::stream::StreamObserver;
use foresee_engine::usage::Usage;
use hyper::Uri;
use hyper::body::Incoming;
use hyper::header::HeaderMap;

use crate::http::{
    ApiKey, Failure, FailureKind, HttpClient, StreamEnd, client, post, read_stream, send,
};
use crate::load::LoadConfig;
use crate::load::cancellation::Cancellation;
use crate::load::clock::Clock;

/// The address of all requests, with the pool of connections.
pub(super) struct Target {
    client: HttpClient,
    uri: Uri,
    api_key: Option<ApiKey>,
    /// Headers of all requests besides the key.
    headers: HeaderMap,
    timeout: Duration,
}

impl Target {
    /// Returns a target at `uri` for requests with the key and the headers of `config`.
    pub(super) fn new(uri: Uri, config: &LoadConfig) -> Self {
        Self {
            client: client(),
            uri,
            api_key: config.api_key.clone(),
            headers: config.headers.clone(),
            timeout: config.timeout,
        }
    }
}

/// A request before it is sent. Times are the engine's.
#[derive(Clone, Copy, Debug)]
pub(super) struct ClientRequest {
    /// Position in the workload.
    pub(super) index: usize,
    /// Time at which the workload has the request sent.
    pub(super) due: Duration,
    pub(super) prompt_tokens: u32,
    pub(super) output_tokens: u32,
    pub(super) cancellation: Option<Cancellation>,
}

/// How a request ended.
#[derive(Clone, Debug)]
pub(super) enum End {
    /// The stream reported that it is complete.
    Finished,
    /// The client closed the stream early, as planned.
    Aborted,
    /// The request failed.
    Failed(Failure),
}

/// Measurements of one request. Times are the engine's.
#[derive(Debug)]
pub(super) struct Record {
    pub(super) request: ClientRequest,
    /// Time at which the request was sent.
    pub(super) sent: Duration,
    /// Times at which its first and its latest token arrived.
    pub(super) token_times: Option<(Duration, Duration)>,
    /// Seconds from each token to the next.
    pub(super) gaps: Vec<f32>,
    /// Output tokens received.
    pub(super) output_tokens: u32,
    /// The worker that a router named.
    pub(super) worker: Option<String>,
    /// Token counts that the engine reported.
    pub(super) usage: Option<Usage>,
    pub(super) end: End,
    pub(super) ended: Duration,
}

impl ClientRequest {
    /// Sends the request and reads the response to its end, to the planned cancellation, or until
    /// the target's timeout of real time. The record has the tokens that arrived until then. A
    /// failure is recorded as its end.
    pub(super) async fn run(self, target: &Target, body: Bytes, clock: Clock) -> Record {
        let sent = clock.now();
        let mut record = Record {
            request: self,
            sent,
            token_times: None,
            gaps: Vec::new(),
            output_tokens: 0,
            worker: None,
            usage: None,
            end: End::Aborted,
            ended: sent,
        };
        let (patience, is_impatient) = match self.cancellation {
            Some(Cancellation::BeforeFirstByte { patience }) => (clock.real(patience), true),
            _ => (target.timeout, false),
        };
        let limit = patience.min(target.timeout);
        let exchange = record.exchange(target, body, clock);
        let end = tokio::time::timeout(limit, exchange).await;
        record.end = match end {
            Ok(Ok(StreamEnd::Complete)) => End::Finished,
            Ok(Ok(StreamEnd::Left)) => End::Aborted,
            Ok(Err(failure)) => {
                if failure.worker.is_some() {
                    record.worker.clone_from(&failure.worker);
                }
                End::Failed(failure)
            }
            Err(_) if is_impatient && patience <= target.timeout => End::Aborted,
            Err(_) => {
                let message = format!("the response did not end in {:?}", target.timeout);
                End::Failed(Failure::new(FailureKind::Timeout, message))
            }
        };
        record.ended = clock.now();
        record
    }
}

impl Record {
    /// Sends the request and reads its stream into the record.
    ///
    /// # Errors
    /// If the request fails. The record keeps the tokens that arrived before.
    async fn exchange(
        &mut self,
        target: &Target,
        body: Bytes,
        clock: Clock,
    ) -> Result<StreamEnd, Failure> {
        let mut request = post(&target.uri, body, target.api_key.as_ref());
        request.headers_mut().extend(target.headers.clone());
        let opened = send(&target.client, request).await?;
        self.worker = opened.worker;
        self.read(opened.body, clock).await
    }

    /// Reads the stream and records tokens and usage. Returns [`StreamEnd::Left`] at the planned
    /// cancellation: at the first bytes, or after a number of tokens unless the stream ends with
    /// them.
    ///
    /// # Errors
    /// If the connection breaks, or the stream has an error or is cut short.
    async fn read(&mut self, body: Incoming, clock: Clock) -> Result<StreamEnd, Failure> {
        let mut observer = StreamObserver::new();
        let read = read_stream(body, &mut observer, |_, observer, seen| {
            if matches!(
                self.request.cancellation,
                Some(Cancellation::BeforeFirstByte { .. })
            ) {
                return ControlFlow::Break(());
            }
            self.add_tokens(seen.new_tokens, clock.now());
            self.output_tokens = observer.tokens();
            self.usage = observer.usage();
            if let Some(Cancellation::AfterTokens(tokens)) = self.request.cancellation
                && self.output_tokens >= tokens
                && !seen.done
                && !seen.error
            {
                return ControlFlow::Break(());
            }
            ControlFlow::Continue(())
        });
        read.await
    }

    /// Records the times of tokens that arrived together at `now`: the first after a gap, the
    /// others without one. Tokens beyond the requested number are ignored.
    ///
    /// `output_tokens` must still be the number before these tokens; the caller updates it.
    fn add_tokens(&mut self, new_tokens: u32, now: Duration) {
        // Tokens beyond the requested number take no memory.
        let missing_tokens = self
            .request
            .output_tokens
            .saturating_sub(self.output_tokens);
        let new_tokens = new_tokens.min(missing_tokens) as usize;
        if new_tokens == 0 {
            return;
        }
        let first = match self.token_times {
            Some((first, latest)) => {
                self.gaps.push(now.saturating_sub(latest).as_secs_f32());
                first
            }
            None => {
                self.gaps.reserve(missing_tokens as usize - 1);
                now
            }
        };
        self.gaps.resize(self.gaps.len() + new_tokens - 1, 0.0);
        self.token_times = Some((first, now));
    }
}
