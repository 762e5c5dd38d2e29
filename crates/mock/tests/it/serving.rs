//! The mock engine over real sockets.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::time::Duration;

use bytes::Bytes;
use foresee_engine::stream::StreamObserver;
use foresee_engine::usage::parse_usage;
use foresee_engine::worker_metrics::CacheConfig;
use foresee_mock::{MockEngineConfig, bind, serve};
use foresee_sim::engine::EngineConfig;
use foresee_sim::step_time::L40S_8B;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{Request, Response, StatusCode};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::{Value, json};
use tokio::sync::oneshot;

/// Block size of the simulated engines, in tokens.
const BLOCK: NonZeroU32 = NonZeroU32::new(16).unwrap();

/// Limit for each wait.
const TIMEOUT: Duration = Duration::from_secs(20);

/// A mock engine on a free port with a client. The engine is stopped when this value is dropped.
struct Served {
    address: SocketAddr,
    client: Client<HttpConnector, Full<Bytes>>,
    _stop: oneshot::Sender<()>,
}

async fn start(speedup: f64) -> Served {
    let mut config = MockEngineConfig::new("m", EngineConfig::from_preset(&L40S_8B, BLOCK));
    config.speedup = speedup;
    start_with(config).await
}

async fn start_with(config: MockEngineConfig) -> Served {
    let listener = bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    tokio::spawn(async move {
        let stopped = async {
            let _ = stopped.await;
        };
        serve(config, listener, stopped).await.unwrap();
    });
    Served {
        address,
        client: Client::builder(TokioExecutor::new()).build_http(),
        _stop: stop,
    }
}

impl Served {
    async fn send(&self, path: &str, body: Option<Value>) -> Response<Incoming> {
        let method = if body.is_some() { "POST" } else { "GET" };
        let request = Request::builder()
            .method(method)
            .uri(format!("http://{}{path}", self.address))
            .header("x-request-id", "r-1")
            .body(body.map_or_else(Full::default, |body| body.to_string().into()))
            .unwrap();
        let response = self.client.request(request);
        let response = tokio::time::timeout(TIMEOUT, response).await.unwrap();
        response.unwrap()
    }

    async fn post(&self, path: &str, body: Value) -> (StatusCode, Vec<u8>) {
        let response = self.send(path, Some(body)).await;
        let status = response.status();
        (status, read(response).await)
    }

    async fn post_json(&self, path: &str, body: Value) -> Value {
        let (status, body) = self.post(path, body).await;
        let text = String::from_utf8_lossy(&body);
        assert_eq!(status, StatusCode::OK, "{text}");
        serde_json::from_slice(&body).unwrap()
    }

    async fn metrics(&self) -> String {
        let body = read(self.send("/metrics", None).await).await;
        String::from_utf8(body).unwrap()
    }

    /// Reads the metrics repeatedly until they are as expected.
    async fn metrics_become(&self, expected: impl Fn(&str) -> bool) {
        let mut ticks = tokio::time::interval(Duration::from_millis(5));
        let waiting = async {
            while !expected(&self.metrics().await) {
                ticks.tick().await;
            }
        };
        tokio::time::timeout(TIMEOUT, waiting).await.unwrap();
    }
}

async fn read(response: Response<Incoming>) -> Vec<u8> {
    let body = tokio::time::timeout(TIMEOUT, response.into_body().collect()).await;
    body.unwrap().unwrap().to_bytes().to_vec()
}

fn metric(text: &str, name: &str) -> f64 {
    let line = text
        .lines()
        .find(|line| line.starts_with(&format!("vllm:{name}{{")));
    let value = line.and_then(|line| line.rsplit(' ').next());
    value.unwrap().parse().unwrap()
}

fn is_idle(metrics: &str) -> bool {
    [
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
    ]
    .iter()
    .all(|name| metric(metrics, name) == 0.0)
}

