//! Cluster tests: a real Kubernetes with real pods. One file a promise; every allow has its deny twin.

mod authorization;
mod churn;
mod cluster;
mod issuance;
mod maintenance;
mod outages;
mod probes;
mod rights;
mod stage;
mod start;
mod ways;
