//! Wakers without threads: who was woken is told when it is asked for.

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::{Wake, Waker};

use parking_lot::Mutex;

/// Numbers that were woken, in that order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Woken(Arc<Mutex<VecDeque<usize>>>);

impl Woken {
    /// Wakes that number.
    pub(crate) fn waker(&self, number: usize) -> Waker {
        Waker::from(Arc::new(Bell {
            number,
            woken: self.clone(),
        }))
    }

    /// The first that was woken and not taken yet.
    pub(crate) fn take(&self) -> Option<usize> {
        self.0.lock().pop_front()
    }
}

struct Bell {
    number: usize,
    woken: Woken,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.woken.0.lock().push_back(self.number);
    }
}
