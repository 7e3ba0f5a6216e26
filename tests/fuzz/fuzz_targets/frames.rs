//! `culvert/1` frames.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| culvert::fuzz::frames(bytes));
