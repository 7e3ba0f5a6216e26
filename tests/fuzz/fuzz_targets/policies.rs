//! Policies: parsed, compiled, evaluated.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| culvert::fuzz::policies(bytes));
