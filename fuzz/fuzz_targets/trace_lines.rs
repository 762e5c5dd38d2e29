//! Fuzzes the reader of traces.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| foresee_properties::trace_lines::check(bytes));
