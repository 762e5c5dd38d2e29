//! The load generator against a scripted server, over real sockets.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::num::NonZeroU32;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use foresee_client::load::{
    FailureKind, LiveOutcome, LiveReport, LoadConfig, LoadError, NamedOutcome, Progress, run,
};
use foresee_mock::{MockEngineConfig, bind, serve as serve_mock_engine};
use foresee_sim::engine::EngineConfig;
use foresee_sim::prompt::Prompt;
use foresee_sim::step_time::L40S_8B;
use foresee_sim::workload::{Arrival, Shape, Workload, WorkloadRequest};
use http_body_util::BodyExt;
use hyper::body::{Body, Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use serde_json::Value;
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::{Barrier, Semaphore};

const TOKEN: &str = "data: {\"choices\":[{\"index\":0,\"text\":\" bab\"}]}\n\n";
const DONE: &str = "data: [DONE]\n\n";

/// The server's response to a request.
struct Reply {
    status: u16,
    worker: Option<&'static str>,
    frames: Frames,
}

/// A body: some frames, then an end, a broken connection, or endless tokens.
#[derive(Default)]
struct Frames {
    frames: VecDeque<String>,
    breaks: bool,
    endless: bool,
    /// Signals that the body is dropped.
    _gone: Option<Gone>,
    /// Counted down before the last frame is sent.
    in_flight: Option<Arc<AtomicUsize>>,
}

/// Adds a permit when it is dropped.
struct Gone(Arc<Semaphore>);

impl Drop for Gone {
    fn drop(&mut self) {
        self.0.add_permits(1);
    }
}

impl Body for Frames {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        if let Some(frame) = self.frames.pop_front() {
            if self.frames.is_empty()
                && let Some(in_flight) = self.in_flight.take()
            {
                in_flight.fetch_sub(1, Ordering::SeqCst);
            }
            return Poll::Ready(Some(Ok(Frame::data(frame.into()))));
        }
        if self.endless {
            self.frames.push_back(TOKEN.to_owned());
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        if std::mem::take(&mut self.breaks) {
            return Poll::Ready(Some(Err(io::ErrorKind::ConnectionReset.into())));
        }
        Poll::Ready(None)
    }
}

/// Returns the events of a stream: tokens, the usage and the end mark.
fn stream_events(tokens: usize, prompt: u32, cached: u32) -> VecDeque<String> {
    let usage = format!(
        "data: {{\"choices\":[],\"usage\":{{\"prompt_tokens\":{prompt},\
         \"completion_tokens\":{tokens},\"prompt_tokens_details\":{{\"cached_tokens\":{cached}}}}}}}\n\n"
    );
    let end = [usage, DONE.to_owned()];
    std::iter::repeat_n(TOKEN.to_owned(), tokens)
        .chain(end)
        .collect()
}

fn stream(frames: impl IntoIterator<Item = String>) -> Reply {
    Reply {
        status: 200,
        worker: None,
        frames: Frames {
            frames: frames.into_iter().collect(),
            ..Frames::default()
        },
    }
}

fn finished(tokens: usize) -> Reply {
    stream(stream_events(tokens, 0, 0))
}

/// Starts a server that calls `reply` with the path and the body of each request. Returns its
/// address.
async fn serve<F>(reply: impl Fn(String, Value) -> F + Clone + Send + Sync + 'static) -> String
where
    F: Future<Output = Reply> + Send,
{
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    // The backlog is larger than a burst, because a refused connection is retried only after a
    // second.
    let listener = socket.listen(1024).unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (socket, _) = listener.accept().await.unwrap();
            socket.set_nodelay(true).unwrap();
            let reply = reply.clone();
            let service = service_fn(move |request: Request<Incoming>| {
                let reply = reply.clone();
                async move {
                    let path = request.uri().path().to_owned();
                    let body = request.into_body().collect().await.unwrap().to_bytes();
                    let body = serde_json::from_slice(&body).unwrap();
                    let reply = reply(path, body).await;
                    let mut response = Response::builder().status(reply.status);
                    if let Some(worker) = reply.worker {
                        response = response.header("x-foresee-worker", worker);
                    }
                    Ok::<_, Infallible>(response.body(reply.frames).unwrap())
                }
            });
            // A client that disconnects causes an error, which the tests do not regard as a
            // failure.
            tokio::spawn(async move {
                hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(socket), service)
                    .await
                    .ok();
            });
        }
    });
    format!("http://{address}")
}

fn workload(concurrency: usize, arrivals: impl IntoIterator<Item = Arrival>) -> Workload {
    let requests = (0..).zip(arrivals).map(|(index, arrival)| WorkloadRequest {
        prompt: Prompt::new().then(1, 60).then(1000 + index, 40),
        output_stream: None,
        output_tokens: 5,
        arrival,
    });
    Workload {
        name: "test".to_owned(),
        requests: requests.collect(),
        concurrency,
    }
}

