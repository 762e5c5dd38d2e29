//! Fuzzes the decompression of bodies.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| foresee_properties::decompress::check(bytes));
