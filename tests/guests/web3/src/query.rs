//! The part behind the `?`: `key=value&key=value`, taken as it is.
use std::str::FromStr;

pub fn value<'a>(query: &'a str, key: &str) -> Option<&'a str> {
    query.split('&').filter_map(|pair| pair.split_once('=')).find(|(k, _)| *k == key).map(|(_, value)| value)
}

pub fn number<N: FromStr>(query: &str, key: &str) -> Option<N> {
    value(query, key)?.parse().ok()
}
