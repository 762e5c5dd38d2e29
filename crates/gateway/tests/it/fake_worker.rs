//! Set-up of the integration tests: workers scripted byte by byte, a gateway in front of them, and a
//! client that reads the bytes of a response. All of them use real sockets.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use foresee_core::outlier::OutlierConfig;
use foresee_core::policy;
use foresee_core::workers::{WorkerSnapshot, WorkerState};
use foresee_gateway::{ClientTrust, Gateway, GatewayConfig, ShutdownConfig};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

/// Time after which a wait fails its test. No wait takes nearly as long on a loaded machine.
const MAX_WAIT: Duration = Duration::from_secs(5);

/// Model that workers serve by default.
pub(crate) const MODEL: &str = "m";

const PROBE_INTERVAL: Duration = Duration::from_millis(40);

pub(crate) const STREAM_HEAD: &[u8] =
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";

// Waiting

/// Waits for a future. Panics after a time limit.
pub(crate) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(MAX_WAIT, future).await {
        Ok(value) => value,
        Err(_) => panic!("timed out waiting for {what}"),
    }
}

/// Polls a condition until it holds. Panics after a time limit.
pub(crate) async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    within(what, async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
}

// The worker

/// Engine whose responses are scripted by the test, except those to the gateway's own requests.
pub(crate) struct FakeWorker {
    pub(crate) address: SocketAddr,
    shared: Arc<Scripted>,
    received: mpsc::UnboundedReceiver<Exchange>,
    accepting: AbortHandle,
    /// Bound socket that reserves the port while the worker does not listen.
    reserved: Option<TcpSocket>,
}

/// State that a fake worker shares with its connections.
struct Scripted {
    healthy: AtomicBool,
    probes: AtomicUsize,
    connections: AtomicUsize,
    model_list: Mutex<String>,
    metrics: Mutex<String>,
    server_info: Mutex<Option<String>>,
    event_sources: Mutex<Option<String>>,
    /// Method and path of health checks.
    health_check: Mutex<String>,
    /// Value of `authorization` without which the gateway's own requests get a 401.
    required_authorization: Mutex<Option<String>>,
    /// Whether requests of metrics get no response.
    hangs_on_metrics: AtomicBool,
    /// Heads of the gateway's own requests.
    own_requests: Mutex<Vec<Head>>,
    requests: mpsc::UnboundedSender<Exchange>,
    running: Mutex<Vec<AbortHandle>>,
}

impl FakeWorker {
    pub(crate) async fn start() -> Self {
        Self::serving(&[MODEL]).await
    }

    pub(crate) async fn serving(models: &[&str]) -> Self {
        Self::at("127.0.0.1:0".parse().unwrap(), models).await
    }