fn at_once(requests: usize) -> Workload {
    workload(
        0,
        std::iter::repeat_n(Arrival::At(Duration::ZERO), requests),
    )
}

async fn load(config: &LoadConfig, workload: &Workload) -> LiveOutcome {
    run(config, workload, |_| ()).await.unwrap()
}

#[tokio::test]
async fn counts_and_latencies_describe_what_clients_received() {
    let received = Arc::new(Mutex::new(Vec::new()));
    let seen = received.clone();
    let address = serve(move |path, body| {
        let mut seen = seen.lock();
        let worker = ["a", "b"][seen.len() % 2];
        seen.push((path, body));
        async move {
            Reply {
                worker: Some(worker),
                ..stream(stream_events(5, 100, 60))
            }
        }
    })
    .await;
    let config = LoadConfig {
        workers: 4,
        ..LoadConfig::new(address, "m")
    };
    let reported = Mutex::new(Vec::new());
    let outcome = run(&config, &at_once(10), |progress| {
        reported.lock().push(progress)
    })
    .await
    .unwrap();

    assert_eq!((outcome.sent, outcome.finished), (10, 10));
    assert_eq!((outcome.aborted, outcome.failures()), (0, 0));
    assert_eq!(
        (outcome.prompt_tokens, outcome.cached_tokens),
        (1000, 600),
        "the counts of the usage"
    );
    assert_eq!((outcome.hit_fraction, outcome.output_tokens), (0.6, 50));
    assert_eq!(outcome.workers["a"].requests, 5);
    assert_eq!(outcome.workers["b"].uncached_prompt_tokens, 5 * 40);
    assert_eq!(outcome.cached_tokens_reports, 10);
    assert!(outcome.requests_per_second > 0.0);
    // Two of four workers had all requests.
    assert_eq!(
        (outcome.computed_imbalance, outcome.request_imbalance),
        (Some(2.0), Some(2.0))
    );
    let (first, end) = (outcome.time_to_first_token, outcome.end_to_end);
    assert!(first.mean > 0.0 && first.p50 <= first.p99);
    assert!(first.mean <= end.mean && end.p99 <= outcome.makespan + 1e-6);
    assert!(outcome.client_delay.p99 <= first.p99);
    assert!(outcome.output_tokens_per_second > 0.0);

    let received = received.lock();
    assert!(received.iter().all(|(path, body)| {
        path == "/v1/completions"
            && body["prompt"].as_str().unwrap().len() == 400
            && body["max_tokens"] == 5
            && body["stream"] == true
    }));
    let reported = reported.lock();
    assert!(reported.is_sorted_by_key(|progress| progress.ended));
    let last = *reported.last().unwrap();
    let expected = Progress {
        sent: 10,
        ended: 10,
        failed: 0,
        total: 10,
        now: last.now,
    };
    assert_eq!(last, expected);

    let report = LiveReport {
        workload: "test".to_owned(),
        workers: 4,
        outcomes: vec![NamedOutcome {
            name: "kv".to_owned(),
            outcome,
        }],
    };
    let table = report.to_string();
    assert!(table.contains("prefix hits, % of tokens          60.0\n"));
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["outcomes"][0]["name"], "kv");
    assert_eq!(json["outcomes"][0]["workers"]["a"]["requests"], 5);
}

#[tokio::test]
async fn goodput_counts_finished_requests_within_the_slo() {
    let count = Arc::new(AtomicUsize::new(0));
    let address = serve(move |_, _| {
        let index = count.fetch_add(1, Ordering::SeqCst);
        async move {
            match index {
                0 => Reply {
                    status: 500,
                    worker: None,
                    frames: Frames::default(),
                },
                // More than two seconds of the engine's time.
                1 => {
                    tokio::time::sleep(Duration::from_millis(300)).await;
                    finished(3)
                }
                _ => finished(3),
            }
        }
    })
    .await;
    let config = LoadConfig {
        speedup: 10.0,
        ..LoadConfig::new(address, "m")
    };
    let mut workload = at_once(4);
    for request in &mut workload.requests {
        request.arrival = Arrival::ClosedLoop;
    }
    workload.concurrency = 1;
    let outcome = load(&config, &workload).await;
    assert_eq!((outcome.finished, outcome.failures()), (3, 1));
    assert_eq!(outcome.goodput.fraction, 0.5);
    let per_second = 2.0 / outcome.makespan;
    assert!((outcome.goodput.per_second - per_second).abs() < 1e-9);
}

