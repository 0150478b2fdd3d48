//! The settings of one server: what a container, a pod or a runtime class may set, each with its unit and default.
//!
//! ```text
//! environment WASMTIME_HTTP_PROXY_REQUEST_TIMEOUT=5s     (hidden from the guest)
//! annotation  troupe.dev/http-request-timeout: 5s         else
//! option      http_request_timeout = "5s"                 else the default
//! ```
//! Pure. All mistakes are told at once, each with the name under which the value was set.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::time::Duration;

use crate::guest::{Bounds, Reuse};
use crate::outgoing::OutgoingPolicy;
use crate::units::{parse_bytes, parse_duration};

const VARIABLE: &str = "WASMTIME_HTTP_PROXY_";
/// How an older shim spelt the backlog.
const MISSPELT_BACKLOG: &str = "WASMTIME_HTTP_BACKLOG";
const ANNOTATION: &str = "troupe.dev/http-";
const OPTION: &str = "http_";

/// How one server behaves.
#[derive(Debug, Clone, PartialEq)]
pub struct HttpSettings {
    /// Where it listens; port 0 lets the system choose.
    pub socket_addr: SocketAddr,
    /// Connections that the kernel holds until they are accepted.
    pub backlog: u32,
    /// How long a request may take, from its head to the last byte of the response; `None` is as long as it likes.
    pub request_timeout: Option<Duration>,
    /// How long a client may take for the head of a request.
    pub header_timeout: Duration,
    /// How long a connection may stay without any progress.
    pub idle_timeout: Duration,
    /// How long requests in flight have to end after SIGTERM.
    pub drain_timeout: Duration,
    /// Connections at once; further ones wait in the backlog.
    pub max_connections: usize,
    /// Requests at once; further ones are refused with 503.
    pub max_concurrent_requests: usize,
    /// Largest request body, in bytes; more is 413.
    pub max_body: u64,
    /// Largest head of a request, in bytes; more is 431.
    pub max_header_size: usize,
    /// Most header fields of a request; more is 431.
    pub max_headers: usize,
    /// Requests that one instance serves, one after another.
    pub instance_reuse: u32,
    /// How long an instance waits for its next request.
    pub instance_idle_timeout: Duration,
    /// Where the guest may send requests to.
    pub outgoing: OutgoingPolicy,
    /// A line in the container's log for each request.
    pub access_log: bool,
    /// Each line of the guest's output starts with the id of its request.
    pub log_request_id: bool,
    /// How the guest is kept inside its memory.
    pub bounds_checks: Bounds,
}

impl Default for HttpSettings {
    fn default() -> Self {
        Self {
            socket_addr: SocketAddr::from(([0, 0, 0, 0], 8080)),
            backlog: 100,
            request_timeout: Some(Duration::from_secs(60)),
            header_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(60),
            // A little less than the 30 s after which Kubernetes kills.
            drain_timeout: Duration::from_secs(25),
            max_connections: 1024,
            max_concurrent_requests: 256,
            max_body: 64 << 20,
            max_header_size: 64 << 10,
            max_headers: 100,
            instance_reuse: 1,
            instance_idle_timeout: Duration::from_secs(5),
            outgoing: OutgoingPolicy::default(),
            access_log: false,
            log_request_id: false,
            bounds_checks: Bounds::default(),
        }
    }
}

/// The names, as in the environment; the README's table has the same order.
const NAMES: [&str; 17] = [
    "SOCKET_ADDR",
    "BACKLOG",
    "REQUEST_TIMEOUT",
    "HEADER_TIMEOUT",
    "IDLE_TIMEOUT",
    "DRAIN_TIMEOUT",
    "MAX_CONNECTIONS",
    "MAX_CONCURRENT_REQUESTS",
    "MAX_BODY",
    "MAX_HEADER_SIZE",
    "MAX_HEADERS",
    "INSTANCE_REUSE",
    "INSTANCE_IDLE_TIMEOUT",
    "OUTGOING",
    "ACCESS_LOG",
    "LOG_REQUEST_ID",
    "BOUNDS_CHECKS",
];

impl HttpSettings {
    /// How long instances live.
    pub fn reuse(&self) -> Reuse {
        Reuse {
            requests: self.instance_reuse,
            idle: self.instance_idle_timeout,
            patience: self.request_timeout,
            limit: self.max_concurrent_requests,
        }
    }

