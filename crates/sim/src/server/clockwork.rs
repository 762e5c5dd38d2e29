//! The engine in real time: one task owns it, lets its steps take their time, and tells each
//! request how far it has come.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::engine::{Engine, EngineConfig, EngineRequest, Step, SubmitError, Totals};
use crate::server::publish::{Content, Publisher};

/// How far the clock may fall behind. Timers are coarse and machines busy, so steps that end late
/// are made up for; after a longer halt the time is lost.
const MOST_LAG: Duration = Duration::from_secs(1);

/// How far one choice of a request has come.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Progress {
    /// Tokens generated.
    pub(super) generated: u32,
    /// Prompt tokens that came from the cache.
    pub(super) cached_tokens: u32,
    pub(super) finished: bool,
}

/// How far a request has come, choice by choice; or why the engine does not take it.
type Outcome = Result<Vec<Progress>, SubmitError>;

/// The engine's state at one instant.
#[derive(Clone, Copy, Debug)]
pub(super) struct Snapshot {
    pub(super) running: usize,
    pub(super) waiting: usize,
    pub(super) pinned_blocks: u32,
    /// Distinct blocks in the prefix cache.
    pub(super) cached_hashes: usize,
    pub(super) totals: Totals,
}

/// A request to the engine, and what its blocks contain, if that is known.
#[derive(Clone, Debug)]
pub(super) struct Submission {
    pub(super) request: EngineRequest,
    pub(super) content: Option<Arc<Content>>,
}

enum Command {
    Submit(Vec<Submission>, watch::Sender<Outcome>),
    Abort(Range<u64>),
    Snapshot(oneshot::Sender<Snapshot>),
}

/// Reaches the task that owns the engine, which ends when the last of these is dropped.
#[derive(Clone, Debug)]
pub(super) struct Clockwork {
    // Unbounded, because a guard's drop cannot wait. Each connection has one request at most.
    commands: mpsc::UnboundedSender<Command>,
    next_id: Arc<AtomicU64>,
}

/// The engine's task is gone: the server is shutting down.
#[derive(Debug)]
pub(super) struct Stopped;

impl Clockwork {
    /// Starts an engine that runs `speed` times as fast as its step law says.
    pub(super) fn start(config: EngineConfig, speed: f64, publisher: Option<Publisher>) -> Self {
        let (commands, inbox) = mpsc::unbounded_channel();
        let driver = Driver {
            engine: Engine::new(config),
            speed,
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

    /// Submits the choices of a request. Their ids are given here.
    pub(super) fn submit(&self, mut choices: Vec<Submission>) -> Generation {
        let count = choices.len() as u64;
        let first = self.next_id.fetch_add(count, Ordering::Relaxed);
        for (choice, id) in choices.iter_mut().zip(first..) {
            choice.request.id = id;
        }
        let begun = Ok(vec![Progress::default(); choices.len()]);
        let (sender, progress) = watch::channel(begun);
        // If the task is gone, so is the sender now, and the first wait says so.
        let _ = self.commands.send(Command::Submit(choices, sender));
        Generation {
            progress,
            ids: first..first + count,
            commands: self.commands.clone(),
        }
    }

    /// The engine's state, after everything this caller sent before.
    pub(super) async fn snapshot(&self) -> Result<Snapshot, Stopped> {
        let (reply, snapshot) = oneshot::channel();
        let _ = self.commands.send(Command::Snapshot(reply));
        snapshot.await.map_err(|_| Stopped)
    }
}

/// A request in the engine. Dropping it aborts what is not finished.
#[derive(Debug)]
pub(super) struct Generation {
    progress: watch::Receiver<Outcome>,
    ids: Range<u64>,
    commands: mpsc::UnboundedSender<Command>,
}

impl Generation {
    /// Waits until the request has come further than last seen, and writes how far into
    /// `progress`. Whoever is slow finds several tokens at once, as with vLLM.
    pub(super) async fn advance(
        &mut self,
        progress: &mut Vec<Progress>,
    ) -> Result<Result<(), SubmitError>, Stopped> {
        self.progress.changed().await.map_err(|_| Stopped)?;
        match &*self.progress.borrow_and_update() {
            Ok(now) => {
                progress.clone_from(now);
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

/// Whom to tell about a choice.
struct Recipient {
    progress: Arc<watch::Sender<Outcome>>,
    choice: usize,
}

struct Driver {
    engine: Engine,
    speed: f64,
    inbox: mpsc::UnboundedReceiver<Command>,
    recipients: HashMap<u64, Recipient>,
    publisher: Option<Publisher>,
}

impl Driver {
    async fn run(mut self) {
        // When the next step begins: when the last one was due to end, not when a timer said so,
        // or steps shorter than the timer's millisecond would all take one.
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
                self.obey(command);
                clock = Instant::now();
                continue;
            };
            if let Some(publisher) = &mut self.publisher {
                publisher.note(self.engine.take_cache_events());
            }
            let now = Instant::now();
            clock = clock.max(now.checked_sub(MOST_LAG).unwrap_or(now));
            clock += step.duration.div_f64(self.speed);
            if !self.obey_until(clock).await {
                return;
            }
            self.end_step(step);
        }
    }

    /// Takes commands until the deadline. Returns whether there may be more.
    async fn obey_until(&mut self, deadline: Instant) -> bool {
        let timer = tokio::time::sleep_until(deadline);
        tokio::pin!(timer);
        loop {
            tokio::select! {
                // Commands first: when steps are behind time, requests must still get in.
                biased;
                command = self.inbox.recv() => match command {
                    Some(command) => self.obey(command),
                    None => return false,
                },
                () = &mut timer => return true,
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit(choices, progress) => self.submit(choices, progress),
            Command::Abort(ids) => {
                for id in ids {
                    self.engine.abort(id);
                    self.forget(id);
                }
            }
            Command::Snapshot(reply) => {
                // Whoever asked may have gone.
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

    fn submit(&mut self, choices: Vec<Submission>, progress: watch::Sender<Outcome>) {
        let progress = Arc::new(progress);
        let ids: Vec<u64> = choices.iter().map(|choice| choice.request.id).collect();
        for (choice, submission) in choices.into_iter().enumerate() {
            let id = submission.request.id;
            if let Err(error) = self.engine.submit(submission.request) {
                for id in ids {
                    self.engine.abort(id);
                    self.forget(id);
                }
                // Whoever asked may have gone.
                let _ = progress.send(Err(error));
                return;
            }
            if let (Some(publisher), Some(content)) = (&mut self.publisher, submission.content) {
                publisher.remember(id, content);
            }
            let progress = progress.clone();
            self.recipients.insert(id, Recipient { progress, choice });
        }
    }

    fn forget(&mut self, id: u64) {
        self.recipients.remove(&id);
        if let Some(publisher) = &mut self.publisher {
            publisher.forget(id);
        }
    }

    fn end_step(&mut self, step: Step) {
        // Before anybody is answered, so that who knows of an answer may know of its blocks.
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
                self.forget(event.id);
            }
        }
    }
}
