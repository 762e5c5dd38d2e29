//! Writes down the traffic: a line for each answered request, in the format `foresee replay` reads.
//!
//! A line has when the request came, how long prompt and answer were, and of the prompt's content
//! only the hashes of its blocks. A thread of its own writes; whoever answers requests hands over
//! what is needed and never waits. If the file cannot keep up, lines are dropped and counted.

use std::fs::{File, OpenOptions};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use foresee_core::sequence::Sequence;
use foresee_engine::request::Sequences;
use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use serde::Serialize;

use crate::answered::Ending;
use crate::metrics::{Metrics, Outcome};

/// Requests that may wait to be written.
const MOST_WAITING: usize = 4096;

/// An answered request.
#[derive(Debug)]
pub(crate) struct Entry {
    /// When it came, by the gateway's clock.
    pub(crate) arrived: Duration,
    pub(crate) model: String,
    pub(crate) sequences: Sequences,
    /// Output tokens of each prompt, or of all together if they were not told apart.
    output_tokens: Vec<u32>,
}

/// Hands entries to the thread that writes.
#[derive(Debug)]
pub(crate) struct Recorder {
    /// `None` ends it.
    entries: SyncSender<Option<Entry>>,
    writer: Mutex<Option<JoinHandle<()>>>,
    dropped: Counter,
}

impl Recorder {
    /// Appends to the file at `path`.
    pub(crate) fn start(path: &Path, metrics: &Metrics) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        let (entries, receiver) = sync_channel(MOST_WAITING);
        let dropped = metrics.recorded("dropped");
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH);
        let writer = Writer {
            file: BufWriter::new(file),
            started: since_1970.unwrap_or_default(),
            next_id: RandomState::new().hash_one(std::process::id()),
            written: metrics.recorded("written"),
            dropped: dropped.clone(),
            has_failed: false,
        };
        let thread = std::thread::Builder::new().name("recorder".to_owned());
        let writer = thread.spawn(move || writer.run(&receiver))?;
        Ok(Self {
            entries,
            writer: Mutex::new(Some(writer)),
            dropped,
        })
    }

    /// Writes down a request that ended so, if there is something to replay: its worker answered,
    /// and it is known with how many tokens.
    pub(crate) fn record(
        &self,
        arrived: Duration,
        model: &str,
        sequences: Sequences,
        ending: &Ending,
    ) {
        let answered = matches!(ending.outcome, Outcome::Ok | Outcome::ClientLeft);
        if !answered || ending.output_tokens == 0 || sequences.prompt_tokens == 0 {
            return;
        }
        let entry = Entry {
            arrived,
            model: model.to_owned(),
            sequences,
            output_tokens: match ending.apart.as_slice() {
                [] => vec![ending.output_tokens],
                apart => apart.to_vec(),
            },
        };
        if self.entries.try_send(Some(entry)).is_err() {
            self.dropped.inc();
        }
    }

    /// Writes what is waiting, and no more. Blocks until it is done.
    pub(crate) fn finish(&self) {
        if let Some(writer) = self.writer.lock().take() {
            // Both fail only if the thread is gone.
            let _ = self.entries.send(None);
            let _ = writer.join();
        }
    }
}

struct Writer {
    file: BufWriter<File>,
    /// When the gateway's clock was zero, since 1970.
    started: Duration,
    /// Names blocks that nobody shares.
    next_id: u64,
    written: Counter,
    dropped: Counter,
    has_failed: bool,
}

/// As the reader in `foresee-sim` has it.
#[derive(Serialize)]
struct Line<'a> {
    /// Milliseconds since 1970: several runs may follow each other in one file.
    timestamp: f64,
    input_length: u32,
    output_length: u32,
    hash_ids: Vec<u64>,
    tokens_per_hash_id: u32,
    model: &'a str,
}

impl Writer {
    fn run(mut self, entries: &Receiver<Option<Entry>>) {
        let mut next = entries.recv().ok().flatten();
        while let Some(entry) = next.take() {
            self.write(&entry);
            next = match entries.try_recv() {
                Ok(entry) => entry,
                Err(TryRecvError::Disconnected) => None,
                Err(TryRecvError::Empty) => {
                    // Nothing to do: what was written can be read meanwhile.
                    let flushed = self.file.flush();
                    self.note(&flushed);
                    entries.recv().ok().flatten()
                }
            };
        }
        let flushed = self.file.flush();
        self.note(&flushed);
    }