    /// Starts a worker that listens at `address`.
    pub(crate) async fn at(address: SocketAddr, models: &[&str]) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (requests, received) = mpsc::unbounded_channel();
        let models: Vec<Value> = models.iter().map(|id| json!({ "id": id })).collect();
        let shared = Arc::new(Scripted {
            healthy: AtomicBool::new(true),
            probes: AtomicUsize::new(0),
            connections: AtomicUsize::new(0),
            model_list: Mutex::new(json!({ "object": "list", "data": models }).to_string()),
            metrics: Mutex::default(),
            server_info: Mutex::default(),
            event_sources: Mutex::default(),
            health_check: Mutex::new("GET /health".to_owned()),
            required_authorization: Mutex::default(),
            hangs_on_metrics: AtomicBool::new(false),
            own_requests: Mutex::default(),
            requests,
            running: Mutex::default(),
        });
        Self {
            address,
            accepting: Scripted::accept(&shared, listener),
            shared,
            received,
            reserved: None,
        }
    }

    /// Returns the worker's description for the gateway's configuration.
    pub(crate) fn spec(&self, name: &str) -> String {
        format!("http://{},name={name}", self.address)
    }

    /// Waits for the next request of a client.
    pub(crate) async fn request(&mut self) -> Exchange {
        let next = within("a request to reach the worker", self.received.recv());
        next.await.unwrap()
    }

    /// Waits for the next request of a client, without a time limit.
    pub(crate) async fn request_at_any_time(&mut self) -> Exchange {
        self.received.recv().await.unwrap()
    }

    /// Returns the next request of a client, if one has arrived.
    pub(crate) fn try_request(&mut self) -> Option<Exchange> {
        self.received.try_recv().ok()
    }

    /// Returns whether the test has taken all requests that have arrived.
    pub(crate) fn is_idle(&self) -> bool {
        self.received.is_empty()
    }

    pub(crate) fn probes(&self) -> usize {
        self.shared.probes.load(Ordering::SeqCst)
    }

    pub(crate) fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::SeqCst)
    }

    pub(crate) fn set_healthy(&self, healthy: bool) {
        self.shared.healthy.store(healthy, Ordering::SeqCst);
    }

    /// Sets the method and path of health checks.
    pub(crate) fn set_health_check(&self, request: &str) {
        request.clone_into(&mut self.shared.health_check.lock());
    }

    /// Makes the worker refuse the gateway's own requests without this value of `authorization`.
    pub(crate) fn require_authorization(&self, value: &str) {
        *self.shared.required_authorization.lock() = Some(value.to_owned());
    }

    /// Makes the worker accept requests of metrics and never respond to them.
    pub(crate) fn hang_on_metrics(&self) {
        self.shared.hangs_on_metrics.store(true, Ordering::SeqCst);
    }

    /// Returns the first line and the value of a header, of each request that the gateway has sent on
    /// its own.
    pub(crate) fn own_requests(&self, header: &str) -> Vec<(String, Option<String>)> {
        let requests = self.shared.own_requests.lock();
        let shown = requests.iter().map(|head| {
            let value = head.get(header).map(str::to_owned);
            (head.first_line.clone(), value)
        });
        shown.collect()
    }

    pub(crate) fn set_model_list(&self, list: &str) {
        list.clone_into(&mut self.shared.model_list.lock());
    }

    pub(crate) fn set_metrics(&self, metrics: &str) {
        metrics.clone_into(&mut self.shared.metrics.lock());
    }

    /// Makes the worker respond like SGLang, with this server info.
    pub(crate) fn set_server_info(&self, info: &Value) {
        *self.shared.server_info.lock() = Some(info.to_string());
    }

    /// Makes the worker list its event sources, like vLLM.
    pub(crate) fn set_event_sources(&self, sources: &Value) {
        *self.shared.event_sources.lock() = Some(sources.to_string());
    }

    /// Behaves like a killed process: closes all connections and refuses new ones.
    pub(crate) async fn die(&mut self) {
        self.accepting.abort();
        for task in self.shared.running.lock().drain(..) {
            task.abort();
        }
        until("the worker to stop listening", || {
            let socket = TcpSocket::new_v4().unwrap();
            socket.set_reuseaddr(true).unwrap();
            let free = socket.bind(self.address).is_ok();
            self.reserved = free.then_some(socket);
            free
        })
        .await;
    }

    /// Listens at the same address again.
    pub(crate) fn come_back(&mut self) {
        let listener = self.reserved.take().unwrap().listen(1024).unwrap();
        self.accepting = Scripted::accept(&self.shared, listener);
    }
}

impl Scripted {
    fn accept(self: &Arc<Self>, listener: TcpListener) -> AbortHandle {
        let shared = Arc::clone(self);
        let task = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                shared.connections.fetch_add(1, Ordering::SeqCst);
                Arc::clone(&shared).serve(stream);
            }
        });
        task.abort_handle()
    }

    fn serve(self: Arc<Self>, stream: TcpStream) {
        let shared = Arc::clone(&self);
        let task = tokio::spawn(async move {
            let mut connection = Connection::new(stream);
            // Ends when the gateway closes the connection, or with a request of a client.
            while let Ok(head) = connection.head().await {
                let body = connection.body(&head, false).await.unwrap();
                if head.first_line.starts_with("GET /metrics ")
                    && shared.hangs_on_metrics.load(Ordering::SeqCst)
                {
                    let _ = connection.fill().await;
                    return;
                }
                let Some(response) = shared.own_response(&head) else {
                    let worker = Arc::clone(&shared);
                    let exchange = Exchange {
                        head,
                        body,
                        connection,
                        worker,
                    };
                    let _ = shared.requests.send(exchange);
                    return;
                };
                if connection.stream.write_all(&response).await.is_err() {
                    return;
                }
            }
        });
        self.running.lock().push(task.abort_handle());
    }

    /// Returns the response, if the request is one that gateways send on their own.
    fn own_response(&self, head: &Head) -> Option<Vec<u8>> {
        let health_check = self.health_check.lock().clone() + " HTTP/1.1";
        let (status, body) = match head.first_line.as_str() {
            line if line == health_check => {
                self.probes.fetch_add(1, Ordering::SeqCst);
                let healthy = self.healthy.load(Ordering::SeqCst);
                let status = if healthy { "200 OK" } else { "500 Not Well" };
                (status, String::new())
            }
            "GET /v1/models HTTP/1.1" => ("200 OK", self.model_list.lock().clone()),
            "GET /metrics HTTP/1.1" => ("200 OK", self.metrics.lock().clone()),
            // As older releases do, which do not have `/server_info`.
            "GET /get_server_info HTTP/1.1" => optional_body(&self.server_info),
            "GET /kv_event_sources HTTP/1.1" => optional_body(&self.event_sources),
            "GET /server_info HTTP/1.1" => ("404 Not Found", String::new()),
            _ => return None,
        };
        self.own_requests.lock().push(head.clone());
        let required = self.required_authorization.lock();
        let is_refused = required.is_some() && head.get("authorization") != required.as_deref();
        if is_refused {
            return Some(whole("401 Unauthorized", "application/json", ""));
        }
        Some(whole(status, "application/json", body))
    }
}

