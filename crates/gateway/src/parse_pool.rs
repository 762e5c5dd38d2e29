//! One bounded pool of threads for work that would delay the streams of an I/O thread: parsing and
//! tokenising long bodies.

use std::sync::Arc;
use std::time::Duration;

use foresee_engine::error::ApiError;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::task::JoinError;
use tokio::time::timeout;

/// Maximum time that a task waits for a free thread.
const MAX_WAIT: Duration = Duration::from_secs(10);

/// Value of `Retry-After` if no thread becomes free.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Threads for parsing, shared by all I/O threads.
///
/// The threads are those of the runtime in which the gateway was started. Each I/O thread has a
/// runtime of its own, whose blocking pools together would not be bounded.
#[derive(Debug)]
pub(crate) struct ParsePool {
    runtime: Handle,
    /// One permit per processor. More concurrent tasks would only delay the I/O threads.
    permits: Arc<Semaphore>,
    max_wait: Duration,
}

/// Why a task was not completed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PoolError {
    /// All threads were busy for the maximum time. The task was not started.
    #[error("no thread became free within {0:?}")]
    Busy(Duration),
    /// The task panicked, or the gateway ended.
    #[error(transparent)]
    Failed(#[from] JoinError),
}

impl ParsePool {
    /// Creates a pool with one thread per processor. Must be called inside a tokio runtime.
    pub(crate) fn new() -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Self::with_threads(processors, MAX_WAIT)
    }

    /// Creates a pool of `threads`, for which a task waits at most `max_wait`.
    fn with_threads(threads: usize, max_wait: Duration) -> Self {
        Self {
            runtime: Handle::current(),
            permits: Arc::new(Semaphore::new(threads)),
            max_wait,
        }
    }

    /// Runs a task on a thread of the pool and returns its result. Waits for a free thread first;
    /// tasks start in the order in which they were given. A started task runs to its end even if
    /// the future is dropped, and keeps its thread so long.
    ///
    /// # Errors
    /// Fails if no thread becomes free in time, the task panics, or the gateway ends.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        task: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, PoolError> {
        let permit = timeout(self.max_wait, Arc::clone(&self.permits).acquire_owned()).await;
        // The semaphore is never closed.
        let Ok(Ok(permit)) = permit else {
            return Err(PoolError::Busy(self.max_wait));
        };
        let running = self.runtime.spawn_blocking(move || {
            let _permit = permit;
            task()
        });
        Ok(running.await?)
    }

    /// Runs a task on a thread of the pool, as soon as one is free, without waiting for it. The task is
    /// not run if the gateway ends before.
    pub(crate) fn spawn(&self, task: impl FnOnce() + Send + 'static) {
        let permits = Arc::clone(&self.permits);
        let runtime = self.runtime.clone();
        self.runtime.spawn(async move {
            let permit = permits.acquire_owned().await;
            runtime.spawn_blocking(move || {
                let _permit = permit;
                task();
            });
        });
    }
}

impl PoolError {
    /// Returns the client's error response: a 503 with `Retry-After` if all threads are busy, and a
    /// 400 for a body that the parser fails on, which is logged as an error.
    pub(crate) fn into_response(self) -> ApiError {
        match self {
            Self::Busy(_) => ApiError {
                code: Some("router_overloaded"),
                retry_after: Some(RETRY_AFTER),
                ..ApiError::unavailable(
                    "The router is busy parsing other requests. Try again shortly.",
                )
            },
            Self::Failed(error) => {
                tracing::error!(%error, "parsing a request body failed");
                ApiError::bad_request("The body cannot be parsed.", None)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn a_pool_returns_results_and_panics_as_errors() {
        let pool = ParsePool::with_threads(1, MAX_WAIT);
        assert_eq!(pool.run(|| 7).await.unwrap(), 7);
        let failed = pool.run(|| panic!("a bug")).await;
        let failed: Result<(), PoolError> = failed;
        assert_eq!(failed.unwrap_err().into_response().status, 400);
        // The thread of the panic is free again.
        assert_eq!(pool.run(|| 8).await.unwrap(), 8);
    }

    #[tokio::test]
    async fn a_busy_pool_refuses_after_the_maximum_wait() {
        let pool = ParsePool::with_threads(1, Duration::from_millis(20));
        let (finish, finished) = mpsc::channel::<()>();
        let (started, has_started) = tokio::sync::oneshot::channel();
        let long = pool.run(move || {
            let _ = started.send(());
            let _ = finished.recv();
        });
        let refused = async {
            has_started.await.unwrap();
            let refused = pool.run(|| ()).await.unwrap_err();
            assert!(matches!(refused, PoolError::Busy(_)), "{refused:?}");
            assert_eq!(refused.into_response().status, 503);
            finish.send(()).unwrap();
        };
        let (long, ()) = tokio::join!(long, refused);
        long.unwrap();
        pool.run(|| ()).await.unwrap();
    }

    #[tokio::test]
    async fn a_dropped_future_does_not_free_a_running_thread() {
        let pool = ParsePool::with_threads(1, Duration::from_millis(20));
        let (finish, finished) = mpsc::channel::<()>();
        let (started, has_started) = tokio::sync::oneshot::channel();
        tokio::select! {
            _ = pool.run(move || { let _ = started.send(()); let _ = finished.recv(); }) => {
                panic!("the task waits for the test");
            }
            started = has_started => started.unwrap(),
        }
        assert!(matches!(pool.run(|| ()).await, Err(PoolError::Busy(_))));
        finish.send(()).unwrap();
        tokio::task::yield_now().await;
        assert_eq!(pool.permits.acquire().await.unwrap().num_permits(), 1);
    }
}
