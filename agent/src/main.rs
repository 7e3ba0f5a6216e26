//! The `culvert` binary: parses arguments, calls the library, and turns the result into an exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    match culvert::cli::run(std::env::args_os()) {
        Ok(code) => code,
        Err(error) => {
            // The alternate form prints the causes on one line, the last one last.
            eprintln!("culvert: {error:#}");
            ExitCode::FAILURE
        }
    }
}
