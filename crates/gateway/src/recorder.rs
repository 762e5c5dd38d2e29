//! Records traffic as a trace: one line per prompt of a completed request, in the format that
//! `foresee replay` reads.
//!
//! A line contains the arrival time, the lengths of prompt and output, and of the prompt's content
//! only the hashes of its blocks. A thread of its own writes the file, so that requests never wait
//! for it. If the thread cannot keep up, requests are dropped from the recording and counted.

use std::fs::{File, OpenOptions};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use foresee_api::trace::TraceRecord;
use foresee_core::sequence::Sequence;
use foresee_engine::request::PromptSequences;
use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;

use crate::clock::since_epoch;
use crate::completion::Completion;
use crate::metrics::{Metrics, Outcome};

/// Maximum number of requests that wait to be written.
const MAX_PENDING_ENTRIES: usize = 4096;

/// A completed request that is to be recorded.
#[derive(Debug)]
pub(crate) struct Entry {
    /// Arrival time by the gateway's clock.
    pub(crate) arrived: Duration,
    /// Name of the model.
    pub(crate) model: String,
    /// Prompts as block hashes.
    pub(crate) sequences: PromptSequences,
    /// Output tokens of each prompt or, if only the sum is known, one sum of all prompts.
    output_tokens: Vec<u32>,
}

/// Sends entries to the thread that writes them.
#[derive(Debug)]
pub(crate) struct Recorder {
    /// Queue of the thread; `None` ends it.
    entries: SyncSender<Option<Entry>>,
    /// Handle of the thread; `None` after [`finish`](Self::finish).
    writer: Mutex<Option<JoinHandle<()>>>,
    /// Counts requests that were dropped from the recording.
    dropped: Counter,
}

impl Recorder {
    /// Opens the file at `path` for appending, creates it if needed, and starts the thread. Fails
    /// if the file cannot be opened or no thread can be started.
    pub(crate) fn start(path: &Path, metrics: &Metrics) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        let (entries, receiver) = sync_channel(MAX_PENDING_ENTRIES);
        let dropped = metrics.recorded_counter("dropped");
        let writer = Writer {
            file: BufWriter::new(file),
            started: since_epoch(),
            next_id: RandomState::new().hash_one(std::process::id()),
            written: metrics.recorded_counter("written"),
            dropped: dropped.clone(),
            write_failed: false,
        };
        let thread = std::thread::Builder::new().name("recorder".to_owned());
        let writer = thread.spawn(move || writer.run(&receiver))?;
        Ok(Self {
            entries,
            writer: Mutex::new(Some(writer)),
            dropped,
        })
    }

    /// Queues a request for recording, if it can be replayed: a worker generated output, and the
    /// lengths of prompt and output are known. Never blocks; a full queue drops the request. A
    /// request that cannot be replayed is ignored, and not counted as dropped. `arrived` is a time
    /// of the gateway's clock.
    pub(crate) fn record(
        &self,
        arrived: Duration,
        model: &str,
        sequences: PromptSequences,
        completion: &Completion,
    ) {
        let has_output = matches!(completion.outcome, Outcome::Ok | Outcome::ClientLeft);
        if !has_output || completion.output_tokens == 0 || sequences.prompt_tokens == 0 {
            return;
        }
        let entry = Entry {
            arrived,
            model: model.to_owned(),
            sequences,
            output_tokens: match completion.output_tokens_by_choice.as_slice() {
                [] => vec![completion.output_tokens],
                by_choice => by_choice.to_vec(),
            },
        };
        if self.entries.try_send(Some(entry)).is_err() {
            self.dropped.inc();
        }
    }

    /// Writes all queued requests and ends the thread. Blocks until that is done. Later requests are
    /// dropped.
    pub(crate) fn finish(&self) {
        if let Some(writer) = self.writer.lock().take() {
            // Both fail only if the thread has panicked.
            let _ = self.entries.send(None);
            let _ = writer.join();
        }
    }
}

/// The thread that writes the file.
struct Writer {
    file: BufWriter<File>,
    /// Time since 1970 at which the gateway's clock was zero.
    started: Duration,
    /// Next hash id for a block of unknown content. Starts at a random number, so that it is not
    /// equal to an id of another block.
    next_id: u64,
    /// Counts recorded prompts.
    written: Counter,
    /// Counts dropped requests, and prompts that could not be written.
    dropped: Counter,
    /// Whether a write has failed and the error was logged.
    write_failed: bool,
}

impl Writer {
    /// Writes entries until the queue contains `None` or is closed. Flushes the file whenever the
    /// queue is empty, so that it can be read meanwhile.
    fn run(mut self, entries: &Receiver<Option<Entry>>) {
        let mut next = entries.recv().ok().flatten();
        while let Some(entry) = next.take() {
            self.write(&entry);
            next = match entries.try_recv() {
                Ok(entry) => entry,
                Err(TryRecvError::Disconnected) => None,
                Err(TryRecvError::Empty) => {
                    let flushed = self.file.flush();
                    self.log_write_result(&flushed);
                    entries.recv().ok().flatten()
                }
            };
        }
        let flushed = self.file.flush();
        self.log_write_result(&flushed);
    }

