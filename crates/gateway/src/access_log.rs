//! `--access-log`: one line of JSON for each request to the API, when it has ended.
//!
//! A line has times, lengths and outcomes, and no text of prompts or outputs. A thread of its own
//! writes the lines, so that requests never wait for it; lines that it cannot keep up with are dropped
//! and counted. Of the requests that succeed, a fraction can be logged.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use http::header::USER_AGENT;
use http::{HeaderMap, HeaderValue, Request};
use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use serde::Serialize;

use crate::completion::Completion;
use crate::connection_state::Peer;
use crate::metrics::{Metrics, Outcome};
use crate::placement::parsed_request::ParsedRequest;

/// Maximum number of lines that wait to be written.
const MAX_PENDING_LINES: usize = 8192;

/// Longest text of a client that a line repeats, in characters.
const MAX_TEXT_CHARS: usize = 256;

/// Message to the thread that writes the file.
#[derive(Debug)]
enum Message {
    Line(String),
    End,
}

/// Sends lines to the thread that writes them.
#[derive(Debug)]
pub(crate) struct AccessLog {
    messages: SyncSender<Message>,
    /// Handle of the thread; `None` after [`finish`](Self::finish).
    writer: Mutex<Option<JoinHandle<()>>>,
    /// Whether the thread opens the file again before the next line.
    must_reopen: Arc<AtomicBool>,
    /// Counts lines that were dropped.
    dropped: Counter,
    /// Fraction of the requests that succeed which have a line.
    sample_ratio: f64,
    /// Requests that have succeeded.
    successes: AtomicU64,
}

impl AccessLog {
    /// Opens the file at `path` for appending, creates it if needed, and starts the thread. `-` is the
    /// standard output. Of the requests that succeed, the fraction `sample_ratio` is logged, evenly
    /// spaced.
    ///
    /// # Errors
    /// Fails if the file cannot be opened or no thread can be started.
    pub(crate) fn start(path: &Path, sample_ratio: f64, metrics: &Metrics) -> io::Result<Self> {
        let output = open(path)?;
        let (messages, receiver) = sync_channel(MAX_PENDING_LINES);
        let must_reopen = Arc::new(AtomicBool::new(false));
        let file = LogFile {
            path: path.to_owned(),
            output,
            must_reopen: Arc::clone(&must_reopen),
            dropped: metrics.access_log_dropped.clone(),
            has_failed: false,
        };
        let thread = std::thread::Builder::new().name("access-log".to_owned());
        let writer = thread.spawn(move || file.write_lines(&receiver))?;
        Ok(Self {
            messages,
            writer: Mutex::new(Some(writer)),
            must_reopen,
            dropped: metrics.access_log_dropped.clone(),
            sample_ratio,
            successes: AtomicU64::new(0),
        })
    }

    /// Returns whether a request with this outcome has a line, and counts it.
    fn is_sampled(&self, outcome: Outcome) -> bool {
        if outcome != Outcome::Ok {
            return true;
        }
        let before = self.successes.fetch_add(1, Ordering::Relaxed);
        let lines = |requests: u64| (requests as f64 * self.sample_ratio).floor();
        lines(before + 1) > lines(before)
    }

    /// Begins the line of a request that has just arrived. `request_id` is that of the gateway.
    pub(crate) fn begin<B>(
        self: &Arc<Self>,
        request: &Request<B>,
        request_id: &HeaderValue,
    ) -> AccessEntry {
        let (headers, peer) = (request.headers(), request.extensions().get::<Peer>());
        let own_id = || String::from_utf8_lossy(request_id.as_bytes()).into_owned();
        let line = Line {
            time: humantime::format_rfc3339_millis(SystemTime::now()).to_string(),
            request_id: text_of(headers, "x-request-id").unwrap_or_else(own_id),
            trace_id: trace_id(headers),
            method: shortened(request.method().as_str()),
            path: shortened(request.uri().path()),
            client: peer.map(|peer| peer.address.ip().to_canonical().to_string()),
            user_agent: text_of(headers, USER_AGENT.as_str()),
            ..Line::default()
        };
        AccessEntry {
            log: Arc::clone(self),
            line,
            arrived: Instant::now(),
            is_written: false,
        }
    }

    /// Opens the file again before the next line, for a program that has moved it away.
    pub(crate) fn reopen(&self) {
        self.must_reopen.store(true, Ordering::Relaxed);
    }

    /// Writes all lines and ends the thread. Blocks until that is done.
    pub(crate) fn finish(&self) {
        if let Some(writer) = self.writer.lock().take() {
            // Both fail only if the thread has panicked.
            let _ = self.messages.send(Message::End);
            let _ = writer.join();
        }
    }
}

