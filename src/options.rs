//! The runtime options: what an administrator writes under `[...runtimes.wasm.options]` in containerd's configuration.
//!
//! ```text
//! containerd ── Any ──▶ runtimeoptions.v1.Options ──▶ config_path (a TOML file) + config_body (TOML text) ──▶ Options
//!               Any ──▶ runc's or an unknown message ──▶ ignored: many clients send runc's whatever the runtime is
//! ```
//! Invariant: units are types from here on, a key that is set is either understood or an error, and all mistakes are
//! told at once. Called by `start` only; the daemon receives the parsed value through its launch arguments.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use containerd_shim::protos::protobuf::CodedInputStream;
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};
use troupe_actors::{HttpSettings, RuncOptions, Settings, SocketPolicy, parse_bytes, parse_duration};

use crate::group::GroupKind;
use crate::runc_options;

/// The keys of this shim, in the order the README lists them.
const KEYS: [&str; 10] = [
    "group",
    "cache_dir",
    "cache_max_size",
    "idle_timeout",
    "drain_timeout",
    "compile_timeout",
    "compile_memory",
    "max_module_size",
    "sockets",
    "log_level",
];

/// Keys that belong to runc or to CRI, besides those of `runc_options`. People copy a runc runtime's table and change its `runtime_type`; none of these
/// means anything here, so they neither fail nor act. Compared without case, as containerd does.
const FOREIGN_KEYS: [&str; 12] = [
    "TypeUrl",
    "ConfigPath",
    "ConfigBody",
    "ShimCgroup",
    "IoUid",
    "IoGid",
    "CriuPath",
    "CriuImagePath",
    "CriuWorkPath",
    "TaskApiAddress",
    "TaskApiVersion",
    "Runtime",
];

/// More than this is not a configuration; it bounds what `start` reads from a path it was told.
const MAX_CONFIG_FILE: u64 = 1 << 20;

/// Everything a runtime class can set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Options {
    /// How many pods share one process. The annotation `troupe.dev/group` wins over it.
    pub group: GroupKind,
    /// Folder of compiled code, root-only.
    pub cache_dir: PathBuf,
    /// How many bytes that folder may hold before the longest unused entries are evicted.
    pub cache_max_size: u64,
    /// How long the daemon stays after its last container.
    pub idle_timeout: Duration,
    /// How long containers have to end after SIGTERM to the daemon before they are cut off.
    pub drain_timeout: Duration,
    /// How long one compile may take, by the clock.
    pub compile_timeout: Duration,
    /// How much memory one compile may use, in bytes.
    pub compile_memory: u64,
    /// Largest wasm file that is read and compiled, in bytes.
    pub max_module_size: u64,
    /// Whether guests may have sockets.
    pub sockets: SocketPolicy,
    /// What servers are told unless they say otherwise: checked texts, by their keys.
    #[serde(default)]
    pub http: BTreeMap<String, String>,
    /// How runc is called for native containers.
    #[serde(default)]
    pub runc: RuncOptions,
    /// What the daemon logs; without it, containerd's own level decides.
    pub log_level: Option<LogLevel>,
}

/// The level of the daemon's log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

impl Default for Options {
    fn default() -> Self {
        let Settings {
            cache_dir,
            cache_max_size,
            compile_timeout,
            compile_memory,
            max_module_size,
            idle_timeout,
            drain_timeout,
            sockets,
            http,
            runc,
        } = Settings::default();
        Self {
            group: GroupKind::default(),
            cache_dir,
            cache_max_size,
            idle_timeout,
            drain_timeout,
            compile_timeout,
            compile_memory,
            max_module_size,
            sockets,
            http,
            runc,
            log_level: None,
        }
    }
}

impl Options {
    /// Finds the runtime options among what containerd sent along.
    pub fn from_extensions(extensions: &[Any]) -> Result<Self> {
        match extensions.iter().find(|any| is_runtime_options(any)) {
            Some(any) => Self::from_runtime_options(&RuntimeOptions::decode(&any.value)?),
            None => Ok(Self::default()),
        }
    }

    /// What a file of runtime options says, the one that `ConfigPath` names.
    pub fn from_file(path: &Path) -> Result<Self> {
        Self::from_table(&read_config_file(&std::path::absolute(path)?)?)
    }

