//! Types and names that the gateway writes and other crates read, without behaviour.
//!
//! | modules | content |
//! |---|---|
//! | [`headers`] | names of the headers of the public API |
//! | [`metrics`] | names of metrics |
//! | [`admin`] | JSON of the admin API |
//! | [`trace`] | lines of recorded traffic |

pub mod admin;
pub mod headers;
pub mod metrics;
pub mod trace;
