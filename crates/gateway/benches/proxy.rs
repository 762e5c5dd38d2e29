//! Benchmark of the proxy: CPU time of the gateway's process per request, its memory after many
//! different prompts, and its memory with many open streams and after them. Run with `cargo bench -p foresee-gateway`.
//!
//! Two child processes of this program act as the worker and the clients, so that their CPU time is
//! not counted. The first argument is the role. Both use a minimal HTTP implementation over keep-alive
//! connections. Linux only, because it reads `/proc/self`.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use foresee_core::queue::QueueOrder;
use foresee_core::router::RouterConfig;
use foresee_core::workers::WorkerState;
use foresee_gateway::{Gateway, GatewayConfig, TraceConfig, raise_open_file_limit};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

/// Number of connections of the clients.
const CONNECTIONS: usize = 32;
/// Number of events of one stream.
const EVENTS: usize = 16;
/// Number of streams that are open at once. Each takes two of the gateway's open files.
const OPEN_STREAMS: usize = 9_000;
/// Number of requests at once while the streams are opened.
const OPENING_AT_ONCE: usize = 200;
/// Time after the end of the streams at which memory is measured again.
const IDLE_TIME: Duration = Duration::from_secs(60);

fn main() {
    raise_open_file_limit().unwrap();
    let mut arguments = std::env::args().skip(1);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    match arguments.next().as_deref() {
        Some("worker") => runtime.block_on(worker()),
        Some("clients") => {
            let address = arguments.next().unwrap();
            let kind = Kind::from_name(&arguments.next().unwrap());
            let requests = arguments.next().unwrap().parse().unwrap();
            runtime.block_on(clients(address, kind, requests));
        }
        Some("open-streams") => runtime.block_on(hold_streams(arguments.next().unwrap())),
        _ => runtime.block_on(async {
            measure().await;
            measure_open_streams().await;
        }),
    }
}

/// Kind of requests and responses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A chat of 2 KB; the response does not stream.
    Whole,
    /// A chat of 2 KB; the response is a stream of 16 events.
    Stream,
    /// A chat of 2 KB; the response is a stream of 16 events, one per millisecond, so that no two
    /// events share a system call.
    SlowStream,
    /// A chat of 28 KB that differs from all other prompts; the response does not stream.
    Distinct,
}

impl Kind {
    const ALL: [(Kind, &'static str); 4] = [
        (Kind::Whole, "whole"),
        (Kind::Stream, "stream"),
        (Kind::SlowStream, "slow-stream"),
        (Kind::Distinct, "distinct"),
    ];

    fn from_name(name: &str) -> Self {
        let mut kinds = Self::ALL.iter();
        kinds.find(|(_, known)| *known == name).unwrap().0
    }

    fn name(self) -> &'static str {
        let mut kinds = Self::ALL.iter();
        kinds.find(|(kind, _)| *kind == self).unwrap().1
    }

    /// Returns the body of request `number`. All bodies of one kind have the same length.
    fn body(self, number: usize) -> String {
        let length = if self == Kind::Distinct {
            28_000
        } else {
            1_900
        };
        let subject = if self == Kind::Distinct {
            number
        } else {
            number % 10
        };
        let words: String = (0..)
            .flat_map(|word| format!("{subject:06}-{word} ").into_bytes())
            .map(char::from)
            .take(length)
            .collect();
        let stream = matches!(self, Kind::Stream | Kind::SlowStream);
        let gap = u8::from(self == Kind::SlowStream);
        format!(
            r#"{{"model":"m","stream":{stream},"gap_ms":{gap},"max_tokens":16,"messages":[{{"role":"system","content":"You are helpful."}},{{"role":"user","content":"{words}"}}]}}"#
        )
    }
}

async fn measure() {
    println!(
        "{:44}{:>10}{:>12}{:>12}",
        "", "requests", "CPU µs each", "requests/s"
    );
    for (label, kind, requests, sampled) in [
        ("2 KB chat, whole response", Kind::Whole, 40_000, None),
        ("2 KB chat, stream of 16 events", Kind::Stream, 20_000, None),
        (
            "the same, none of them traced",
            Kind::Stream,
            20_000,
            Some(0.0),
        ),
        ("the same, a tenth traced", Kind::Stream, 20_000, Some(0.1)),
        ("the same, all traced", Kind::Stream, 20_000, Some(1.0)),
        (
            "2 KB chat, 16 events 1 ms apart",
            Kind::SlowStream,
            20_000,
            None,
        ),
        (
            "28 KB chat, distinct prompts",
            Kind::Distinct,
            100_000,
            None,
        ),
    ] {
        let queue = RouterConfig::default().queue_order;
        let (mut worker, gateway) = start(queue, sampled).await;
        // Opens connections and fills caches before the measurement.
        run_clients(&gateway, kind, 2_000).await;
        let (cpu, memory, start) = (cpu_time(), resident_bytes(), Instant::now());
        run_clients(&gateway, kind, requests).await;
        let (cpu, elapsed) = (cpu_time() - cpu, start.elapsed());
        println!(
            "{label:44}{requests:>10}{:>12.1}{:>12.0}",
            cpu.as_secs_f64() * 1e6 / requests as f64,
            requests as f64 / elapsed.as_secs_f64(),
        );
        if kind == Kind::Distinct {
            println!(
                "memory before and after: {:.1} MB, {:.1} MB; {} prefix tree nodes",
                memory as f64 / 1e6,
                resident_bytes() as f64 / 1e6,
                gateway.router().prefix_tree_nodes(),
            );
        }
        gateway.shut_down().await;
        worker.kill().unwrap();
        worker.wait().unwrap();
    }
}