/// Returns 200 with the body, or 404 without one.
fn optional_body(body: &Mutex<Option<String>>) -> (&'static str, String) {
    match body.lock().clone() {
        Some(body) => ("200 OK", body),
        None => ("404 Not Found", String::new()),
    }
}

/// Returns a whole response of known length.
pub(crate) fn whole(status: &str, content_type: &str, body: impl AsRef<[u8]>) -> Vec<u8> {
    let body = body.as_ref();
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-type: {content_type}\r\ncontent-length: {length}\r\n\r\n"
    );
    [head.as_bytes(), body].concat()
}

/// Returns one chunk of a chunked body, encoded.
pub(crate) fn chunk(data: impl AsRef<[u8]>) -> Vec<u8> {
    let data = data.as_ref();
    let mut chunk = format!("{:x}\r\n", data.len()).into_bytes();
    chunk.extend_from_slice(data);
    chunk.extend_from_slice(b"\r\n");
    chunk
}

/// Returns one event with one token of text.
pub(crate) fn token(text: &str) -> String {
    let event = json!({ "choices": [{ "index": 0, "delta": { "content": text } }] });
    format!("data: {event}\n\n")
}

/// Request that reached a worker. The test sends the response.
pub(crate) struct Exchange {
    pub(crate) head: Head,
    pub(crate) body: Vec<u8>,
    connection: Connection,
    worker: Arc<Scripted>,
}

impl Exchange {
    pub(crate) async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        let written = self.try_send(bytes).await;
        written.expect("the gateway closed its connection");
    }

    /// Sends bytes, and returns an error if the gateway has closed its connection.
    pub(crate) async fn try_send(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        self.connection.stream.write_all(bytes.as_ref()).await
    }

    pub(crate) async fn send_chunk(&mut self, data: impl AsRef<[u8]>) {
        self.send(chunk(data)).await;
    }

    pub(crate) async fn start_stream(&mut self) {
        self.send(STREAM_HEAD).await;
    }

    /// Ends a stream as engines do, and keeps the connection open.
    pub(crate) async fn end_stream(mut self) {
        self.send_chunk("data: [DONE]\n\n").await;
        self.finish_chunks().await;
    }

    /// Ends a chunked body and keeps the connection open.
    pub(crate) async fn finish_chunks(mut self) {
        self.send("0\r\n\r\n").await;
        self.keep();
    }

    /// Sends a whole response and keeps the connection open.
    pub(crate) async fn respond(mut self, bytes: impl AsRef<[u8]>) {
        self.send(bytes).await;
        self.keep();
    }

    pub(crate) async fn respond_json(self, body: impl AsRef<[u8]>) {
        self.respond(whole("200 OK", "application/json", body))
            .await;
    }

    /// Serves further requests on this connection.
    pub(crate) fn keep(self) {
        self.worker.serve(self.connection.stream);
    }

    /// Closes the connection in an orderly way.
    pub(crate) fn close(self) {}

    /// Resets the connection: reads and writes of the other side fail.
    pub(crate) fn reset(self) {
        self.connection.stream.set_zero_linger().unwrap();
    }

    /// Waits until the gateway has closed or reset the connection.
    pub(crate) async fn closed(&mut self) {
        let read = self.connection.fill().await;
        assert!(!matches!(read, Ok(1..)), "got more bytes of a request");
    }
}

// HTTP, parsed without a library

