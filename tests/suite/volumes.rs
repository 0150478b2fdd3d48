//! Volumes: what a spec mounts is in the container, live, and as read-only as it says; nothing of it stays behind.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rustix::mount::{MountPropagationFlags, UnmountFlags};

use crate::common::containerd::Containerd;
use crate::common::ctr::{Client, Container, Run};
use crate::common::http::{self, BOTH};
use crate::common::image::{self, Kind};
use crate::common::site::{Site, WEB};
use crate::common::{Outcome, SOON, base, guests, proc, wait};

pub const CASES: crate::common::Cases = &[
    ("a_folder_is_read_and_written", folder),
    ("read_only_is_the_kernels_word", read_only),
    ("a_volume_is_writable_in_a_read_only_root", read_only_root),
    ("updates_are_seen_as_they_happen", updates),
    ("a_server_reads_its_volume", served),
    ("a_file_is_mounted_over_a_file", file),
    ("a_tmpfs_has_its_size_and_mode", tmpfs),
    ("the_usual_files_are_there", usual),
    ("mounts_nest_and_go_by_their_order", nested),
    ("later_mounts_of_the_host_arrive_if_asked", propagation),
    ("a_guest_in_a_layer_has_volumes", layer),
    ("two_hundred_mounts", many),
    ("nothing_stays_mounted", nothing_left),
    ("nothing_stays_mounted_of_a_killed_process", killed),
];

/// The same program as a module and as a component.
const KITS: [&str; 2] = ["/kit.wasm", "/kit-component.wasm"];

/// A folder of the host for one case.
pub fn source(containerd: &Containerd, name: &str) -> Result<PathBuf> {
    base::folder(&format!("volumes/{}/{name}", containerd.version))
}

pub fn bind<'a>(run: Run<'a>, source: &Path, target: &str, options: &str) -> Run<'a> {
    run.option("--mount", &format!("type=bind,src={},dst={target},options={options}", source.display()))
}

/// Commands of the kit, one after another; tells what became of each.
pub fn each<'a>(client: &Client<'a>, kit: &str, commands: &[&str]) -> Result<Run<'a>> {
    client.guest(kit, &words(commands))
}

pub fn words<'a>(commands: &[&'a str]) -> Vec<&'a str> {
    let mut words = vec!["each"];
    for command in commands {
        words.extend(command.split(' '));
        words.push(",");
    }
    words.pop();
    words
}

fn folder(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("volumes");
    for kit in KITS {
        let data = source(containerd, &format!("data{kit}"))?;
        fs::write(data.join("old"), "of the host\n")?;
        let commands = [
            "read /data/old",
            "write-file /data/new text",
            "append /data/new more",
            "mkdir /data/folder",
            "rename /data/new /data/folder/new",
            "link /data/folder/new /data/linked",
            "rm /data/old",
            "ls /data",
            "rename /data/linked /elsewhere",
        ];
        let text = bind(each(&client, kit, &commands)?, &data, "/data", "rbind:rw").expect(0)?.text();
        let errors: Vec<&str> = text.lines().filter(|line| line.contains(": ") && !line.ends_with(": ok")).collect();
        ensure!(matches!(errors[..], [error] if error.starts_with("rename /data/linked")), "{text}");
        ensure!(text.starts_with("of the host\n") && text.contains("\nfolder\nlinked\n"), "{text}");
        ensure!(fs::read_to_string(data.join("folder/new"))? == "textmore");
        ensure!(!data.join("old").exists());
    }
    Ok(())
}

fn read_only(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("volumes");
    let data = source(containerd, "ro")?;
    fs::write(data.join("file"), "as it was")?;
    let writes = [
        "write-file /data/file x",
        "append /data/file x",
        "write-file /data/new x",
        "mkdir /data/folder",
        "rename /data/file /data/other",
        "link /data/file /data/other",
        "rm /data/file",
    ];
    for kit in KITS {
        for options in ["rbind:ro", "bind:ro", "rbind:rro", "bind:rw:ro"] {
            let text = bind(each(&client, kit, &writes)?, &data, "/data", options).expect(0)?.text();
            ensure!(!text.contains(": ok") && text.lines().count() == writes.len(), "{options}: {text}");
            let read = bind(client.guest(kit, &["read", "/data/file"])?, &data, "/data", options).expect(0)?;
            ensure!(read.text() == "as it was");
        }
    }
    ensure!(fs::read_dir(&data)?.count() == 1 && fs::read_to_string(data.join("file"))? == "as it was");
    Ok(())
}

