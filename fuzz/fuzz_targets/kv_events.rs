//! Fuzzes the decoding of KV events, and their application to a cache view.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| foresee_properties::kv_events::check(bytes));
