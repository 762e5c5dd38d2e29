//! Drains workers, and removes them once they have no requests or their deadline has passed.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use foresee_core::router::Router;
use foresee_core::workers::{WorkerId, WorkerState};
use parking_lot::Mutex;

use crate::clock::Clock;
use crate::workers::Workers;
use crate::workers::worker::Worker;

/// Time after which a draining worker is removed although it has requests, unless the operator sets
/// another one. Long enough for all but the longest outputs.
pub(crate) const DEFAULT_DRAIN_TIMEOUT: Duration = Duration::from_secs(600);

/// Time between two checks of the workers that are to be removed.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Drains workers, and removes those whose removal is pending: a worker stays until it has no requests
/// or its deadline has passed.
#[derive(Debug)]
pub(crate) struct Removals {
    workers: Arc<Workers>,
    router: Router,
    clock: Clock,
    state: Mutex<RemovalState>,
}

/// Pending removals, and whether a task carries them out.
#[derive(Debug, Default)]
struct RemovalState {
    /// Deadline of each removal, by the gateway's clock. Contains only workers of the gateway, so
    /// their number is bounded.
    deadlines: HashMap<WorkerId, Duration>,
    /// Whether a task checks the workers. It ends when there are no pending removals.
    is_watched: bool,
}

impl Removals {
    /// Creates the removals of a gateway that removes no worker yet.
    pub(crate) fn new(workers: Arc<Workers>, router: Router, clock: Clock) -> Self {
        Self {
            workers,
            router,
            clock,
            state: Mutex::default(),
        }
    }

    /// Returns the time from `now` until a worker is removed even with requests; `None` if no
    /// removal of the worker is pending.
    pub(crate) fn time_left(&self, id: WorkerId, now: Duration) -> Option<Duration> {
        let deadline = *self.state.lock().deadlines.get(&id)?;
        Some(deadline.saturating_sub(now))
    }

    /// Returns whether a worker is to be removed.
    pub(crate) fn is_pending(&self, id: WorkerId) -> bool {
        self.state.lock().deadlines.contains_key(&id)
    }

    /// Drains the workers that `name` stands for, and removes each of them once it has no requests
    /// or `timeout` has passed. Replaces the deadline of a pending removal. Returns whether there is
    /// such a worker. Must run inside a tokio runtime.
    pub(crate) fn remove_when_drained(self: &Arc<Self>, name: &str, timeout: Duration) -> bool {
        let mut state = self.state.lock();
        let workers = self.workers_named(name);
        let deadline = self.clock.now().saturating_add(timeout);
        for worker in &workers {
            self.router.set_draining(worker.id, true);
            state.deadlines.insert(worker.id, deadline);
            tracing::info!(
                worker = %worker.config.name, ?timeout,
                "draining the worker; it is removed when it has no requests"
            );
        }
        if !workers.is_empty() && !state.is_watched {
            state.is_watched = true;
            tokio::spawn(watch_removals(Arc::downgrade(self)));
        }
        !workers.is_empty()
    }

    /// Drains the workers that `name` stands for, or ends that if `draining` is false, and cancels
    /// their pending removals. Returns the state of the first of them; `None` if there is no such
    /// worker.
    pub(crate) fn set_draining(&self, name: &str, draining: bool) -> Option<WorkerState> {
        // Held throughout, so that none of the workers is removed in between.
        let mut state = self.state.lock();
        let workers = self.workers_named(name);
        for worker in &workers {
            self.router.set_draining(worker.id, draining);
            let was_pending = state.deadlines.remove(&worker.id).is_some();
            tracing::info!(
                worker = %worker.config.name, draining, removal_cancelled = was_pending,
                "set whether the worker is draining"
            );
        }
        let first = workers.first()?.id;
        let snapshots = self.router.workers(self.clock.now());
        let snapshot = snapshots.iter().find(|snapshot| snapshot.id == first);
        snapshot.map(|snapshot| snapshot.state)
    }

    /// Removes the workers that `name` stands for at once. Responses that they still send are passed
    /// on.
    pub(crate) fn remove_now(&self, name: &str) {
        let mut state = self.state.lock();
        for worker in self.workers_named(name) {
            state.deadlines.remove(&worker.id);
            self.workers.remove(worker.id);
        }
    }

    /// Returns the workers that `name` stands for: the worker of this name, or all ranks and
    /// addresses of the engine of this name.
    fn workers_named(&self, name: &str) -> Vec<Arc<Worker>> {
        let mut workers = self.workers.registry().all();
        workers.retain(|worker| worker.config.name == name || worker.config.engine_name() == name);
        workers
    }

    /// Carries out the removals that are due. Returns whether others are pending; if not, the task
    /// that calls this has to end.
    fn remove_drained_workers(&self) -> bool {
        let mut state = self.state.lock();
        let now = self.clock.now();
        let snapshots = self.router.workers(now);
        state.deadlines.retain(|id, deadline| {
            // A worker that is unknown was removed by other means.
            let worker = snapshots.iter().find(|worker| worker.id == *id);
            let requests = worker.map_or(0, |worker| worker.requests);
            if requests > 0 && now < *deadline {
                return true;
            }
            let name = worker.map_or("", |worker| &worker.name);
            if requests > 0 {
                tracing::warn!(
                    worker = %name, requests,
                    "drain deadline passed; removing the worker while its requests still run"
                );
            } else {
                tracing::info!(worker = %name, "removing the drained worker");
            }
            self.workers.remove(*id);
            false
        });
        state.is_watched = !state.deadlines.is_empty();
        state.is_watched
    }
}

/// Removes drained workers until no removal is pending or the gateway has ended.
async fn watch_removals(removals: Weak<Removals>) {
    while removals
        .upgrade()
        .is_some_and(|removals| removals.remove_drained_workers())
    {
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}
