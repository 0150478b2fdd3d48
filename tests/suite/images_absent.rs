//! A containerd that is slow, hangs, hangs up or is not there while a module is read from it. The container's creation
//! fails in time and says so, the process and its other containers go on, and the next creation is a new attempt.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use containerd_shim_protos::ttrpc::{self, Code};

use crate::common::api::Api;
use crate::common::containerd::Containerd;
use crate::common::shim::{self, Shim, Task, expect_code};
use crate::common::{Outcome, SOON, guests, proc, wait};

pub const CASES: crate::common::Cases = &[("a_containerd_that_stops_in_the_middle", in_the_middle)];

pub const BARE: crate::common::BareCases = &[
    ("files_need_no_grpc", files_need_no_grpc),
    ("a_containerd_that_is_not_there_is_named", absent),
    ("a_containerd_that_hangs_is_given_up", hangs),
    ("a_containerd_that_hangs_up_is_an_error", hangs_up),
    ("a_containerd_that_talks_nonsense_is_an_error", nonsense),
    ("leaving_does_not_wait_for_containerd", leaving),
];

const IMAGE: &str = "test.local/large:latest";
const MIB: u64 = 1 << 20;

/// What lies between a shim and containerd: lets through so many bytes of the answers, then hangs, or hangs up.
#[derive(Default)]
struct Proxy {
    left: AtomicU64,
    hangs: AtomicBool,
}

impl Proxy {
    fn start(self: &Arc<Self>, shim: &Shim, containerd: PathBuf) -> Outcome {
        let (listener, proxy) = (UnixListener::bind(shim.folder().join("c.sock"))?, Arc::clone(self));
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = UnixStream::connect(&containerd) else { continue };
                let (Ok(client_in), Ok(server_in)) = (client.try_clone(), server.try_clone()) else { continue };
                thread::spawn(move || drop(std::io::copy(&mut &client_in, &mut &server_in)));
                let proxy = Arc::clone(&proxy);
                thread::spawn(move || proxy.answers(&server, &client));
            }
        });
        Ok(())
    }

    fn answers(&self, mut server: &UnixStream, mut client: &UnixStream) {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(read @ 1..) = server.read(&mut buffer) {
            // Slow enough to be in the middle for a while.
            thread::sleep(Duration::from_millis(1));
            let left = self.left.load(Ordering::SeqCst);
            if left < read as u64 && self.hangs.load(Ordering::SeqCst) {
                // Until the other side gives up.
                let _ = client.read(&mut buffer);
                break;
            }
            if left < read as u64 || client.write_all(&buffer[..read]).is_err() {
                break;
            }
            self.left.store(left - read as u64, Ordering::SeqCst);
        }
        let _ = (client.shutdown(Shutdown::Both), server.shutdown(Shutdown::Both));
    }

    fn allow(&self, bytes: u64, hangs: bool) {
        self.left.store(bytes, Ordering::SeqCst);
        self.hangs.store(hangs, Ordering::SeqCst);
    }
}

/// A module of some MiB: the guest, and a section that nobody reads.
fn large() -> Result<Vec<u8>> {
    let mut module = fs::read(guests::built("kit.wasm")?)?;
    let mut size = 4 * MIB;
    module.push(0);
    let content = size;
    while size >= 128 {
        module.push((size % 128) as u8 | 128);
        size /= 128;
    }
    module.push(size as u8);
    // A name of no characters, and the rest.
    module.resize(module.len() + content as usize, 0);
    Ok(module)
}

fn in_the_middle(containerd: &Containerd) -> Outcome {
    let api = Api::connect(containerd, "bare")?;
    api.artifact(IMAGE, &[("kit.wasm", &large()?)])?;
    let shim = fresh(&format!("middle-{}", containerd.version))?;
    let proxy = Arc::new(Proxy::default());
    proxy.start(&shim, containerd.socket())?;
    let plan = api.container(IMAGE, &["/"]);
    let record = plan.record()?;
    let words = ["/", "exit", "3"].map(str::to_owned);
    let task = shim.task(&shim.bundle_of(&plan.id, &shim::spec(&words))?)?;
    let cut = |words: &str| expect_code("create", task.create(), Code::UNKNOWN, words);
    // After the container's record, in the content, and once more: nothing of the attempt before is left.
    let (looking, reading) = ("the image's layers cannot be looked at: ", "read the image's content from containerd: ");
    for (bytes, words) in [(0, looking), (300, looking), (MIB, reading), (3 * MIB, reading)] {
        proxy.allow(bytes, false);
        cut(words)?;
    }
    let began = Instant::now();
    proxy.allow(2 * MIB, true);
    cut("read the image's content from containerd: no answer within 10 s")?;
    ensure!(began.elapsed() < SOON, "{:?}", began.elapsed());
    proxy.allow(u64::MAX, false);
    task.create()?;
    task.start()?;
    ensure!(task.wait()? == 3);
    task.delete()?;
    drop(task);
    record.delete_record()?;
    api.client.expect_empty()?;
    shim.expect_end()
}

