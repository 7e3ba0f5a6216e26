//! Node tests: real namespaces, real eBPF, real mutual TLS. One file per promise; every allow has its deny twin.

/// Has each of these tests run once for each pair of tunnel forms that the two agents may be set to: they get the values of the agents'
/// `--tunnel-form`, the client's first.
macro_rules! in_each_form {
    ($($test:ident),+ $(,)?) => {
        mod culvert {
            $(#[test] fn $test() { super::$test(["auto", "auto"]); })+
        }
        mod hbone {
            $(#[test] fn $test() { super::$test(["hbone", "hbone"]); })+
        }
        mod mixed {
            $(#[test] fn $test() { super::$test(["auto", "hbone"]); })+
        }
    };
}

/// Has each of these tests run once more with both pods on one node, whose kernel carries their connections.
macro_rules! in_the_kernel {
    ($($test:ident),+ $(,)?) => {
        mod kernel {
            $(#[test] fn $test() { super::$test(harness::mesh::IN_THE_KERNEL); })+
        }
    };
}

mod authorization;
mod certificates;
mod churn;
mod encryption;
mod ends;
mod first_moment;
mod issuance;
mod limits;
mod modes;
mod order;
mod outage;
mod programs;
mod readiness;
mod renewal;
mod restart;
mod same_node;
mod services;
mod shared_kernel;
mod single_stack;
mod sockets;
mod start_race;
mod telemetry;
mod transparency;
mod tunnel_forms;
mod unknown_addresses;
mod unreadable_policy;
mod volume;
