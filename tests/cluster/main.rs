//! Cluster tests: a real Kubernetes with real pods. One file a promise; every allow has its deny twin.

mod authorization;
mod churn;
mod cluster;
mod issuance;
mod outages;
mod probes;
mod rights;
mod start;
mod ways;
