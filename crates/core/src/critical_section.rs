//! The router's lock, and the guard that ends a critical section.
//!
//! Work that need not be done under the lock is left behind in the state: hash chains to drop and
//! tasks to wake. A [`CriticalSection`] takes them out when it ends, unlocks, and only then drops
//! and wakes. The chains may be large allocations, and the tasks may take the lock.

use std::fmt;
use std::num::NonZeroU32;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::task::Waker;

use parking_lot::{Mutex, MutexGuard};

use crate::state::State;

/// Observer of the router's lock, for measurements.
///
/// Both methods are called by the thread that holds the lock, so they must not call the router.
pub trait LockObserver: Send + Sync {
    /// Is called right after the lock was acquired.
    fn on_locked(&self);

    /// Is called right before the lock is released.
    fn on_unlocking(&self);
}

/// State of a router, shared by its handles and its bookings.
#[derive(Clone)]
pub(crate) struct SharedState(Arc<LockedState>);

/// A state, its lock, and the observer of the lock.
struct LockedState {
    state: Mutex<State>,
    /// Tokens per block, which never change. A copy of what is behind the lock.
    block_size: NonZeroU32,
    /// `None` except in measurements.
    observer: Option<Arc<dyn LockObserver>>,
}

impl fmt::Debug for SharedState {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.state.fmt(formatter)
    }
}

impl SharedState {
    /// Puts `state` behind a lock. `observer` is called whenever the lock is acquired or released.
    pub(crate) fn new(state: State, observer: Option<Arc<dyn LockObserver>>) -> Self {
        Self(Arc::new(LockedState {
            block_size: state.config.block_size,
            state: Mutex::new(state),
            observer,
        }))
    }

    /// Returns the block size of the router, in tokens. Does not need the lock.
    pub(crate) fn block_size(&self) -> NonZeroU32 {
        self.0.block_size
    }

    /// Waits for the lock and starts a critical section. It ends when the result is dropped.
    pub(crate) fn lock(&self) -> CriticalSection<'_> {
        let state = self.0.state.lock();
        let observer = self.0.observer.as_deref();
        if let Some(observer) = observer {
            observer.on_locked();
        }
        CriticalSection {
            state: Some(state),
            observer,
            is_fair: false,
        }
    }
}

/// Exclusive access to the state of a router. Its end, on every path, releases the lock, then drops
/// unused hash chains and wakes tasks.
#[must_use = "a critical section ends as soon as it is dropped"]
pub(crate) struct CriticalSection<'a> {
    /// The lock. `None` only while the section ends.
    state: Option<MutexGuard<'a, State>>,
    observer: Option<&'a dyn LockObserver>,
    /// Whether the lock is passed on to a waiting thread.
    is_fair: bool,
}

impl CriticalSection<'_> {
    /// Ends the section and passes the lock on to a thread that waits for it. For sections that
    /// follow each other without a pause, which could keep the lock otherwise.
    pub(crate) fn unlock_fair(mut self) {
        self.is_fair = true;
    }

    /// Passes the lock on to a thread that waits for it, if any, and takes it back. The state may
    /// have changed afterwards. Hash chains to drop and tasks to wake are left for the end.
    pub(crate) fn pause(&mut self) {
        if let Some(observer) = self.observer {
            observer.on_unlocking();
        }
        if let Some(state) = &mut self.state {
            MutexGuard::bump(state);
        }
        if let Some(observer) = self.observer {
            observer.on_locked();
        }
    }
}

impl Deref for CriticalSection<'_> {
    type Target = State;

    #[inline]
    fn deref(&self) -> &State {
        match &self.state {
            Some(state) => state,
            None => unreachable!("the lock is released only by dropping the section"),
        }
    }
}

impl DerefMut for CriticalSection<'_> {
    #[inline]
    fn deref_mut(&mut self) -> &mut State {
        match &mut self.state {
            Some(state) => state,
            None => unreachable!("the lock is released only by dropping the section"),
        }
    }
}

impl Drop for CriticalSection<'_> {
    fn drop(&mut self) {
        let Some(mut state) = self.state.take() else {
            return;
        };
        let unused_chains = state.prefixes.take_deferred_drops();
        let wakers = std::mem::take(&mut state.dispatcher.pending_wakers);
        if let Some(observer) = self.observer {
            observer.on_unlocking();
        }
        if self.is_fair {
            MutexGuard::unlock_fair(state);
        } else {
            drop(state);
        }
        drop(unused_chains);
        wakers.into_iter().for_each(Waker::wake);
    }
}