    fn write(&mut self, entry: &Entry) {
        let Sequences { first, further, .. } = &entry.sequences;
        let prompts = 1 + further.len();
        for (index, sequence) in std::iter::once(first).chain(further).enumerate() {
            let output_length = match entry.output_tokens.as_slice() {
                [all] => all / prompts as u32,
                apart => apart.get(index).copied().unwrap_or(0),
            };
            if output_length == 0 || sequence.tokens() == 0 {
                continue;
            }
            let timestamp = (self.started + entry.arrived).as_secs_f64() * 1e3;
            let line = Line {
                // To the microsecond: the rest is noise.
                timestamp: (timestamp * 1e3).round() / 1e3,
                input_length: sequence.tokens(),
                output_length,
                hash_ids: self.ids(sequence),
                tokens_per_hash_id: sequence.block_size().get(),
                model: &entry.model,
            };
            let written = serde_json::to_string(&line)
                .map_err(io::Error::from)
                .and_then(|line| writeln!(self.file, "{line}"));
            if self.note(&written) {
                self.written.inc();
            } else {
                self.dropped.inc();
            }
        }
    }

    /// An id for each block of a prompt, the same wherever it is the same with all before. Those
    /// of no known content have one of their own.
    fn ids(&mut self, sequence: &Sequence) -> Vec<u64> {
        let mut ids = sequence.hashes().to_vec();
        let blocks = sequence.tokens().div_ceil(sequence.block_size().get());
        while ids.len() < blocks as usize {
            ids.push(self.next_id);
            self.next_id = self.next_id.wrapping_add(1);
        }
        ids
    }

    /// Says once that writing fails. Returns whether it went well.
    fn note(&mut self, result: &io::Result<()>) -> bool {
        match result {
            Ok(()) => true,
            Err(error) => {
                if !std::mem::replace(&mut self.has_failed, true) {
                    tracing::error!(%error, "cannot write the recording; requests go on");
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

    fn ended(outcome: Outcome, output_tokens: u32) -> Ending {
        Ending {
            outcome,
            usage: Usage::default(),
            output_tokens,
            apart: Vec::new(),
            first_token: None,
        }
    }

    fn prompt(tokens: u32) -> Sequences {
        let block_size = 16.try_into().unwrap();
        let tokens: Vec<u32> = (0..tokens).collect();
        Sequences::of_one(Sequence::from_tokens(&tokens, block_size, 0), 1)
    }

    #[test]
    fn only_what_can_be_replayed_is_written() {
        let folder = tempfile_path("kept");
        let metrics = Metrics::new();
        let recorder = Recorder::start(&folder, &metrics).unwrap();
        let second = Duration::from_secs(1);
        recorder.record(second, "m", prompt(40), &ended(Outcome::Ok, 5));
        recorder.record(second, "m", prompt(40), &ended(Outcome::ClientLeft, 2));
        recorder.record(second, "m", prompt(40), &ended(Outcome::WorkerFailed, 5));
        recorder.record(second, "m", prompt(40), &ended(Outcome::Ok, 0));
        recorder.record(second, "m", prompt(0), &ended(Outcome::Ok, 5));
        let apart = Ending {
            apart: vec![3, 0],
            ..ended(Outcome::Ok, 3)
        };
        recorder.record(second, "m", prompt(16), &apart);
        recorder.finish();
        recorder.record(second, "m", prompt(40), &ended(Outcome::Ok, 5));
        let written = std::fs::read_to_string(&folder).unwrap();
        std::fs::remove_file(&folder).unwrap();
        let lines: Vec<serde_json::Value> = written
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        let lengths = |name: &str| -> Vec<u64> {
            lines.iter().map(|it| it[name].as_u64().unwrap()).collect()
        };
        assert_eq!(lengths("input_length"), [40, 40, 16]);
        assert_eq!(lengths("output_length"), [5, 2, 3]);
        let ids = |line: usize| lines[line]["hash_ids"].as_array().unwrap();
        assert_eq!((ids(0).len(), ids(2).len()), (3, 1));
        assert_eq!((&ids(0)[..2], &ids(0)[0]), (&ids(1)[..2], &ids(2)[0]));
        // What is behind the last full block is nobody else's.
        assert_ne!(ids(0)[2], ids(1)[2]);
        assert_eq!(metrics.recorded("written").get(), 3);
        assert_eq!(metrics.recorded("dropped").get(), 1);
    }

    #[test]
    fn a_full_disk_is_counted_and_harms_nobody() {
        if !Path::new(FULL).exists() {
            return;
        }
        let metrics = Metrics::new();
        let recorder = Recorder::start(Path::new(FULL), &metrics).unwrap();
        for _ in 0..200 {
            // Long enough that the buffer overflows.
            let ending = ended(Outcome::Ok, 5);
            recorder.record(Duration::ZERO, "m", prompt(2000), &ending);
        }
        recorder.finish();
        assert!(metrics.recorded("dropped").get() > 0);
    }

    fn tempfile_path(name: &str) -> std::path::PathBuf {
        std::env::temp_dir().join(format!("foresee-{name}-{}.jsonl", std::process::id()))
    }
}
