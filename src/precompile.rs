//! The verb `compile`: fills the cache before any container asks, from an init job or while a node image is built.
//!
//! ```text
//!   FILE.wasm ─────────────────────────────┐
//!   OCI layout, tar or folder (layout.rs) ─┤ found.rs ─▶ layers.rs: modules ─▶ Prewarm ─▶ one line each on stdout
//!   name of containerd's image (stored.rs) ┘
//! ```
//! One line for each entry of the cache, its fields between tabs: key, `compiled` or `cached`, kind, bytes of the code,
//! milliseconds, name. Everything else goes to stderr: what failed, and, on a terminal, how far it is. What fails does
//! not keep the rest from being compiled, only from a good exit code.
//!
//! Called by `main`.

mod docker;
mod found;
mod layers;
mod layout;
mod stored;
mod tarball;
mod unpack;

use std::env;
use std::ffi::OsString;
use std::io::{self, IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use clap::{Parser, ValueEnum};
use tokio::runtime::Runtime;
use troupe_actors::guest::{Bounds, CacheEntry, CompileSettings, Prewarm};

use crate::options::Options;
use found::{Finder, Found};
use stored::Containerd;

/// What `ctr` takes where nothing is said.
const ADDRESS: &str = "/run/containerd/containerd.sock";
const NAMESPACE: &str = "default";

/// Compiles wasm modules into the cache of compiled code, for containers to find.
///
/// Prints a line for each entry: key, `compiled` or `cached`, kind, bytes, milliseconds and name, between tabs. Entries
/// fit the binary that made them and machines whose processor has the same features.
#[derive(Debug, Parser)]
#[command(name = "containerd-shim-wasmtime-v1 compile", version)]
struct Args {
    /// Folder of compiled code, as the runtime option `cache_dir` names it
    #[arg(long, value_name = "DIR")]
    cache_dir: Option<PathBuf>,

    /// A file of runtime options, as `ConfigPath` names it: cache, limits of a compile
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// How HTTP servers will be run: the `BOUNDS_CHECKS` of their containers
    #[arg(long, value_enum, default_value = "explicit")]
    bounds: Choice,

    /// containerd's gRPC socket, for images by name (CONTAINERD_ADDRESS, else /run/containerd/containerd.sock)
    #[arg(short, long, value_name = "SOCKET")]
    address: Option<PathBuf>,

    /// Where in containerd these images are; Kubernetes uses k8s.io (CONTAINERD_NAMESPACE, else default)
    #[arg(short, long, value_name = "NAME")]
    namespace: Option<String>,

    /// A wasm file, an image (an OCI layout or what `docker save` writes, a tar file or a folder), or the name of an image
    /// that containerd has
    #[arg(value_name = "FILE|IMAGE", required = true)]
    sources: Vec<PathBuf>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Choice {
    Explicit,
    Guarded,
    Both,
}

impl Choice {
    fn bounds(self) -> &'static [Bounds] {
        match self {
            Self::Explicit => &[Bounds::Explicit],
            Self::Guarded => &[Bounds::Guarded],
            Self::Both => &[Bounds::Explicit, Bounds::Guarded],
        }
    }
}

impl Args {
    fn containerd(&self) -> Containerd {
        let set = |name| env::var_os(name).filter(|value| !value.is_empty());
        let address = self.address.clone().or_else(|| set("CONTAINERD_ADDRESS").map(PathBuf::from));
        let namespace = self.namespace.clone();
        let namespace = namespace.or_else(|| set("CONTAINERD_NAMESPACE")?.into_string().ok());
        Containerd {
            address: address.unwrap_or_else(|| ADDRESS.into()),
            namespace: namespace.unwrap_or_else(|| NAMESPACE.to_owned()),
        }
    }
}

/// Runs the verb with what stands after it on the command line.
pub fn precompile(arguments: &[OsString]) -> Result<ExitCode> {
    let name = OsString::from("containerd-shim-wasmtime-v1 compile");
    let args = match Args::try_parse_from([name].iter().chain(arguments)) {
        Ok(args) => args,
        Err(told) => {
            // Help and version as well, which are no errors.
            told.print().context("cannot write")?;
            return Ok(ExitCode::from(u8::try_from(told.exit_code()).unwrap_or(2)));
        }
    };
    let log = tracing_subscriber::fmt().with_max_level(tracing::Level::WARN).with_writer(io::stderr);
    log.try_init().map_err(|error| anyhow!("the log: {error}"))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("the runtime")?;
    let failures = fill(&args, &runtime)?;
    Ok(if failures == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Compiles everything and returns how much failed.
fn fill(args: &Args, runtime: &Runtime) -> Result<usize> {
    let mut options = args.config.as_deref().map_or_else(|| Ok(Options::default()), Options::from_file)?;
    if let Some(folder) = &args.cache_dir {
        options.cache_dir = std::path::absolute(folder).context("the cache folder")?;
    }
    let prewarm = Prewarm::new(CompileSettings::from(&options.settings()));
    let finder = Finder { runtime, containerd: args.containerd(), most: options.max_module_size };
    let (mut failures, mut filled) = (0, Vec::new());
    for (number, source) in args.sources.iter().enumerate() {
        let position = format!("{}/{}", number + 1, args.sources.len());
        let found = finder
            .modules(source)
            .unwrap_or_else(|error| vec![Found { name: source.display().to_string(), wasm: Err(error) }]);
        for Found { name, wasm } in found {
            let entries = match wasm {
                Ok(wasm) => runtime.block_on(one(&prewarm, &name, &wasm, args.bounds, &position)),
                Err(error) => Err(error.context(name.clone())),
            };
            match entries {
                Ok(entries) => {
                    print(&name, &entries)?;
                    filled.extend(entries.into_iter().map(|entry| entry.key));
                }
                Err(error) => {
                    failures += 1;
                    complain(&error);
                }
            }
        }
    }
    let evicted = filled.iter().filter(|key| !options.cache_dir.join(key).exists()).count();
    if evicted > 0 {
        complain(&anyhow!(
            "{evicted} of {} entries were evicted again: all of them are more than the {} bytes of `cache_max_size`; raise \
             that runtime option, here (--config) and where containers run",
            filled.len(),
            options.cache_max_size
        ));
    }
    Ok(failures + evicted)
}

/// One line, as all verbs do it.
fn complain(error: &anyhow::Error) {
    eprintln!("troupe: {}", format!("{error:#}").replace('\n', " "));
}

async fn one(prewarm: &Prewarm, name: &str, wasm: &[u8], bounds: Choice, position: &str) -> Result<Vec<CacheEntry>> {
    let mut progress = Progress::new(format!("{position} {name} ({} KiB)", wasm.len() >> 10));
    let fill = prewarm.fill(name, wasm, bounds.bounds());
    tokio::pin!(fill);
    loop {
        tokio::select! {
            // It names the module itself.
            filled = &mut fill => return Ok(filled?),
            () = progress.next() => {}
        }
    }
}

fn print(name: &str, entries: &[CacheEntry]) -> Result<()> {
    let mut stdout = io::stdout().lock();
    for CacheEntry { key, kind, bytes, compiled, took } in entries {
        let state = if *compiled { "compiled" } else { "cached" };
        let name = name.replace(char::is_control, "?");
        writeln!(stdout, "{key}\t{state}\t{kind}\t{bytes}\t{}\t{name}", took.as_millis())
            .and_then(|()| stdout.flush())
            .context("cannot write to stdout")?;
    }
    Ok(())
}

/// A line on a terminal, rewritten as time passes and gone when it is dropped; nothing where nobody looks.
struct Progress {
    what: String,
    start: Instant,
    shows: bool,
}

impl Progress {
    fn new(what: String) -> Self {
        let progress = Self { what, start: Instant::now(), shows: io::stderr().is_terminal() };
        progress.show();
        progress
    }

    /// The next moment to look again; pending for ever where nobody does.
    async fn next(&mut self) {
        if !self.shows {
            return std::future::pending().await;
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
        self.show();
    }

    fn show(&self) {
        if self.shows {
            eprint!("\r\x1b[K{}: {} s", self.what, self.start.elapsed().as_secs());
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.shows {
            eprint!("\r\x1b[K");
        }
    }
}