/// Fields of one line. A field without a value is left out.
#[derive(Debug, Default, Serialize)]
struct Line {
    time: String,
    request_id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    trace_id: Option<String>,
    /// Id of the gateway's span of the request; only of sampled requests.
    #[serde(skip_serializing_if = "Option::is_none")]
    span_id: Option<String>,
    method: String,
    path: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    client: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    user_agent: Option<String>,
    /// Id of the key.
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tenant: Option<String>,
    /// Model as the client named it.
    #[serde(skip_serializing_if = "Option::is_none")]
    model: Option<String>,
    /// Model behind the alias that the client named.
    #[serde(skip_serializing_if = "Option::is_none")]
    served_model: Option<String>,
    /// Whether the client asked for a streamed response.
    #[serde(skip_serializing_if = "Option::is_none")]
    stream: Option<bool>,
    status: u16,
    outcome: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    error_code: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    worker: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    attempts: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes_in: Option<usize>,
    /// Bytes of the response's body, as far as the client got it.
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes_out: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    priority: Option<i32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    deadline_seconds: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_tokens: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cached_tokens: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    predicted_cached_tokens: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    output_tokens: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    queue_seconds: Option<f64>,
    /// Time of the decision.
    #[serde(skip_serializing_if = "Option::is_none")]
    route_seconds: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    predicted_ttft_seconds: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ttft_seconds: Option<f64>,
    /// Mean time between output tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    itl_mean_seconds: Option<f64>,
    /// Longest time between two arrivals of output tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    itl_max_seconds: Option<f64>,
    duration_seconds: f64,
}

/// The line of one request. Dropping it before it is written writes it as that of a client that left.
#[derive(Debug)]
pub(crate) struct AccessEntry {
    log: Arc<AccessLog>,
    line: Line,
    arrived: Instant,
    is_written: bool,
}

/// Fields of a request that is placed on a worker.
#[derive(Debug)]
pub(crate) struct PlacedFields<'a> {
    pub(crate) worker: &'a str,
    pub(crate) status: u16,
    pub(crate) attempts: u32,
    pub(crate) predicted_cached_tokens: u32,
    pub(crate) predicted_ttft: Duration,
    /// Time in the router's queue.
    pub(crate) queued_for: Duration,
    /// Time of the decision.
    pub(crate) decided_in: Duration,
}

impl AccessEntry {
    /// Adds the key of the request.
    pub(crate) fn set_key(&mut self, id: &str, tenant: &str) {
        self.line.key = Some(id.to_owned());
        self.line.tenant = Some(tenant.to_owned());
    }

    /// Adds the ids of the request's trace and of its span in it.
    pub(crate) fn set_trace(&mut self, trace_id: String, span_id: String) {
        self.line.trace_id = Some(trace_id);
        self.line.span_id = Some(span_id);
    }

    /// Adds the size of the body, its model and whether it asks for a stream, and the hints of the
    /// client.
    pub(crate) fn set_body(&mut self, bytes: usize, parsed: &ParsedRequest) {
        let priority = parsed.hints.priority;
        let is_renamed = parsed.rewrite.is_some();
        self.line.bytes_in = Some(bytes);
        self.line.model = Some(shortened(parsed.requested_model()));
        self.line.served_model = is_renamed.then(|| shortened(&parsed.model));
        self.line.stream = Some(parsed.is_streaming);
        self.line.deadline_seconds = parsed
            .hints
            .deadlines
            .first_byte
            .map(|deadline| deadline.as_secs_f64());
        self.line.priority = (priority != 0).then_some(priority);
    }

    /// Adds the fields that are known once a worker responds.
    pub(crate) fn set_placed(&mut self, fields: &PlacedFields<'_>) {
        self.line.worker = Some(fields.worker.to_owned());
        self.line.status = fields.status;
        self.line.attempts = Some(fields.attempts);
        self.line.predicted_cached_tokens = Some(fields.predicted_cached_tokens);
        self.line.predicted_ttft_seconds = Some(fields.predicted_ttft.as_secs_f64());
        self.line.queue_seconds = Some(fields.queued_for.as_secs_f64());
        self.line.route_seconds = Some(fields.decided_in.as_secs_f64());
    }

    /// Adds the worker that failed the last of several attempts.
    pub(crate) fn set_failed(&mut self, attempts: u32, worker: Option<&str>) {
        self.line.attempts = Some(attempts);
        self.line.worker = worker.map(str::to_owned);
    }

