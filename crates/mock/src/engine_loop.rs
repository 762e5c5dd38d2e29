//! The engine loop: one task owns the simulated engine, runs its steps in real time, and reports
//! progress to each request.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use foresee_sim::engine::{Engine, EngineConfig, EngineRequest, Step, SubmitError, Totals};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::kv_publisher::{Content, Publisher};

/// Maximum delay of the engine's clock that later steps make up for. Timers are coarse and machines
/// are busy, so steps often end late. After a longer halt, the excess time is skipped.
const MAX_LAG: Duration = Duration::from_secs(1);

/// Progress of one choice of a request.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ChoiceProgress {
    /// Output tokens generated so far.
    pub(crate) generated: u32,
    /// Prompt tokens found in the prefix cache.
    pub(crate) cached_tokens: u32,
    pub(crate) finished: bool,
}

/// Progress of each choice of a request, or the reason why the engine rejected the request.
type Outcome = Result<Vec<ChoiceProgress>, SubmitError>;

/// State of the engine at one instant, for `/metrics`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Snapshot {
    pub(crate) running: usize,
    pub(crate) waiting: usize,
    pub(crate) pinned_blocks: u32,
    /// Number of distinct block hashes in the prefix cache.
    pub(crate) cached_hashes: usize,
    pub(crate) totals: Totals,
}

/// A request to the engine, with the content of its blocks if KV events are published.
#[derive(Clone, Debug)]
pub(crate) struct Submission {
    pub(crate) request: EngineRequest,
    pub(crate) content: Option<Arc<Content>>,
}

/// A message to the task that owns the engine.
enum Command {
    /// Submits all choices of a request, whose progress goes to the sender.
    Submit(Vec<Submission>, watch::Sender<Outcome>),
    /// Aborts the engine requests with these ids.
    Abort(Range<u64>),
    /// Sends a snapshot of the engine.
    Snapshot(oneshot::Sender<Snapshot>),
    /// Makes the following steps take this many times as long as in a healthy engine.
    SetSlowdown(f64),
}

/// Handle of the task that owns the engine. The task ends when the last handle and the last
/// [`Generation`] have been dropped.
#[derive(Clone, Debug)]
pub(crate) struct EngineLoop {
    // Unbounded, because `Generation` sends from `drop`, which cannot wait. Each connection has at
    // most one request, so the number of commands stays small.
    commands: mpsc::UnboundedSender<Command>,
    next_id: Arc<AtomicU64>,
}

/// Error: the engine's task has ended because the mock engine is shutting down.
#[derive(Debug)]
pub(crate) struct Stopped;

impl EngineLoop {
    /// Starts an engine whose steps take the time of its step-time model divided by `speedup`,
    /// which must be above 0. Must be called within a Tokio runtime.
    pub(crate) fn start(config: EngineConfig, speedup: f64, publisher: Option<Publisher>) -> Self {
        let (commands, inbox) = mpsc::unbounded_channel();
        let driver = LoopDriver {
            engine: Engine::new(config),
            speedup,
            slowdown: 1.0,
            inbox,
            recipients: HashMap::new(),
            publisher,
        };
        tokio::spawn(driver.run());
        Self {
            commands,
            next_id: Arc::default(),
        }
    }

    /// Submits the choices of a request and assigns their engine ids, which replace the given ones.
    /// Does not wait: the first [`Generation::advance`] reports a rejection or a stopped engine.
    pub(crate) fn submit(&self, mut choices: Vec<Submission>) -> Generation {
        let count = choices.len() as u64;
        let first = self.next_id.fetch_add(count, Ordering::Relaxed);
        for (choice, id) in choices.iter_mut().zip(first..) {
            choice.request.id = id;
        }
        let initial = Ok(vec![ChoiceProgress::default(); choices.len()]);
        let (sender, progress) = watch::channel(initial);
        // If the task has ended, the sender is dropped here, and the first `advance` fails.
        let _ = self.commands.send(Command::Submit(choices, sender));
        Generation {
            progress,
            ids: first..first + count,
            commands: self.commands.clone(),
        }
    }

    /// Makes all steps that begin later take `slowdown` times as long as in a healthy engine.
    pub(crate) fn set_slowdown(&self, slowdown: f64) {
        // If the task has ended, there are no later steps.
        let _ = self.commands.send(Command::SetSlowdown(slowdown));
    }

    /// Returns the engine's state after all commands that this caller has sent before.
    ///
    /// # Errors
    /// If the engine's task has ended.
    pub(crate) async fn snapshot(&self) -> Result<Snapshot, Stopped> {
        let (reply, snapshot) = oneshot::channel();
        let _ = self.commands.send(Command::Snapshot(reply));
        snapshot.await.map_err(|_| Stopped)
    }
}

/// A request in the engine. Dropping the value aborts the request unless all choices are finished.
#[derive(Debug)]
pub(crate) struct Generation {
    progress: watch::Receiver<Outcome>,
    ids: Range<u64>,
    commands: mpsc::UnboundedSender<Command>,
}

impl Generation {
    /// Waits for new progress since the last call and writes it to `progress`. A slow reader gets
    /// several tokens at a time, as with vLLM.
    ///
    /// # Errors
    /// The inner error if the engine rejected the request; [`Stopped`] if the engine has stopped,
    /// or if all choices are finished and their last progress has been returned. `progress` is then
    /// unchanged.
    pub(crate) async fn advance(
        &mut self,
        progress: &mut Vec<ChoiceProgress>,
    ) -> Result<Result<(), SubmitError>, Stopped> {
        self.progress.changed().await.map_err(|_| Stopped)?;
        match &*self.progress.borrow_and_update() {
            Ok(current) => {
                progress.clone_from(current);
                Ok(Ok(()))
            }
            Err(error) => Ok(Err(*error)),
        }
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        let finished = match &*self.progress.borrow() {
            Ok(choices) => choices.iter().all(|choice| choice.finished),
            Err(_) => true,
        };
        if !finished {
            let _ = self.commands.send(Command::Abort(self.ids.clone()));
        }
    }
}

