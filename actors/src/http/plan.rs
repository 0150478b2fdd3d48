//! What a server needs to begin, and its life around serving: its streams first, its output's end last.

use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::admission::Slots;
use super::server::{Server, Threads};
use super::settings::HttpSettings;
use super::workers::Workers;
use crate::error::Result;
use crate::guest::{Budget, CpuTime, Environment, Hooks, Host, Outcome, Program, Serving, Stage};
use crate::outgoing::{Client, ClientSettings};
use crate::pod::listen;
use crate::signals::Signals;
use crate::stdio::Stdio;

/// What a server is made of, before it is started.
pub struct Plan {
    /// The container, for the log.
    pub name: String,
    pub settings: HttpSettings,
    pub program: Arc<Program>,
    pub environment: Environment,
    pub stdio: Stdio,
    pub budget: Arc<Budget>,
    pub cpu: Arc<CpuTime>,
    pub client: ClientSettings,
    pub workers: Arc<Workers>,
    pub slots: Arc<Slots>,
}

impl Plan {
    /// Begins to serve, on a worker. `socket` is bound, in the network of the pod; connections may come from here on.
    ///
    /// # Errors
    /// `Host` when the address cannot be listened on.
    pub fn begin(
        self,
        socket: OwnedFd,
        stage: Arc<Stage>,
        signals: watch::Receiver<Signals>,
    ) -> Result<JoinHandle<Outcome>> {
        let listener = listen(socket, self.settings.socket_addr, self.settings.backlog)?;
        let runtime = self.workers.place().map_or_else(|| stage.runtime.clone(), |place| place.runtime.clone());
        Ok(runtime.spawn(self.run(listener, stage, signals)))
    }

    async fn run(self, listener: TcpListener, stage: Arc<Stage>, mut signals: watch::Receiver<Signals>) -> Outcome {
        let streams = match self.stdio.attach() {
            Ok(streams) => streams,
            Err(error) => return Outcome::HostFailed(format!("attach the standard streams: {error}")),
        };
        let host = Host {
            environment: self.environment,
            stdout: Arc::clone(&streams.stdout),
            stderr: Arc::clone(&streams.stderr),
            log_request_id: self.settings.log_request_id,
            budget: self.budget,
            cpu: self.cpu,
            hooks: Hooks::new(Some(Client::new(&self.client))),
        };
        let (reuse, idle) = (self.settings.instance_reuse, self.settings.instance_idle_timeout);
        let serving = Serving::new(self.program, host, reuse, idle);
        let threads = Threads { workers: self.workers, slots: self.slots, stage };
        let server = Server::new(self.name, self.settings, serving, threads, streams.clone());
        let outcome = server.serve(listener, &mut signals).await;
        drop(server);
        // A reader that stalls holds up the end of its own container only; a further signal ends the wait, and one that was
        // cut off is not waited for.
        let is_drained = matches!(outcome, Outcome::Exited(_));
        let enough = signals.wait_for(|signals| !is_drained || signals.count > 1);
        tokio::select! {
            biased;
            () = streams.finish() => {}
            _ = enough => {}
        }
        outcome
    }
}