/// `readOnlyRootFilesystem` with an emptyDir.
fn read_only_root(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("volumes");
    let data = source(containerd, "scratch")?;
    for kit in KITS {
        let commands = ["write-file /data/new text", "write-file /new text", "write-file /dev/new text"];
        let run = each(&client, kit, &commands)?.flag("--read-only");
        let text = bind(run, &data, "/data", "rbind:rw").expect(0)?.text();
        let oks: Vec<&str> = text.lines().filter(|line| line.ends_with(": ok")).collect();
        ensure!(oks == ["write-file /data/new text: ok"], "{text}");
    }
    Ok(())
}

/// Replaces the files of a ConfigMap as the kubelet does: a new folder, and a link that is moved over the old one.
fn publish(volume: &Path, version: u32, content: &str) -> Outcome {
    let folder = format!("..v{version}");
    fs::create_dir(volume.join(&folder))?;
    fs::write(volume.join(&folder).join("key"), content)?;
    symlink(&folder, volume.join("..data_tmp"))?;
    fs::rename(volume.join("..data_tmp"), volume.join("..data"))?;
    if version == 1 {
        symlink("..data/key", volume.join("key"))?;
    } else {
        fs::remove_dir_all(volume.join(format!("..v{}", version - 1)))?;
    }
    Ok(())
}

fn updates(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("volumes");
    for kit in KITS {
        let volume = source(containerd, &format!("configmap{kit}"))?;
        publish(&volume, 1, "one\n")?;
        let run = bind(client.guest(kit, &["watch", "/config/key", "3"])?, &volume, "/config", "rbind:ro");
        let job = run.spawn()?;
        for (version, so_far, next) in [(2, "one\n", "two\n"), (3, "one\ntwo\n", "three\n")] {
            job.stdout.wait(so_far, SOON, |bytes| (bytes == so_far.as_bytes()).then_some(()))?;
            publish(&volume, version, next)?;
        }
        let done = job.finish(SOON)?;
        ensure!(done.code == Some(0) && done.text() == "one\ntwo\nthree\n", "{done:?}");
    }
    Ok(())
}

fn served(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("volumes");
    let volume = source(containerd, "served")?;
    publish(&volume, 1, "one\n")?;
    let site = Site::start(bind(client.guest(WEB, &[])?, &volume, "/config", "rbind:ro"))?;
    http::block_on(async {
        for protocol in BOTH {
            http::get(site.addr, protocol, "/file?path=/config/key").await?.expect(200, "one\n")?;
        }
        publish(&volume, 2, "two\n")?;
        http::get(site.addr, BOTH[0], "/file?path=/config/key").await?.expect(200, "two\n")
    })?;
    site.drain("SIGTERM", 0)?;
    Ok(())
}

/// A subPath, over a file of the image and over none.
fn file(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("volumes");
    let folder = source(containerd, "file")?;
    let file = folder.join("app.conf");
    for kit in KITS {
        fs::write(&file, "of the host\n")?;
        for target in ["/hello.wasm", "/etc/app/app.conf"] {
            let commands = [&*format!("read {target}"), &*format!("append {target} more\n"), &*format!("rm {target}")];
            let text = bind(each(&client, kit, &commands)?, &file, target, "bind:rw").expect(0)?.text();
            ensure!(text.starts_with("of the host\n") && text.contains("more\n: ok"), "{text}");
            ensure!(!text.trim_end().ends_with("ok"), "a mount point was removed: {text}");
        }
        ensure!(fs::read_to_string(&file)? == "of the host\nmore\nmore\n");
    }
    let run = bind(client.guest("/kit.wasm", &["ls", "/"])?, &file, "/dev", "bind");
    run.expect_error("it would replace its devices")?;
    bind(client.guest("/kit.wasm", &[])?, &folder, "/hello.wasm", "bind").expect_error("the target is a file")?;
    bind(client.guest("/kit.wasm", &[])?, &file, "/etc/../..", "bind").expect_error("replace the root")
}

