//! Cluster tests: a real Kubernetes with real pods. One file a promise; every allow has its deny twin.

mod authorization;
mod churn;
mod cluster;
mod issuance;
mod maintenance;
mod modes;
mod network_policy;
mod outages;
mod outside;
mod probes;
mod rights;
mod roots;
mod stage;
mod start;
mod successor;
mod ways;