#[tokio::test]
async fn failures_are_counted_by_kind() {
    let count = Arc::new(AtomicUsize::new(0));
    let address = serve(move |_, _| {
        let index = count.fetch_add(1, Ordering::SeqCst);
        async move {
            let tokens = || [TOKEN, TOKEN].map(str::to_owned);
            match index {
                0 | 1 => finished(5),
                2 | 3 => Reply {
                    status: 503,
                    ..stream([format!("no worker for {index}")])
                },
                4 => {
                    let mut reply = stream(tokens());
                    reply.frames.breaks = true;
                    reply
                }
                5 => stream(tokens()),
                6 => stream(["data: {\"error\":{\"message\":\"died\"}}\n\n".to_owned()]),
                _ => std::future::pending().await,
            }
        }
    })
    .await;
    let config = LoadConfig {
        timeout: Duration::from_millis(300),
        ..LoadConfig::new(address, "m")
    };
    let outcome = load(&config, &at_once(8)).await;
    assert_eq!((outcome.sent, outcome.finished), (8, 2));
    let counts: Vec<_> = outcome
        .failed
        .iter()
        .map(|(kind, failures)| (*kind, failures.count))
        .collect();
    let expected = [
        (FailureKind::Reset, 1),
        (FailureKind::Status(503), 2),
        (FailureKind::ErrorEvent, 1),
        (FailureKind::CutShort, 1),
        (FailureKind::Timeout, 1),
    ];
    assert_eq!(counts, expected);
    let mut messages = outcome.failed[&FailureKind::Status(503)].messages.clone();
    messages.sort();
    assert_eq!(messages, ["no worker for 2", "no worker for 3"]);
    let json = serde_json::to_value(&outcome).unwrap();
    assert_eq!(json["failed"]["status 503"]["count"], 2);
    // Tokens of failed streams count.
    assert!((2 * 5..=2 * 5 + 4).contains(&outcome.output_tokens));
}

#[tokio::test]
async fn a_closed_port_is_a_failure_to_connect() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    drop(listener);
    let outcome = load(&LoadConfig::new(address, "m"), &at_once(3)).await;
    assert_eq!(outcome.failed[&FailureKind::Connect].count, 3);
    let messages = &outcome.failed[&FailureKind::Connect].messages;
    assert!(messages[0].contains("refused"), "{messages:?}");
}

#[tokio::test]
async fn a_stream_that_its_client_closes_ends_at_the_server() {
    let dropped = Arc::new(Semaphore::new(0));
    let drops = dropped.clone();
    let address = serve(move |_, _| {
        let mut reply = stream([]);
        reply.frames.endless = true;
        reply.frames._gone = Some(Gone(drops.clone()));
        std::future::ready(reply)
    })
    .await;
    let config = LoadConfig {
        abort_fraction: 1.0,
        ..LoadConfig::new(address, "m")
    };
    let outcome = load(&config, &at_once(20)).await;
    assert_eq!((outcome.sent, outcome.aborted), (20, 20));
    assert_eq!((outcome.finished, outcome.failures()), (0, 0));
    let reached_the_server = outcome.time_to_first_token.mean > 0.0;
    assert!(reached_the_server && outcome.output_tokens >= 1);
    // About three in four clients wait for tokens. Some of the others close before they reach the
    // server.
    let _gone = dropped.acquire_many(10).await.unwrap();
}

#[tokio::test]
async fn a_closed_loop_has_exactly_its_concurrency_in_flight() {
    const CONCURRENCY: usize = 3;
    let together = Arc::new(Barrier::new(CONCURRENCY));
    let in_flight = Arc::new(AtomicUsize::new(0));
    let max_in_flight = Arc::new(AtomicUsize::new(0));
    let (now, peak) = (in_flight.clone(), max_in_flight.clone());
    let address = serve(move |_, _| {
        let (together, now, peak) = (together.clone(), now.clone(), peak.clone());
        async move {
            peak.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            // No response starts before `CONCURRENCY` requests are in flight.
            together.wait().await;
            let mut reply = finished(5);
            reply.frames.in_flight = Some(now);
            reply
        }
    })
    .await;
    let workload = workload(CONCURRENCY, [Arrival::ClosedLoop; 5 * CONCURRENCY]);
    let outcome = load(&LoadConfig::new(address, "m"), &workload).await;
    assert_eq!(outcome.finished, 5 * CONCURRENCY);
    assert_eq!(max_in_flight.load(Ordering::SeqCst), CONCURRENCY);
}

#[tokio::test]
async fn all_requests_of_a_burst_are_in_flight_together() {
    const REQUESTS: u32 = 200;
    let together = Arc::new(Barrier::new(REQUESTS as usize));
    let address = serve(move |_, _| {
        let together = together.clone();
        async move {
            together.wait().await;
            finished(2)
        }
    })
    .await;
    let shape = Shape {
        isl: 700,
        osl: 2,
        ..Shape::default()
    };
    let workload = Workload::burst(&shape, REQUESTS, 1);
    let outcome = load(&LoadConfig::new(address, "m"), &workload).await;
    assert_eq!(outcome.finished, REQUESTS as usize);
}

