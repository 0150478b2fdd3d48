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
        let runtime = self.workers.any().runtime.clone();
        Ok(runtime.spawn(self.run(listener, stage, signals)))
    }

    async fn run(self, listener: TcpListener, stage: Arc<Stage>, mut signals: watch::Receiver<Signals>) -> Outcome {
        let streams = match self.stdio.attach() {
            Ok(streams) => streams,
            Err(error) => return Outcome::HostFailed(format!("attach the standard streams: {error}")),
        };
        let host = Host {
            environment: Arc::new(self.environment),
            stdout: Arc::clone(&streams.stdout),
            stderr: Arc::clone(&streams.stderr),
            log_request_id: self.settings.log_request_id,
            budget: self.budget,
            cpu: self.cpu,
            hooks: Hooks::new(Some(Client::new(&self.client))),
        };
        let serving = Serving::new(self.program, host, self.settings.reuse());
        let threads = Threads { workers: self.workers, slots: self.slots, stage };
        let server = Server::new(self.name, self.settings, serving, threads, streams.clone());
        let (outcome, patience) = server.serve(listener, &mut signals).await;
        let name = server.name().to_owned();
        drop(server);
        // A reader that stalls holds up the end of its own container, but not for ever; a further signal ends the wait.
        tokio::select! {
            biased;
            () = streams.finish() => {}
            _ = signals.wait_for(|signals| signals.count > 1) => {}
            () = tokio::time::sleep(patience) => {
                tracing::warn!(container = %name, "the last of its output is lost: nobody reads it");
            }
        }
        outcome
    }
}
