//! KV events: what is decoded of recorded ones, of made-up ones, and of bytes that are none.

#![allow(clippy::unwrap_used)]

mod hostile;
mod layouts;
mod recorded;
mod written;