/// Measures memory before, with and after [`OPEN_STREAMS`] streams that are open at once.
async fn measure_open_streams() {
    // The one worker would not be sent that many requests at once.
    let (mut worker, gateway) = start(None, None).await;
    run_clients(&gateway, Kind::Stream, 2_000).await;
    let before = resident_bytes();
    let (mut clients, mut output) = spawn(&["open-streams", &gateway.address().to_string()]);
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    assert_eq!(line, "open\n", "some streams could not be opened");
    assert_eq!(gateway.router().booking_count(), OPEN_STREAMS);
    let open = resident_bytes();
    clients.kill().unwrap();
    clients.wait().unwrap();
    while gateway.router().booking_count() > 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    tokio::time::sleep(IDLE_TIME).await;
    println!(
        "{OPEN_STREAMS} open streams: {:.1} kB each; memory before, with and {} s after them: {:.1} MB, {:.1} MB, {:.1} MB",
        (open - before) as f64 / OPEN_STREAMS as f64 / 1e3,
        IDLE_TIME.as_secs(),
        before as f64 / 1e6,
        open as f64 / 1e6,
        resident_bytes() as f64 / 1e6,
    );
    gateway.shut_down().await;
    worker.kill().unwrap();
    worker.wait().unwrap();
}

/// Starts a worker as a child process and a gateway in front of it. With a fraction, that many requests
/// are traced, and the worker is the collector as well: it responds to anything.
async fn start(queue_order: Option<QueueOrder>, sampled: Option<f64>) -> (Child, Gateway) {
    let (worker, mut output) = spawn(&["worker"]);
    let mut address = String::new();
    output.read_line(&mut address).unwrap();
    let traces = sampled.map(|ratio| TraceConfig {
        sample_ratio: Some(ratio),
        ..TraceConfig::new(address.trim().parse().unwrap())
    });
    let gateway = Gateway::start(GatewayConfig {
        traces,
        listen: "127.0.0.1:0".parse().unwrap(),
        admin_listen: "127.0.0.1:0".parse().unwrap(),
        workers: vec![address.trim().parse().unwrap()],
        shutdown: foresee_gateway::ShutdownConfig {
            delay: Duration::ZERO,
        },
        router: RouterConfig {
            queue_order,
            ..RouterConfig::default()
        },
        ..GatewayConfig::default()
    })
    .unwrap();
    let healthy = || gateway.router().workers(Duration::ZERO)[0].state == WorkerState::Healthy;
    while !healthy() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    (worker, gateway)
}

async fn run_clients(gateway: &Gateway, kind: Kind, requests: usize) {
    let address = gateway.address().to_string();
    let (mut clients, _output) = spawn(&["clients", &address, kind.name(), &requests.to_string()]);
    let ended = tokio::task::spawn_blocking(move || clients.wait().unwrap());
    assert!(ended.await.unwrap().success(), "a request failed");
}

/// Starts a child process of this program, and returns it with its output.
fn spawn(arguments: &[&str]) -> (Child, BufReader<ChildStdout>) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(arguments)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = BufReader::new(child.stdout.take().unwrap());
    (child, output)
}

/// Returns the user and system time of this process.
fn cpu_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    // The name, in parentheses, may contain spaces; utime and stime are fields 14 and 15.
    let fields: Vec<&str> = stat
        .rsplit_once(')')
        .unwrap()
        .1
        .split_whitespace()
        .collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 10)
}

/// Returns the resident memory of this process.
fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS"))
        .unwrap();
    let kilobytes: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kilobytes * 1024
}

/// Runs the worker, which responds to health checks and chats until it is killed.
async fn worker() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    println!("http://{}", listener.local_addr().unwrap());
    std::io::stdout().flush().unwrap();
    loop {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.set_nodelay(true).unwrap();
        tokio::spawn(async move { while respond(&mut stream).await.is_some() {} });
    }
}

