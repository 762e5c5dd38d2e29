//! Fuzzes the search for the model's name in config_files bodies.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| foresee_properties::config_files::check(bytes));
