//! What a disk can do to the cache: damage it, be full, be read-only.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;

use rustix::mount::{MountFlags, mount, mount_remount};
use troupe_actors::guest::Bounds;

use crate::support::{COUNTED, Fixture, module};

/// Of the trailer: magic, length, digest.
const TRAILER: u64 = 48;

async fn load(fixture: &Fixture, number: usize) {
    fixture.programs().load("/app.wasm", module(number), Bounds::default()).await.unwrap();
}

type Damage = fn(&File, u64);

fn flip(file: &File, at: u64) {
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

#[tokio::test]
async fn damage_anywhere_is_found_and_the_module_compiled_again() {
    let damages: [(&str, Damage); 14] = [
        ("emptied", |file, _| file.set_len(0).unwrap()),
        ("cut after a byte", |file, _| file.set_len(1).unwrap()),
        ("cut in the code", |file, length| file.set_len(length / 2).unwrap()),
        ("cut before the trailer", |file, length| file.set_len(length - TRAILER).unwrap()),
        ("cut in the trailer", |file, length| file.set_len(length - 7).unwrap()),
        ("a byte longer", |file, length| file.set_len(length + 1).unwrap()),
        ("all zeros, as after a power cut", |file, length| {
            file.set_len(0).unwrap();
            file.set_len(length).unwrap();
        }),
        ("the ELF header", |file, _| flip(file, 0)),
        ("the code", |file, length| flip(file, length / 2)),
        ("its last byte", |file, length| flip(file, length - TRAILER - 1)),
        ("the magic", |file, length| flip(file, length - TRAILER)),
        ("the length", |file, length| flip(file, length - TRAILER + 8)),
        ("the digest", |file, length| flip(file, length - TRAILER + 16)),
        ("its last byte", |file, length| flip(file, length - 1)),
    ];
    let fixture = Fixture::scripted(COUNTED);
    load(&fixture, 1).await;
    for (number, (what, damage)) in damages.into_iter().enumerate() {
        let [entry] = &fixture.entries()[..] else { panic!("one entry expected") };
        let file = File::options().read(true).write(true).open(entry).unwrap();
        damage(&file, file.metadata().unwrap().len());
        load(&fixture, 1).await;
        assert_eq!(fixture.runs(), 2 + number, "{what}: not compiled again");
        load(&fixture, 1).await;
        assert_eq!(fixture.runs(), 2 + number, "{what}: compiled once more");
    }
    assert_eq!(fixture.entries().len(), 1);
}

/// Runs `case`, of the test that has this name, on a thread with mounts of its own, which end with it. In a process of its own:
/// what blocks is done by threads of the process, which see the mounts of whoever was the first to need one.
fn with_own_mounts(name: &str, case: impl AsyncFnOnce() + Send) {
    const INSIDE: &str = "TROUPE_TEST_INSIDE";
    if std::env::var_os(INSIDE).is_none() {
        let mut alone = Command::new(std::env::current_exe().unwrap());
        let done = alone.args(["--exact", &format!("disk::{name}")]).env(INSIDE, "1").output().unwrap();
        let told = String::from_utf8_lossy(&done.stdout);
        assert!(done.status.success() && told.contains("1 passed"), "{told}");
        return;
    }
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            troupe_actors::isolate().unwrap();
            tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(case());
        });
        thread.join().unwrap();
    });
}

fn small_disk(at: &Path) {
    fs::create_dir(at).unwrap();
    mount("cache", at, "tmpfs", MountFlags::empty(), c"mode=0700,size=1m").unwrap();
}

fn is_there(path: &Path) -> bool {
    fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_some())
}

#[test]
fn on_a_full_disk_programs_run_from_memory_until_there_is_room() {
    let fixture = Fixture::scripted(COUNTED);
    let disk = fixture.settings.cache_dir.clone();
    with_own_mounts("on_a_full_disk_programs_run_from_memory_until_there_is_room", async || {
        small_disk(&disk);
        let ballast = disk.join("ballast");
        let mut file = File::create(&ballast).unwrap();
        while file.write_all(&[1; 4096]).is_ok() {}
        load(&fixture, 1).await;
        load(&fixture, 1).await;
        assert_eq!(fixture.runs(), 2);
        assert_eq!(fixture.entries().len(), 1, "{:?}", fixture.entries());
        fs::remove_file(&ballast).unwrap();
        drop(file);
        load(&fixture, 1).await;
        load(&fixture, 1).await;
        assert_eq!(fixture.runs(), 3);
    });
    assert!(!is_there(&disk), "the mount was not the test's own");
}

#[test]
fn on_a_read_only_disk_entries_are_found_and_others_run_from_memory() {
    let fixture = Fixture::scripted(COUNTED);
    let disk = fixture.settings.cache_dir.clone();
    with_own_mounts("on_a_read_only_disk_entries_are_found_and_others_run_from_memory", async || {
        small_disk(&disk);
        load(&fixture, 1).await;
        mount_remount(&disk, MountFlags::RDONLY, c"").unwrap();
        load(&fixture, 1).await;
        assert_eq!(fixture.runs(), 1);
        load(&fixture, 2).await;
        load(&fixture, 2).await;
        assert_eq!(fixture.runs(), 3);
        assert_eq!(fixture.entries().len(), 1);
    });
}

#[test]
fn a_disk_that_forbids_code_is_copied_from() {
    let fixture = Fixture::scripted(COUNTED);
    let disk = fixture.settings.cache_dir.clone();
    with_own_mounts("a_disk_that_forbids_code_is_copied_from", async || {
        fs::create_dir(&disk).unwrap();
        mount("cache", &disk, "tmpfs", MountFlags::NOEXEC, c"mode=0700").unwrap();
        load(&fixture, 1).await;
        load(&fixture, 1).await;
        assert_eq!(fixture.runs(), 1);
    });
}
