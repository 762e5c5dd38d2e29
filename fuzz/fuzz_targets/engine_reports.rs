//! Fuzzes the parsers of engines' descriptions and metrics.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| foresee_properties::engine_reports::check(bytes));
