//! The cache among several processes: daemons that need the same module, compilers that are killed, eviction under
//! containers that run, disks that take nothing, and what the verb `compile` has left there.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};
use rustix::process::Signal;

use super::cache::{compiles, entries, fresh};
use crate::common::containerd::Containerd;
use crate::common::job::{self, Job};
use crate::common::site::{self, Site};
use crate::common::{Outcome, SOON, guests, http, proc, wait};

pub const CASES: crate::common::Cases = &[
    ("two_processes_compile_an_equal_module_once", two_processes),
    ("a_killed_process_leaves_the_compile_to_the_other", killed_process),
    ("twenty_starts_survive_killed_compilers", killed_compilers),
    ("a_server_whose_code_was_evicted_goes_on", evicted),
    ("a_full_disk_costs_a_warning", full_disk),
    ("a_read_only_disk_costs_a_warning", read_only),
    ("what_was_compiled_ahead_is_not_compiled_again", ahead),
];

/// A compile takes seconds on a machine that does other things as well.
const COMPILED: Duration = Duration::from_secs(60);
const EXIT: [&str; 3] = ["/app.wasm", "exit", "3"];

/// A root filesystem with a module that nobody else has: the kit, and a section that says a number.
fn variant(containerd: &Containerd, number: u8) -> Result<PathBuf> {
    let folder = containerd.folder().join(format!("variant-{number}"));
    fs::create_dir_all(&folder)?;
    let mut wasm = fs::read(guests::built("kit.wasm")?)?;
    wasm.extend([0, 3, 1, b'v', number]);
    fs::write(folder.join("app.wasm"), wasm)?;
    Ok(folder)
}

fn workers(containerd: &Containerd) -> Vec<u32> {
    proc::running(&containerd.folder().join("bin"), "compile-worker")
}

/// Every file is an entry, and there are as many.
fn only_entries(containerd: &Containerd, count: usize) -> Outcome {
    let files = entries(containerd)?;
    let is_entry = |file: &PathBuf| {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        name.len() == 64 && name.bytes().all(|byte| byte.is_ascii_hexdigit())
    };
    ensure!(files.len() == count && files.iter().all(is_entry), "expected {count} entries, there are {files:?}");
    Ok(())
}

/// Two daemons: one whose compiler is stopped half way, and one that waits for it.
fn one_waits(containerd: &Containerd) -> Result<(Job, Job, u32)> {
    let root = variant(containerd, 1)?;
    let debug = containerd.more_options("debug", "log_level = \"debug\"")?;
    let start = |namespace| containerd.namespace(namespace).rootfs(&root, &EXIT).options(debug.clone()).spawn();
    let first = start("shared-a")?;
    let worker = wait::until("a compiler", SOON, || Ok(workers(containerd).first().copied()))?;
    proc::signal(worker, Signal::STOP)?;
    let second = start("shared-b")?;
    wait::until_true("the second to wait for the first", SOON, || {
        Ok(containerd.whole_log_since(0).contains("another process compiles it; waiting"))
    })?;
    ensure!(workers(containerd) == [worker], "it compiles as well");
    Ok((first, second, worker))
}

fn two_processes(containerd: &Containerd) -> Outcome {
    fresh(containerd, "two", |containerd| {
        let (first, second, worker) = one_waits(containerd)?;
        proc::signal(worker, Signal::CONT)?;
        for job in [first, second] {
            let done = job.finish(COMPILED)?;
            ensure!(done.code == Some(3), "{done:?}");
        }
        ensure!(compiles(containerd) == 1, "{} compiles", compiles(containerd));
        only_entries(containerd, 1)
    })
}

fn killed_process(containerd: &Containerd) -> Outcome {
    fresh(containerd, "killed", |containerd| {
        let (first, second, worker) = one_waits(containerd)?;
        proc::signal(containerd.namespace("shared-a").daemon()?, Signal::KILL)?;
        let done = second.finish(COMPILED)?;
        ensure!(done.code == Some(3), "{done:?}");
        ensure!(first.finish(SOON)?.code != Some(3), "it was killed");
        // Should it have been stopped before it had asked for a signal at its parent's death, it looks for its parent now.
        let _ = proc::signal(worker, Signal::CONT);
        wait::until_true("its compiler to die with it", SOON, || Ok(!proc::is_running(worker)))?;
        ensure!(compiles(containerd) == 1, "{} compiles", compiles(containerd));
        only_entries(containerd, 1)?;
        let left = containerd.namespace("shared-a");
        for id in left.ctr(&["containers", "ls", "-q"])?.lines() {
            left.ctr(&["containers", "delete", id])?;
        }
        Ok(())
    })
}

fn killed_compilers(containerd: &Containerd) -> Outcome {
    fresh(containerd, "killers", |containerd| {
        let roots = (0..5).map(|number| variant(containerd, number)).collect::<Result<Vec<_>>>()?;
        let clients = [containerd.namespace("killers-a"), containerd.namespace("killers-b")];
        let jobs = (0..20)
            .map(|number| clients[number % 2].rootfs(&roots[number % 5], &EXIT).spawn())
            .collect::<Result<Vec<_>>>()?;
        // Every second compiler dies, as soon as it is seen, for as long as there are any.
        let mut seen = BTreeSet::new();
        let mut killed = 0;
        wait::until_true("all starts to be over", 2 * COMPILED, || {
            for worker in workers(containerd) {
                if seen.insert(worker) && seen.len() % 2 == 1 && proc::signal(worker, Signal::KILL).is_ok() {
                    killed += 1;
                }
            }
            Ok(jobs.iter().all(Job::is_over))
        })?;
        ensure!(killed > 0, "no compiler was seen");
        let mut failed = 0;
        for job in jobs {
            let done = job.finish(SOON)?;
            let clear = done.stderr.contains("the compile worker was killed with signal 9");
            ensure!(done.code == Some(3) || clear, "neither a success nor a clear error: {done:?}");
            failed += usize::from(clear);
        }
        ensure!(failed > 0, "{killed} compilers were killed, and nobody was told");
        for client in &clients {
            for root in &roots {
                client.rootfs(root, &EXIT).expect(3)?;
            }
            client.expect_empty()?;
        }
        only_entries(containerd, 5)
    })
}