    /// The settings of a container, from the farthest source to the nearest.
    ///
    /// # Errors
    /// A sentence with every wrong value and the name it was given under.
    pub fn resolve(
        options: &BTreeMap<String, String>,
        annotations: &HashMap<String, String>,
        env: &[(String, String)],
    ) -> Result<Self, String> {
        let mut settings = Self::default();
        let mut mistakes = Vec::new();
        for (source, value) in options.iter().chain(annotations).chain(env.iter().map(|(name, value)| (name, value))) {
            if let Some(name) = setting(source)
                && let Err(why) = settings.set(&name, value)
            {
                mistakes.push(format!("{source}={value:?}: {why}"));
            }
        }
        mistakes.sort();
        if mistakes.is_empty() { Ok(settings) } else { Err(mistakes.join("; ")) }
    }

    /// Whether an environment variable is a setting, which the guest does not see.
    pub fn is_variable(name: &str) -> bool {
        name.starts_with(VARIABLE) || name == MISSPELT_BACKLOG
    }

    /// Checks one runtime option. `None` when the key is none of a server's.
    ///
    /// # Errors
    /// What is wrong with the value.
    pub fn check_option(key: &str, value: &str) -> Option<Result<(), String>> {
        key.starts_with(OPTION).then(|| setting(key).unwrap_or_default()).map(|name| Self::default().set(&name, value))
    }

    /// The keys of the runtime options, in order.
    pub fn option_keys() -> impl Iterator<Item = String> {
        NAMES.iter().map(|name| format!("{OPTION}{}", name.to_ascii_lowercase()))
    }

    fn set(&mut self, name: &str, text: &str) -> Result<(), String> {
        const MILLI: Duration = Duration::from_millis(1);
        let text = text.trim();
        match name {
            "SOCKET_ADDR" => self.socket_addr = address(text)?,
            "BACKLOG" => self.backlog = number(text, 1, 65_535)?,
            "REQUEST_TIMEOUT" => {
                self.request_timeout = Some(duration(text, Duration::ZERO)?).filter(|time| !time.is_zero());
            }
            "HEADER_TIMEOUT" => self.header_timeout = duration(text, MILLI)?,
            "IDLE_TIMEOUT" => self.idle_timeout = duration(text, MILLI)?,
            "DRAIN_TIMEOUT" => self.drain_timeout = duration(text, Duration::ZERO)?,
            "MAX_CONNECTIONS" => self.max_connections = number(text, 1, 1_000_000)?,
            "MAX_CONCURRENT_REQUESTS" => self.max_concurrent_requests = number(text, 1, 1_000_000)?,
            "MAX_BODY" => self.max_body = bytes(text, 0, u64::MAX)?,
            "MAX_HEADER_SIZE" => self.max_header_size = bytes(text, 8 << 10, 1 << 20)? as usize,
            "MAX_HEADERS" => self.max_headers = number(text, 1, 1000)?,
            "INSTANCE_REUSE" => self.instance_reuse = number(text, 1, u32::MAX.into())?,
            "INSTANCE_IDLE_TIMEOUT" => self.instance_idle_timeout = duration(text, MILLI)?,
            "OUTGOING" => self.outgoing = text.parse().map_err(|e| format!("{e}"))?,
            "ACCESS_LOG" => self.access_log = switch(text)?,
            "LOG_REQUEST_ID" => self.log_request_id = switch(text)?,
            "BOUNDS_CHECKS" => self.bounds_checks = bounds(text)?,
            _ => return Err(format!("there is no such setting; there are {}", NAMES.join(", "))),
        }
        Ok(())
    }
}

/// The name in capitals of a setting that is given under this name in any of the three sources.
fn setting(source: &str) -> Option<String> {
    if source == MISSPELT_BACKLOG {
        return Some("BACKLOG".into());
    }
    let variable = source.strip_prefix(VARIABLE).map(str::to_owned);
    let annotation = || source.strip_prefix(ANNOTATION).map(|name| name.replace('-', "_").to_ascii_uppercase());
    let option = || source.strip_prefix(OPTION).map(str::to_ascii_uppercase);
    variable.or_else(annotation).or_else(option)
}

fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| "not an address and port such as 0.0.0.0:8080 or [::]:8080".into())
}

fn number<T: TryFrom<u64>>(text: &str, least: u64, most: u64) -> Result<T, String> {
    let wrong = || format!("not a whole number from {least} to {most}");
    let number = text.parse().ok().filter(|number| (least..=most).contains(number)).ok_or_else(wrong)?;
    T::try_from(number).map_err(|_| wrong())
}

fn duration(text: &str, least: Duration) -> Result<Duration, String> {
    const DAY: Duration = Duration::from_secs(24 * 3600);
    let duration = parse_duration(text).map_err(|e| e.to_string())?;
    if (least..=DAY).contains(&duration) { Ok(duration) } else { Err(format!("not between {least:?} and 24h")) }
}

