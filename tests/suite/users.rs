//! Files as the container's user: whom new ones belong to, and what the user may not do, the guest may not.

use std::fs::{self, File, Permissions};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::volumes::{bind, each, source, words};
use crate::common::api::Api;
use crate::common::containerd::Containerd;
use crate::common::ctr::Run;
use crate::common::http::{self, BOTH};
use crate::common::site::{self, Site, WEB};
use crate::common::{Outcome, SOON, base, guests, image, proc, wait};

pub const CASES: crate::common::Cases = &[("the_spec_says_who", spec)];

/// `ctr run --user` came with containerd 1.7.
pub const BY_FLAG: crate::common::Cases = &[
    ("new_files_are_the_users", made),
    ("what_the_user_may_not_the_guest_may_not", denied),
    ("supplementary_groups_count", groups),
    ("a_closed_root_is_closed", closed_root),
    ("users_of_one_process_are_apart", apart),
    ("servers_are_their_user", servers),
    ("requests_of_a_users_server_go_out", outgoing),
    ("a_users_output_is_complete", output),
    ("the_process_stays_out_of_the_users_reach", reach),
    ("threads_go_with_the_last_container", threads),
];

const KITS: [&str; 2] = ["/kit.wasm", "/kit-component.wasm"];

/// A folder of the host with this mode.
fn folder(containerd: &Containerd, name: &str, mode: u32) -> Result<PathBuf> {
    let folder = source(containerd, name)?;
    fs::set_permissions(&folder, Permissions::from_mode(mode))?;
    Ok(folder)
}

/// A file with this owner, group and mode.
fn file(path: &Path, (owner, group, mode): (u32, u32, u32), content: &str) -> Outcome {
    File::create(path)?.write_all(content.as_bytes())?;
    chown(path, Some(owner), Some(group))?;
    Ok(fs::set_permissions(path, Permissions::from_mode(mode))?)
}

fn as_user<'a>(run: Run<'a>, user: &str) -> Run<'a> {
    run.option("--user", user)
}

/// What became of each command that failed.
fn failures(text: &str) -> Vec<&str> {
    text.lines().filter(|line| line.contains("(os error")).collect()
}

fn spec(containerd: &Containerd) -> Outcome {
    let api = Api::connect(containerd, "users-spec")?;
    let (root, data) =
        (base::folder(&format!("roots/spec-{}", containerd.version))?, folder(containerd, "spec", 0o777)?);
    fs::copy(guests::built("kit.wasm")?, root.join("kit.wasm"))?;
    for (name, group, mode) in [("roots", 0, 0o600), ("shared", 3000, 0o640), ("others", 4000, 0o640)] {
        file(&data.join(name), (0, group, mode), &format!("of {name}\n"))?;
    }
    let commands =
        ["read /data/roots", "read /data/shared", "read /data/others", "write-file /data/new x", "write-file /new x"];
    let plan = api.container("", &[&["/kit.wasm"], &*words(&commands)].concat()).spec(|spec| {
        spec["root"] = json!({"path": root});
        spec["process"]["user"] = json!({"uid": 1000, "gid": 2000, "additionalGids": [3000], "umask": 0o027});
        spec["mounts"] =
            json!([{"destination": "/data", "type": "bind", "source": data, "options": ["rbind", "rprivate", "rw"]}]);
    });
    let text = plan.expect(0)?;
    ensure!(failures(&text).len() == 3 && text.contains("of shared\n") && !text.contains("of roots"), "{text}");
    let stat = fs::metadata(data.join("new"))?;
    ensure!((stat.uid(), stat.gid(), stat.mode() & 0o7777) == (1000, 2000, 0o640), "{stat:?}");
    Ok(())
}

