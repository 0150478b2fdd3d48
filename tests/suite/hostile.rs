//! Images and specifications that nobody sane would write. Each has its own clear error or a harmless effect, and
//! none leaves anything behind in the shim process, which a quiet neighbour keeps alive for the comparison.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use anyhow::{Result, ensure};

use crate::common::cgroup::Threads;
use crate::common::containerd::Containerd;
use crate::common::ctr::Client;
use crate::common::http::{self, Protocol};
use crate::common::site::Site;
use crate::common::{Outcome, SOON, base, guests, proc, shim, site, wait};

pub const CASES: crate::common::Cases = &[
    ("a_missing_module_is_named", missing),
    ("what_is_no_wasm_is_refused", no_wasm),
    ("what_cannot_be_linked_is_refused", unlinkable),
    ("symbolic_links_stay_in_the_root", links),
    ("special_files_are_no_modules", special),
    ("ten_thousand_arguments", many_arguments),
    ("an_id_in_use_is_refused", id_in_use),
    ("a_guest_that_spins_while_it_is_instantiated", start_loop),
    ("more_memory_than_there_is", huge_memory),
    ("a_module_larger_than_a_compile_may_be", huge_module),
    ("a_system_that_grants_no_thread", no_thread),
];

/// Runs `act` with a neighbour in the same process, and compares what the process holds before and after.
fn leaving_nothing(containerd: &Containerd, namespace: &str, act: impl FnOnce(&Client<'_>) -> Outcome) -> Outcome {
    let client = containerd.namespace(namespace);
    let neighbour = client.guest("/sleeper.wasm", &[])?.detached()?;
    // The first failure may load what every later one uses, of wasm as of Linux programs.
    client.guest("/none.wasm", &[])?.expect_error("none.wasm")?;
    let root = root(containerd, "first")?;
    fs::write(root.join("script"), "#!/bin/sh\n")?;
    client.rootfs(&root, &["/script"]).expect_error("/script")?;
    let daemon = neighbour.daemon()?;
    let before = proc::holdings(daemon)?;
    act(&client)?;
    let settled = wait::until_true("the shim to let go", SOON, || Ok(proc::holdings(daemon)?.fit_in(before)));
    settled.map_err(|error| error.context(format!("before {before:?}, after {:?}", proc::holdings(daemon))))?;
    ensure!(neighbour.status()?.as_deref() == Some("RUNNING"), "the neighbour is gone");
    ensure!(client.tasks()?.len() == 1, "{:?}", client.tasks()?);
    neighbour.kill_and_wait("SIGKILL")?;
    neighbour.delete()?;
    client.expect_empty()
}

/// A root filesystem of the case's own.
fn root(containerd: &Containerd, name: &str) -> Result<PathBuf> {
    let root = base::folder(&format!("roots/{name}-{}", containerd.version))?;
    fs::copy(guests::built("kit.wasm")?, root.join("kit.wasm"))?;
    Ok(root)
}

fn missing(containerd: &Containerd) -> Outcome {
    leaving_nothing(containerd, "missing", |client| {
        for file in ["/none.wasm", "none.wasm", "/no/such/folder/none.wasm", "/kit.wasm/none.wasm"] {
            client.guest(file, &[])?.expect_error("none.wasm")?;
        }
        client.guest("/", &[])?.expect_error("/")
    })
}

fn no_wasm(containerd: &Containerd) -> Outcome {
    let root = root(containerd, "garbage")?;
    let whole = fs::read(guests::built("kit.wasm")?)?;
    let garbage: Vec<u8> = (0..4096u32).map(|index| (index * 197 % 251) as u8).collect();
    let broken = [&whole[..8], &garbage].concat();
    for (name, content) in [
        ("empty", &b""[..]),
        ("garbage", &garbage),
        ("header", &whole[..8]),
        ("short", &whole[..4]),
        ("truncated", &whole[..whole.len() / 2]),
        ("broken", &broken),
        ("script", b"#!/bin/sh\necho hello\n"),
        ("elf", &fs::read("/bin/busybox")?),
    ] {
        fs::write(root.join(name), content)?;
    }
    leaving_nothing(containerd, "garbage", |client| {
        for name in ["empty", "garbage", "short", "truncated", "broken", "script", "elf", "header"] {
            client.rootfs(&root, &[&format!("/{name}")]).expect_error(name)?;
        }
        Ok(())
    })
}

fn unlinkable(containerd: &Containerd) -> Outcome {
    leaving_nothing(containerd, "unlinkable", |client| {
        for (file, named) in [
            ("/imports-unknown.wasm", "nobody"),
            ("/component-imports-unknown.wasm", "troupe:nobody/home"),
            ("/no-start.wasm", "_start"),
            ("/start-signature.wasm", "_start"),
        ] {
            client.guest(file, &[])?.expect_error(named)?;
        }
        Ok(())
    })
}

/// What lies outside of the root filesystem, whatever way leads there, is not there.
fn links(containerd: &Containerd) -> Outcome {
    let root = root(containerd, "links")?;
    let outside = base::folder("outside")?;
    fs::copy(guests::built("kit.wasm")?, outside.join("outside.wasm"))?;
    fs::write(outside.join("secret"), "a secret of the host")?;
    let up = format!("{}{}", "../".repeat(20), outside.display().to_string().trim_start_matches('/'));
    let link = |target: &str, name: &str| -> Outcome {
        let _ = fs::remove_file(root.join(name));
        Ok(symlink(target, root.join(name))?)
    };
    link(&outside.join("outside.wasm").display().to_string(), "absolute.wasm")?;
    link(&format!("{up}/outside.wasm"), "up.wasm")?;
    link(&outside.display().to_string(), "folder")?;
    link("loop-b.wasm", "loop-a.wasm")?;
    link("loop-a.wasm", "loop-b.wasm")?;
    link("/kit.wasm", "inside.wasm")?;
    link("../../../kit.wasm", "above.wasm")?;
    link(&outside.join("secret").display().to_string(), "secret")?;
    link(&format!("{up}/secret"), "secret-up")?;
    leaving_nothing(containerd, "links", |client| {
        let run = |words: &[&str]| client.rootfs(&root, words);
        for file in ["/absolute.wasm", "/up.wasm", "/folder/outside.wasm", "/loop-a.wasm"] {
            run(&[file, "exit", "3"]).expect_error(file.rsplit('/').next().unwrap_or_default())?;
        }
        run(&[&format!("/{up}/outside.wasm"), "exit", "3"]).expect_error("outside.wasm")?;
        // Links are resolved as the container would see them: its own root is the top.
        run(&["/inside.wasm", "exit", "3"]).expect(3)?;
        run(&["/above.wasm", "exit", "4"]).expect(4)?;
        for file in ["/secret", "/secret-up", "/folder/secret", &format!("/{up}/secret")] {
            let done = run(&["/kit.wasm", "read", file]).expect(1)?;
            ensure!(done.stdout.is_empty(), "the guest read {file}: {done:?}");
        }
        Ok(())
    })
}

/// Opening a FIFO would wait for ever, and reading a device would never end.
fn special(containerd: &Containerd) -> Outcome {
    let root = root(containerd, "special")?;
    if !root.join("fifo.wasm").exists() {
        shim::fifo(&root.join("fifo.wasm"))?;
        std::os::unix::net::UnixListener::bind(root.join("socket.wasm"))?;
        fs::create_dir(root.join("folder.wasm"))?;
    }
    leaving_nothing(containerd, "special", |client| {
        for file in ["fifo.wasm", "socket.wasm", "folder.wasm"] {
            client.rootfs(&root, &[&format!("/{file}")]).expect_error(file)?;
        }
        client.rootfs(&root, &["/dev/zero"]).expect_error("zero")
    })
}

fn many_arguments(containerd: &Containerd) -> Outcome {
    leaving_nothing(containerd, "arguments", |client| {
        let words: Vec<String> = (0..10_000).map(|number| format!("argument-{number}")).collect();
        let words: Vec<&str> = ["args"].into_iter().chain(words.iter().map(String::as_str)).collect();
        // Not for the component: the preview-1 adapter in it has room for 64 KiB of them, then it traps.
        let done = client.guest("/kit.wasm", &words)?.expect(0)?;
        ensure!(done.text().lines().count() == 10_002, "{} lines", done.text().lines().count());
        ensure!(done.text().ends_with("argument-9998\nargument-9999\n"));
        Ok(())
    })
}

fn id_in_use(containerd: &Containerd) -> Outcome {
    leaving_nothing(containerd, "ids", |client| {
        let run = client.guest("/kit.wasm", &["sleep", "0"])?.id("same");
        let first = run.detached()?;
        let second = run.to_end()?;
        ensure!(second.code != Some(0) && second.stderr.contains("already exists"), "{second:?}");
        ensure!(first.status()?.as_deref() == Some("RUNNING"));
        ensure!(first.kill_and_wait("SIGKILL")?.0.exit_code() == 137);
        first.delete()
    })
}

fn start_loop(containerd: &Containerd) -> Outcome {
    leaving_nothing(containerd, "startloop", |client| {
        let container = client.guest("/start-loop.wasm", &[])?.detached()?;
        ensure!(container.kill_and_wait("SIGTERM")?.0.exit_code() == 143);
        container.delete()
    })
}

/// An error of `ctr run`, or the end of the container for lack of memory; never that of the process.
fn huge_memory(containerd: &Containerd) -> Outcome {
    leaving_nothing(containerd, "huge", |client| {
        let run = client.guest("/memory-min-huge.wasm", &[])?.option("--memory-limit", "67108864");
        let done = run.to_end()?;
        ensure!(done.code == Some(137) || (done.code == Some(1) && done.stderr.contains("memory")), "{done:?}");
        Ok(())
    })
}

/// The setting that refuses it is named, and the process goes on to compile the next one.
fn huge_module(containerd: &Containerd) -> Outcome {
    let root = root(containerd, "huge-module")?;
    let padding = wat::parse_str(format!("(module (@custom \"x\" \"{}\"))", "x".repeat(100 << 20)))?;
    fs::write(root.join("huge.wasm"), padding)?;
    let options = containerd.more_options("huge-module", "compile_memory = \"64MiB\"")?;
    let client = containerd.namespace("huge-module");
    let run = |words: &[&str]| client.rootfs(&root, words).options(options.clone());
    run(&["/huge.wasm"]).expect_error("compile_memory")?;
    run(&["/kit.wasm", "exit", "7"]).expect(7)?;
    client.expect_empty()
}

/// Every container needs a thread of its own, a server some more. What needs none goes on: the end of a container, say.
fn no_thread(containerd: &Containerd) -> Outcome {
    const REFUSED: &str = "Resource temporarily unavailable";
    const SHARED: &str = "/web3.wasm";
    // In another process: what is compiled needs no process for that.
    let compiled = containerd.namespace("compiled");
    compiled.guest("/hello.wasm", &["1"])?.expect(0)?;
    site::web(&compiled, &[])?.drain("SIGTERM", 0)?;
    Site::start(compiled.guest(SHARED, &[])?)?.drain("SIGTERM", 0)?;
    let (client, begun) = (containerd.namespace("threads"), containerd.log_length());
    let (first, second) =
        (client.guest("/sleeper.wasm", &[])?.detached()?, client.guest("/sleeper.wasm", &[])?.detached()?);
    let daemon = first.daemon()?;
    let threads = Threads::of(daemon)?;
    // Those with nothing to do end after a while, all but one.
    wait::until_true("idle threads to end", SOON, || Ok(proc::threads(daemon, "blocking")? == 1))?;
    threads.grant(0)?;
    for file in ["/hello.wasm", site::WEB] {
        site::anywhere(client.guest(file, &[])?).expect_error(REFUSED)?;
    }
    second.kill_and_wait("SIGKILL")?;
    second.delete()?;
    // The thread of the container, and none of those that serve.
    threads.grant(1)?;
    site::anywhere(client.guest(site::WEB, &[])?).expect_error("start the threads that serve connections")?;
    ensure!(first.status()?.as_deref() == Some("RUNNING"), "the neighbour is gone");
    threads.grant_all()?;
    let server = site::web(&client, &[])?;
    http::block_on(async { http::get(server.addr, Protocol::One, "/hello").await?.expect(200, "hello\n") })?;
    // Those of WASI 0.3 are others, and their first server asks for them.
    wait::until_true("idle threads to end", SOON, || Ok(proc::threads(daemon, "blocking")? == 1))?;
    threads.grant(1)?;
    site::anywhere(client.guest(SHARED, &[])?).expect_error("start the threads that serve connections")?;
    http::block_on(async { http::get(server.addr, Protocol::One, "/hello").await?.expect(200, "hello\n") })?;
    threads.grant_all()?;
    server.drain("SIGTERM", 0)?;
    drop(server);
    first.kill_and_wait("SIGKILL")?;
    first.delete()?;
    client.expect_empty()?;
    let log = containerd.whole_log_since(begun);
    ensure!(!log.contains("panic"), "{log}");
    Ok(())
}
