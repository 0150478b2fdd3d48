//! Whether pages of this process can leave memory: then the pool must not trust a scan for present pages.
//!
//! Sticky: once swap was seen, slots are cleaned the slow way for the rest of the process's life, because a page that
//! went out before may still be out. A thread waits for the kernel to tell of a change (`/proc/swaps` can be polled).

use std::fs::File;
use std::io::{Read, Seek};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use rustix::event::{PollFd, PollFlags, poll};

use super::pool;

const SWAPS: &str = "/proc/swaps";
/// Pages that move between the nodes of a large machine are not present for a moment, as if they were swapped.
const BALANCING: &str = "/proc/sys/kernel/numa_balancing";

/// Tells whether the fast way is safe.
#[derive(Debug, Clone)]
pub struct Watch {
    unsafe_now: Arc<AtomicBool>,
}

impl Watch {
    /// The watch of the process, started by the first who asks.
    pub fn get() -> &'static Self {
        static WATCH: OnceLock<Watch> = OnceLock::new();
        WATCH.get_or_init(Self::start)
    }

    /// No page of ours can leave memory, as far as the kernel told until now.
    pub fn is_resident(&self) -> bool {
        !self.unsafe_now.load(Ordering::Acquire)
    }

    fn start() -> Self {
        let watch = Self { unsafe_now: Arc::default() };
        let reason = if !pool::can_scan() {
            Some("the kernel cannot scan for written pages (Linux 6.7 can)")
        } else if pages_move_between_nodes() {
            Some("automatic NUMA balancing is on")
        } else {
            watch.follow().err()
        };
        if let Some(reason) = reason {
            tracing::info!(reason, "instances are cleaned by remapping: requests cost more");
            watch.unsafe_now.store(true, Ordering::Release);
        }
        watch
    }

    /// Looks once, then for ever, on a thread that sleeps in between.
    fn follow(&self) -> Result<(), &'static str> {
        const UNREADABLE: &str = "/proc/swaps cannot be read";
        let mut file = File::open(SWAPS).map_err(|_| UNREADABLE)?;
        if is_swap_active(&mut file).map_err(|_| UNREADABLE)? {
            return Err("swap is active");
        }
        let flag = Arc::clone(&self.unsafe_now);
        let thread = std::thread::Builder::new().name("swap".into()).stack_size(64 << 10).spawn(move || {
            loop {
                let changed = poll(&mut [PollFd::new(&file, PollFlags::PRI)], None);
                match changed.map_err(std::io::Error::from).and_then(|_| is_swap_active(&mut file)) {
                    Ok(false) => {}
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                    Ok(true) | Err(_) => break,
                }
            }
            flag.store(true, Ordering::Release);
            tracing::warn!("swap was switched on: instances are cleaned by remapping from now on, requests cost more");
        });
        thread.map(drop).map_err(|_| "no thread can be had to watch for swap")
    }
}

/// The table has a line of headings, then one for each area.
fn is_swap_active(file: &mut File) -> std::io::Result<bool> {
    let mut text = String::new();
    file.rewind()?;
    file.read_to_string(&mut text)?;
    Ok(text.lines().nth(1).is_some())
}

fn pages_move_between_nodes() -> bool {
    std::fs::read_to_string(BALANCING).is_ok_and(|text| text.trim() != "0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn swap_is_told_from_the_table() {
        let mut file = tempfile::tempfile().unwrap();
        let write = |file: &mut File, text: &str| std::io::Write::write_all(file, text.as_bytes()).unwrap();
        write(&mut file, "Filename\t\tType\t\tSize\t\tUsed\t\tPriority\n");
        assert!(!is_swap_active(&mut file).unwrap());
        write(&mut file, "/swapfile\tfile\t1048572\t0\t-2\n");
        assert!(is_swap_active(&mut file).unwrap());
    }
}
