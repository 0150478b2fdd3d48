//! Compiling as the daemon does it: the real binary as the worker, the library's public side, a cache of its own.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says what it expects by failing")]

#[path = "compile/cache.rs"]
mod cache;
#[path = "compile/disk.rs"]
mod disk;
#[path = "compile/layers.rs"]
mod layers;
#[path = "compile/support.rs"]
mod support;
#[path = "compile/verb.rs"]
mod verb;

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use support::{COUNTED, Fixture, module, slow};
use troupe_actors::guest::{Bounds, Code, LoadError, Programs};

async fn refusal(programs: &Programs<Code>, wasm: impl Into<Vec<u8>>) -> LoadError {
    programs.load("/app.wasm", wasm.into(), Bounds::default()).await.err().expect("it should be refused")
}

/// Children of this test process.
fn children() -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let lists = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    lists.flat_map(|list| list.split_whitespace().map(str::to_owned).collect::<Vec<_>>()).collect()
}

/// How many of them are workers that live.
fn workers() -> usize {
    let worker = |pid: &&String| {
        std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.ends_with(b"compile-worker\0"))
    };
    children().iter().filter(worker).count()
}

/// `/proc/PID/status` of a worker that has given up its privileges.
fn worker_status() -> Option<String> {
    let root = rustix::process::geteuid().is_root();
    let statuses = children().into_iter().filter_map(|pid| std::fs::read_to_string(format!("/proc/{pid}/status")).ok());
    statuses.into_iter().find(|status| status.contains("NoNewPrivs:\t1") && !(root && status.contains("Uid:\t0\t")))
}

#[tokio::test]
async fn a_second_process_maps_what_the_first_compiled() {
    let fixture = Fixture::scripted(COUNTED);
    let component = wat::parse_str("(component (core module (func)))").unwrap();
    for _ in 0..2 {
        let programs = fixture.programs();
        assert!(matches!(*programs.load("/m.wasm", module(1), Bounds::default()).await.unwrap(), Code::Module(_)));
        assert!(matches!(
            *programs.load("/c.wasm", component.clone(), Bounds::default()).await.unwrap(),
            Code::Component(_)
        ));
        programs.close().await;
    }
    assert_eq!(fixture.runs(), 2);
    assert_eq!(fixture.entries().len(), 2);
}

#[tokio::test]
async fn however_many_ask_at_once_it_is_compiled_once_and_shared() {
    let fixture = Fixture::scripted(COUNTED);
    let programs = Arc::new(fixture.programs());
    let asking: Vec<_> = (0..20)
        .map(|number| {
            let programs = programs.clone();
            tokio::spawn(
                async move { programs.load("/app.wasm", module(number % 5), Bounds::default()).await.unwrap() },
            )
        })
        .collect();
    let mut loaded = Vec::new();
    for task in asking {
        loaded.push(task.await.unwrap());
    }
    assert!(loaded.iter().enumerate().all(|(number, program)| Arc::ptr_eq(program, &loaded[number % 5])));
    assert_eq!(fixture.runs(), 5);
    drop(loaded);
    programs.load("/app.wasm", module(0), Bounds::default()).await.unwrap();
    assert_eq!(fixture.runs(), 5, "a program nobody holds comes from the cache");
}

#[tokio::test]
async fn a_truncated_or_garbled_module_says_where_it_breaks() {
    let fixture = Fixture::new();
    let programs = fixture.programs();
    let whole = module(1);
    let error = refusal(&programs, &whole[..whole.len() - 3]).await;
    assert!(matches!(error, LoadError::Invalid { .. }) && error.to_string().contains("offset"), "{error}");
    let error = refusal(&programs, [&whole[..8], &[0xff; 40]].concat()).await;
    assert!(matches!(error, LoadError::Invalid { .. }) && error.to_string().starts_with("/app.wasm: "), "{error}");
    assert!(fixture.entries().is_empty());
}

#[tokio::test]
async fn too_slow_names_the_setting_and_ends_the_worker() {
    let mut fixture = Fixture::new();
    fixture.settings.timeout = Duration::from_millis(300);
    let programs = fixture.programs();
    let large = slow();
    let start = Instant::now();
    let error = refusal(&programs, large).await;
    assert!(
        matches!(error, LoadError::TooExpensive { .. }) && error.to_string().contains("compile_timeout"),
        "{error}"
    );
    // Far less than compiling it takes, far more than a busy machine adds.
    assert!(start.elapsed() < Duration::from_secs(10), "it took {:?}", start.elapsed());
    programs.load("/app.wasm", module(1), Bounds::default()).await.unwrap();
    assert_eq!(fixture.entries().len(), 1);
}

#[tokio::test]
async fn too_much_memory_names_the_setting() {
    let mut fixture = Fixture::new();
    fixture.settings.memory = 24 << 20;
    let programs = fixture.programs();
    let error = refusal(&programs, slow()).await;
    assert!(matches!(error, LoadError::TooExpensive { .. }) && error.to_string().contains("compile_memory"), "{error}");
    programs.load("/app.wasm", module(1), Bounds::default()).await.unwrap();
}

