//! Durations and byte sizes as people write them: `"1m30s"`, `"512MiB"`. Pure; called where settings are parsed.

use std::time::Duration;

/// A text that is no such quantity; says what it is and what it should look like.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct NotAQuantity(String);

type Result<T> = std::result::Result<T, NotAQuantity>;

/// Longest first where one unit begins with another (`ms` before `m`).
const DURATION_UNITS: [(&str, u64); 4] = [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000)];

const BYTE_UNITS: [(&str, u64); 10] = [
    ("", 1),
    ("B", 1),
    ("K", 1 << 10),
    ("KiB", 1 << 10),
    ("M", 1 << 20),
    ("MiB", 1 << 20),
    ("G", 1 << 30),
    ("GiB", 1 << 30),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
];

/// One or more whole numbers with a unit each, as Go and systemd write them.
///
/// # Errors
/// For anything else, and for what exceeds 2^64 ms.
pub fn parse_duration(text: &str) -> Result<Duration> {
    let millis = milliseconds(text.trim()).filter(|_| !text.trim().is_empty());
    millis
        .map(Duration::from_millis)
        .ok_or_else(|| NotAQuantity(format!("{text:?} is not a duration such as \"500ms\", \"5s\" or \"1m30s\"")))
}

/// A whole number with an optional unit: `K`, `M`, `G` and the `iB` forms are powers of 1024, `MB` and `GB` of 1000.
///
/// # Errors
/// For anything else, and for what exceeds 2^64 bytes.
pub fn parse_bytes(text: &str) -> Result<u64> {
    bytes(text.trim()).ok_or_else(|| NotAQuantity(format!("{text:?} is not a size such as \"512MiB\" or \"2GiB\"")))
}

fn milliseconds(mut rest: &str) -> Option<u64> {
    let mut millis: u64 = 0;
    while !rest.is_empty() {
        let (number, tail) = split_number(rest)?;
        let (unit, factor) = DURATION_UNITS.iter().find(|(unit, _)| tail.starts_with(unit))?;
        millis = millis.checked_add(number.checked_mul(*factor)?)?;
        rest = &tail[unit.len()..];
    }
    Some(millis)
}

fn bytes(text: &str) -> Option<u64> {
    let (number, unit) = split_number(text)?;
    let (_, factor) = BYTE_UNITS.iter().find(|(name, _)| *name == unit.trim())?;
    number.checked_mul(*factor)
}

fn split_number(text: &str) -> Option<(u64, &str)> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    Some((text[..end].parse().ok()?, &text[end..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_sums_of_numbers_with_units() {
        for (text, millis) in [("5s", 5_000), ("250ms", 250), ("1m30s", 90_000), ("2h", 7_200_000), ("0s", 0)] {
            assert_eq!(parse_duration(text).unwrap(), Duration::from_millis(millis), "{text}");
        }
        for text in ["", "5", "s", "5 s", "-5s", "1.5s", "5sec", "99999999999999999999s", "18446744073709551615h"] {
            assert!(parse_duration(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn sizes_know_both_families_of_units() {
        for (text, bytes) in
            [("10", 10), ("64K", 65_536), ("512MiB", 512 << 20), ("2 GiB", 2 << 30), ("1GB", 1_000_000_000)]
        {
            assert_eq!(parse_bytes(text).unwrap(), bytes, "{text}");
        }
        for text in ["", "MiB", "-1", "1.5G", "5 apples", "99999999999G"] {
            assert!(parse_bytes(text).is_err(), "{text:?}");
        }
    }
}
