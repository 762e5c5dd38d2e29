//! Fuzzes the search for the model's name in new_workers bodies.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| foresee_properties::new_workers::check(bytes));
