//! Manifest files, as far as the index.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| culvert::fuzz::manifests(bytes));
