//! Fuzzes the parsers of request bodies and the rendering of chats.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| foresee_properties::request_bodies::check(bytes));