/// Head of an HTTP message.
#[derive(Clone, Debug)]
pub(crate) struct Head {
    pub(crate) first_line: String,
    pub(crate) headers: Vec<(String, String)>,
}

impl Head {
    fn parse(bytes: &[u8]) -> Self {
        let text = String::from_utf8_lossy(bytes);
        let mut lines = text.split("\r\n");
        let first_line = lines.next().unwrap().to_owned();
        let headers = lines.filter_map(|line| {
            let (name, value) = line.split_once(':')?;
            Some((name.to_lowercase(), value.trim().to_owned()))
        });
        Self {
            headers: headers.collect(),
            first_line,
        }
    }

    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(known, _)| known == name);
        found.map(|(_, value)| value.as_str())
    }

    pub(crate) fn status(&self) -> u16 {
        let status = self.first_line.split(' ').nth(1).unwrap();
        status.parse().unwrap()
    }
}

/// Connection with a buffer of bytes that were read but not used yet.
pub(crate) struct Connection {
    pub(crate) stream: TcpStream,
    unused: Vec<u8>,
}

impl Connection {
    pub(crate) fn new(stream: TcpStream) -> Self {
        stream.set_nodelay(true).unwrap();
        Self {
            stream,
            unused: Vec::new(),
        }
    }

    async fn fill(&mut self) -> io::Result<usize> {
        self.stream.read_buf(&mut self.unused).await
    }

    async fn fill_or_fail(&mut self) -> io::Result<()> {
        match self.fill().await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }

    async fn take(&mut self, length: usize) -> io::Result<Vec<u8>> {
        while self.unused.len() < length {
            self.fill_or_fail().await?;
        }
        let rest = self.unused.split_off(length);
        Ok(std::mem::replace(&mut self.unused, rest))
    }

    /// Returns the bytes before `end`, and skips `end`.
    async fn take_until(&mut self, end: &[u8]) -> io::Result<Vec<u8>> {
        loop {
            let found = self.unused.windows(end.len()).position(|w| w == end);
            if let Some(length) = found {
                let taken = self.take(length).await?;
                self.take(end.len()).await?;
                return Ok(taken);
            }
            self.fill_or_fail().await?;
        }
    }

    pub(crate) async fn head(&mut self) -> io::Result<Head> {
        Ok(Head::parse(&self.take_until(b"\r\n\r\n").await?))
    }

    /// Returns the next chunk of a chunked body; `None` at its end.
    pub(crate) async fn chunk(&mut self) -> io::Result<Option<Vec<u8>>> {
        let size = self.take_until(b"\r\n").await?;
        let size = String::from_utf8(size).unwrap();
        let size = usize::from_str_radix(&size, 16).expect("a chunk's size");
        let data = self.take(size).await?;
        assert_eq!(self.take(2).await?, b"\r\n");
        Ok((size > 0).then_some(data))
    }

    pub(crate) async fn chunks(&mut self) -> io::Result<Vec<u8>> {
        let mut body = Vec::new();
        while let Some(chunk) = self.chunk().await? {
            body.extend_from_slice(&chunk);
        }
        Ok(body)
    }

    /// Reads the body that belongs to `head`.
    async fn body(&mut self, head: &Head, until_close: bool) -> io::Result<Vec<u8>> {
        if head.get("transfer-encoding") == Some("chunked") {
            return self.chunks().await;
        }
        match head.get("content-length") {
            Some(length) => self.take(length.parse().unwrap()).await,
            None if until_close => {
                while self.fill().await? > 0 {}
                Ok(std::mem::take(&mut self.unused))
            }
            None => Ok(Vec::new()),
        }
    }
}

// The client

/// Connection of a client to the gateway.
pub(crate) struct Client {
    pub(crate) connection: Connection,
}

/// Response that arrived whole.
#[derive(Debug)]
pub(crate) struct ClientResponse {
    pub(crate) head: Head,
    pub(crate) body: Vec<u8>,
}

impl ClientResponse {
    pub(crate) fn status(&self) -> u16 {
        self.head.status()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| {
            panic!("{error} in {}", self.text());
        })
    }

    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    /// Asserts that this is an error in the form that OpenAI clients expect, and returns its fields.
    pub(crate) fn error(&self, status: u16) -> Value {
        assert_eq!(self.status(), status, "{self:?}");
        assert_eq!(self.head.get("content-type"), Some("application/json"));
        let error = self.json()["error"].clone();
        assert!(error["message"].is_string(), "{error}");
        assert!(error["type"].is_string(), "{error}");
        assert!(error.get("param").is_some(), "{error}");
        assert!(error.get("code").is_some(), "{error}");
        error
    }
}