    /// Writes a line for each prompt of a request, and counts it. A sum of output tokens is divided
    /// equally among the prompts. Prompts without tokens or without output are left out.
    fn write(&mut self, entry: &Entry) {
        let PromptSequences { first, rest, .. } = &entry.sequences;
        let prompt_count = 1 + rest.len();
        for (index, sequence) in std::iter::once(first).chain(rest).enumerate() {
            let output_length = match entry.output_tokens.as_slice() {
                [sum] => sum / prompt_count as u32,
                by_choice => by_choice.get(index).copied().unwrap_or(0),
            };
            if output_length == 0 || sequence.tokens() == 0 {
                continue;
            }
            let timestamp = (self.started + entry.arrived).as_secs_f64() * 1e3;
            let record = TraceRecord {
                // Since 1970, rounded to microseconds; smaller differences are noise.
                timestamp: (timestamp * 1e3).round() / 1e3,
                input_length: sequence.tokens(),
                output_length,
                hash_ids: self.hash_ids(sequence),
                tokens_per_hash_id: Some(sequence.block_size()),
                model: Some(entry.model.clone()),
            };
            let written = serde_json::to_string(&record)
                .map_err(io::Error::from)
                .and_then(|line| writeln!(self.file, "{line}"));
            if self.log_write_result(&written) {
                self.written.inc();
            } else {
                self.dropped.inc();
            }
        }
    }

    /// Returns an id for each block of a prompt: its sequence hash, or a new number for a block of
    /// unknown content. Each call numbers the blocks of unknown content anew, so they match no
    /// other block.
    fn hash_ids(&mut self, sequence: &Sequence) -> Vec<u64> {
        let mut ids = sequence.hashes().to_vec();
        let blocks = sequence.tokens().div_ceil(sequence.block_size().get());
        while ids.len() < blocks as usize {
            ids.push(self.next_id);
            self.next_id = self.next_id.wrapping_add(1);
        }
        ids
    }

    /// Logs the first error of the recording. Returns whether `result` is a success.
    fn log_write_result(&mut self, result: &io::Result<()>) -> bool {
        match result {
            Ok(()) => true,
            Err(error) => {
                if !std::mem::replace(&mut self.write_failed, true) {
                    tracing::error!(%error, "cannot write the recording; requests are still served, check the disk");
                }
                false
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use foresee_engine::usage::Usage;

    const FULL: &str = "/dev/full";

    fn completion(outcome: Outcome, output_tokens: u32) -> Completion {
        Completion {
            outcome,
            usage: Usage::default(),
            output_tokens,
            output_tokens_by_choice: Vec::new(),
            first_token: None,
            last_token: None,
            longest_gap: Duration::ZERO,
            bytes: 0,
        }
    }

    fn prompt(tokens: u32) -> PromptSequences {
        let block_size = 16.try_into().unwrap();
        let tokens: Vec<u32> = (0..tokens).collect();
        PromptSequences::repeated(Sequence::from_tokens(&tokens, block_size, 0), 1)
    }

    #[test]
    fn only_requests_with_known_lengths_are_recorded() {
        let path = tempfile_path("recording");
        let metrics = Metrics::new();
        let recorder = Recorder::start(&path, &metrics).unwrap();
        let second = Duration::from_secs(1);
        recorder.record(second, "m", prompt(40), &completion(Outcome::Ok, 5));
        recorder.record(second, "m", prompt(40), &completion(Outcome::ClientLeft, 2));
        recorder.record(
            second,
            "m",
            prompt(40),
            &completion(Outcome::WorkerFailed, 5),
        );
        recorder.record(second, "m", prompt(40), &completion(Outcome::Ok, 0));
        recorder.record(second, "m", prompt(0), &completion(Outcome::Ok, 5));
        let by_choice = Completion {
            output_tokens_by_choice: vec![3, 0],
            ..completion(Outcome::Ok, 3)
        };
        recorder.record(second, "m", prompt(16), &by_choice);
        recorder.finish();
        recorder.record(second, "m", prompt(40), &completion(Outcome::Ok, 5));
        let written = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let lines: Vec<serde_json::Value> = written
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        let lengths = |name: &str| -> Vec<u64> {
            lines
                .iter()
                .map(|line| line[name].as_u64().unwrap())
                .collect()
        };
        assert_eq!(lengths("input_length"), [40, 40, 16]);
        assert_eq!(lengths("output_length"), [5, 2, 3]);
        let hash_ids = |line: usize| lines[line]["hash_ids"].as_array().unwrap();
        assert_eq!((hash_ids(0).len(), hash_ids(2).len()), (3, 1));
        assert_eq!(
            (&hash_ids(0)[..2], &hash_ids(0)[0]),
            (&hash_ids(1)[..2], &hash_ids(2)[0])
        );
        // The partial block at the end has an id of its own.
        assert_ne!(hash_ids(0)[2], hash_ids(1)[2]);
        assert_eq!(metrics.recorded_counter("written").get(), 3);
        assert_eq!(metrics.recorded_counter("dropped").get(), 1);
    }

    #[test]
    fn requests_that_a_full_disk_drops_are_counted() {
        if !Path::new(FULL).exists() {
            return;
        }
        let metrics = Metrics::new();
        let recorder = Recorder::start(Path::new(FULL), &metrics).unwrap();
        for _ in 0..200 {
            // The prompts are long enough to overflow the buffer.
            let completion = completion(Outcome::Ok, 5);
            recorder.record(Duration::ZERO, "m", prompt(2000), &completion);
        }
        recorder.finish();
        assert!(metrics.recorded_counter("dropped").get() > 0);
    }

    fn tempfile_path(name: &str) -> std::path::PathBuf {
        std::env::temp_dir().join(format!("foresee-{name}-{}.jsonl", std::process::id()))
    }
}
