//! A cache folder that several processes use: each `Programs` here is one, for nothing but the folder is shared.

use std::fs::File;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use troupe_actors::guest::{Bounds, Code, CompileSettings, Prewarm, Programs};

use crate::support::{COUNTED, Fixture, WORKER, heavy, module};

async fn load(programs: &Programs<Code>, wasm: Vec<u8>) -> Arc<Code> {
    programs.load("/app.wasm", wasm, Bounds::default()).await.unwrap()
}

/// Everything in the folder is an entry.
fn only_entries(fixture: &Fixture) -> usize {
    let entries = fixture.entries();
    for entry in &entries {
        let name = entry.file_name().unwrap().to_str().unwrap();
        assert!(name.len() == 64 && !name.starts_with('.'), "{name} is left");
    }
    entries.len()
}

/// The name of the entry for a module, from a folder of its own.
async fn key(wasm: &[u8]) -> String {
    let fixture = Fixture::new();
    let entries = Prewarm::new(fixture.settings.clone()).fill("/app.wasm", wasm, &[Bounds::Explicit]).await.unwrap();
    entries[0].key.clone()
}

#[tokio::test]
async fn processes_that_ask_at_once_compile_an_equal_module_once() {
    let fixture = Fixture::scripted("echo run >> $HERE/runs; sleep 0.3; exec $REAL \"$@\"");
    let (one, two, three) = (fixture.programs(), fixture.programs(), fixture.programs());
    tokio::join!(load(&one, module(1)), load(&two, module(1)), load(&three, module(1)));
    assert_eq!(fixture.runs(), 1);
    assert_eq!(only_entries(&fixture), 1);
}

#[tokio::test]
async fn a_process_killed_while_it_compiles_leaves_its_turn_to_the_next() {
    let fixture = Fixture::scripted(COUNTED);
    let wasm = heavy(200);
    let turn = fixture.settings.cache_dir.join(format!(".turn-{}", key(&wasm).await));
    let file = fixture.folder.path().join("app.wasm");
    std::fs::write(&file, &wasm).unwrap();
    let mut other = Command::new(WORKER);
    other.arg("compile").arg("--cache-dir").arg(&fixture.settings.cache_dir).arg(&file);
    let mut other = other.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while !turn.exists() {
        assert!(Instant::now() < deadline && other.try_wait().unwrap().is_none(), "no turn was taken");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let programs = fixture.programs();
    let waiting = tokio::spawn(async move { load(&programs, wasm).await });
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!waiting.is_finished() && fixture.runs() == 0, "it does not wait for the other");
    other.kill().unwrap();
    other.wait().unwrap();
    waiting.await.unwrap();
    assert_eq!(fixture.runs(), 1);
    assert_eq!(only_entries(&fixture), 1);
}

#[tokio::test]
async fn a_process_that_hangs_is_not_waited_for_without_end() {
    let mut fixture = Fixture::scripted(COUNTED);
    fixture.settings.timeout = Duration::from_secs(1);
    load(&fixture.programs(), module(2)).await;
    let name = format!(".turn-{}", key(&module(1)).await);
    let held = File::create(fixture.settings.cache_dir.join(name)).unwrap();
    held.lock().unwrap();
    let start = Instant::now();
    load(&fixture.programs(), module(1)).await;
    let waited = start.elapsed();
    assert!(waited >= Duration::from_secs(1) && waited < Duration::from_secs(30), "it waited for {waited:?}");
    assert_eq!(fixture.runs(), 2);
}