#[tokio::test]
async fn a_module_larger_than_the_memory_names_the_setting() {
    let mut fixture = Fixture::new();
    fixture.settings.memory = 24 << 20;
    let programs = fixture.programs();
    let large = wat::parse_str(format!("(module (@custom \"x\" \"{}\"))", "x".repeat(40 << 20))).unwrap();
    let error = refusal(&programs, large).await;
    assert!(matches!(error, LoadError::TooExpensive { .. }) && error.to_string().contains("compile_memory"), "{error}");
    programs.load("/app.wasm", module(1), Bounds::default()).await.unwrap();
}

#[tokio::test]
async fn a_worker_that_dies_is_the_error_of_one() {
    let fixture = Fixture::scripted("grep -q die /proc/self/fd/0 && kill -9 $$; exec $REAL \"$@\"");
    let programs = fixture.programs();
    let dying = wat::parse_str("(module (func (export \"die\")))").unwrap();
    let (dead, living) = tokio::join!(
        programs.load("/dead.wasm", dying, Bounds::default()),
        programs.load("/app.wasm", module(1), Bounds::default())
    );
    let error = dead.err().unwrap();
    assert!(matches!(error, LoadError::Internal { .. }) && error.to_string().contains("signal 9"), "{error}");
    living.unwrap();
    assert_eq!(fixture.entries().len(), 1);
}

#[tokio::test]
async fn a_worker_that_floods_its_error_pipe_is_cut_short_not_waited_for() {
    let fixture = Fixture::scripted("yes 'no good' | head -c 1000000 >&2; exit 3");
    let error = refusal(&fixture.programs(), module(1)).await;
    assert!(error.to_string().contains("exit status: 3: no good"), "{error}");
    assert!(error.to_string().len() < 5000);
}

#[tokio::test]
async fn a_caller_who_leaves_stops_nothing_and_the_end_stops_all() {
    let fixture = Fixture::scripted("sleep 0.2; exec $REAL \"$@\"");
    let programs = fixture.programs();
    let left =
        tokio::time::timeout(Duration::from_millis(50), programs.load("/app.wasm", module(1), Bounds::default())).await;
    drop(left);
    programs.load("/app.wasm", module(1), Bounds::default()).await.unwrap();

    let left =
        tokio::time::timeout(Duration::from_millis(500), programs.load("/slow.wasm", slow(), Bounds::default())).await;
    assert!(left.is_err(), "the slow module should not be ready");
    let start = Instant::now();
    programs.close().await;
    assert!(start.elapsed() < Duration::from_secs(2), "closing took {:?}", start.elapsed());
    assert!(refusal(&programs, module(2)).await.to_string().contains("shutting down"));
}

#[tokio::test]
async fn without_a_usable_folder_programs_run_from_memory() {
    let mut fixture = Fixture::new();
    fixture.settings.cache_dir = "/proc/none/cache".into();
    fixture.programs().load("/app.wasm", module(1), Bounds::default()).await.unwrap();
}

#[tokio::test]
async fn a_folder_open_to_others_is_refused() {
    let fixture = Fixture::new();
    std::fs::create_dir(&fixture.settings.cache_dir).unwrap();
    std::fs::set_permissions(&fixture.settings.cache_dir, std::fs::Permissions::from_mode(0o777)).unwrap();
    let error = refusal(&fixture.programs(), module(1)).await;
    assert!(matches!(error, LoadError::UnsafeCache { .. }), "{error}");
}

#[tokio::test]
async fn the_worker_holds_nothing_of_the_host() {
    let fixture = Fixture::new();
    let programs = Arc::new(fixture.programs());
    let loading = tokio::spawn({
        let programs = programs.clone();
        async move { programs.load("/slow.wasm", slow(), Bounds::default()).await.map(drop) }
    });
    let status = loop {
        tokio::time::sleep(Duration::from_millis(5)).await;
        assert!(!loading.is_finished(), "the worker was not seen");
        if let Some(status) = worker_status() {
            break status;
        }
    };
    let line = |name: &str| status.lines().find(|line| line.starts_with(name)).unwrap_or_default().to_owned();
    assert_eq!(line("NoNewPrivs:"), "NoNewPrivs:\t1");
    if rustix::process::geteuid().is_root() {
        assert_eq!(line("Uid:"), "Uid:\t65534\t65534\t65534\t65534");
        assert_eq!(line("CapEff:"), "CapEff:\t0000000000000000");
        assert_eq!(line("Groups:").trim_end(), "Groups:");
    }
    programs.close().await;
    assert!(loading.await.unwrap().is_err());
}

#[tokio::test]
async fn no_worker_outlives_its_programs() {
    let fixture = Fixture::new();
    let programs = fixture.programs();
    let left =
        tokio::time::timeout(Duration::from_millis(400), programs.load("/slow.wasm", slow(), Bounds::default())).await;
    assert!(left.is_err());
    programs.close().await;
    // Other tests of this process have workers of their own; they come and go.
    let deadline = Instant::now() + Duration::from_secs(30);
    while workers() > 0 {
        assert!(Instant::now() < deadline, "{} workers are left", workers());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
