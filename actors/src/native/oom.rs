//! Tells when the kernel kills in a container for want of memory.
//!
//! The kernel says when to look (an eventfd in version 1 of cgroups, a changed file in version 2), the counter of kills
//! says whether. It is read once more when the container has ended, so that the word comes before the exit in any case.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::inotify;
use tokio::io::Interest;
use tokio_util::sync::CancellationToken;

use super::cgroup::Cgroup;
use crate::ContainerId;
use crate::event::{EventKind, Events};
use crate::stdio::watched;

/// Watches one container.
#[derive(Debug)]
pub struct Watch {
    id: ContainerId,
    cgroup: Cgroup,
    events: Events,
    told: AtomicU64,
}

impl Watch {
    /// Begins, on the runtime of the caller, until `closing`.
    pub fn begin(id: ContainerId, cgroup: Cgroup, events: Events, closing: CancellationToken) -> Arc<Self> {
        let watch = Arc::new(Self { id, cgroup, events, told: AtomicU64::new(0) });
        let task = Arc::clone(&watch);
        drop(tokio::spawn(async move {
            tokio::select! {
                followed = task.follow() => if let Err(error) = followed {
                    tracing::debug!(container = %task.id, %error, "its memory is looked at when it ends only");
                },
                () = closing.cancelled() => {}
            }
        }));
        watch
    }

    /// Reads the counter; tells once for each time it has grown. Some microseconds.
    pub fn look(&self) {
        let kills = self.cgroup.oom_kills();
        if self.told.fetch_max(kills, Ordering::Relaxed) < kills {
            tracing::warn!(container = %self.id, kills, "out of memory");
            self.events.tell(&self.id, EventKind::OutOfMemory);
        }
    }

    async fn follow(&self) -> io::Result<()> {
        let notice = watched(self.notice()?, Interest::READABLE).map_err(|e| e.into_parts().1)?;
        let mut buffer = [0; 4096];
        loop {
            let mut ready = notice.readable().await?;
            if let Ok(read) = ready.try_io(|notice| Ok(rustix::io::read(notice.get_ref(), &mut buffer)?)) {
                read?;
                self.look();
                // Gone with the container: nothing more will come, and version 1 would say so for ever.
                let Some((folder, file)) = self.cgroup.oom_file() else { return Ok(()) };
                if !folder.join(file).exists() {
                    return Ok(());
                }
            }
        }
    }

    /// What becomes readable when it is time to look.
    fn notice(&self) -> io::Result<OwnedFd> {
        let (folder, file) = self.cgroup.oom_file().ok_or(io::ErrorKind::NotFound)?;
        match &self.cgroup {
            Cgroup::V1(_) => {
                let notice = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
                let control = std::fs::File::open(folder.join(file))?;
                let order = format!("{} {}", notice.as_raw_fd(), control.as_raw_fd());
                std::fs::write(folder.join("cgroup.event_control"), order)?;
                Ok(notice)
            }
            Cgroup::V2(_) => {
                let notice = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
                inotify::add_watch(&notice, folder.join(file), inotify::WatchFlags::MODIFY)?;
                Ok(notice)
            }
        }
    }
}