/// Returns the JSON of each event except the last, which marks the end.
fn events(body: &[u8]) -> Vec<Value> {
    let text = std::str::from_utf8(body).unwrap();
    let mut data: Vec<&str> = text
        .split_terminator("\n\n")
        .map(|event| event.strip_prefix("data: ").unwrap())
        .collect();
    assert_eq!(data.pop(), Some("[DONE]"));
    data.iter()
        .map(|data| serde_json::from_str(data).unwrap())
        .collect()
}

#[tokio::test]
async fn a_completion_has_the_requested_number_of_tokens() {
    let served = start(1000.0).await;
    let request =
        json!({"model": "m", "prompt": "x".repeat(400), "max_tokens": 20, "ignore_eos": true});
    let body = served.post_json("/v1/completions", request.clone()).await;
    assert_eq!(body["object"], "text_completion");
    assert_eq!(body["model"], "m");
    let choice = &body["choices"][0];
    assert_eq!(choice["text"].as_str().unwrap().len(), 20 * 4);
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!(body["usage"]["prompt_tokens"], 100);
    assert_eq!(body["usage"]["completion_tokens"], 20);
    assert_eq!(body["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    // A repeated request has the same output, and finds every block but the last in the cache.
    let again = served.post_json("/v1/completions", request).await;
    assert_eq!(again["choices"][0]["text"], choice["text"]);
    assert_eq!(again["usage"]["prompt_tokens_details"]["cached_tokens"], 96);
    let metrics = served.metrics().await;
    assert_eq!(metric(&metrics, "prefix_cache_queries_total"), 200.0);
    assert_eq!(metric(&metrics, "prefix_cache_hits_total"), 96.0);
    assert_eq!(metric(&metrics, "generation_tokens_total"), 40.0);
}

#[tokio::test]
async fn a_chat_streams_as_vllm_does() {
    let served = start(1000.0).await;
    let request = json!({
        "model": "m", "stream": true, "max_completion_tokens": 5, "ignore_eos": true,
        "messages": [{"role": "user", "content": "Hi"}],
        "stream_options": {"include_usage": true, "continuous_usage_stats": true},
    });
    let response = served.send("/v1/chat/completions", Some(request)).await;
    assert_eq!(
        response.headers()["content-type"],
        "text/event-stream; charset=utf-8"
    );
    assert_eq!(response.headers()["x-request-id"], "r-1");
    let body = read(response).await;
    let events = events(&body);
    assert!(
        events
            .iter()
            .all(|event| event["object"] == "chat.completion.chunk")
    );
    assert!(events.iter().all(|event| event["id"] == "chatcmpl-r-1"));
    let first = &events[0]["choices"][0];
    assert_eq!(first["delta"], json!({"role": "assistant", "content": ""}));
    assert_eq!(events[0]["usage"]["completion_tokens"], 0);

    let (usage, contents) = events[1..].split_last().unwrap();
    let text: String = contents
        .iter()
        .map(|event| event["choices"][0]["delta"]["content"].as_str().unwrap())
        .collect();
    assert_eq!(text.len(), 5 * 4);
    let last = contents.last().unwrap();
    assert_eq!(last["choices"][0]["finish_reason"], "length");
    assert_eq!(last["usage"]["completion_tokens"], 5);
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], 5);

    let mut observer = StreamObserver::new();
    let seen = observer.feed(&body);
    assert!(seen.done && !seen.error && !observer.is_mid_event());
    assert_eq!((observer.tokens(), observer.unread_events()), (5, 0));
}

