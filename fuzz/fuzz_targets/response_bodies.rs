//! Fuzzes the parsers of response bodies that are not streamed.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| foresee_properties::response_bodies::check(bytes));
