//! The part behind the `?`: `key=value&key=value`, values percent-encoded where they have to be.
use std::str::FromStr;

use wasip2::http::types::ResponseOutparam;

use crate::answer::Failure;

pub struct Query(Vec<(String, String)>);

impl Query {
    pub fn new(text: &str) -> Self {
        let pairs = text.split('&').filter(|pair| !pair.is_empty());
        Query(
            pairs.map(|pair| pair.split_once('=').unwrap_or((pair, ""))).map(|(k, v)| (decode(k), decode(v))).collect(),
        )
    }

    pub fn text(&self, key: &str) -> Option<&str> {
        self.0.iter().find(|(k, _)| k == key).map(|(_, value)| value.as_str())
    }

    /// The number at `key`, or what is to be there without it; the message says what is wrong with it.
    pub fn number<N: FromStr>(&self, key: &str, default: Option<N>) -> Result<N, String> {
        match (self.text(key), default) {
            (Some(text), _) => text.parse().map_err(|_| format!("`{key}={text}`: no number that fits here")),
            (None, Some(default)) => Ok(default),
            (None, None) => Err(format!("`{key}=` is missing")),
        }
    }
}

/// Hands a mistake over together with the means to answer it.
pub fn or_mistake<T>(parsed: Result<T, String>, out: ResponseOutparam) -> Result<(T, ResponseOutparam), Failure> {
    match parsed {
        Ok(value) => Ok((value, out)),
        Err(message) => Err(Failure::Mistake(out, message)),
    }
}

/// A `%` that is not followed by two digits stands for itself.
fn decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let code = tail.get(..2).and_then(|digits| u8::from_str_radix(str::from_utf8(digits).ok()?, 16).ok());
        match (first, code) {
            (b'%', Some(code)) => {
                bytes.push(code);
                rest = &tail[2..];
            }
            _ => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
