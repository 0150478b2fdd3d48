//! Volumes under attack: images and sources that lead elsewhere, and sources that are not there or do not answer.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, ensure};
use rustix::fs::{CWD, FileType, Mode, RenameFlags, makedev, mknodat, renameat_with};
use rustix::mount::{MountFlags, UnmountFlags};

use super::volumes::{bind, each, source, words};
use crate::common::containerd::Containerd;
use crate::common::{Outcome, SOON, base, guests, proc, wait};

pub const CASES: crate::common::Cases = &[
    ("targets_stay_in_the_root", targets),
    ("a_target_that_changes_meanwhile_stays_in_the_root", racing),
    ("links_in_a_volume_lead_nowhere_else", links),
    ("volumes_of_neighbours_are_not_there", neighbours),
    ("what_cannot_be_mounted_is_named", refused),
    ("sockets_and_fifos_are_mounted_and_harmless", special),
    ("devices_of_images_and_volumes_stay_shut", devices),
    ("a_source_that_does_not_answer_holds_up_nobody", dead),
];

/// A root filesystem of the case's own.
fn root(containerd: &Containerd, name: &str) -> Result<PathBuf> {
    let root = base::folder(&format!("roots/{name}-{}", containerd.version))?;
    fs::copy(guests::built("kit.wasm")?, root.join("kit.wasm"))?;
    Ok(root)
}

fn entries(folder: &Path) -> Result<usize> {
    Ok(fs::read_dir(folder)?.count())
}

fn targets(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("volumes-hostile");
    let (root, outside) = (root(containerd, "targets")?, source(containerd, "outside")?);
    let data = source(containerd, "inside")?;
    fs::write(data.join("file"), "of the volume\n")?;
    let up = format!("{}{}", "../".repeat(20), outside.display().to_string().trim_start_matches('/'));
    symlink(&outside, root.join("absolute"))?;
    symlink(&up, root.join("up"))?;
    symlink("/proc/self/cwd", root.join("magic"))?;
    symlink("absolute", root.join("chain"))?;
    symlink("/run/later", root.join("dangling"))?;
    symlink("loop", root.join("loop"))?;
    // A guest cannot walk through an absolute link itself; where it leads to in the root, the volume is.
    let below = outside.display().to_string();
    for (target, place) in [
        ("/absolute", &*below),
        ("/up", &below),
        ("/chain", &below),
        ("/magic", "/proc/self/cwd"),
        ("/dangling", "/run/later"),
        ("/absolute/a", &format!("{below}/a")),
        ("/up/a/b", &format!("{below}/a/b")),
        ("/../../x", "/x"),
    ] {
        let run = client.rootfs(&root, &["/kit.wasm", "read", &format!("{place}/file")]);
        let done = bind(run, &data, target, "rbind:ro").expect(0)?;
        ensure!(done.text() == "of the volume\n", "{target}: {done:?}");
        ensure!(entries(&outside)? == 0, "{target} was made outside");
    }
    bind(client.rootfs(&root, &["/kit.wasm"]), &data, "/loop", "rbind").expect_error("at /loop: the target")?;
    bind(client.rootfs(&root, &["/kit.wasm"]), &data, "/kit.wasm/x", "rbind").expect_error("Not a directory")?;
    symlink("/", root.join("slash"))?;
    bind(client.rootfs(&root, &["/kit.wasm"]), &data, "/slash", "rbind").expect_error("replace the root")
}

