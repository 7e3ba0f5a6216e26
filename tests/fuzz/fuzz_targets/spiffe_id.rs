//! SPIFFE IDs.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| culvert::fuzz::spiffe_id(bytes));
