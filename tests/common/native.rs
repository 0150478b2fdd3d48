//! Linux programs to run beside wasm: one folder with a static busybox and its applets.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::base;
use super::ctr::{Client, Run};
use super::job::Job;

/// The applets that the cases use.
const APPLETS: [&str; 24] = [
    "sh", "cat", "echo", "sleep", "true", "false", "ls", "ps", "kill", "stty", "tty", "head", "tail", "tr", "dd", "wc",
    "env", "id", "hostname", "mkdir", "grep", "sync", "nc", "readlink",
];

/// The root filesystem, made once. With `/script` (`#!`), `/text` (nothing that runs) and `/locked` (a program that may not
/// be executed).
pub fn busybox() -> Result<PathBuf> {
    let root = base::path()?.join("busybox");
    if root.exists() {
        return Ok(root);
    }
    let made = base::path()?.join(".busybox");
    for folder in ["bin", "proc", "sys", "dev", "tmp", "etc"] {
        fs::create_dir_all(made.join(folder))?;
    }
    let found = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|path| Path::new(path).exists());
    fs::copy(found.context("no busybox; install busybox-static")?, made.join("bin/busybox"))?;
    for applet in APPLETS {
        symlink("busybox", made.join("bin").join(applet))?;
    }
    put(&made, "script", "#!/bin/sh\necho \"script $*\"\nexit 6\n", 0o755)?;
    put(&made, "text", "I am no program.\n", 0o755)?;
    fs::copy(made.join("bin/busybox"), made.join("locked"))?;
    fs::set_permissions(made.join("locked"), fs::Permissions::from_mode(0o644))?;
    fs::rename(made, &root)?;
    Ok(root)
}

fn put(root: &Path, name: &str, text: &str, mode: u32) -> Result<()> {
    let path = root.join(name);
    fs::write(&path, text)?;
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(mode))?)
}

/// `ctr run` of a Linux program.
pub fn run<'a>(client: &Client<'a>, words: &[&str]) -> Result<Run<'a>> {
    Ok(client.rootfs(&busybox()?, words).option("--env", "PATH=/usr/bin:/bin"))
}

/// The same for a line of shell.
pub fn shell<'a>(client: &Client<'a>, line: &str) -> Result<Run<'a>> {
    run(client, &["sh", "-c", line])
}

/// `ctr task exec`, its id first.
pub fn exec_in(client: &Client<'_>, container: &str, id: &str, words: &[&str]) -> Result<Job> {
    let mut command = client.command(&["task", "exec", "--exec-id", id, container]);
    command.args(words);
    Job::spawn(command)
}
