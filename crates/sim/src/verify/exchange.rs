//! One request and its answer, with what the router predicted and what the engine reported.

use std::time::Duration;

use bytes::Bytes;
use foresee_engine::stream::StreamObserver;
use foresee_engine::usage::{Usage, parse_usage};
use http_body_util::{BodyExt, Limited};
use hyper::Uri;
use hyper::body::Incoming;
use hyper::header::HeaderMap;
use serde::Deserialize;

use crate::http::{HttpClient, chain, post, refusal, shortened};
use crate::verify::script::Ask;

/// The longest body that is read.
const LONGEST_BODY: usize = 16 << 20;

/// How an exchange went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    Answered,
    /// The client left, as it was meant to.
    Left,
    Failed(String),
}

/// What is known after an exchange.
#[derive(Clone, Debug)]
pub(super) struct Exchange {
    pub(super) ending: Ending,
    pub(super) worker: Option<String>,
    /// Tokens that the router predicted to be cached on that worker.
    pub(super) predicted_tokens: Option<u32>,
    pub(super) usage: Usage,
    /// The answer's text.
    pub(super) text: String,
}

impl Exchange {
    fn failed(why: String) -> Self {
        Self {
            ending: Ending::Failed(why),
            worker: None,
            predicted_tokens: None,
            usage: Usage::default(),
            text: String::new(),
        }
    }
}

/// Asks a router at `api`, and reads the answer to its end, or until it is to be left.
pub(super) async fn exchange(
    client: &HttpClient,
    api: &str,
    ask: &Ask,
    limit: Duration,
) -> Exchange {
    let uri: Uri = match format!("{api}{}", ask.path).parse() {
        Ok(uri) => uri,
        Err(error) => return Exchange::failed(chain(&error)),
    };
    let exchanged = tokio::time::timeout(limit, send(client, &uri, ask)).await;
    exchanged.unwrap_or_else(|_| Exchange::failed(format!("no end within {limit:?}")))
}

async fn send(client: &HttpClient, uri: &Uri, ask: &Ask) -> Exchange {
    let response = match client.request(post(uri, ask.body.clone())).await {
        Ok(response) => response,
        Err(error) => return Exchange::failed(chain(&error)),
    };
    let status = response.status();
    if !status.is_success() {
        return Exchange::failed(format!("{status}: {}", refusal(response).await));
    }
    let headers = response.headers();
    let worker = text_of(headers, "x-foresee-worker");
    let predicted = text_of(headers, "x-foresee-overlap-tokens");
    let mut exchange = Exchange {
        ending: Ending::Answered,
        worker,
        predicted_tokens: predicted.and_then(|tokens| tokens.parse().ok()),
        usage: Usage::default(),
        text: String::new(),
    };
    let read = if ask.streams {
        exchange
            .read_stream(response.into_body(), ask.leaves_after)
            .await
    } else {
        exchange.read_whole(response.into_body()).await
    };
    if let Err(why) = read {
        exchange.ending = Ending::Failed(why);
    }
    exchange
}

fn text_of(headers: &HeaderMap, name: &str) -> Option<String> {
    let value = headers.get(name)?.to_str().ok()?;
    Some(value.to_owned())
}

impl Exchange {
    async fn read_whole(&mut self, body: Incoming) -> Result<(), String> {
        let body = Limited::new(body, LONGEST_BODY).collect().await;
        let body = body.map_err(|error| chain(error.as_ref()))?.to_bytes();
        self.usage = parse_usage(&body).ok_or("the answer has no usage")?;
        self.text = text_in(&body).unwrap_or_default();
        Ok(())
    }

    async fn read_stream(
        &mut self,
        mut body: Incoming,
        leaves_after: Option<u32>,
    ) -> Result<(), String> {
        let mut observer = StreamObserver::new();
        let mut read = Vec::new();
        while let Some(frame) = body.frame().await {
            let bytes: Bytes = match frame {
                Ok(frame) => frame.into_data().unwrap_or_default(),
                Err(_) if observer.is_done() => break,
                Err(error) => return Err(chain(&error)),
            };
            if observer.feed(&bytes).error {
                return Err(shortened(&String::from_utf8_lossy(&bytes)));
            }
            if read.len() + bytes.len() > LONGEST_BODY {
                return Err("the stream is longer than is read here".to_owned());
            }
            read.extend_from_slice(&bytes);
            if leaves_after.is_some_and(|tokens| observer.tokens() >= tokens) && !observer.is_done()
            {
                self.ending = Ending::Left;
                return Ok(());
            }
        }
        if !observer.is_done() {
            return Err("the stream ended without an end mark".to_owned());
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

/// The text of the first choice in a body or an event.
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
    choice.text.or(message.and_then(|it| it.content))
}
