//! Types, names and files that the gateway writes and other programs read.
//!
//! | modules | content |
//! |---|---|
//! | [`headers`] | names of the headers of the public API |
//! | [`metrics`] | names of metrics |
//! | [`admin`] | JSON of the admin API |
//! | [`dashboard`] | JSON that the dashboard reads from the admin API |
//! | [`trace`] | lines of recorded traffic |
//! | [`explanation`] | JSON of an explained decision |
//! | [`state_file`] | file that keeps what a router has learned |

pub mod admin;
pub mod dashboard;
pub mod explanation;
pub mod headers;
pub mod metrics;
pub mod state_file;
pub mod trace;
