//! The application of the cluster tests' pods, which knows nothing of a mesh: it serves, it connects, and it tells what it saw of a
//! connection, one JSON object a line. It is also the sandboxes' pause program.

#![expect(clippy::print_stdout, reason = "what it tells is its purpose")]

mod capture;
mod connect;
mod grpc;
mod pause;
mod serve;
mod traffic;

use std::process::ExitCode;

use clap::Parser;

/// An application for pods.
#[derive(Debug, Parser)]
enum Verb {
    /// Does nothing, until it is told to end.
    Pause,
    /// Serves until it is told to end: echo, HTTP and gRPC's health protocol.
    Serve(serve::Ports),
    /// Connects once, says something, and tells the answer. Ends with 0 if there was one.
    Connect(connect::Arguments),
    /// Asks a gRPC server for its health. Ends with 0 if it serves.
    GrpcHealth {
        /// Where.
        server: String,
    },
    /// Keeps what passes the links of its network namespace, and answers questions about it.
    Capture,
    /// Connects again and again, keeps one connection busy, and tells of each second.
    Traffic(traffic::Arguments),
}

fn main() -> ExitCode {
    let done = match Verb::parse() {
        Verb::Pause => pause::run(),
        Verb::Serve(ports) => serve::run(&ports),
        Verb::Connect(arguments) => connect::run(&arguments),
        Verb::GrpcHealth { server } => grpc::check(&server),
        Verb::Capture => capture::run(),
        Verb::Traffic(arguments) => traffic::run(&arguments),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("app: {error:#}");
            ExitCode::FAILURE
        }
    }
}