fn made(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("users");
    for (kit, user, owner) in
        [(KITS[0], "1000:2000", (1000, 2000)), (KITS[1], "1001", (1001, 0)), (KITS[0], "0:7", (0, 7))]
    {
        let data = folder(containerd, &format!("made{kit}{user}"), 0o777)?;
        let commands =
            ["write-file /data/file text", "mkdir /data/folder", "write-file /data/folder/x y", "append /data/log z"];
        let run = as_user(each(&client, kit, &commands)?, user);
        let text = bind(run, &data, "/data", "rbind:rw").expect(0)?.text();
        ensure!(failures(&text).is_empty(), "{text}");
        for (name, mode) in [("file", 0o644), ("folder", 0o755), ("folder/x", 0o644), ("log", 0o644)] {
            let stat = fs::metadata(data.join(name))?;
            ensure!((stat.uid(), stat.gid()) == owner && stat.mode() & 0o7777 == mode, "{user} {name}: {stat:?}");
        }
    }
    Ok(())
}

fn denied(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("users");
    let data = folder(containerd, "denied", 0o755)?;
    file(&data.join("roots"), (0, 0, 0o600), "a secret\n")?;
    file(&data.join("everybodys"), (0, 0, 0o644), "for all\n")?;
    file(&data.join("own"), (1000, 1000, 0o600), "its own\n")?;
    file(&data.join("write-only"), (1000, 1000, 0o200), "unread\n")?;
    for (name, mode) in [("closed", 0o700), ("unlisted", 0o711), ("sticky", 0o1777)] {
        fs::create_dir(data.join(name))?;
        file(&data.join(name).join("file"), (0, 0, 0o644), "inside\n")?;
        fs::set_permissions(data.join(name), Permissions::from_mode(mode))?;
    }
    let bad = [
        "read /data/roots",
        "append /data/roots x",
        "write-file /data/everybodys x",
        "write-file /data/new x",
        "mkdir /data/folder",
        "rm /data/everybodys",
        "rename /data/own /data/other",
        "read /data/write-only",
        "ls /data/closed",
        "read /data/closed/file",
        "stat /data/closed/file",
        "ls /data/unlisted",
        "rm /data/sticky/file",
        "rename /data/sticky/file /data/sticky/other",
        "write-file /new x",
    ];
    let good = [
        "read /data/everybodys",
        "read /data/own",
        "append /data/own x",
        "append /data/write-only x",
        "read /data/unlisted/file",
        "stat /data/roots",
        "write-file /data/sticky/mine x",
        "rm /data/sticky/mine",
        "ls /data",
    ];
    for kit in KITS {
        let run = |commands: &[&str]| {
            anyhow::Ok(bind(as_user(each(&client, kit, commands)?, "1000:1000"), &data, "/data", "rbind:rw"))
        };
        let text = run(&bad)?.expect(0)?.text();
        ensure!(failures(&text).len() == bad.len() && !text.contains("secret"), "{text}");
        let text = run(&good)?.expect(0)?.text();
        ensure!(failures(&text).is_empty() && text.contains("for all\n") && text.contains("its own\n"), "{text}");
        // Root may.
        let root = bind(client.guest(kit, &["read", "/data/closed/file"])?, &data, "/data", "rbind:ro");
        ensure!(root.expect(0)?.text() == "inside\n");
    }
    ensure!(fs::read_to_string(data.join("roots"))? == "a secret\n");
    Ok(())
}

/// The image's own /etc/group says which ones.
fn groups(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("users");
    let files = base::folder("users-image")?;
    fs::write(files.join("passwd"), "root:x:0:0::/:\napp:x:1000:2000::/:\n")?;
    fs::write(files.join("group"), "root:x:0:\nmain:x:2000:\nextra:x:3000:app\nother:x:4000:root\n")?;
    let from = |name: &str| format!("{}:/etc/{name}", files.join(name).display());
    let options = ["--file", &from("passwd"), "--file", &from("group")];
    let kit = guests::built("kit.wasm")?;
    client.import("test.local/users:latest", &image::pack("users", &[&kit], &options)?)?;
    let data = folder(containerd, "groups", 0o755)?;
    for group in [2000, 3000, 4000] {
        file(&data.join(group.to_string()), (0, group, 0o640), &format!("of {group}\n"))?;
    }
    let commands = words(&["read /data/2000", "read /data/3000", "read /data/4000"]);
    let run = client.image("test.local/users:latest", &[&["/kit.wasm"], &*commands].concat());
    let text = bind(as_user(run, "app"), &data, "/data", "rbind:ro").expect(0)?.text();
    ensure!(text.contains("of 2000\n") && text.contains("of 3000\n"), "{text}");
    ensure!(matches!(failures(&text)[..], [line] if line.starts_with("read /data/4000")), "{text}");
    Ok(())
}