fn bytes(text: &str, least: u64, most: u64) -> Result<u64, String> {
    let bytes = parse_bytes(text).map_err(|e| e.to_string())?;
    if (least..=most).contains(&bytes) { Ok(bytes) } else { Err(format!("not between {least} and {most} bytes")) }
}

fn switch(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("neither on nor off".into()),
    }
}

fn bounds(text: &str) -> Result<Bounds, String> {
    match text {
        "explicit" => Ok(Bounds::Explicit),
        "guarded" => Ok(Bounds::Guarded),
        _ => Err("neither explicit nor guarded".into()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn env(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    fn of_env(pairs: &[(&str, &str)]) -> Result<HttpSettings, String> {
        HttpSettings::resolve(&BTreeMap::new(), &HashMap::new(), &env(pairs))
    }

    #[test]
    fn names_and_defaults_are_those_of_the_readme() {
        let (_, table) = include_str!("../../../README.md").split_once("| `WASMTIME_HTTP_PROXY_…` |").unwrap();
        let rows: Vec<_> = table.lines().skip(2).take_while(|line| line.starts_with('|')).collect();
        assert_eq!(rows.len(), NAMES.len());
        for (row, name) in rows.iter().zip(NAMES) {
            let cells: Vec<_> = row.split('|').map(|cell| cell.trim().trim_matches('`')).collect();
            assert_eq!(cells[1], name);
            assert_eq!(of_env(&[(&format!("{VARIABLE}{name}"), cells[3])]), Ok(HttpSettings::default()), "{row}");
        }
    }

    #[test]
    fn the_nearest_source_wins() {
        let options =
            BTreeMap::from([("http_idle_timeout", "1s"), ("http_header_timeout", "1s"), ("http_backlog", "1")])
                .into_iter()
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .collect();
        let annotations = HashMap::from([
            ("troupe.dev/http-idle-timeout".to_owned(), "2s".to_owned()),
            ("troupe.dev/http-header-timeout".to_owned(), "2s".to_owned()),
            ("troupe.dev/group".to_owned(), "pod".to_owned()),
        ]);
        let env = env(&[("WASMTIME_HTTP_PROXY_IDLE_TIMEOUT", "3s"), ("PATH", "/bin")]);
        let settings = HttpSettings::resolve(&options, &annotations, &env).unwrap();
        assert_eq!(settings.idle_timeout, Duration::from_secs(3));
        assert_eq!(settings.header_timeout, Duration::from_secs(2));
        assert_eq!(settings.backlog, 1);
        assert_eq!(settings.request_timeout, Some(Duration::from_secs(60)));
    }

    #[test]
    fn every_mistake_is_told_with_its_name() {
        let error = of_env(&[
            ("WASMTIME_HTTP_PROXY_SOCKET_ADDR", "8080"),
            ("WASMTIME_HTTP_PROXY_BACKLOG", "many"),
            ("WASMTIME_HTTP_PROXY_MAX_BODDY", "1"),
            ("WASMTIME_HTTP_PROXY_DRAIN_TIMEOUT", "5"),
        ])
        .unwrap_err();
        for words in [
            "WASMTIME_HTTP_PROXY_SOCKET_ADDR=\"8080\": not an address",
            "WASMTIME_HTTP_PROXY_BACKLOG=\"many\": not a whole number from 1",
            "WASMTIME_HTTP_PROXY_MAX_BODDY=\"1\": there is no such setting",
            "WASMTIME_HTTP_PROXY_DRAIN_TIMEOUT=\"5\": \"5\" is not a duration",
        ] {
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn the_older_spelling_and_no_timeout_are_understood() {
        let settings = of_env(&[
            ("WASMTIME_HTTP_BACKLOG", "7"),
            ("WASMTIME_HTTP_PROXY_REQUEST_TIMEOUT", "0s"),
            ("WASMTIME_HTTP_PROXY_SOCKET_ADDR", "[::1]:0"),
        ])
        .unwrap();
        assert_eq!((settings.backlog, settings.request_timeout), (7, None));
        assert_eq!(settings.socket_addr, "[::1]:0".parse().unwrap());
    }

    #[test]
    fn every_name_can_be_set() {
        for name in NAMES {
            let error = HttpSettings::default().set(name, "?").unwrap_err();
            assert!(!error.contains("no such setting"), "{name}: {error}");
        }
    }

    proptest! {
        #[test]
        fn no_value_is_too_strange(which in 0..NAMES.len(), value: String) {
            let _ = HttpSettings::default().set(NAMES[which], &value);
        }
    }
}