/// Reads one request and responds to it. Returns `None` at the end of the connection.
async fn respond(stream: &mut TcpStream) -> Option<()> {
    let (head, body) = read_message(stream).await?;
    if head.starts_with("GET /health") {
        stream
            .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
            .await
            .ok()?;
    } else if head.starts_with("GET") {
        let missing = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n";
        stream.write_all(missing).await.ok()?;
    } else if memchr::memmem::find(&body, br#""stream":true"#).is_some() {
        let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
        stream.write_all(head.as_bytes()).await.ok()?;
        let is_slow = memchr::memmem::find(&body, br#""gap_ms":1"#).is_some();
        if memchr::memmem::find(&body, br#""hold":true"#).is_some() {
            stream.write_all(b"c\r\ndata: {}\n\n  \r\n").await.ok()?;
            // Until the gateway closes the connection.
            let _ = stream.read_u8().await;
            return None;
        }
        for event in 0..EVENTS {
            let data = if event + 1 == EVENTS {
                "data: [DONE]\n\n".to_owned()
            } else {
                format!(
                    "data: {{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"m\",\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\" word{event}\"}},\"logprobs\":null,\"finish_reason\":null}}]}}\n\n"
                )
            };
            let chunk = format!("{:x}\r\n{data}\r\n", data.len());
            stream.write_all(chunk.as_bytes()).await.ok()?;
            if is_slow {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        stream.write_all(b"0\r\n\r\n").await.ok()?;
    } else {
        let text = "word ".repeat(16);
        let body = format!(
            r#"{{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"m","choices":[{{"index":0,"message":{{"role":"assistant","content":"{text}"}},"finish_reason":"length"}}],"usage":{{"prompt_tokens":480,"completion_tokens":16,"total_tokens":496}}}}"#
        );
        let response = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(response.as_bytes()).await.ok()?;
    }
    Some(())
}

/// Runs the clients: sends `requests` requests over [`CONNECTIONS`] connections. Panics if a response is
/// incomplete or not a 200.
async fn clients(address: String, kind: Kind, requests: usize) {
    let tasks: Vec<_> = (0..CONNECTIONS)
        .map(|connection| {
            let address = address.clone();
            tokio::spawn(async move {
                let mut stream = TcpStream::connect(&address).await.unwrap();
                stream.set_nodelay(true).unwrap();
                for number in (connection..requests).step_by(CONNECTIONS) {
                    let body = kind.body(number);
                    let request = format!(
                        "POST /v1/chat/completions HTTP/1.1\r\nhost: {address}\r\nauthorization: Bearer key\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
                        body.len()
                    );
                    stream.write_all(request.as_bytes()).await.unwrap();
                    let (head, _) = read_message(&mut stream).await.expect("a response");
                    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
}

/// Opens [`OPEN_STREAMS`] streams, prints `open` after the first event of the last one, and keeps them
/// open until the process is killed.
async fn hold_streams(address: String) {
    let permits = Arc::new(Semaphore::new(OPENING_AT_ONCE));
    let tasks: Vec<_> = (0..OPEN_STREAMS)
        .map(|number| {
            let (permits, address) = (Arc::clone(&permits), address.clone());
            tokio::spawn(async move {
                let _permit = permits.acquire().await.unwrap();
                let body = Kind::Stream
                    .body(number)
                    .replacen('{', r#"{"hold":true,"#, 1);
                let request = format!(
                    "POST /v1/chat/completions HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
                    body.len()
                );
                let mut stream = TcpStream::connect(&address).await.unwrap();
                stream.write_all(request.as_bytes()).await.unwrap();
                let mut bytes = Vec::new();
                while memchr::memmem::find(&bytes, b"data: ").is_none() {
                    assert_ne!(stream.read_buf(&mut bytes).await.unwrap(), 0);
                }
                stream
            })
        })
        .collect();
    let mut streams = Vec::new();
    for task in tasks {
        streams.push(task.await.unwrap());
    }
    println!("open");
    std::io::stdout().flush().unwrap();
    std::future::pending::<()>().await;
}

/// Reads one whole HTTP message: with chunked encoding, up to the last chunk. Returns its head and body,
/// or `None` at the end of the connection.
async fn read_message(stream: &mut TcpStream) -> Option<(String, Vec<u8>)> {
    let mut bytes = Vec::with_capacity(4096);
    let mut body_start = None;
    let mut body_length = None;
    loop {
        if stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
        if body_start.is_none()
            && let Some(end) = memchr::memmem::find(&bytes, b"\r\n\r\n")
        {
            body_start = Some(end + 4);
            let head = String::from_utf8_lossy(&bytes[..end]).to_ascii_lowercase();
            let length = head
                .lines()
                .find_map(|line| line.strip_prefix("content-length: "));
            body_length = length.map(|length| length.parse::<usize>().unwrap());
            if body_length.is_none() && !head.contains("chunked") {
                body_length = Some(0);
            }
        }
        let Some(start) = body_start else { continue };
        let complete = match body_length {
            Some(length) => bytes.len() >= start + length,
            None => bytes.ends_with(b"0\r\n\r\n"),
        };
        if complete {
            let body = bytes.split_off(start);
            return Some((String::from_utf8_lossy(&bytes).into_owned(), body));
        }
    }
}
