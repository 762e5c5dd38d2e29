//! Properties of the parsers that read bytes of clients, engines and operators.
//!
//! Each module has a function `check`, which takes any bytes and panics if a property of a parser
//! does not hold for them. A fuzz target in `fuzz/` calls each of them, and so does the test of this
//! crate, with the committed corpus and with mutations of it.
//!
//! The properties are of four kinds:
//!
//! - No input causes a panic.
//! - The result is a function of the bytes, and not of chunk boundaries or of the parser's state.
//! - The size of the result is bounded by the size of the input.
//! - A result that is formatted and parsed again is equal.

pub mod config_files;
pub mod decompress;
pub mod engine_reports;
pub mod kv_events;
pub mod multipart;
pub mod new_workers;
pub mod request_bodies;
pub mod response_bodies;
mod slow_events;
pub mod streams;
pub mod trace_lines;
pub mod worker_descriptions;

/// A fuzz target: its name, and the properties that it checks.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Name of the target's file in `fuzz/fuzz_targets` and of its folder in `fuzz/corpus`.
    pub name: &'static str,
    /// Checks the properties for an input. Panics if one of them does not hold.
    pub check: fn(&[u8]),
}

/// All fuzz targets.
pub const TARGETS: [Target; 11] = [
    Target {
        name: "config_files",
        check: config_files::check,
    },
    Target {
        name: "decompress",
        check: decompress::check,
    },
    Target {
        name: "engine_reports",
        check: engine_reports::check,
    },
    Target {
        name: "kv_events",
        check: kv_events::check,
    },
    Target {
        name: "multipart",
        check: multipart::check,
    },
    Target {
        name: "new_workers",
        check: new_workers::check,
    },
    Target {
        name: "request_bodies",
        check: request_bodies::check,
    },
    Target {
        name: "response_bodies",
        check: response_bodies::check,
    },
    Target {
        name: "streams",
        check: streams::check,
    },
    Target {
        name: "trace_lines",
        check: trace_lines::check,
    },
    Target {
        name: "worker_descriptions",
        check: worker_descriptions::check,
    },
];
