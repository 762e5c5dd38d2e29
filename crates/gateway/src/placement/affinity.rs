//! Workers that remember something of earlier requests: stored responses, sessions and media.
//!
//! A stored response exists only on the worker that generated it, so a request that continues it has
//! to go there. A session, or an image, is only a preference: the worker has probably cached the part
//! of the prompt that the gateway cannot hash, which the policy weighs against load.

use std::hash::{BuildHasher, RandomState};
use std::num::NonZeroUsize;
use std::time::Duration;

use foresee_core::workers::WorkerId;
use lru::LruCache;
use parking_lot::Mutex;

use crate::placement::parsed_request::ParsedRequest;

/// Maximum number of keys; the least recently used one is forgotten. An entry has about 100 bytes.
const MAX_KEYS: NonZeroUsize = NonZeroUsize::MIN.saturating_add((1 << 16) - 1);

/// Time after which a key that was not used is forgotten.
const LIFETIME: Duration = Duration::from_secs(3600);

/// Something that a worker remembers of an earlier request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Memory<'k> {
    /// A stored response, by its id.
    Response(&'k str),
    /// A session, by the key that the client gave it.
    Session(&'k [u8]),
    /// An image, sound or other medium, by its hash.
    Medium(u64),
}

/// Worker that remembers, by the hash of what it remembers. Two keys with the same hash share an entry,
/// which costs a better choice and nothing else.
#[derive(Debug)]
pub(crate) struct Affinity {
    workers: Mutex<LruCache<u64, (WorkerId, Duration)>>,
    hasher: RandomState,
}

impl Default for Affinity {
    fn default() -> Self {
        Self {
            workers: Mutex::new(LruCache::new(MAX_KEYS)),
            hasher: RandomState::new(),
        }
    }
}

impl Affinity {
    /// Records that `worker` remembers `memory` from `now` on.
    pub(crate) fn remember(&self, memory: Memory<'_>, worker: WorkerId, now: Duration) {
        let key = self.hasher.hash_one(memory);
        self.workers.lock().put(key, (worker, now));
    }

    /// Returns the worker that remembers `memory`, if that was recorded within the [`LIFETIME`].
    pub(crate) fn worker(&self, memory: Memory<'_>, now: Duration) -> Option<WorkerId> {
        let key = self.hasher.hash_one(memory);
        let (worker, at) = self.workers.lock().get(&key).copied()?;
        (now.saturating_sub(at) <= LIFETIME).then_some(worker)
    }

    /// Sets the worker that a parsed request has to go to, because it names a stored response of that
    /// worker, and the one that it prefers, because of its session or its first medium.
    pub(crate) fn apply(
        &self,
        parsed: &mut ParsedRequest,
        response_id: Option<&str>,
        now: Duration,
    ) {
        let known = |memory| self.worker(memory, now);
        let response_id = response_id.or(parsed.previous_response_id.as_deref());
        parsed.only_worker = response_id.and_then(|id| known(Memory::Response(id)));
        let by_session = parsed
            .session
            .as_deref()
            .and_then(|session| known(Memory::Session(session)));
        let by_medium = || known(Memory::Medium(parsed.medium?));
        parsed.preferred_worker = by_session.or_else(by_medium);
    }

    /// Records that `worker` has been sent the session and the first medium of a request.
    pub(crate) fn remember_request(&self, parsed: &ParsedRequest, worker: WorkerId, now: Duration) {
        if let Some(session) = &parsed.session {
            self.remember(Memory::Session(session), worker, now);
        }
        if let Some(medium) = parsed.medium {
            self.remember(Memory::Medium(medium), worker, now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use foresee_core::router::{Router, RouterConfig};
    use foresee_core::workers::WorkerSpec;

    #[test]
    fn a_worker_is_remembered_for_an_hour_and_kinds_do_not_mix() {
        let router = Router::new(RouterConfig::default()).unwrap();
        let worker = router.add_worker(WorkerSpec::default()).unwrap();
        let affinity = Affinity::default();
        affinity.remember(Memory::Response("r"), worker, Duration::from_secs(5));
        let at = |seconds| affinity.worker(Memory::Response("r"), Duration::from_secs(seconds));
        assert_eq!(at(5), Some(worker));
        assert_eq!(at(3605), Some(worker));
        assert_eq!(at(3606), None);
        let now = Duration::from_secs(6);
        assert_eq!(affinity.worker(Memory::Session(b"r"), now), None);
        assert_eq!(affinity.worker(Memory::Response("s"), now), None);
    }

    #[test]
    fn the_number_of_keys_is_bounded() {
        let router = Router::new(RouterConfig::default()).unwrap();
        let worker = router.add_worker(WorkerSpec::default()).unwrap();
        let affinity = Affinity::default();
        for medium in 0..100_000 {
            affinity.remember(Memory::Medium(medium), worker, Duration::ZERO);
        }
        assert_eq!(affinity.workers.lock().len(), MAX_KEYS.get());
        assert_eq!(affinity.worker(Memory::Medium(0), Duration::ZERO), None);
        let latest = affinity.worker(Memory::Medium(99_999), Duration::ZERO);
        assert_eq!(latest, Some(worker));
    }
}
