//! A container that serves HTTP: started on a port of its own, found by what the daemon logs.

use std::collections::HashMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::containerd::Containerd;
use super::ctr::{Client, Container, Run};
use super::{SOON, base, wait};

/// The guest that does what a path says.
pub const WEB: &str = "/web.wasm";

/// Names of the settings' variables begin with it.
pub const PREFIX: &str = "WASMTIME_HTTP_PROXY_";

/// A served container. Dropped, it is killed and removed.
#[derive(Debug)]
pub struct Site<'a> {
    pub container: Container<'a>,
    pub addr: SocketAddr,
    containerd: &'a Containerd,
    log: PathBuf,
    offset: u64,
}

/// `web.wasm` with these settings, by the names without their prefix.
pub fn web<'a>(client: &Client<'a>, settings: &[(&str, &str)]) -> Result<Site<'a>> {
    Site::start(with(client.guest(WEB, &[])?, settings))
}

/// A container with these settings, not yet run.
pub fn with<'a>(run: Run<'a>, settings: &[(&str, &str)]) -> Run<'a> {
    settings.iter().fold(run, |run, (name, value)| run.option("--env", &format!("{PREFIX}{name}={value}")))
}

/// On a port that the system chooses, in the network of the host.
pub fn anywhere(run: Run<'_>) -> Run<'_> {
    with(run.flag("--net-host"), &[("SOCKET_ADDR", "127.0.0.1:0")])
}

impl<'a> Site<'a> {
    /// Starts it and waits until it listens.
    pub fn start(run: Run<'a>) -> Result<Self> {
        let run = anywhere(run);
        let containerd = run.containerd();
        let log = base::folder("logs")?.join(format!("{}-{}", containerd.version, run.id));
        let offset = containerd.log_length();
        let container = run.logged(&log)?;
        Self::of(containerd, container, log, offset)
    }

    /// One that was started already, after containerd's log had this length.
    pub fn of(containerd: &'a Containerd, container: Container<'a>, log: PathBuf, offset: u64) -> Result<Self> {
        let addr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
        let mut site = Self { addr, container, containerd, log, offset };
        let line = site.wait_line("listening")?;
        let addr = line.get("addr").with_context(|| format!("no address in {line:?}"))?;
        site.addr = addr.parse().with_context(|| format!("the address {addr}"))?;
        ensure!(site.addr.port() != 0, "{addr}");
        Ok(site)
    }

    /// What the guest, and the shim on its behalf, wrote so far.
    pub fn log(&self) -> String {
        fs::read(&self.log).map_or_else(|_| String::new(), |bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Waits until the container's log says this.
    pub fn wait_log(&self, text: &str) -> Result<String> {
        wait::until(&format!("{text:?} in the container's log"), SOON, || {
            let log = self.log();
            Ok(log.contains(text).then_some(log))
        })
        .with_context(|| format!("the log is {:?}", self.log()))
    }

    /// Waits until so many lines of the container's log say this; clients on this thread go on meanwhile.
    pub async fn told(&self, text: &str, count: usize) -> Result<()> {
        let told = async {
            while self.log().lines().filter(|line| line.contains(text)).count() < count {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            anyhow::Ok(())
        };
        super::http::soon(&format!("{count} lines {text:?} in the container's log"), told).await
    }

    /// The daemon's lines about this container since it was started.
    pub fn lines(&self) -> Vec<String> {
        let text = self.containerd.whole_log_since(self.offset);
        text.lines().filter(|line| self.is_about(line)).map(str::to_owned).collect()
    }

    /// `container=NAMESPACE/ID`, in quotes or not.
    fn is_about(&self, line: &str) -> bool {
        fields(line).get("container").and_then(|name| name.rsplit('/').next()) == Some(&self.container.id)
    }

    /// Waits for a line of the daemon about this container, and tells its fields.
    pub fn wait_line(&self, word: &str) -> Result<HashMap<String, String>> {
        let found = wait::until(&format!("the daemon to log {word:?}"), SOON, || {
            Ok(self.lines().into_iter().find(|line| line.contains(&format!(" {word}"))))
        })
        .with_context(|| format!("it logged {:?}", self.lines()))?;
        Ok(fields(&found))
    }

    /// Sends a signal and waits for the end, which must have this code. Tells the fields of the line about the drain.
    pub fn drain(&self, signal: &str, code: u64) -> Result<HashMap<String, String>> {
        self.container.kill(signal)?;
        self.drained(code, SOON)
    }

    /// Waits for the end.
    pub fn drained(&self, code: u64, limit: Duration) -> Result<HashMap<String, String>> {
        let exit = self.container.exit_within(limit)?;
        if exit.exit_code() != code {
            bail!("expected code {code}, got {exit:?}; the daemon says {:?}", self.lines());
        }
        self.wait_line("drained")
    }

    /// Anonymous memory of the process it is in, in KiB.
    pub fn memory_kib(&self) -> Result<u64> {
        super::proc::anonymous_kib(self.container.daemon()?)
    }
}

/// The `name=value` of a line; values in quotes may hold blanks.
fn fields(line: &str) -> HashMap<String, String> {
    let mut fields = HashMap::new();
    let mut rest = line;
    while let Some((before, after)) = rest.split_once('=') {
        let name = before.rsplit(' ').next().unwrap_or_default();
        let (value, left) = match after.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"').unwrap_or((quoted, "")),
            None => after.split_once(' ').unwrap_or((after, "")),
        };
        fields.insert(name.to_owned(), value.to_owned());
        rest = left;
    }
    fields
}