#[tokio::test]
async fn arrivals_and_think_times_follow_the_engines_time() {
    let received = Arc::new(Mutex::new(Vec::new()));
    let seen = received.clone();
    let address = serve(move |path, body| {
        seen.lock().push((path, body));
        std::future::ready(finished(5))
    })
    .await;
    let seconds = Duration::from_secs;
    let arrivals = [
        Arrival::At(seconds(100)),
        Arrival::At(seconds(150)),
        Arrival::After {
            request: 1,
            think: seconds(30),
        },
    ];
    let config = LoadConfig {
        speedup: 500.0,
        chat: true,
        ..LoadConfig::new(address, "m")
    };
    let begin = std::time::Instant::now();
    let workload = workload(0, arrivals);
    let outcome = load(&config, &workload).await;
    let elapsed = begin.elapsed().as_secs_f64();
    assert_eq!(outcome.finished, 3);
    // The clock starts at the first arrival.
    assert!(outcome.makespan >= 80.0, "{}", outcome.makespan);
    assert!(outcome.makespan <= elapsed * 500.0);
    let received = received.lock();
    let lengths: Vec<usize> = received
        .iter()
        .map(|(path, body)| {
            assert_eq!(path, "/v1/chat/completions");
            body["messages"][0]["content"].as_str().unwrap().len()
        })
        .collect();
    assert_eq!(lengths, [400; 3]);
}

#[tokio::test]
async fn the_mock_engine_counts_exactly_the_tokens_of_the_workload() {
    const SPEEDUP: f64 = 200.0;
    let listener = bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let mock_engine = MockEngineConfig {
        speedup: SPEEDUP,
        ..MockEngineConfig::new(
            "m",
            EngineConfig::from_preset(&L40S_8B, NonZeroU32::new(16).unwrap()),
        )
    };
    tokio::spawn(serve_mock_engine(
        mock_engine,
        listener,
        std::future::pending(),
    ));
    let shape = Shape {
        isl: 640,
        isl_spread: 0.5,
        osl: 20,
        prefixes: 1,
        ..Shape::default()
    };
    let workload = Workload::closed_loop(&shape, 40, 2, 1);
    let config = LoadConfig {
        speedup: SPEEDUP,
        ..LoadConfig::new(address, "m")
    };
    let outcome = load(&config, &workload).await;
    assert_eq!((outcome.finished, outcome.output_tokens), (40, 40 * 20));
    let prompt_tokens: u32 = workload
        .requests
        .iter()
        .map(|request| request.prompt.len())
        .sum();
    assert_eq!(outcome.prompt_tokens, u64::from(prompt_tokens));
    // The prefix is half of every prompt. It is cached except for the first prompt and the longest
    // ones.
    assert!(
        (0.4..0.5).contains(&outcome.hit_fraction),
        "{}",
        outcome.hit_fraction
    );
}

#[tokio::test]
async fn no_request_is_sent_after_the_duration_limit() {
    let address = serve(|_, _| std::future::ready(finished(5))).await;
    let config = LoadConfig {
        duration: Some(Duration::from_secs(60)),
        speedup: 1000.0,
        ..LoadConfig::new(address, "m")
    };
    let arrivals = [0, 10, 59, 60, 100].map(|second| Arrival::At(Duration::from_secs(second)));
    let outcome = load(&config, &workload(0, arrivals)).await;
    assert_eq!((outcome.sent, outcome.finished), (3, 3));
    let nothing = LoadConfig {
        duration: Some(Duration::ZERO),
        ..config
    };
    // Requests of the first instant are sent for any limit.
    assert_eq!(load(&nothing, &workload(0, arrivals)).await.sent, 1);
}

#[tokio::test]
async fn an_invalid_configuration_is_rejected() {
    let valid = LoadConfig::new("127.0.0.1:1", "m");
    let error_of = async |config: LoadConfig| run(&config, &at_once(1), |_| ()).await.unwrap_err();
    for speedup in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let error = error_of(LoadConfig {
            speedup,
            ..valid.clone()
        });
        assert!(matches!(error.await, LoadError::Speedup(_)));
    }
    for abort_fraction in [-0.1, 1.1, f64::NAN] {
        let error = error_of(LoadConfig {
            abort_fraction,
            ..valid.clone()
        });
        assert!(matches!(error.await, LoadError::AbortFraction(_)));
    }
    let error = error_of(LoadConfig::new("https://example.com", "m")).await;
    assert!(matches!(error, LoadError::NotHttp { .. }));
    let error = error_of(LoadConfig::new("http://no host", "m")).await;
    assert!(matches!(error, LoadError::InvalidAddress { .. }));
}
