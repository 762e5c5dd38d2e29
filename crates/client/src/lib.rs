//! Client of an OpenAI-compatible address: sends requests and reads the responses to their end.
//!
//! Modules, in reading order:
//!
//! | modules | content |
//! |---|---|
//! | `http` | GET, POST, and event streams that are read to their end |
//! | [`load`] | the load generator: sends a workload, and measures latencies and throughput |
//! | [`verify`] | compares a router's predictions with running engines |

mod http;
pub mod load;
pub mod verify;
