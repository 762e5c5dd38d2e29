//! One request of a verification and its response: the router's prediction, the engine's report.

use std::ops::ControlFlow;
use std::time::Duration;

use foresee_engine::stream::StreamObserver;
use foresee_engine::usage::{Usage, parse_usage};
use hyper::Uri;
use hyper::body::Incoming;
use serde::Deserialize;

use crate::http::{
    Failure, HttpClient, MAX_BODY_BYTES, Opened, StreamEnd, chain, post, read_stream, read_whole,
    send,
};
use crate::verify::prompt_mix::PlannedRequest;

/// How an exchange ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// The response was read to its end.
    Completed,
    /// The client closed the connection early, as planned.
    Aborted,
    /// The request failed, for this reason.
    Failed(String),
}

/// A request and its response.
#[derive(Clone, Debug)]
pub(super) struct Exchange {
    pub(super) ending: Ending,
    /// The worker that the router chose.
    pub(super) worker: Option<String>,
    /// Prompt tokens that the router expected in that worker's cache.
    pub(super) predicted_tokens: Option<u32>,
    /// Token counts that the engine reported.
    pub(super) usage: Usage,
    /// The output's text.
    pub(super) text: String,
}

impl Exchange {
    fn failed(reason: String) -> Self {
        Self {
            ending: Ending::Failed(reason),
            worker: None,
            predicted_tokens: None,
            usage: Usage::default(),
            text: String::new(),
        }
    }
}

/// Sends a request to the router at `api`. Reads the response to its end, or until the client
/// leaves as planned. `limit` applies to the whole exchange; an exchange that exceeds it has no
/// worker and no prediction. Only a completed exchange has usage and text.
pub(super) async fn exchange(
    client: &HttpClient,
    api: &str,
    ask: &PlannedRequest,
    limit: Duration,
) -> Exchange {
    let uri: Uri = match format!("{api}{}", ask.path).parse() {
        Ok(uri) => uri,
        Err(error) => return Exchange::failed(chain(&error)),
    };
    let exchanged = tokio::time::timeout(limit, exchange_at(client, &uri, ask)).await;
    exchanged.unwrap_or_else(|_| Exchange::failed(format!("the response did not end in {limit:?}")))
}

/// Sends a request and reads its response, without a time limit. A failure is recorded as the
/// ending.
async fn exchange_at(client: &HttpClient, uri: &Uri, ask: &PlannedRequest) -> Exchange {
    let opened = match send(client, post(uri, ask.body.clone(), None)).await {
        Ok(opened) => opened,
        Err(failure) => return Exchange::failed(failure.to_string()),
    };
    let Opened {
        worker,
        predicted_tokens,
        body,
    } = opened;
    let mut exchange = Exchange {
        ending: Ending::Completed,
        worker,
        predicted_tokens,
        usage: Usage::default(),
        text: String::new(),
    };
    let read = if ask.is_streaming {
        exchange.read_stream(body, ask.closes_after).await
    } else {
        exchange.read_whole(body).await
    };
    if let Err(reason) = read {
        exchange.ending = Ending::Failed(reason);
    }
    exchange
}

impl Exchange {
    /// Records the usage and the text of a response that is not streamed. Without text, it is
    /// empty.
    ///
    /// # Errors
    /// If the body cannot be read, or has no usage.
    async fn read_whole(&mut self, body: Incoming) -> Result<(), String> {
        let body = read_whole(body).await;
        let body = body.map_err(|failure: Failure| failure.to_string())?;
        self.usage = parse_usage(&body).ok_or("the response has no usage")?;
        self.text = text_in(&body).unwrap_or_default();
        Ok(())
    }

    /// Records the usage and the text of a streamed response. After `closes_after` tokens, stops
    /// reading and records the ending `Aborted`, without usage or text.
    ///
    /// # Errors
    /// If the stream fails, is longer than [`MAX_BODY_BYTES`], or is complete without usage.
    async fn read_stream(
        &mut self,
        body: Incoming,
        closes_after: Option<u32>,
    ) -> Result<(), String> {
        let mut observer = StreamObserver::new();
        let mut read = Vec::new();
        let mut is_too_long = false;
        let end = read_stream(body, &mut observer, |bytes, observer, seen| {
            is_too_long = read.len() + bytes.len() > MAX_BODY_BYTES;
            if is_too_long {
                return ControlFlow::Break(());
            }
            read.extend_from_slice(bytes);
            // The rest of the stream may have arrived already.
            let is_due = closes_after.is_some_and(|tokens| observer.tokens() >= tokens);
            if is_due && !seen.error {
                return ControlFlow::Break(());
            }
            ControlFlow::Continue(())
        });
        let end = end.await;
        if is_too_long {
            return Err(format!("the stream is longer than {MAX_BODY_BYTES} bytes"));
        }
        if end.map_err(|failure| failure.to_string())? == StreamEnd::Left {
            self.ending = Ending::Aborted;
            return Ok(());
        }
        self.usage = observer.usage().ok_or("the stream has no usage")?;
        for line in read.split(|&byte| byte == b'\n') {
            if let Some(text) = line.strip_prefix(b"data: ").and_then(text_in) {
                self.text.push_str(&text);
            }
        }
        Ok(())
    }
}

/// Returns the text of the first choice in a body or an event. `None` if this is not JSON in
/// OpenAI's format, or has no choice or no text, such as an event with usage only.
fn text_in(json: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Body {
        choices: Vec<Choice>,
    }
    #[derive(Deserialize)]
    struct Choice {
        text: Option<String>,
        message: Option<Message>,
        delta: Option<Message>,
    }
    #[derive(Deserialize)]
    struct Message {
        content: Option<String>,
    }
    let body: Body = serde_json::from_slice(json).ok()?;
    let choice = body.choices.into_iter().next()?;
    let message = choice.message.or(choice.delta);
    choice.text.or(message.and_then(|message| message.content))
}