    /// What the library needs to know; the rest (group, log level) is the edge's own business.
    pub fn settings(&self) -> Settings {
        Settings {
            cache_dir: self.cache_dir.clone(),
            cache_max_size: self.cache_max_size,
            compile_timeout: self.compile_timeout,
            compile_memory: self.compile_memory,
            max_module_size: self.max_module_size,
            idle_timeout: self.idle_timeout,
            drain_timeout: self.drain_timeout,
            sockets: self.sockets,
            http: self.http.clone(),
            runc: self.runc.clone(),
        }
    }

    fn from_runtime_options(message: &RuntimeOptions) -> Result<Self> {
        let mut table = match message.config_path.as_str() {
            "" => Table::new(),
            path => read_config_file(Path::new(path))?,
        };
        // containerd fills the body only when there is no path; a client that sends both means the body to be nearer.
        table.extend(message.config_body.parse::<Table>().map_err(|e| one_line("the runtime options", &e))?);
        Self::from_table(&table)
    }

    fn from_table(table: &Table) -> Result<Self> {
        let mut options = Self::default();
        let mistakes: Vec<String> =
            table.iter().filter_map(|(key, value)| options.set(key, value).err().map(|e| format!("{e:#}"))).collect();
        match mistakes.as_slice() {
            [] => Ok(options),
            [one] => bail!("runtime option {one}"),
            many => bail!("{} wrong runtime options: {}", many.len(), many.join("; ")),
        }
    }

    fn set(&mut self, key: &str, value: &Value) -> Result<()> {
        const HOUR: Duration = Duration::from_secs(3600);
        const MIB: u64 = 1 << 20;
        let named = || format!("`{key}`");
        match key {
            "group" => self.group = string(value).and_then(str::parse).with_context(named)?,
            "cache_dir" => self.cache_dir = absolute_path(value).with_context(named)?,
            "cache_max_size" => self.cache_max_size = bytes(value, MIB, MIB * MIB).with_context(named)?,
            "idle_timeout" => {
                self.idle_timeout = duration(value, Duration::from_millis(100), 24 * HOUR).with_context(named)?;
            }
            "drain_timeout" => self.drain_timeout = duration(value, Duration::ZERO, HOUR).with_context(named)?,
            "compile_timeout" => {
                self.compile_timeout = duration(value, Duration::from_secs(1), HOUR).with_context(named)?;
            }
            "compile_memory" => self.compile_memory = bytes(value, 64 * MIB, MIB * MIB).with_context(named)?,
            "max_module_size" => self.max_module_size = bytes(value, 1024, 4096 * MIB).with_context(named)?,
            "sockets" => self.sockets = string(value).and_then(|text| Ok(text.parse()?)).with_context(named)?,
            "log_level" => {
                self.log_level = Some(
                    LogLevel::deserialize(value.clone())
                        .ok()
                        .context("must be one of error, warn, info, debug, trace")
                        .with_context(named)?,
                );
            }
            runc if runc_options::is_key(runc) => {
                runc_options::set(&mut self.runc, runc, value).with_context(named)?;
            }
            foreign if FOREIGN_KEYS.iter().any(|known| known.eq_ignore_ascii_case(foreign)) => {}
            _ => self.set_http(key, value)?,
        }
        Ok(())
    }
}

impl Options {
    /// A setting of servers, under the name of its environment variable.
    fn set_http(&mut self, key: &str, value: &Value) -> Result<()> {
        let text = match value {
            Value::Integer(number) => number.to_string(),
            other => string(other).with_context(|| format!("`{key}`"))?.to_owned(),
        };
        match HttpSettings::check_option(key, &text) {
            Some(Ok(())) => drop(self.http.insert(key.to_owned(), text)),
            Some(Err(why)) => bail!("`{key}`: {text:?}: {why}"),
            None => {
                let known: Vec<_> = KEYS.into_iter().map(str::to_owned).chain(HttpSettings::option_keys()).collect();
                bail!("`{key}` is unknown; known are {}", known.join(", "));
            }
        }
        Ok(())
    }
}

impl fmt::Display for LogLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        })
    }
}

/// `runtimeoptions.v1.Options`. No crate we use generates it, and it is three strings.
#[derive(Debug, Default)]
struct RuntimeOptions {
    config_path: String,
    config_body: String,
}