    /// Writes the line of a request whose response has ended. `prompt_tokens` are those that the
    /// gateway counted; `ttft` is the time from the arrival to the first token.
    pub(crate) fn complete(
        &mut self,
        completion: &Completion,
        prompt_tokens: u32,
        ttft: Option<Duration>,
    ) {
        let usage = &completion.usage;
        let output_tokens = usage.completion_tokens.unwrap_or(completion.output_tokens);
        self.line.prompt_tokens = Some(usage.prompt_tokens.unwrap_or(prompt_tokens));
        self.line.cached_tokens = usage.cached_tokens;
        self.line.output_tokens = Some(output_tokens);
        self.line.ttft_seconds = ttft.map(|ttft| ttft.as_secs_f64());
        self.line.bytes_out = Some(completion.bytes);
        if let (Some(first), Some(last)) = (completion.first_token, completion.last_token)
            && output_tokens > 1
        {
            let decoding = last.saturating_sub(first).as_secs_f64();
            self.line.itl_mean_seconds = Some(decoding / f64::from(output_tokens - 1));
            self.line.itl_max_seconds = Some(completion.longest_gap.as_secs_f64());
        }
        self.write(completion.outcome);
    }

    /// Writes the line of a request to which the gateway responds itself.
    pub(crate) fn respond(&mut self, outcome: Outcome, status: u16, code: Option<&'static str>) {
        self.line.status = status;
        self.line.error_code = code;
        self.write(outcome);
    }

    /// Writes the line, once.
    fn write(&mut self, outcome: Outcome) {
        if std::mem::replace(&mut self.is_written, true) || !self.log.is_sampled(outcome) {
            return;
        }
        self.line.outcome = outcome.as_str();
        self.line.duration_seconds = self.arrived.elapsed().as_secs_f64();
        // Serialisation fails only for maps with keys other than strings.
        let Ok(line) = serde_json::to_string(&self.line) else {
            return;
        };
        if self.log.messages.try_send(Message::Line(line)).is_err() {
            self.log.dropped.inc();
        }
    }
}

impl Drop for AccessEntry {
    fn drop(&mut self) {
        self.write(Outcome::ClientLeft);
    }
}

/// Returns the beginning of a text.
fn shortened(text: &str) -> String {
    text.chars().take(MAX_TEXT_CHARS).collect()
}

/// Returns the beginning of a header's text; `None` without the header, or if it is not text.
fn text_of(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name)?.to_str().ok().map(shortened)
}

/// Returns the trace id of a valid `traceparent` header.
fn trace_id(headers: &HeaderMap) -> Option<String> {
    let mut parts = headers.get("traceparent")?.to_str().ok()?.split('-');
    let (_, id) = (parts.next()?, parts.next()?);
    let is_hex = id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
    (is_hex && id.bytes().any(|byte| byte != b'0')).then(|| id.to_owned())
}

/// Opens the output.
fn open(path: &Path) -> io::Result<Box<dyn Write + Send>> {
    if path == Path::new("-") {
        return Ok(Box::new(BufWriter::new(io::stdout())));
    }
    let file: File = OpenOptions::new().create(true).append(true).open(path)?;
    Ok(Box::new(BufWriter::new(file)))
}

/// The file, and the state of the thread that writes it.
struct LogFile {
    path: PathBuf,
    output: Box<dyn Write + Send>,
    must_reopen: Arc<AtomicBool>,
    /// Counts lines that were dropped, or could not be written.
    dropped: Counter,
    /// Whether the last write failed. Only the first of several errors is logged.
    has_failed: bool,
}

impl LogFile {
    /// Writes lines until [`Message::End`]. Flushes whenever no line waits.
    fn write_lines(mut self, messages: &Receiver<Message>) {
        loop {
            let message = match messages.try_recv() {
                Ok(message) => message,
                Err(TryRecvError::Disconnected) => break,
                Err(TryRecvError::Empty) => {
                    let flushed = self.output.flush();
                    self.note(flushed);
                    match messages.recv() {
                        Ok(message) => message,
                        Err(_) => break,
                    }
                }
            };
            let Message::Line(line) = message else {
                break;
            };
            if self.must_reopen.swap(false, Ordering::Relaxed) {
                self.reopen();
            }
            let written = writeln!(self.output, "{line}");
            self.note(written);
        }
        let flushed = self.output.flush();
        self.note(flushed);
    }

    /// Opens the file again. After an error, the old one stays in use until the next line.
    fn reopen(&mut self) {
        let flushed = self.output.flush();
        self.note(flushed);
        match open(&self.path) {
            Ok(output) => self.output = output,
            Err(error) => {
                self.must_reopen.store(true, Ordering::Relaxed);
                self.note(Err(error));
            }
        }
    }

    /// Counts an error, and logs the first one after a success.
    fn note(&mut self, result: io::Result<()>) {
        let Err(error) = result else {
            self.has_failed = false;
            return;
        };
        self.dropped.inc();
        if !std::mem::replace(&mut self.has_failed, true) {
            tracing::error!(
                path = %self.path.display(), %error,
                "cannot write the access log; requests are still served"
            );
        }
    }
}