/// Somebody who shares the root changes a folder of the way into a link, over and over.
fn racing(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("volumes-hostile");
    let (root, outside) = (root(containerd, "racing")?, source(containerd, "race-outside")?);
    let data = source(containerd, "race-inside")?;
    fs::create_dir_all(root.join("way"))?;
    symlink(&outside, root.join("other"))?;
    let keeper = client.guest("/sleeper.wasm", &[])?.detached()?;
    let daemon = keeper.daemon()?.to_string();
    let (before, stop) = (proc::mounts(&daemon)?, AtomicBool::new(false));
    let (way, other) = (root.join("way"), root.join("other"));
    std::thread::scope(|scope| -> Outcome {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let _ = renameat_with(CWD, &way, CWD, &other, RenameFlags::EXCHANGE);
            }
        });
        let run = || -> Outcome {
            for _ in 0..10 {
                let mut run = client.rootfs(&root, &["/kit.wasm", "exit", "0"]);
                for number in 0..20 {
                    run = bind(run, &data, &format!("/way/{number}/below"), "rbind:rw");
                }
                // It may find the link, whose end in the root is made; nothing else may happen.
                run.expect(0)?;
            }
            Ok(())
        };
        let done = run();
        stop.store(true, Ordering::Relaxed);
        done
    })?;
    ensure!(entries(&outside)? == 0 && entries(&data)? == 0);
    ensure!(proc::mounts(&daemon)? == before);
    keeper.kill_and_wait("SIGKILL")?;
    keeper.delete()
}

fn links(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("volumes-hostile");
    let (data, outside) = (source(containerd, "links")?, source(containerd, "secret")?);
    fs::write(outside.join("secret"), "a secret of the host")?;
    symlink(outside.join("secret"), data.join("absolute"))?;
    symlink("../secret/secret", data.join("up"))?;
    symlink("../../../../../../etc/passwd", data.join("passwd"))?;
    let commands =
        ["read /data/absolute", "read /data/up", "read /data/passwd", "read /data/../../etc/passwd", "ls /data/.."];
    for kit in ["/kit.wasm", "/kit-component.wasm"] {
        let text = bind(each(&client, kit, &commands)?, &data, "/data", "rbind:rw").expect(0)?.text();
        ensure!(!text.contains("secret of") && !text.contains("root:"), "{text}");
        ensure!(text.lines().filter(|line| line.contains("(os error")).count() == 4, "{text}");
        // Above a volume is the container's own root.
        ensure!(text.contains("kit-component.wasm"), "{text}");
    }
    Ok(())
}

fn neighbours(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("volumes-hostile");
    let (one, other) = (source(containerd, "one")?, source(containerd, "other")?);
    fs::write(one.join("file"), "one\n")?;
    fs::write(other.join("file"), "other\n")?;
    let first = bind(client.guest("/kit.wasm", &["sleep", "0"])?, &one, "/one", "rbind:rw").detached()?;
    let commands = ["read /one/file", "read /data/../one/file", "read /../one/file", "read /data/file", "ls /"];
    let text = bind(each(&client, "/kit.wasm", &commands)?, &other, "/data", "rbind:rw").expect(0)?.text();
    ensure!(text.lines().filter(|line| line.contains("(os error")).count() == 3, "{text}");
    ensure!(text.contains("other\n") && !text.contains("\none\n"), "{text}");
    first.kill_and_wait("SIGKILL")?;
    first.delete()
}

fn refused(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("volumes-hostile");
    let data = source(containerd, "refused")?;
    let file = data.join("file");
    fs::write(&file, "")?;
    let run = || client.guest("/kit.wasm", &["ls", "/"]);
    for (source, options, text) in [
        (&*data.join("none"), "rbind", "/none at /data: the source: No such file or directory"),
        (&file.join("x"), "rbind", "at /data: the source: Not a directory"),
        (Path::new("/proc"), "rbind:ro", "the source holds a proc file system"),
        (Path::new("/proc/sys/kernel"), "bind:ro", "the source holds a proc file system"),
        (Path::new("/"), "rbind:ro", "the source holds a proc file system"),
        (&data, "rbind:rx", "/data: the option rx is unknown"),
    ] {
        bind(run()?, source, "/data", options).expect_error(text)?;
    }
    let kind = "type=ext4,src=/dev/sda,dst=/data,options=ro";
    run()?.option("--mount", kind).expect_error("/data: the type ext4 is not supported")?;
    bind(run()?, Path::new("/dev"), "/dev", "rbind").expect_error("/dev: it would replace")
}

