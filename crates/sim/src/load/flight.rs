//! One request as its client sees it: sent, read token by token, ended one way or another.

use std::time::Duration;

use bytes::Bytes;
use foresee_engine::stream::StreamObserver;
use foresee_engine::usage::Usage;
use http_body_util::BodyExt;
use hyper::Uri;
use hyper::body::Incoming;

use crate::http::{HttpClient, chain, client, post, refusal, shortened};
use crate::load::clock::Clock;
use crate::load::hang_up::HangUp;
use crate::load::outcome::FailureKind;

/// Where requests are sent, over connections that are kept for the next.
pub(super) struct Target {
    client: HttpClient,
    uri: Uri,
    timeout: Duration,
}

impl Target {
    /// Sends to `uri`, and waits up to `timeout` of real time for the end of an answer.
    pub(super) fn new(uri: Uri, timeout: Duration) -> Self {
        Self {
            client: client(),
            uri,
            timeout,
        }
    }
}

/// A request that is about to be sent. Times are the engine's.
#[derive(Clone, Copy, Debug)]
pub(super) struct Flight {
    /// In the workload.
    pub(super) index: usize,
    /// When it was to be sent.
    pub(super) due: Duration,
    pub(super) prompt_tokens: u32,
    pub(super) output_tokens: u32,
    pub(super) hang_up: Option<HangUp>,
}

/// How a request ended.
#[derive(Clone, Debug)]
pub(super) enum End {
    /// The stream said that it is complete.
    Finished,
    /// The client broke it off.
    Aborted,
    /// What went wrong, and how it was said.
    Failed(FailureKind, String),
}

/// What was seen of a request. Times are the engine's.
#[derive(Debug)]
pub(super) struct Record {
    pub(super) flight: Flight,
    /// When it was sent.
    pub(super) sent: Duration,
    /// When its first and its latest token came.
    pub(super) tokens_came: Option<(Duration, Duration)>,
    /// Seconds from each token to the next.
    pub(super) gaps: Vec<f32>,
    pub(super) output_tokens: u32,
    /// Who answered, according to a router.
    pub(super) worker: Option<String>,
    pub(super) usage: Option<Usage>,
    pub(super) end: End,
    pub(super) ended: Duration,
}

impl Flight {
    /// Sends the request and reads the answer to its end.
    pub(super) async fn fly(self, target: &Target, body: Bytes, clock: Clock) -> Record {
        let sent = clock.now();
        let mut record = Record {
            flight: self,
            sent,
            tokens_came: None,
            gaps: Vec::new(),
            output_tokens: 0,
            worker: None,
            usage: None,
            end: End::Aborted,
            ended: sent,
        };
        let (patience, impatient) = match self.hang_up {
            Some(HangUp::BeforeFirstByte { patience }) => (clock.real(patience), true),
            _ => (target.timeout, false),
        };
        let limit = patience.min(target.timeout);
        let exchange = record.exchange(target, body, clock);
        let end = tokio::time::timeout(limit, exchange).await;
        record.end = match end {
            Ok(end) => end,
            Err(_) if impatient && patience <= target.timeout => End::Aborted,
            Err(_) => {
                let message = format!("no end within {:?}", target.timeout);
                End::Failed(FailureKind::Timeout, message)
            }
        };
        record.ended = clock.now();
        record
    }
}

impl Record {
    async fn exchange(&mut self, target: &Target, body: Bytes, clock: Clock) -> End {
        let response = match target.client.request(post(&target.uri, body)).await {
            Ok(response) => response,
            Err(error) if error.is_connect() => {
                return End::Failed(FailureKind::Connect, chain(&error));
            }
            Err(error) => return End::Failed(FailureKind::Reset, chain(&error)),
        };
        let worker = response.headers().get("x-foresee-worker");
        self.worker = worker.map(|name| String::from_utf8_lossy(name.as_bytes()).into_owned());
        if !response.status().is_success() {
            let status = response.status().as_u16();
            let kind = FailureKind::Status(status);
            return End::Failed(kind, refusal(response).await);
        }
        self.read(response.into_body(), clock).await
    }

    async fn read(&mut self, mut body: Incoming, clock: Clock) -> End {
        let mut observer = StreamObserver::new();
        let mut done = false;
        while let Some(frame) = body.frame().await {
            let bytes = match frame {
                Ok(frame) => frame.into_data().unwrap_or_default(),
                // The answer was complete: what happens to the connection is not its concern.
                Err(_) if done => break,
                Err(error) => return End::Failed(FailureKind::Reset, chain(&error)),
            };
            if matches!(self.flight.hang_up, Some(HangUp::BeforeFirstByte { .. })) {
                return End::Aborted;
            }
            let seen = observer.feed(&bytes);
            self.take_tokens(seen.new_tokens, clock.now());
            self.output_tokens = observer.tokens();
            self.usage = observer.usage();
            if seen.error {
                let message = shortened(&String::from_utf8_lossy(&bytes));
                return End::Failed(FailureKind::ErrorEvent, message);
            }
            // Read on to the end of the body, or the connection could not be used again.
            done = seen.done;
            if let Some(HangUp::AfterTokens(tokens)) = self.flight.hang_up
                && self.output_tokens >= tokens
                && !done
            {
                return End::Aborted;
            }
        }
        if done {
            return End::Finished;
        }
        let message = format!(
            "the stream ended after {} of {} tokens and without an end mark",
            self.output_tokens, self.flight.output_tokens
        );
        End::Failed(FailureKind::CutShort, message)
    }

    /// Notes tokens that came together: the first of them after a gap, the others at once.
    fn take_tokens(&mut self, new_tokens: u32, now: Duration) {
        // What a stream claims beyond what it was asked for is not worth any memory.
        let room = self.flight.output_tokens.saturating_sub(self.output_tokens);
        let new_tokens = new_tokens.min(room) as usize;
        if new_tokens == 0 {
            return;
        }
        let first = match self.tokens_came {
            Some((first, latest)) => {
                self.gaps.push(now.saturating_sub(latest).as_secs_f32());
                first
            }
            None => {
                self.gaps.reserve(room as usize - 1);
                now
            }
        };
        self.gaps.resize(self.gaps.len() + new_tokens - 1, 0.0);
        self.tokens_came = Some((first, now));
    }
}
