//! Where a container may send requests: the `OUTGOING` setting.
//!
//! ```text
//! all | none | api.example.com, *.example.com, 10.0.0.1:8080, [::1]:80
//! ```
//! A host without a port allows every port; `*.` stands for one label or more, not for none. Pure: names are compared as
//! the guest wrote them, before any look-up, so a name that is not in the list is not even asked for. An address that a
//! listed name resolves to needs no entry of its own.

use std::net::IpAddr;
use std::str::FromStr;

/// Longest host name of the DNS.
const MAX_NAME: usize = 253;

/// Where a container may send requests.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum OutgoingPolicy {
    /// Anywhere.
    #[default]
    All,
    /// Nowhere.
    None,
    /// To these only.
    Listed(Vec<Destination>),
}

/// One entry of the list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Destination {
    host: Host,
    /// `None` is every port.
    port: Option<u16>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Host {
    /// In lower case, without a dot at the end.
    Name(String),
    /// `*.example.com`, kept as `.example.com`.
    Below(String),
    Address(IpAddr),
}

/// A value of the setting that is none, in a sentence that quotes it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{item:?} in {value:?} {why}; expected all, none, or a list of hosts such as api.example.com, *.example.com:443, 10.0.0.1"
)]
pub struct NotAPolicy {
    value: String,
    item: String,
    why: &'static str,
}

impl OutgoingPolicy {
    /// Whether a request to `port` of `host` may be sent; `host` as it stands in a URI.
    pub fn allows(&self, host: &str, port: u16) -> bool {
        match self {
            Self::All => true,
            Self::None => false,
            Self::Listed(list) => {
                let host = Host::literal(host);
                list.iter().any(|entry| entry.port.is_none_or(|only| only == port) && entry.host.covers(&host))
            }
        }
    }
}

impl FromStr for OutgoingPolicy {
    type Err = NotAPolicy;

    fn from_str(value: &str) -> Result<Self, NotAPolicy> {
        match value.trim().to_ascii_lowercase().as_str() {
            "all" => return Ok(Self::All),
            "none" => return Ok(Self::None),
            _ => {}
        }
        let items = value.split(',').map(str::trim);
        let entries = items.map(|item| {
            destination(item).map_err(|why| NotAPolicy { value: value.to_owned(), item: item.to_owned(), why })
        });
        entries.collect::<Result<_, _>>().map(Self::Listed)
    }
}

impl Host {
    /// A host of a URI: what looks like an address is one (`[::1]` is `[0:0::1]`), the rest is a name.
    fn literal(host: &str) -> Self {
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        match bare.parse::<IpAddr>() {
            Ok(address) => Self::Address(address.to_canonical()),
            Err(_) => Self::Name(bare.strip_suffix('.').unwrap_or(bare).to_ascii_lowercase()),
        }
    }

    fn covers(&self, host: &Self) -> bool {
        match (self, host) {
            (Self::Below(suffix), Self::Name(name)) => name.strip_suffix(suffix).is_some_and(|rest| !rest.is_empty()),
            (pattern, host) => pattern == host,
        }
    }
}

fn destination(item: &str) -> Result<Destination, &'static str> {
    if item.is_empty() {
        return Err("is empty");
    }
    if item.contains('/') {
        return Err("is neither a host nor a host and a port");
    }
    if matches!(item.to_ascii_lowercase().as_str(), "all" | "none" | "*") {
        return Err("cannot stand in a list");
    }
    if let Ok(address) = item.parse::<IpAddr>() {
        return Ok(Destination { host: Host::Address(address.to_canonical()), port: None });
    }
    let (host, port) = match item.rsplit_once(':') {
        Some((host, port)) => (host, Some(parse_port(port).ok_or("has no port from 1 to 65535 behind the colon")?)),
        None => (item, None),
    };
    let host = match (host.strip_prefix("*."), host.strip_prefix('[')) {
        (Some(domain), _) => Host::Below(format!(".{}", name(domain)?)),
        (None, Some(_)) => match Host::literal(host) {
            address @ Host::Address(_) => address,
            Host::Name(_) | Host::Below(_) => return Err("has no address between the brackets"),
        },
        (None, None) => match Host::literal(host) {
            address @ Host::Address(IpAddr::V4(_)) => address,
            Host::Address(IpAddr::V6(_)) => return Err("needs brackets around the address before a port"),
            Host::Name(_) | Host::Below(_) => Host::Name(name(host)?),
        },
    };
    Ok(Destination { host, port })
}

