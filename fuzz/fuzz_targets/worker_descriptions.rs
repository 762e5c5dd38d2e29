//! Fuzzes the parser of worker descriptions.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| foresee_properties::worker_descriptions::check(bytes));