impl Client {
    pub(crate) async fn connect(address: SocketAddr) -> Self {
        let stream = within("a connection", TcpStream::connect(address)).await;
        Self {
            connection: Connection::new(stream.unwrap()),
        }
    }

    /// Connects and sends `bytes` unchanged.
    pub(crate) async fn sending(address: SocketAddr, bytes: impl AsRef<[u8]>) -> Self {
        let mut client = Self::connect(address).await;
        client.send(bytes).await;
        client
    }

    pub(crate) async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.connection
            .stream
            .write_all(bytes.as_ref())
            .await
            .unwrap();
    }

    /// Reads the head of the response.
    pub(crate) async fn head(&mut self) -> Head {
        within("a response", self.connection.head()).await.unwrap()
    }

    /// Reads the next chunk of a response.
    pub(crate) async fn chunk(&mut self) -> Vec<u8> {
        let chunk = within("a chunk", self.connection.chunk()).await;
        chunk.unwrap().expect("the response ended")
    }

    /// Reads all further chunks. Fails if the response breaks off.
    pub(crate) async fn rest(&mut self) -> io::Result<String> {
        let rest = within("the end of the response", self.connection.chunks()).await?;
        Ok(String::from_utf8(rest).unwrap())
    }

    /// Reads a whole response. Fails if it breaks off.
    pub(crate) async fn try_response(&mut self) -> io::Result<ClientResponse> {
        within("a whole response", async {
            let head = self.connection.head().await?;
            let body = self.connection.body(&head, true).await?;
            Ok(ClientResponse { head, body })
        })
        .await
    }

    pub(crate) async fn response(&mut self) -> ClientResponse {
        self.try_response().await.unwrap()
    }
}

/// Returns an encoded request.
pub(crate) fn http(method: &str, path: &str, body: impl AsRef<[u8]>) -> Vec<u8> {
    let body = body.as_ref();
    let mut request = format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\n");
    if !body.is_empty() {
        let length = body.len();
        request += &format!("content-type: application/json\r\ncontent-length: {length}\r\n");
    }
    [request.as_bytes(), b"\r\n", body].concat()
}

/// Sends one request on a connection of its own and returns the response. Panics without an address,
/// as a gateway without an admin listener has none.
pub(crate) async fn call(
    address: impl Into<Option<SocketAddr>>,
    method: &str,
    path: &str,
    body: impl AsRef<[u8]>,
) -> ClientResponse {
    let address = address.into().expect("an address");
    let mut client = Client::sending(address, http(method, path, body)).await;
    client.response().await
}

/// Returns the body of a chat completion request.
pub(crate) fn chat(prompt: &str, stream: bool) -> String {
    let messages = json!([{ "role": "user", "content": prompt }]);
    json!({ "model": MODEL, "stream": stream, "messages": messages }).to_string()
}

pub(crate) const CHAT: &str = "/v1/chat/completions";

// The gateway

/// Returns a configuration with short times, free ports, round robin from the first worker on, and no
/// queue.
pub(crate) fn config(workers: &[&FakeWorker]) -> GatewayConfig {
    let mut config = GatewayConfig {
        listen: "127.0.0.1:0".parse().unwrap(),
        admin_listen: "127.0.0.1:0".parse().unwrap(),
        probe_interval: PROBE_INTERVAL,
        connect_timeout: Duration::from_secs(1),
        shutdown: ShutdownConfig {
            delay: Duration::ZERO,
        },
        shutdown_timeout: Duration::from_secs(2),
        io_threads: NonZeroUsize::MIN.saturating_add(1),
        expose_worker_header: true,
        client_trust: ClientTrust {
            control_headers: true,
            proxies: Vec::new(),
        },
        ..GatewayConfig::default()
    };
    config.router.policy = policy::ROUND_ROBIN;
    config.router.queue_order = None;
    config.router.outlier = OutlierConfig::disabled();
    config.workers = workers
        .iter()
        .zip('a'..)
        .map(|(worker, name)| worker.spec(&name.to_string()).parse().unwrap())
        .collect();
    config
}

/// Starts a gateway and waits until all its workers are healthy. They are named `a`, `b` and so on.
pub(crate) async fn gateway(workers: &[&FakeWorker]) -> Gateway {
    gateway_with(config(workers)).await
}

