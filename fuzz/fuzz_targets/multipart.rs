//! Fuzzes the search for the model's name in multipart bodies.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| foresee_properties::multipart::check(bytes));