impl RuntimeOptions {
    fn decode(value: &[u8]) -> Result<Self> {
        const CONFIG_PATH: u32 = 2 << 3 | 2;
        const CONFIG_BODY: u32 = 3 << 3 | 2;
        let mut message = Self::default();
        let mut input = CodedInputStream::from_bytes(value);
        let mut read = || -> containerd_shim::protos::protobuf::Result<()> {
            while let Some(tag) = input.read_raw_tag_or_eof()? {
                match tag {
                    CONFIG_PATH => message.config_path = input.read_string()?,
                    CONFIG_BODY => message.config_body = input.read_string()?,
                    // Field 1 is `type_url`, CRI's name for the kind of file; fields that do not exist yet are skipped.
                    other => skip_field(&mut input, other)?,
                }
            }
            Ok(())
        };
        read().context("the runtime options are not a valid runtimeoptions.v1.Options message")?;
        Ok(message)
    }
}

fn skip_field(input: &mut CodedInputStream<'_>, tag: u32) -> containerd_shim::protos::protobuf::Result<()> {
    match tag & 7 {
        0 => input.read_raw_varint64().map(drop),
        1 => input.skip_raw_bytes(8),
        2 => input.read_bytes().map(drop),
        5 => input.skip_raw_bytes(4),
        // Groups are long gone from protobuf: whatever follows cannot be understood.
        _ => input.skip_raw_bytes(u32::MAX),
    }
}

/// containerd has kept the package name through all its moves of the Go package (1.6 to 2.x: `runtimeoptions.v1`); the
/// CRI plugin of the years before had it under `cri.`, and `Any::pack` prefixes a host.
fn is_runtime_options(any: &Any) -> bool {
    let name = any.type_url.rsplit('/').next().unwrap_or_default();
    matches!(name, "runtimeoptions.v1.Options" | "cri.runtimeoptions.v1.Options")
}

fn read_config_file(path: &Path) -> Result<Table> {
    let named = || format!("runtime option ConfigPath: cannot read {}", path.display());
    if !path.is_absolute() {
        bail!("runtime option ConfigPath: {} is not an absolute path", path.display());
    }
    // Looked at first, because opening a FIFO would block and a device has no end.
    let metadata = fs::metadata(path).with_context(named)?;
    if !metadata.is_file() {
        bail!("{}: it is not a regular file", named());
    }
    if metadata.len() > MAX_CONFIG_FILE {
        bail!("{}: {} bytes are too many (limit {MAX_CONFIG_FILE})", named(), metadata.len());
    }
    let text = fs::read_to_string(path).with_context(named)?;
    text.parse().map_err(|e| one_line(&path.display().to_string(), &e))
}

/// The TOML parser draws the line and a caret below it; containerd wants one line.
fn one_line(source: &str, error: &toml::de::Error) -> anyhow::Error {
    anyhow::anyhow!("{source}: not valid TOML: {}", error.message().replace('\n', ", "))
}

fn string(value: &Value) -> Result<&str> {
    value.as_str().with_context(|| format!("must be a string, not {}", article(value)))
}

fn article(value: &Value) -> String {
    match value.type_str() {
        name @ ("integer" | "array") => format!("an {name}"),
        name => format!("a {name}"),
    }
}

fn absolute_path(value: &Value) -> Result<PathBuf> {
    let path = PathBuf::from(string(value)?);
    if !path.is_absolute() {
        bail!("{} is not an absolute path", path.display());
    }
    Ok(path)
}

fn duration(value: &Value, least: Duration, most: Duration) -> Result<Duration> {
    let duration = parse_duration(string(value).context("a duration needs a unit, as in \"5s\"")?)?;
    if !(least..=most).contains(&duration) {
        bail!("{duration:?} is out of range ({least:?} to {most:?})");
    }
    Ok(duration)
}

fn bytes(value: &Value, least: u64, most: u64) -> Result<u64> {
    let bytes = match value {
        Value::Integer(number) => u64::try_from(*number).ok().with_context(|| format!("{number} is negative"))?,
        other => parse_bytes(string(other).context("a size is a string such as \"512MiB\", or a number of bytes")?)?,
    };
    if !(least..=most).contains(&bytes) {
        bail!("{bytes} bytes are out of range ({least} to {most})");
    }
    Ok(bytes)
}

#[cfg(test)]
#[path = "options_tests.rs"]
mod tests;
