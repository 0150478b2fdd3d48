//! `containerd-shim-wasmtime-v1`: one binary, a verb for every moment of a shim's life.
//!
//! | verb | who runs it | what it does |
//! |---|---|---|
//! | `start` | containerd, for every container | prints the address of the container's daemon, launching it if need be |
//! | `serve` | `start` | the daemon |
//! | `delete` | containerd, when a daemon was lost | cleans up, prints how the container ended |
//! | `compile` | an init job, whoever builds a node image | fills the cache of compiled code ahead |
//! | `compile-worker` | the daemon, `compile` | compiles one module in a limited process |
//! | `-info`, `-v` | containerd, people | what this binary is |
//!
//! Invariant: a verb of containerd's prints either its reply on stdout or one line on stderr, never both.

#![forbid(unsafe_code)]

mod bootstrap;
mod bundle;
mod cgroup;
mod cleanup;
mod connections;
mod events;
mod group;
mod image;
mod info;
mod launch;
mod logging;
mod metrics;
mod native_metrics;
mod options;
mod precompile;
mod runc_options;
mod service;
mod signals;
mod socket;
mod start;
mod status;
mod task;

use std::env;
use std::ffi::OsString;
use std::io::{self, Write as _};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};

/// Requests allocate in batches, and threads free what others have allocated.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

const USAGE: &str = "\
usage: containerd-shim-wasmtime-v1 -namespace NAME -id ID [-address SOCKET] [-publish-binary PATH] [-debug] start
       containerd-shim-wasmtime-v1 -namespace NAME -id ID [-bundle DIR] delete
       containerd-shim-wasmtime-v1 compile [--cache-dir DIR] [--bounds explicit|guarded|both] FILE|IMAGE...
       containerd-shim-wasmtime-v1 -info | -v

This is a containerd shim: containerd runs it for the runtime io.containerd.wasmtime.v1.
To run a container: ctr run --runtime io.containerd.wasmtime.v1 IMAGE ID
";

fn main() -> ExitCode {
    let mut args = env::args_os();
    let program = args.next().unwrap_or_default();
    let args: Vec<OsString> = args.collect();
    let outcome = match args.first().and_then(|verb| verb.to_str()) {
        Some("compile-worker") => return troupe_actors::guest::compile_worker(),
        Some("compile") => match precompile::precompile(&args[1..]) {
            Ok(code) => return code,
            Err(error) => Err(error),
        },
        Some("serve") => launch::ServeParams::inherit(&args[1..]).and_then(service::serve).map(|()| Vec::new()),
        Some(_) => match answer(&program, &args) {
            Ok(Some(reply)) => Ok(reply),
            Ok(None) => return usage(),
            Err(error) => Err(error),
        },
        None => return usage(),
    };
    match outcome.and_then(|reply| print(&reply)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // One line: containerd wraps it into its own error, and `ctr` prints that.
            eprintln!("troupe: {}", format!("{error:#}").replace('\n', " "));
            ExitCode::FAILURE
        }
    }
}

/// The reply to one of containerd's verbs; `None` when it is none of them.
fn answer(program: &OsString, args: &[OsString]) -> Result<Option<Vec<u8>>> {
    let flags = containerd_shim::parse(args)?;
    if flags.info {
        return info::info(&bootstrap::read_stdin()?).map(Some);
    }
    if flags.version {
        let name = Path::new(program).file_name().unwrap_or_default().to_string_lossy();
        return Ok(Some(info::version(&name).into_bytes()));
    }
    match flags.action.as_str() {
        "start" => start::start(&flags).map(Some),
        "delete" => cleanup::delete(&flags).map(Some),
        _ => Ok(None),
    }
}

fn print(reply: &[u8]) -> Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(reply).and_then(|()| stdout.flush()).context("cannot write to stdout")
}

fn usage() -> ExitCode {
    eprint!("{USAGE}");
    ExitCode::from(2)
}
