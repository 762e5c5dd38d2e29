//! Decoding of KV events: recorded events, constructed events, and invalid bytes.

#![allow(clippy::unwrap_used)]

mod hostile;
mod layouts;
mod recorded;
mod written;
