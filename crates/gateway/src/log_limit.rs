//! Rate limits for warnings that can repeat.
//!
//! A fault that lasts, such as a worker that refuses connections, would write a warning for every
//! request that meets it and fill the disk. [`warn_limited!`](warn_limited) writes
//! at most one line per second for each place in the code and each key (usually the worker's name).
//! The next line that is written says in its field `suppressed` how many were left out before it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Shortest time between two lines of one place in the code with one key.
const MIN_INTERVAL: Duration = Duration::from_secs(1);

/// Maximum number of keys that are limited separately. Further keys share one limit, so that keys
/// that a client can choose (such as a model's name) bound the memory.
const MAX_KEYS: usize = 256;

/// Limits the lines that one place in the code writes.
#[derive(Debug)]
pub(crate) struct LogLimit {
    by_key: Mutex<BTreeMap<String, KeyState>>,
}

/// The lines of one key.
#[derive(Debug)]
struct KeyState {
    /// When a line was last written.
    written_at: Instant,
    /// Number of lines left out since then; lost if the key is removed to bound the memory.
    suppressed: u64,
}

impl KeyState {
    /// Returns whether a line at `now` has to be left out.
    fn is_limited(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.written_at) < MIN_INTERVAL
    }
}

impl LogLimit {
    /// Creates a limit; usable in a `static`.
    pub(crate) const fn new() -> Self {
        Self {
            by_key: Mutex::new(BTreeMap::new()),
        }
    }

    /// Decides whether a line with `key` may be written at `now`. Returns how many lines with this
    /// key were left out since the last one that was written, or `None` if this line has to be left
    /// out and was counted as such. Keys that share a limit share the number too.
    pub(crate) fn admit(&self, key: &str, now: Instant) -> Option<u64> {
        let mut by_key = self.by_key.lock();
        let mut key = key;
        if !by_key.contains_key(key) {
            if by_key.len() >= MAX_KEYS {
                // Only keys whose next line would be left out are worth their memory.
                by_key.retain(|_, state| state.is_limited(now));
            }
            if by_key.len() >= MAX_KEYS {
                key = "";
            }
        }
        let Some(state) = by_key.get_mut(key) else {
            let state = KeyState {
                written_at: now,
                suppressed: 0,
            };
            by_key.insert(key.to_owned(), state);
            return Some(0);
        };
        if state.is_limited(now) {
            state.suppressed = state.suppressed.saturating_add(1);
            return None;
        }
        state.written_at = now;
        Some(std::mem::take(&mut state.suppressed))
    }
}

/// Writes a warning at most once per second for each place in the code and each key.
///
/// `key` is a `&str`, usually the worker's name or `""`. The rest is as for [`tracing::warn!`]. If
/// lines were left out before this one, their number is in the field `suppressed`:
///
/// ```text
/// warn_limited!(key: &worker.name, worker = %worker.name, %error, "health check failed");
/// ```
macro_rules! warn_limited {
    (key: $key:expr, $($event:tt)+) => {{
        static LIMIT: $crate::log_limit::LogLimit = $crate::log_limit::LogLimit::new();
        if let Some(suppressed) = LIMIT.admit($key, ::std::time::Instant::now()) {
            let suppressed = (suppressed > 0).then_some(suppressed);
            ::tracing::warn!(suppressed, $($event)+);
        }
    }};
}
pub(crate) use warn_limited;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_per_second_and_key_is_written_with_the_number_left_out() {
        let limit = LogLimit::new();
        let start = Instant::now();
        let after = |milliseconds| start + Duration::from_millis(milliseconds);
        assert_eq!(limit.admit("a", after(0)), Some(0));
        for milliseconds in [1, 500, 999] {
            assert_eq!(limit.admit("a", after(milliseconds)), None);
        }
        assert_eq!(limit.admit("b", after(999)), Some(0), "another key");
        assert_eq!(limit.admit("a", after(1000)), Some(3));
        assert_eq!(limit.admit("a", after(1500)), None);
        assert_eq!(limit.admit("a", after(60_000)), Some(1));
        assert_eq!(limit.admit("a", after(62_000)), Some(0));
    }

    #[test]
    fn the_number_of_keys_is_bounded() {
        let limit = LogLimit::new();
        let start = Instant::now();
        for key in 0..MAX_KEYS {
            assert_eq!(limit.admit(&key.to_string(), start), Some(0));
        }
        assert_eq!(limit.admit("first of the rest", start), Some(0));
        assert_eq!(limit.admit("second of the rest", start), None);
        assert_eq!(limit.by_key.lock().len(), MAX_KEYS + 1);
        let later = start + MIN_INTERVAL;
        assert_eq!(limit.admit("another", later), Some(0));
        assert!(limit.by_key.lock().len() <= 2);
    }
}
