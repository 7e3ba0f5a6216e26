//! Cluster tests: a real Kubernetes with real pods. One file a promise; every allow has its deny twin.

mod authorization;
mod cluster;
mod probes;
mod start;
mod ways;