fn special(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("volumes-hostile");
    let data = source(containerd, "special")?;
    let (fifo, socket) = (data.join("fifo"), data.join("socket"));
    mknodat(CWD, &fifo, FileType::Fifo, Mode::from_raw_mode(0o666), 0)?;
    let _listener = UnixListener::bind(&socket)?;
    let commands = words(&["stat /fifo", "stat /run/socket", "read /run/socket"]);
    let run = client.guest("/kit.wasm", &commands)?;
    let text = bind(bind(run, &fifo, "/fifo", "rbind:rw"), &socket, "/run/socket", "rbind:rw").expect(0)?.text();
    ensure!(text.contains("stat /fifo: ok") && text.contains("stat /run/socket: ok"), "{text}");
    ensure!(text.lines().any(|line| line.starts_with("read /run/socket: ") && line.contains("(os error")), "{text}");
    // Nobody ever writes to it: the guest waits, and nobody else does.
    let waits = bind(client.guest("/kit.wasm", &["read", "/fifo"])?, &fifo, "/fifo", "rbind:rw").detached()?;
    client.guest("/kit.wasm", &["ls", "/"])?.expect(0)?;
    waits.kill_and_wait("SIGKILL")?;
    waits.delete()?;
    // Lets the thread go that waits in the kernel.
    drop(File::options().read(true).write(true).open(&fifo)?);
    Ok(())
}

fn devices(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("volumes-hostile");
    let (root, data) = (root(containerd, "devices")?, source(containerd, "devices")?);
    // The second is /dev/kmsg.
    for (name, minor) in [("null", 3), ("kmsg", 11)] {
        for folder in [&root, &data] {
            let mode = Mode::from_raw_mode(0o666);
            mknodat(CWD, folder.join(name), FileType::CharacterDevice, mode, makedev(1, minor))?;
        }
    }
    let commands = ["read /null", "read /kmsg", "append /kmsg x", "read /data/null", "read /data/kmsg"];
    let run = client.rootfs(&root, &[&["/kit.wasm"], &*words(&commands)].concat());
    let text = bind(run, &data, "/data", "rbind:rw:dev").expect(0)?.text();
    ensure!(text.lines().filter(|line| line.contains("Permission denied")).count() == commands.len(), "{text}");
    // As people hide a file.
    let run = client.rootfs(&root, &["/kit.wasm", "read", "/data/file"]);
    let done = bind(run, Path::new("/dev/null"), "/data/file", "bind").expect(0)?;
    ensure!(done.text().is_empty(), "{done:?}");
    Ok(())
}

/// A FUSE file system whose server says nothing; unmounted when dropped.
struct Mute {
    folder: PathBuf,
    _server: File,
}

impl Mute {
    fn mount(folder: PathBuf) -> Result<Self> {
        let server = File::options().read(true).write(true).open("/dev/fuse")?;
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", server.as_raw_fd());
        let options = std::ffi::CString::new(options)?;
        rustix::mount::mount("mute", &folder, "fuse", MountFlags::empty(), Some(options.as_c_str()))?;
        Ok(Self { folder, _server: server })
    }
}

impl Drop for Mute {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.folder, UnmountFlags::DETACH);
    }
}

fn dead(containerd: &Containerd) -> Outcome {
    // Before the process is started, which gets its own copy of the mounts then.
    let mute = Mute::mount(source(containerd, "mute")?)?;
    let client = containerd.namespace("volumes-dead");
    let waits = bind(client.guest("/kit.wasm", &["ls", "/data"])?, &mute.folder, "/data", "rbind:ro").spawn()?;
    let daemon = wait::until("the process", SOON, || Ok(client.daemons().first().copied()))?;
    wait::until_true("a thread to wait for the source", SOON, || is_waiting(daemon))?;
    for _ in 0..3 {
        client.guest("/kit.wasm", &["ls", "/"])?.expect(0)?;
    }
    // The server is gone: what waited for it fails.
    drop(mute);
    let done = waits.finish(SOON)?;
    ensure!(done.code != Some(0) && done.stderr.contains("at /data: the source"), "{done:?}");
    client.expect_empty()
}

/// Whether a thread of the process waits in the kernel for a FUSE server.
fn is_waiting(pid: u32) -> Result<bool> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"))?.flatten();
    Ok(tasks.filter_map(|task| fs::read_to_string(task.path().join("stack")).ok()).any(|stack| stack.contains("fuse")))
}
