//! Delta xDS responses.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| culvert::fuzz::discovery(bytes));