#[tokio::test]
async fn an_output_is_equal_streamed_or_not_and_ends_without_a_limit() {
    let served = start(1000.0).await;
    let mut request = json!({"messages": [{"role": "user", "content": "Tell me."}]});
    let body = served
        .post_json("/v1/chat/completions", request.clone())
        .await;
    let choice = &body["choices"][0];
    assert_eq!(choice["finish_reason"], "stop");
    assert_eq!(choice["message"]["role"], "assistant");
    request["stream"] = json!(true);
    let (_, streamed) = served.post("/v1/chat/completions", request).await;
    let streamed: String = events(&streamed)
        .iter()
        .filter_map(|event| event["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert_eq!(choice["message"]["content"], streamed);
}

#[tokio::test]
async fn the_next_turn_finds_the_output_in_the_cache() {
    let served = start(1000.0).await;
    let question = json!({"role": "user", "content": "word ".repeat(60)});
    let request = json!({"messages": [question], "max_tokens": 64, "ignore_eos": true});
    let body = served.post_json("/v1/chat/completions", request).await;
    let output = &body["choices"][0]["message"];
    let total_tokens = body["usage"]["total_tokens"].as_u64().unwrap();
    let thanks = json!({"role": "user", "content": "Thanks."});
    let request = json!({"messages": [question, output, thanks], "max_tokens": 1});
    let body = served.post_json("/v1/chat/completions", request).await;
    let cached = body["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64();
    // The KV cache has no entry of the last token, because no later token was computed.
    assert_eq!(cached.unwrap(), (total_tokens - 1) / 16 * 16);
}

#[tokio::test]
async fn an_output_ends_after_min_tokens() {
    let served = start(1000.0).await;
    let request = json!({"prompt": "x".repeat(40), "max_tokens": 500, "min_tokens": 33});
    let body = served.post_json("/v1/completions", request).await;
    assert_eq!(body["usage"]["completion_tokens"], 33);
    assert_eq!(body["choices"][0]["finish_reason"], "stop");

    let request = json!({"prompt": "x", "max_tokens": 5, "min_tokens": 6});
    let (status, body) = served.post("/v1/completions", request).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    let body = String::from_utf8_lossy(&body);
    assert!(
        body.contains("min_tokens must be at most max_tokens=5, got 6."),
        "{body}"
    );
}

#[tokio::test]
async fn prompts_can_be_tokens_and_requests_can_have_several_prompts_and_choices() {
    let served = start(1000.0).await;
    let tokens: Vec<u32> = (0..50).collect();
    let request = json!({"prompt": tokens, "max_tokens": 3, "ignore_eos": true, "n": 2});
    let body = served.post_json("/v1/completions", request).await;
    assert_eq!(body["usage"]["prompt_tokens"], 50);
    assert_eq!(body["usage"]["completion_tokens"], 6);
    assert_ne!(body["choices"][0]["text"], body["choices"][1]["text"]);
    assert_eq!(body["choices"][1]["index"], 1);

    let request = json!({"prompt": [[1, 2, 3], [4, 5]], "stream": true, "ignore_eos": true});
    let (_, body) = served.post("/v1/completions", request).await;
    let mut lengths = [0, 0];
    for event in events(&body) {
        let choice = &event["choices"][0];
        let index = choice["index"].as_u64().unwrap() as usize;
        lengths[index] += choice["text"].as_str().unwrap().len();
    }
    assert_eq!(
        lengths,
        [64, 64],
        "the default is 16 tokens for each prompt"
    );

    let request = json!({"model": "m", "input": ["abcdefgh", "ijkl"]});
    let body = served.post_json("/v1/embeddings", request).await;
    assert_eq!(body["data"].as_array().unwrap().len(), 2);
    assert_eq!(body["usage"]["prompt_tokens"], 3);
}

#[tokio::test]
async fn a_stream_whose_client_disconnects_is_aborted() {
    let served = start(1.0).await;
    let request = json!({"prompt": "x".repeat(4000), "stream": true, "max_tokens": 100_000, "ignore_eos": true});
    let mut response = served.send("/v1/completions", Some(request)).await;
    response.frame().await.unwrap().unwrap();
    let metrics = served.metrics().await;
    assert_eq!(metric(&metrics, "num_requests_running"), 1.0);
    assert!(metric(&metrics, "kv_cache_usage_perc") > 0.0);
    drop(response);
    served.metrics_become(is_idle).await;
}

#[tokio::test]
async fn a_request_whose_client_disconnects_before_the_response_is_aborted() {
    let served = start(1.0).await;
    let request = json!({"prompt": "x", "max_tokens": 100_000, "ignore_eos": true});
    let response = served.send("/v1/completions", Some(request));
    let running = served.metrics_become(|text| metric(text, "num_requests_running") == 1.0);
    tokio::select! {
        _ = response => panic!("the response takes half an hour"),
        () = running => {}
    }
    served.metrics_become(is_idle).await;
}

#[tokio::test]
async fn errors_have_the_format_and_status_of_openai() {
    let served = start(1000.0).await;
    let chat = "/v1/chat/completions";
    for (path, body, status, param) in [
        (
            chat,
            json!({"model": "other", "messages": []}),
            404,
            json!("model"),
        ),
        (chat, json!({"messages": 5}), 400, json!("messages")),
        (chat, json!([]), 400, json!(null)),
        (
            "/v1/completions",
            json!({"prompt": "x", "max_tokens": 1_000_000}),
            400,
            json!(null),
        ),
        (
            "/v1/completions",
            json!({"prompt": "x".repeat(1_000_000)}),
            400,
            json!(null),
        ),
        (
            "/v1/completions",
            json!({"prompt": ""}),
            400,
            json!("prompt"),
        ),
        (
            "/v1/completions",
            json!({"prompt": "x", "max_tokens": 0}),
            400,
            json!("max_tokens"),
        ),
        (
            "/v1/completions",
            json!({"prompt": "x", "n": 1_000_000}),
            400,
            json!("n"),
        ),
        (
            "/v1/completions",
            json!({"prompt": "x", "stream_options": {}}),
            400,
            json!("stream_options"),
        ),
        ("/v1/unknown", json!({}), 404, json!(null)),
    ] {
        let (actual, body) = served.post(path, body).await;
        let body: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(actual.as_u16(), status, "{body}");
        assert_eq!(body["error"]["param"], param, "{body}");
        assert!(body["error"]["message"].is_string());
    }
    let unknown = json!({"model": "other", "prompt": "x"});
    let (_, body) = served.post("/v1/completions", unknown).await;
    let body: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(
        body["error"]["message"],
        "The model `other` does not exist."
    );
}

#[tokio::test]
async fn health_models_and_metrics_describe_the_engine() {
    let served = start(1.0).await;
    let health = served.send("/health", None).await;
    assert_eq!(health.status(), StatusCode::OK);
    let models = read(served.send("/v1/models", None).await).await;
    let models: Value = serde_json::from_slice(&models).unwrap();
    assert_eq!(models["data"][0]["id"], "m");
    let metrics = served.metrics().await;
    let (_, cache) = CacheConfig::parse(&metrics)[0];
    let blocks = L40S_8B.kv_tokens / 16;
    assert_eq!((cache.block_size, cache.blocks), (Some(16), Some(blocks)));
    assert_eq!(cache.prefix_caching, Some(true));
    assert_eq!(metric(&metrics, "num_preemptions_total"), 0.0);
}

#[tokio::test]
async fn a_fault_fails_requests_or_slows_steps_until_it_is_cleared() {
    let engine = start(1000.0).await;
    let body = json!({"model": "m", "prompt": "bab", "max_tokens": 100, "ignore_eos": true});
    let (status, _) = engine.post("/fault", json!({"failing": true})).await;
    assert_eq!(status, StatusCode::OK);
    let (status, _) = engine.post("/v1/completions", body.clone()).await;
    assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!(engine.send("/health", None).await.status(), StatusCode::OK);

    // 100 steps of 25 ms take 2.5 ms at this speed, and half a second in the slow engine.
    let timed = async |fault: Value| {
        let (status, _) = engine.post("/fault", fault).await;
        assert_eq!(status, StatusCode::OK);
        let begin = tokio::time::Instant::now();
        let (status, _) = engine.post("/v1/completions", body.clone()).await;
        assert_eq!(status, StatusCode::OK);
        begin.elapsed()
    };
    let slow = timed(json!({"slowdown": 200.0})).await;
    let healthy = timed(json!({})).await;
    assert!(slow > 2 * healthy, "{slow:?} {healthy:?}");

    for invalid in [json!({"slowdown": 0.0}), json!({"slow": 2.0})] {
        let (status, _) = engine.post("/fault", invalid).await;
        assert_eq!(status, StatusCode::BAD_REQUEST);
    }
}

#[tokio::test]
async fn tokenize_returns_as_many_tokens_as_the_engine_counts() {
    let engine = start(1000.0).await;
    let prompt = json!({"model": "m", "prompt": "aaaa bbbb cccc"});
    let messages = json!({"model": "m", "messages": [{"role": "user", "content": "aaaa bbbb"}]});
    for (path, body) in [
        ("/v1/completions", prompt),
        ("/v1/chat/completions", messages),
    ] {
        let tokenized = engine.post_json("/tokenize", body.clone()).await;
        let count = tokenized["tokens"].as_array().unwrap().len();
        assert_eq!(tokenized["count"], json!(count));
        let completed = engine.post_json(path, body).await;
        assert_eq!(completed["usage"]["prompt_tokens"], json!(count));
    }
}

#[tokio::test]
async fn steps_shorter_than_the_timer_resolution_keep_their_duration() {
    // A decode step of this model takes 22 ms. At a speedup of 1,000, 2,000 steps take 45 ms, and
    // would take two seconds if each were rounded up to a millisecond. The steps of the other
    // engine are longer than the resolution, and 2,000 of them take one second.
    let (short, long) = (start(1000.0).await, start(44.0).await);
    let request = json!({"prompt": "x", "max_tokens": 2000, "ignore_eos": true});
    tokio::select! {
        _ = short.post_json("/v1/completions", request.clone()) => {}
        _ = long.post_json("/v1/completions", request) => panic!("the longer steps ended first"),
    }
}

#[tokio::test]
async fn many_connections_are_served_concurrently() {
    const CLIENTS: usize = 400;
    let served = std::sync::Arc::new(start(200.0).await);
    let mut clients = tokio::task::JoinSet::new();
    for client in 0..CLIENTS {
        let served = served.clone();
        clients.spawn(async move {
            let prompt: Vec<u32> = (0..64).map(|token| token + client as u32).collect();
            let request = json!({
                "prompt": prompt, "max_tokens": 16, "ignore_eos": true, "stream": client % 2 == 0,
                "stream_options": if client % 2 == 0 { json!({"include_usage": true}) } else { json!(null) },
            });
            let (status, body) = served.post("/v1/completions", request).await;
            assert_eq!(status, StatusCode::OK);
            if client % 2 == 0 {
                let mut observer = StreamObserver::new();
                assert!(observer.feed(&body).done);
                assert_eq!(observer.tokens(), 16);
            } else {
                assert_eq!(parse_usage(&body).unwrap().completion_tokens, Some(16));
            }
        });
    }
    let done = clients.join_all();
    tokio::time::timeout(TIMEOUT, done).await.unwrap();
    served.metrics_become(is_idle).await;
}

#[tokio::test]
async fn a_shutdown_cuts_streams() {
    let served = start(1.0).await;
    let request = json!({"prompt": "x", "stream": true, "max_tokens": 100_000, "ignore_eos": true});
    let mut response = served.send("/v1/completions", Some(request)).await;
    response.frame().await.unwrap().unwrap();
    drop(served);
    let rest = tokio::time::timeout(TIMEOUT, response.into_body().collect());
    assert!(rest.await.unwrap().is_err());
}

#[tokio::test]
async fn contradictory_configurations_are_rejected() {
    let valid = MockEngineConfig::new("m", EngineConfig::from_preset(&L40S_8B, BLOCK));
    let mut no_speedup = valid.clone();
    no_speedup.speedup = 0.0;
    let mut too_long = valid.clone();
    too_long.max_model_len = u32::MAX;
    let mut no_sequences = valid;
    no_sequences.engine.max_num_seqs = 0;
    for config in [no_speedup, too_long, no_sequences] {
        let listener = bind("127.0.0.1:0".parse().unwrap()).unwrap();
        assert!(
            serve(config, listener, std::future::pending())
                .await
                .is_err()
        );
    }
}