pub(crate) async fn gateway_with(config: GatewayConfig) -> Gateway {
    let gateway = Gateway::start(config).unwrap();
    until("all workers to be healthy", || {
        workers(&gateway)
            .values()
            .all(|worker| worker.state == WorkerState::Healthy)
    })
    .await;
    gateway
}

/// Returns the router's snapshots of the workers, by name.
pub(crate) fn workers(gateway: &Gateway) -> HashMap<String, WorkerSnapshot> {
    let snapshots = gateway.router().workers(Duration::ZERO);
    let by_name = snapshots
        .into_iter()
        .map(|worker| (worker.name.to_string(), worker));
    by_name.collect()
}

/// Waits for the duration of a few health checks, by observing those of another gateway.
pub(crate) async fn a_few_probe_intervals() {
    let worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let before = worker.probes();
    until("a few probes", || worker.probes() >= before + 3).await;
    gateway.shut_down().await;
}

pub(crate) fn state(gateway: &Gateway, name: &str) -> WorkerState {
    workers(gateway)[name].state
}

/// Returns a worker as the admin API shows it.
pub(crate) async fn worker_json(gateway: &Gateway, name: &str) -> Option<Value> {
    let response = call(gateway.admin_address(), "GET", "/admin/workers", "").await;
    let listed = response.json()["workers"].as_array().unwrap().clone();
    listed.into_iter().find(|worker| worker["name"] == name)
}

/// Returns whether no request is booked, and no worker has a block or token of one.
pub(crate) fn has_no_bookings(gateway: &Gateway) -> bool {
    gateway.router().booking_count() == 0
        && workers(gateway).values().all(|worker| {
            worker.requests == 0
                && worker.active_blocks == 0
                && worker.context_tokens == 0
                && worker.prefill_tokens == 0
        })
}

/// Waits until all bookings are released: the gateway may observe the end of a response a moment after
/// the client.
pub(crate) async fn until_released(gateway: &Gateway) {
    until("all bookings to be released", || has_no_bookings(gateway)).await;
}

/// Reads the metrics in OpenMetrics text format.
pub(crate) async fn metrics(gateway: &Gateway) -> String {
    let request = "GET /metrics HTTP/1.1\r\nhost: localhost\r\n\
                   accept: application/openmetrics-text;version=1.0.0,text/plain;q=0.5\r\n\r\n";
    let mut client = Client::sending(gateway.admin_address().unwrap(), request).await;
    let response = client.response().await;
    assert_eq!(response.status(), 200);
    let content_type = response.head.get("content-type").unwrap();
    assert!(content_type.starts_with("application/openmetrics-text"));
    response.text().to_owned()
}

/// Returns the value of one series, given as `name` or `name{labels}`.
pub(crate) fn value(metrics: &str, series: &str) -> Option<f64> {
    let mut lines = metrics.lines();
    lines.find_map(|line| {
        let value = line.strip_prefix(series)?.strip_prefix(' ')?;
        value.parse().ok()
    })
}

/// Waits until a metric has a value. It may be updated a moment after the client has the response.
pub(crate) async fn until_metric(gateway: &Gateway, series: &str, expected: f64) {
    let started = Instant::now();
    loop {
        let text = metrics(gateway).await;
        if value(&text, series) == Some(expected) {
            return;
        }
        let found = value(&text, series);
        assert!(
            started.elapsed() < MAX_WAIT,
            "{series} is {found:?}, not {expected}"
        );
    }
}

/// Gauges that count the requests in progress and what they occupy, without those of one worker.
const GAUGES: [&str; 2] = ["foresee_bookings", "foresee_request_body_bytes"];

/// Gauges of one worker.
const WORKER_GAUGES: [&str; 6] = [
    "requests",
    "queued_requests",
    "active_blocks",
    "queued_blocks",
    "prefill_tokens",
    "context_tokens",
];

/// Waits until every gauge of load is zero. Other gauges, such as the number of connections, do not
/// depend on requests alone.
pub(crate) async fn until_all_gauges_are_zero(gateway: &Gateway) {
    for gauge in GAUGES {
        until_metric(gateway, gauge, 0.0).await;
    }
    for name in workers(gateway).keys() {
        for gauge in WORKER_GAUGES {
            let series = format!("foresee_worker_{gauge}{{worker=\"{name}\"}}");
            until_metric(gateway, &series, 0.0).await;
        }
    }
}
