//! Wakers for a single thread: they record which requests were woken, and the caller reads the
//! record.

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::{Wake, Waker};

use parking_lot::Mutex;

/// A queue of the indices whose wakers were woken, in the order of waking.
#[derive(Clone, Debug, Default)]
pub(crate) struct ReadyWakers(Arc<Mutex<VecDeque<usize>>>);

impl ReadyWakers {
    /// Returns a waker that adds `index` to the queue.
    pub(crate) fn waker(&self, index: usize) -> Waker {
        Waker::from(Arc::new(IndexWaker {
            index,
            queue: self.clone(),
        }))
    }

    /// Removes and returns the first index of the queue.
    pub(crate) fn take(&self) -> Option<usize> {
        self.0.lock().pop_front()
    }
}

/// Adds an index to the queue when it is woken.
struct IndexWaker {
    index: usize,
    queue: ReadyWakers,
}

impl Wake for IndexWaker {
    fn wake(self: Arc<Self>) {
        self.queue.0.lock().push_back(self.index);
    }
}