fn tmpfs(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("volumes");
    for kit in KITS {
        let memory = "type=tmpfs,src=tmpfs,dst=/memory,options=size=128k:mode=710:noexec";
        let run = client.guest(kit, &["fill", "/memory/file", "1000000"])?.option("--mount", memory);
        for _ in 0..2 {
            let text = run.expect(1)?.text();
            ensure!(text.starts_with("full after 131072: No space left"), "{text}");
        }
        let container = client.guest(kit, &["sleep", "0"])?.option("--mount", memory).detached()?;
        let mode = fs::metadata(inside(&container, "memory")?)?.permissions().mode();
        ensure!(mode & 0o7777 == 0o710, "{mode:o}");
        container.kill_and_wait("SIGKILL")?;
        container.delete()?;
    }
    let wrong = "type=tmpfs,src=tmpfs,dst=/memory,options=sise=1k";
    client.guest("/kit.wasm", &[])?.option("--mount", wrong).expect_error("at /memory: the option sise=1k")
}

/// A place in a container's root, as its process sees it.
pub fn inside(container: &Container<'_>, place: &str) -> Result<PathBuf> {
    let daemon = container.daemon()?;
    let end = format!("/{}/rootfs", container.id);
    let roots = proc::mounts(&daemon.to_string())?;
    let root = roots.iter().find(|root| root.ends_with(&end)).with_context(|| format!("{end} is not mounted"))?;
    Ok(PathBuf::from(format!("/proc/{daemon}/root{root}/{place}")))
}

fn usual(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("volumes");
    let folder = source(containerd, "usual")?;
    let (name, log) = (folder.join("hostname"), folder.join("termination-log"));
    fs::write(&name, "a-pod\n")?;
    for kit in KITS {
        fs::write(&log, "")?;
        let commands = [
            "read /etc/hosts",
            "read /etc/hostname",
            "stat /etc/resolv.conf",
            "write-file /dev/termination-log reason",
            "write-file /dev/shm/file text",
            "write-file /run/file text",
            "ls /dev",
            "write-file /dev/other text",
        ];
        let run = each(&client, kit, &commands)?.flag("--net-host");
        let run = bind(bind(run, &name, "/etc/hostname", "rbind:ro"), &log, "/dev/termination-log", "rbind:rw");
        let text = run.expect(0)?.text();
        ensure!(text.contains(&fs::read_to_string("/etc/hosts")?) && text.contains("\na-pod\n"), "{text}");
        ensure!(text.contains("\nfull\nnull\nrandom\nshm\ntermination-log\nurandom\nzero\n"), "{text}");
        let failed: Vec<&str> = text.lines().filter(|line| line.contains("(os error")).collect();
        ensure!(matches!(failed[..], [line] if line.starts_with("write-file /dev/other")), "{text}");
        ensure!(fs::read_to_string(&log)? == "reason");
    }
    Ok(())
}

fn nested(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("volumes");
    let (outer, inner) = (source(containerd, "outer")?, source(containerd, "inner")?);
    fs::write(inner.join("file"), "inner\n")?;
    for kit in KITS {
        let run = client.guest(kit, &["read", "/a/b/c/file"])?;
        let run = bind(bind(run, &outer, "/a/b", "rbind:rw"), &inner, "/a/b/c", "rbind:ro");
        ensure!(run.expect(0)?.text() == "inner\n");
        // The place was made in the outer one, as runc does it; the later mount is in front.
        ensure!(fs::read_dir(&outer)?.count() == 1);
        let run = client.guest(kit, &["ls", "/a"])?;
        let run = bind(bind(run, &inner, "/a", "rbind:ro"), &outer, "/a", "rbind:ro");
        ensure!(run.expect(0)?.text() == "c\n");
    }
    Ok(())
}

/// A shared mount of the host, unmounted when dropped.
struct Shared(PathBuf);

impl Shared {
    fn new(folder: PathBuf) -> Result<Self> {
        rustix::mount::mount_bind(&folder, &folder)?;
        let shared = Self(folder);
        rustix::mount::mount_change(&shared.0, MountPropagationFlags::SHARED)?;
        Ok(shared)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, UnmountFlags::DETACH);
    }
}

