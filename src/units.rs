//! Durations and byte sizes as people write them: `"1m30s"`, `"512MiB"`. Pure; called where settings are parsed.

use std::time::Duration;

use anyhow::{Context, Result, bail};

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
pub fn parse_duration(text: &str) -> Result<Duration> {
    let wrong = || format!("{text:?} is not a duration such as \"500ms\", \"5s\" or \"1m30s\"");
    let mut rest = text.trim();
    let mut millis: u64 = 0;
    if rest.is_empty() {
        bail!(wrong());
    }
    while !rest.is_empty() {
        let (number, tail) = split_number(rest).with_context(wrong)?;
        let (unit, factor) = DURATION_UNITS.iter().find(|(unit, _)| tail.starts_with(unit)).with_context(wrong)?;
        let part = number.checked_mul(*factor).with_context(wrong)?;
        millis = millis.checked_add(part).with_context(wrong)?;
        rest = &tail[unit.len()..];
    }
    Ok(Duration::from_millis(millis))
}

/// A whole number with an optional unit: `K`, `M`, `G` and the `iB` forms are powers of 1024, `MB` and `GB` of 1000.
pub fn parse_bytes(text: &str) -> Result<u64> {
    let wrong = || format!("{text:?} is not a size such as \"512MiB\" or \"2GiB\"");
    let (number, unit) = split_number(text.trim()).with_context(wrong)?;
    let (_, factor) = BYTE_UNITS.iter().find(|(name, _)| *name == unit.trim()).with_context(wrong)?;
    number.checked_mul(*factor).with_context(wrong)
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