fn parse_port(text: &str) -> Option<u16> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    text.parse().ok().filter(|port| digits && *port != 0)
}

/// A host name in the form in which names are compared.
fn name(text: &str) -> Result<String, &'static str> {
    let text = text.strip_suffix('.').unwrap_or(text);
    if !text.is_ascii() {
        return Err("is not ASCII; write the name as it stands in the DNS (xn--…)");
    }
    let fits = |label: &str| {
        let letters = label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
        (1..=63).contains(&label.len()) && letters && !label.starts_with('-') && !label.ends_with('-')
    };
    if text.len() > MAX_NAME || !text.split('.').all(fits) {
        return Err("is not a host name");
    }
    Ok(text.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(text: &str) -> OutgoingPolicy {
        text.parse().unwrap()
    }

    #[test]
    fn all_and_none_are_words() {
        for text in ["all", "ALL", " all "] {
            assert_eq!(policy(text), OutgoingPolicy::All);
        }
        assert_eq!(OutgoingPolicy::default(), OutgoingPolicy::All);
        assert!(policy("all").allows("anything.example", 1));
        assert!(!policy("none").allows("anything.example", 80));
    }

    #[test]
    fn a_list_allows_what_it_names() {
        let list = policy("api.example.com, *.Example.ORG.:443,10.0.0.1:8080, [2001:db8::1]:80, ::1,localhost");
        for (host, port) in [
            ("api.example.com", 80),
            ("API.Example.Com.", 65535),
            ("a.example.org", 443),
            ("A.b.example.org", 443),
            ("10.0.0.1", 8080),
            ("[::ffff:10.0.0.1]", 8080),
            ("[2001:DB8:0::1]", 80),
            ("[::1]", 7),
            ("localhost", 3000),
        ] {
            assert!(list.allows(host, port), "{host}:{port}");
        }
        for (host, port) in [
            ("example.com", 80),
            ("x.api.example.com", 80),
            ("api.example.com.evil.test", 80),
            ("example.org", 443),
            (".example.org", 443),
            ("badexample.org", 443),
            ("a.example.org", 80),
            ("10.0.0.1", 80),
            ("010.0.0.1", 8080),
            ("167772161", 8080),
            ("[2001:db8::1]", 443),
            ("127.0.0.1", 3000),
            ("", 80),
        ] {
            assert!(!list.allows(host, port), "{host}:{port}");
        }
    }

    #[test]
    fn what_is_no_policy_is_quoted() {
        for (text, item, words) in [
            ("", "\"\"", "is empty"),
            ("a.test,,b.test", "\"\" in \"a.test,,b.test\"", "is empty"),
            ("a.test,all", "\"all\"", "cannot stand in a list"),
            ("*", "\"*\"", "cannot stand in a list"),
            ("https://a.test", "\"https://a.test\"", "neither a host"),
            ("10.0.0.0/8", "\"10.0.0.0/8\"", "neither a host"),
            ("a.test:http", "\"a.test:http\"", "no port"),
            ("a.test:0", "\"a.test:0\"", "no port"),
            ("a.test:+80", "\"a.test:+80\"", "no port"),
            ("a.test:", "\"a.test:\"", "no port"),
            ("[::1", "\"[::1\"", "between the brackets"),
            ("[a.test]:80", "\"[a.test]:80\"", "between the brackets"),
            ("a.*.test", "\"a.*.test\"", "not a host name"),
            ("*.", "\"*.\"", "not a host name"),
            ("-a.test", "\"-a.test\"", "not a host name"),
            ("a b.test", "\"a b.test\"", "not a host name"),
            ("b\u{fc}cher.test", "\"bücher.test\"", "not ASCII"),
            ("1:2:3:4:5:6:7:8:443", "\"1:2:3:4:5:6:7:8:443\"", "needs brackets"),
        ] {
            let error = text.parse::<OutgoingPolicy>().unwrap_err().to_string();
            assert!(error.contains(item) && error.contains(words), "{error}");
            assert!(error.contains("expected all, none, or"), "{error}");
        }
    }
}