/// The receiver of progress for one engine request: a choice of a completion request.
struct Recipient {
    progress: Arc<watch::Sender<Outcome>>,
    /// Index of the choice in the request.
    choice: usize,
}

/// The task that owns the engine.
struct LoopDriver {
    engine: Engine,
    /// Seconds of engine time in one second of real time.
    speedup: f64,
    /// Factor by which steps take longer than in a healthy engine.
    slowdown: f64,
    inbox: mpsc::UnboundedReceiver<Command>,
    /// By id of the engine request.
    recipients: HashMap<u64, Recipient>,
    publisher: Option<Publisher>,
}

impl LoopDriver {
    /// Runs steps and commands until all handles have been dropped. While the engine has no work,
    /// it waits for a command, and a restart that the publisher requires takes place.
    async fn run(mut self) {
        // Start of the next step: the time at which the last step was due to end, not the time at
        // which the timer fired. Otherwise steps shorter than the timer's resolution of one
        // millisecond would all take one millisecond.
        let mut clock = Instant::now();
        loop {
            let Some(step) = self.engine.begin_step() else {
                if let Some(publisher) = &mut self.publisher
                    && publisher.is_due_to_restart()
                {
                    self.engine = Engine::new(self.engine.config().clone());
                    publisher.restart();
                }
                let Some(command) = self.inbox.recv().await else {
                    return;
                };
                self.run_command(command);
                clock = Instant::now();
                continue;
            };
            if let Some(publisher) = &mut self.publisher {
                publisher.note(self.engine.take_cache_events());
            }
            let now = Instant::now();
            clock = clock.max(now.checked_sub(MAX_LAG).unwrap_or(now));
            clock += step.duration.mul_f64(self.slowdown / self.speedup);
            if !self.run_commands_until(clock).await {
                return;
            }
            self.end_step(step);
        }
    }

    /// Runs commands until the deadline. Returns `false` if all handles have been dropped;
    /// the step in progress is then abandoned.
    async fn run_commands_until(&mut self, deadline: Instant) -> bool {
        let timer = tokio::time::sleep_until(deadline);
        tokio::pin!(timer);
        loop {
            tokio::select! {
                // Commands first, so that new requests are accepted even if steps are late.
                biased;
                command = self.inbox.recv() => match command {
                    Some(command) => self.run_command(command),
                    None => return false,
                },
                () = &mut timer => return true,
            }
        }
    }

    /// Executes one command. Unknown ids of an abort are ignored, and so is a snapshot without a
    /// receiver.
    fn run_command(&mut self, command: Command) {
        match command {
            Command::Submit(choices, progress) => self.submit(choices, progress),
            Command::Abort(ids) => {
                for id in ids {
                    self.engine.abort(id);
                    self.remove_request(id);
                }
            }
            Command::SetSlowdown(slowdown) => self.slowdown = slowdown,
            Command::Snapshot(reply) => {
                // The receiver may have been dropped.
                let _ = reply.send(Snapshot {
                    running: self.engine.running(),
                    waiting: self.engine.waiting(),
                    pinned_blocks: self.engine.pinned_blocks(),
                    cached_hashes: self.engine.cached_hashes(),
                    totals: self.engine.totals(),
                });
            }
        }
    }

    /// Submits all choices. If the engine rejects one of them, aborts them all and sends the error
    /// as the request's outcome.
    fn submit(&mut self, choices: Vec<Submission>, progress: watch::Sender<Outcome>) {
        let progress = Arc::new(progress);
        let ids: Vec<u64> = choices.iter().map(|choice| choice.request.id).collect();
        for (choice, submission) in choices.into_iter().enumerate() {
            let id = submission.request.id;
            if let Err(error) = self.engine.submit(submission.request) {
                for id in ids {
                    self.engine.abort(id);
                    self.remove_request(id);
                }
                // The client may have disconnected.
                let _ = progress.send(Err(error));
                return;
            }
            if let (Some(publisher), Some(content)) = (&mut self.publisher, submission.content) {
                publisher.add_request(id, content);
            }
            let progress = progress.clone();
            self.recipients.insert(id, Recipient { progress, choice });
        }
    }

    fn remove_request(&mut self, id: u64) {
        self.recipients.remove(&id);
        if let Some(publisher) = &mut self.publisher {
            publisher.remove_request(id);
        }
    }

    /// Publishes the step's KV events, then adds its tokens to the progress of each request.
    /// Finished requests are removed; tokens of aborted requests are ignored.
    fn end_step(&mut self, step: Step) {
        // KV events are published before the progress, so that a client that has received a token
        // can rely on the events about its blocks.
        if let Some(publisher) = &mut self.publisher {
            publisher.publish();
        }
        for event in self.engine.end_step(step) {
            let Some(recipient) = self.recipients.get(&event.id) else {
                continue;
            };
            recipient.progress.send_modify(|outcome| {
                let choices = outcome.as_mut().ok();
                if let Some(choice) = choices.and_then(|all| all.get_mut(recipient.choice)) {
                    choice.generated += 1;
                    choice.cached_tokens = event.cached_tokens;
                    choice.finished = event.finished;
                }
            });
            if event.finished {
                self.remove_request(event.id);
            }
        }
    }
}