#[tokio::test]
async fn who_waits_for_another_process_can_be_stopped() {
    let fixture = Fixture::new();
    load(&fixture.programs(), module(2)).await;
    let held = File::create(fixture.settings.cache_dir.join(format!(".turn-{}", key(&module(1)).await))).unwrap();
    held.lock().unwrap();
    let programs = Arc::new(fixture.programs());
    let waiting = tokio::spawn({
        let programs = programs.clone();
        async move { programs.load("/app.wasm", module(1), Bounds::default()).await.map(drop) }
    });
    tokio::time::sleep(Duration::from_millis(100)).await;
    let start = Instant::now();
    programs.close().await;
    assert!(waiting.await.unwrap().unwrap_err().to_string().contains("shutting down"));
    assert!(start.elapsed() < Duration::from_secs(1), "closing took {:?}", start.elapsed());
}

#[tokio::test]
async fn processes_together_compile_no_more_than_one_may() {
    let script = "mkdir $HERE/busy || echo clash >> $HERE/runs; sleep 0.2; rmdir $HERE/busy; exec $REAL \"$@\"";
    let mut fixture = Fixture::scripted(script);
    fixture.settings.parallel = 1;
    let (one, two, three) = (fixture.programs(), fixture.programs(), fixture.programs());
    tokio::join!(load(&one, module(1)), load(&two, module(2)), load(&three, module(3)));
    assert_eq!(fixture.runs(), 0, "they compiled side by side");
    assert_eq!(only_entries(&fixture), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn eviction_under_use_costs_time_only() {
    let mut fixture = Fixture::new();
    load(&fixture.programs(), module(0)).await;
    let bytes = fixture.entries()[0].metadata().unwrap().len();
    fixture.settings.cache_max_size = 3 * bytes + 3 * 64;
    let users: Vec<_> = (0..4)
        .map(|user| {
            let settings = fixture.settings.clone();
            tokio::spawn(async move {
                let mut held = Vec::new();
                for round in 0..10 {
                    let programs = Programs::new(Default::default(), settings.clone(), |_, _, code: Code| Ok(code));
                    held.push(load(&programs, module((user + round) % 6)).await);
                }
                held.len()
            })
        })
        .collect();
    for user in users {
        assert_eq!(user.await.unwrap(), 10);
    }
    let left: u64 = fixture.entries().iter().map(|entry| entry.metadata().unwrap().len()).sum();
    assert!(only_entries(&fixture) > 0 && left <= fixture.settings.cache_max_size, "{left} bytes are left");
}

#[tokio::test]
async fn a_start_is_a_use_even_if_the_code_is_in_memory() {
    let fixture = Fixture::new();
    let programs = fixture.programs();
    let _held = load(&programs, module(1)).await;
    let old = std::time::SystemTime::now() - Duration::from_secs(3600);
    let entry = fixture.entries().remove(0);
    File::open(&entry).unwrap().set_modified(old).unwrap();
    load(&programs, module(1)).await;
    let used = entry.metadata().unwrap().modified().unwrap();
    assert!(used > old + Duration::from_secs(3000), "last use: {used:?}");
}

#[tokio::test]
async fn a_program_nobody_runs_any_more_stays_loaded_for_a_while() {
    let mut fixture = Fixture::new();
    fixture.settings.linger = Duration::from_millis(500);
    let programs = fixture.programs();
    let first = Arc::downgrade(&load(&programs, module(1)).await);
    assert!(std::ptr::eq(first.as_ptr(), Arc::as_ptr(&load(&programs, module(1)).await)));
    let deadline = Instant::now() + Duration::from_secs(20);
    while first.strong_count() > 0 {
        assert!(Instant::now() < deadline, "it stays for ever");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let second = Arc::downgrade(&load(&programs, module(1)).await);
    programs.close().await;
    assert_eq!(second.strong_count(), 0, "it outlives its process's end");
}

#[tokio::test]
async fn code_larger_than_the_whole_cache_is_used_from_memory() {
    let fixture = Fixture::scripted(COUNTED);
    let settings = CompileSettings { cache_max_size: 1000, ..fixture.settings.clone() };
    let programs = Programs::new(Default::default(), settings, |_, _, code: Code| Ok(code));
    load(&programs, module(1)).await;
    assert!(fixture.entries().is_empty());
}