/// Pages of its code that it has not used yet come from a file that has no name any more.
fn evicted(containerd: &Containerd) -> Outcome {
    fresh(containerd, "evicted", |containerd| {
        let client = containerd.namespace("evicted");
        let small = containerd.more_options("small", "cache_max_size = \"1MiB\"")?;
        let site = Site::start(client.guest("/hello-http.wasm", &[])?.options(small.clone()))?;
        let its_file = entries(containerd)?.pop().context("the server has no entry")?;
        for number in 0..5 {
            client.rootfs(&variant(containerd, number)?, &EXIT).options(small.clone()).expect(3)?;
        }
        let files = entries(containerd)?;
        ensure!(!files.contains(&its_file), "{files:?}");
        let bytes: u64 = files.iter().map(|file| fs::metadata(file).map_or(0, |data| data.len())).sum();
        ensure!(!files.is_empty() && bytes <= 1 << 20, "{bytes} bytes in {files:?}");
        ensure!(containerd.whole_log_since(0).contains("evicted the longest unused entries"));
        http::block_on(async {
            for protocol in http::BOTH {
                http::get(site.addr, protocol, "/").await?.expect(200, "hello world\n")?;
            }
            Ok(())
        })
    })
}

/// A disk of a megabyte in place of the cache folder.
struct Disk(PathBuf);

impl Disk {
    fn mount(containerd: &Containerd) -> Result<Self> {
        fs::create_dir(containerd.cache())?;
        mount("cache", containerd.cache(), "tmpfs", MountFlags::empty(), c"mode=0700,size=1m")?;
        Ok(Self(containerd.cache()))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if let Err(error) = unmount(&self.0, UnmountFlags::DETACH) {
            eprintln!("cannot unmount {}: {error}", self.0.display());
        }
    }
}

const WARNING: &str = "the compiled code cannot be cached; it is used from memory";

fn warned(containerd: &Containerd, why: &str) -> Outcome {
    let log = containerd.whole_log_since(0);
    ensure!(log.lines().any(|line| line.contains(WARNING) && line.contains(why)), "no warning with {why:?}: {log}");
    Ok(())
}

fn full_disk(containerd: &Containerd) -> Outcome {
    fresh(containerd, "full", |containerd| {
        let disk = Disk::mount(containerd)?;
        let ballast = disk.0.join("ballast");
        let mut file = File::create(&ballast)?;
        while file.write_all(&[1; 4096]).is_ok() {}
        let client = containerd.namespace("full");
        client.guest("/kit.wasm", &["exit", "3"])?.expect(3)?;
        warned(containerd, "No space left on device")?;
        ensure!(entries(containerd)? == [ballast.clone()], "{:?}", entries(containerd)?);
        Ok(())
    })
}

fn read_only(containerd: &Containerd) -> Outcome {
    fresh(containerd, "ro", |containerd| {
        let disk = Disk::mount(containerd)?;
        let client = containerd.namespace("ro");
        client.rootfs(&variant(containerd, 1)?, &EXIT).expect(3)?;
        wait::until_true("the process to end", SOON, || Ok(containerd.shims().is_empty()))?;
        mount_remount(&disk.0, MountFlags::RDONLY, c"")?;
        client.rootfs(&variant(containerd, 1)?, &EXIT).expect(3)?;
        ensure!(compiles(containerd) == 1, "what is there was not found");
        client.rootfs(&variant(containerd, 2)?, &EXIT).expect(3)?;
        warned(containerd, "Read-only file system")
    })
}

/// All kinds, by the files and by the image.
fn ahead(containerd: &Containerd) -> Outcome {
    fresh(containerd, "ahead", |containerd| {
        let modules = ["kit.wasm", "kit-component.wasm", "hello-http.wasm", "cli3.wasm", "web3.wasm"];
        let files = modules.iter().map(|name| guests::built(name)).collect::<Result<Vec<_>>>()?;
        let paths: Vec<&Path> = files.iter().map(PathBuf::as_path).collect();
        let image = crate::common::image::pack("ahead", &paths, &["--workdir=/"])?;
        let mut command = Command::new(containerd.folder().join("bin/containerd-shim-wasmtime-v1"));
        command.args(["compile", "--bounds=both", "--cache-dir"]).arg(containerd.cache()).arg(&image);
        let lines = job::run(command, 3 * COMPILED)?.success("compile")?;
        ensure!(lines.lines().count() == 6 && lines.matches("\tcompiled\t").count() == 6, "{lines}");
        let client = containerd.namespace("ahead");
        client.guest("/kit.wasm", &["exit", "3"])?.expect(3)?;
        client.guest("/kit-component.wasm", &["exit", "0"])?.expect(0)?;
        client.guest("/cli3.wasm", &[])?.to_end()?;
        for (file, bounds) in
            [("/hello-http.wasm", "explicit"), ("/hello-http.wasm", "guarded"), ("/web3.wasm", "explicit")]
        {
            let site = Site::start(site::with(client.guest(file, &[])?, &[("BOUNDS_CHECKS", bounds)]))?;
            site.drain("SIGTERM", 0)?;
        }
        ensure!(compiles(containerd) == 0, "{} compiles", compiles(containerd));
        only_entries(containerd, 6)
    })
}