/// A bare shim whose containerd does this with whoever asks; counts them.
fn asked(shim: &Shim, act: impl Fn(UnixStream) + Send + 'static) -> Result<Arc<AtomicUsize>> {
    let count = Arc::new(AtomicUsize::new(0));
    let (listener, seen) = (UnixListener::bind(shim.folder().join("c.sock"))?, Arc::clone(&count));
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            seen.fetch_add(1, Ordering::SeqCst);
            act(stream);
        }
    });
    Ok(count)
}

fn fresh(name: &str) -> Result<Shim> {
    Shim::new(&format!("img-{name}"))
}

/// A container without its module.
fn lacking(shim: &Shim, id: &str) -> Result<Task> {
    shim.task(&shim.bundle_of(id, &shim::spec(&["/none.wasm".to_owned()]))?)
}

fn expect_refusal(task: &Task, words: &[&str]) -> Outcome {
    for word in words {
        expect_code("create", task.create(), Code::UNKNOWN, word)?;
    }
    Ok(())
}

fn files_need_no_grpc() -> Outcome {
    let shim = fresh("files")?;
    let count = asked(&shim, drop)?;
    let task = shim.running("a", &guests::built("kit.wasm")?, &["exit", "3"])?;
    ensure!(task.wait()? == 3);
    task.delete()?;
    drop(task);
    ensure!(count.load(Ordering::SeqCst) == 0, "containerd was asked {count:?} times for nothing");
    // It would have been seen.
    ensure!(lacking(&shim, "b")?.create().is_err() && count.load(Ordering::SeqCst) > 0);
    shim.expect_end()
}

fn absent() -> Outcome {
    let shim = fresh("absent")?;
    let task = lacking(&shim, "a")?;
    let socket = shim.folder().join("c.sock").display().to_string();
    expect_refusal(
        &task,
        &[
            "/none.wasm: the container has no root filesystem",
            &format!("connect to containerd at {socket}: No such file"),
        ],
    )?;
    fs::write(task.folder.join("rootfs/other"), "")?;
    expect_refusal(&task, &["/none.wasm: no such file in the image's root filesystem"])?;
    drop(task);
    shim.expect_end()
}

/// The others do not wait with it.
fn hangs() -> Outcome {
    let shim = fresh("hangs")?;
    let held = Mutex::new(Vec::new());
    asked(&shim, move |stream| held.lock().unwrap_or_else(PoisonError::into_inner).push(stream))?;
    let slow = lacking(&shim, "slow")?;
    let waiting = thread::spawn(move || {
        let began = Instant::now();
        (expect_code("create", slow.create(), Code::UNKNOWN, "no answer within 10 s"), began.elapsed())
    });
    let began = Instant::now();
    let quick = shim.running("quick", &guests::built("kit.wasm")?, &["exit", "3"])?;
    ensure!(quick.wait()? == 3);
    quick.delete()?;
    drop(quick);
    ensure!(!waiting.is_finished(), "the other did not hang, or this took {:?}", began.elapsed());
    let Ok((refused, took)) = waiting.join() else { bail!("the waiting thread panicked") };
    refused?;
    ensure!((Duration::from_secs(9)..SOON).contains(&took), "{took:?}");
    shim.expect_end()
}

fn hangs_up() -> Outcome {
    let shim = fresh("hangs-up")?;
    asked(&shim, |mut stream| drop(stream.read(&mut [0; 16])))?;
    expect_refusal(&lacking(&shim, "a")?, &["the image's layers cannot be looked at: "])?;
    shim.expect_end()
}

fn nonsense() -> Outcome {
    let shim = fresh("nonsense")?;
    asked(&shim, |mut stream| drop(stream.write_all(&b"220 mail.example.org ESMTP\r\n".repeat(1000))))?;
    expect_refusal(&lacking(&shim, "a")?, &["the image's layers cannot be looked at: "])?;
    shim.expect_end()
}

fn leaving() -> Outcome {
    let shim = fresh("leaving")?;
    let held = Mutex::new(Vec::new());
    let count = asked(&shim, move |stream| held.lock().unwrap_or_else(PoisonError::into_inner).push(stream))?;
    let task = lacking(&shim, "a")?;
    let waiting = thread::spawn(move || task.create());
    wait::until_true("containerd to be asked", SOON, || Ok(count.load(Ordering::SeqCst) > 0))?;
    let began = Instant::now();
    proc::signal(shim.daemon()?, rustix::process::Signal::TERM)?;
    wait::until_true("the shim to leave", SOON, || Ok(shim.daemons().is_empty()))?;
    ensure!(began.elapsed() < Duration::from_secs(6), "it waited {:?}", began.elapsed());
    let created: Option<ttrpc::Result<_>> = waiting.join().ok();
    ensure!(created.is_some_and(|created| created.is_err()), "a container was made by a process that left");
    shim.expect_end()
}
