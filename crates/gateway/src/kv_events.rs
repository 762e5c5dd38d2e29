//! KV events of a worker, without I/O: where they are published, and how far they are trusted. What a
//! stream of them says is in [`foresee_engine::kv_events::follower`];
//! [`subscribe`](crate::subscribe) follows them over sockets.

pub(crate) mod event_trust;
#[cfg(test)]
mod follower_tests;
pub(crate) mod replay_backoff;
pub(crate) mod source;
pub(crate) mod status;
