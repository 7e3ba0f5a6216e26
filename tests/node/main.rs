//! Node tests: real namespaces, real eBPF, real mutual TLS. One file per promise; every allow has its deny twin.

mod authorization;
mod encryption;
mod lifecycle;
mod transparency;
mod volume;