fn propagation(containerd: &Containerd) -> Outcome {
    // Before the process is started, which gets its own copy of the mounts then.
    let shared = Shared::new(source(containerd, "shared")?)?;
    let (folder, client) = (shared.0.join("later"), containerd.namespace("volumes-shared"));
    fs::create_dir_all(&folder)?;
    let watch = |options: &str| {
        let run = client.guest("/kit.wasm", &["watch", "/data/later/file", "1"])?;
        bind(run, &shared.0, "/data", options).spawn()
    };
    let (slave, both, private) = (watch("rbind:rslave")?, watch("rbind:rshared")?, watch("rbind:rprivate")?);
    wait::until_true("three tasks", SOON, || {
        Ok(client.tasks()?.iter().filter(|task| task.1 == "RUNNING").count() == 3)
    })?;
    let later = source(containerd, "later")?;
    fs::write(later.join("file"), "later\n")?;
    rustix::mount::mount_bind(&later, &folder)?;
    for job in [slave, both] {
        let done = job.finish(SOON)?;
        ensure!(done.text() == "later\n", "{done:?}");
    }
    // The other one sees what is below: an empty folder.
    rustix::mount::unmount(&folder, UnmountFlags::DETACH)?;
    fs::write(folder.join("file"), "below\n")?;
    let done = private.finish(SOON)?;
    ensure!(done.text() == "below\n", "{done:?}");
    Ok(())
}

/// Without a root filesystem there is an empty one, to hold the volumes.
fn layer(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("volumes");
    let data = source(containerd, "layer")?;
    fs::write(data.join("file"), "of the host\n")?;
    let tar = image::pack_as(Kind::Layers, "volume-layer", &[&guests::built("kit.wasm")?], &[])?;
    client.ctr(&["images", "import", "--all-platforms", "--no-unpack", &tar.display().to_string()])?;
    let run = client.image("test.local/volume-layer:latest", &["kit.wasm", "read", "/data/file"]);
    let run = bind(run, &data, "/data", "rbind:ro");
    if containerd.version == "1.6" {
        // containerd's own error, before any shim is asked.
        return run.expect_error("mismatched image rootfs");
    }
    ensure!(run.expect(0)?.text() == "of the host\n");
    Ok(())
}

fn many(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("volumes");
    let folder = source(containerd, "many")?;
    let mut run = client.guest("/kit.wasm", &["each", "read", "/v/0/file", ",", "read", "/v/199/file"])?;
    for number in 0..200 {
        let one = folder.join(number.to_string());
        fs::create_dir_all(&one)?;
        fs::write(one.join("file"), format!("{number}\n"))?;
        run = bind(run, &one, &format!("/v/{number}"), if number % 2 == 0 { "rbind:ro" } else { "rbind:rw" });
    }
    let text = run.expect(0)?.text();
    ensure!(text == "0\nread /v/0/file: ok\n199\nread /v/199/file: ok\n", "{text}");
    Ok(())
}

fn with_volumes<'a>(client: &Client<'a>, data: &Path) -> Result<Run<'a>> {
    let run = bind(client.guest("/kit.wasm", &["sleep", "0"])?, data, "/data", "rbind:rw");
    Ok(bind(run, data, "/data/again", "rbind:ro").option("--mount", "type=tmpfs,src=tmpfs,dst=/memory,options=size=1m"))
}

fn nothing_left(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("volumes-left");
    let data = source(containerd, "left")?;
    let neighbour = client.guest("/sleeper.wasm", &[])?.detached()?;
    let daemon = neighbour.daemon()?;
    let before = proc::mounts(&daemon.to_string())?;
    let container = with_volumes(&client, &data)?.detached()?;
    ensure!(proc::mounts(&daemon.to_string())?.len() >= before.len() + 5);
    ensure!(proc::mounts_below(base::path()?)?.iter().all(|mount| !mount.contains("/rootfs")), "mounts on the host");
    // Somebody is in it.
    let busy = fs::File::open(inside(&container, "data")?)?;
    container.kill_and_wait("SIGKILL")?;
    container.delete()?;
    ensure!(proc::mounts(&daemon.to_string())? == before, "{:?}", proc::mounts(&daemon.to_string())?);
    drop(busy);
    // A Create that fails half-way leaves as little.
    let run = bind(with_volumes(&client, &data)?, &data.join("none"), "/last", "rbind");
    run.expect_error("/none at /last: the source: No such file or directory")?;
    ensure!(proc::mounts(&daemon.to_string())? == before);
    neighbour.kill_and_wait("SIGKILL")?;
    neighbour.delete()
}

fn killed(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("volumes-killed");
    let data = source(containerd, "killed")?;
    let container = with_volumes(&client, &data)?.detached()?;
    proc::signal(container.daemon()?, rustix::process::Signal::KILL)?;
    ensure!(container.exit()?.exit_code() == 137);
    container.delete_record()?;
    ensure!(proc::mounts_below(&data)?.is_empty());
    fs::remove_dir_all(&data)?;
    client.expect_empty()
}
