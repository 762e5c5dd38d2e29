//! Fuzzes the observation of streamed responses.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| foresee_properties::streams::check(bytes));