/// The root folder itself is opened by the process, which must not help anybody past its mode.
fn closed_root(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("users");
    let root = base::folder(&format!("roots/closed-{}", containerd.version))?;
    fs::copy(guests::built("kit.wasm")?, root.join("kit.wasm"))?;
    fs::write(root.join("file"), "inside\n")?;
    let commands = words(&["ls /", "read /file", "stat /file"]);
    for (mode, denied) in [(0o755, 0), (0o711, 1), (0o700, 3)] {
        fs::set_permissions(&root, Permissions::from_mode(mode))?;
        let run = as_user(client.rootfs(&root, &[&["/kit.wasm"], &*commands].concat()), "1000");
        let text = run.expect(0)?.text();
        ensure!(failures(&text).len() == denied, "{mode:o}: {text}");
    }
    Ok(())
}

fn apart(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("users");
    let data = folder(containerd, "apart", 0o777)?;
    let users = [1001, 1002, 1003];
    for user in users {
        file(&data.join(user.to_string()), (user, user, 0o600), "")?;
    }
    let script = |user: u32| -> Result<Run<'_>> {
        let all = users.map(|other| format!("append /data/{other} {user}"));
        let commands: Vec<&str> = all.iter().map(String::as_str).cycle().take(30).collect();
        let id = format!("{user}:{user}");
        Ok(bind(as_user(each(&client, KITS[0], &commands)?, &id), &data, "/data", "rbind:rw"))
    };
    let jobs = users.map(|user| script(user)?.spawn());
    for (job, user) in jobs.into_iter().zip(users) {
        let text = job?.finish(SOON)?.text();
        ensure!(failures(&text).len() == 20, "{user}: {text}");
        ensure!(fs::read_to_string(data.join(user.to_string()))? == user.to_string().repeat(10));
    }
    Ok(())
}

fn servers(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("users");
    let data = folder(containerd, "servers", 0o777)?;
    file(&data.join("roots"), (0, 0, 0o600), "a secret\n")?;
    file(&data.join("own"), (1000, 1000, 0o600), "its own\n")?;
    for (guest, slash, settings) in [
        (WEB, "/", &[][..]),
        (WEB, "/", &[("INSTANCE_REUSE", "100")][..]),
        ("/web3.wasm", "", &[]),
        ("/web3.wasm", "", &[("INSTANCE_REUSE", "100")]),
    ] {
        let run = as_user(client.guest(guest, &[])?, "1000:1000");
        let site = Site::start(site::with(bind(run, &data, "/data", "rbind:rw"), settings))?;
        http::block_on(async {
            for protocol in BOTH {
                for _ in 0..3 {
                    let secret = http::get(site.addr, protocol, &format!("/file?path={slash}data/roots")).await?;
                    ensure!(secret.status == 404 && !secret.text().contains("secret"), "{secret:?}");
                    let own = http::get(site.addr, protocol, &format!("/file?path={slash}data/own")).await?;
                    own.expect(200, "its own\n")?;
                }
                // Timers go on as ever.
                http::get(site.addr, protocol, "/sleep?ms=20").await?;
            }
            if slash.is_empty() {
                http::get(site.addr, BOTH[0], "/make?path=data/made").await?.expect(200, "made\n")?;
                let stat = fs::metadata(data.join("made"))?;
                ensure!((stat.uid(), stat.gid()) == (1000, 1000), "{stat:?}");
                fs::remove_dir(data.join("made"))?;
            }
            Ok(())
        })?;
        site.drain("SIGTERM", 0)?;
    }
    Ok(())
}

/// What the process reads on a guest's behalf, it reads as itself, whatever the root lets the user see.
fn outgoing(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("users");
    let root = base::folder(&format!("roots/outgoing-{}", containerd.version))?;
    fs::copy(guests::built("web.wasm")?, root.join("web.wasm"))?;
    fs::set_permissions(&root, Permissions::from_mode(0o700))?;
    let back = site::web(&client, &[])?;
    let front = Site::start(as_user(client.rootfs(&root, &[WEB]), "1000:1000"))?;
    http::block_on(async {
        for path in ["/hello", "/sleep?ms=20", "/hello"] {
            let url = format!("/fetch?url=http://localhost:{}{path}", back.addr.port());
            let answer = http::get(front.addr, BOTH[0], &url).await?;
            ensure!(answer.status == 200 && answer.header("x-error").is_none(), "{answer:?}");
        }
        let own = http::get(front.addr, BOTH[0], "/file?path=/web.wasm").await?;
        ensure!(own.status == 404, "{own:?}");
        Ok(())
    })?;
    front.drain("SIGTERM", 0)?;
    back.drain("SIGTERM", 0)?;
    Ok(())
}

/// Into pipes and into files that are root's, to the last byte.
fn output(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("users");
    for kit in KITS {
        let run = as_user(client.guest(kit, &["both", "20000"])?, "1000:1000");
        let done = run.expect(0)?;
        ensure!(done.text().lines().count() == 20_000 && done.stderr.lines().count() == 20_000, "a part is missing");
        let log = folder(containerd, &format!("output{kit}"), 0o700)?.join("log");
        let container = as_user(client.guest(kit, &["write", "300000"])?, "1000:1000").logged(&log)?;
        ensure!(container.exit()?.exit_code() == 0);
        ensure!(fs::metadata(&log)?.len() == 300_000, "{:?}", fs::metadata(&log)?);
        container.delete()?;
    }
    Ok(())
}

/// Threads with a user's ids would let that user's processes kill the process or look into it.
fn reach(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("users-reach");
    let container = as_user(client.guest(KITS[0], &["watch", "/none", "1"])?, "1000:1000").detached()?;
    let daemon = container.daemon()?;
    wait::until_true("threads of the user", SOON, || {
        Ok(names(daemon)?.iter().filter(|name| *name == "user-1000").count() > 1)
    })?;
    let mut looked = 0;
    for task in fs::read_dir(format!("/proc/{daemon}/task"))?.flatten() {
        let tid = task.file_name().into_string().ok().context("a thread's id")?;
        for action in [format!("kill -0 {tid}"), format!("cat /proc/{tid}/environ"), format!("cat /proc/{tid}/mem")] {
            let mut command = Command::new("sh");
            let status =
                command.args(["-c", &action]).uid(1000).gid(1000).stderr(std::process::Stdio::null()).status()?;
            ensure!(!status.success(), "{action} was allowed");
        }
        looked += 1;
    }
    ensure!(looked > 3);
    container.kill_and_wait("SIGKILL")?;
    container.delete()
}

/// Of the threads of a process.
fn names(pid: u32) -> Result<Vec<String>> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"))?.flatten();
    Ok(tasks
        .filter_map(|task| fs::read_to_string(task.path().join("comm")).ok())
        .map(|name| name.trim().to_owned())
        .collect())
}

fn threads(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("users-threads");
    let keeper = client.guest("/sleeper.wasm", &[])?.detached()?;
    let daemon = keeper.daemon()?;
    let of_users = || Ok::<_, anyhow::Error>(names(daemon)?.iter().filter(|name| name.starts_with("user-")).count());
    ensure!(of_users()? == 0, "root costs threads");
    let before = proc::holdings(daemon)?;
    let run = |user: &str| as_user(client.guest(KITS[0], &["sleep", "0"])?, user).detached();
    let (one, same, other) = (run("1000:1000")?, run("1000:1000")?, run("1001:1000")?);
    // A worker each; the rest come when there is something to do.
    wait::until_true("two workers", SOON, || Ok(of_users()? == 2))?;
    for container in [one, same, other] {
        container.kill_and_wait("SIGKILL")?;
        container.delete()?;
    }
    wait::until_true("the threads to end", SOON, || Ok(of_users()? == 0))?;
    wait::until_true("the process to let go", SOON, || Ok(proc::holdings(daemon)?.fit_in(before)))?;
    keeper.kill_and_wait("SIGKILL")?;
    keeper.delete()
}
