//! Work that needs nothing of the host: a loop over memory, and one that allocates.
use std::hint::black_box;

use serde_json::{Value, json};
use wasip2::http::types::ResponseOutparam;

use crate::answer::{Outcome, text};
use crate::query::{Query, or_mistake};

const BUFFER: usize = 64 * 1024;

/// Where FNV-1a begins, 64 bits.
pub const FNV_START: u64 = 0xcbf2_9ce4_8422_2325;

pub fn fnv(hash: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(hash, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

pub fn hash(query: &Query, out: ResponseOutparam) -> Outcome {
    let (rounds, out) = or_mistake(query.number::<u64>("rounds", Some(1)), out)?;
    let buffer: Vec<u8> = (0..BUFFER).map(|index| index as u8).collect();
    let hash = (0..rounds).fold(FNV_START, |hash, _| fnv(hash, black_box(&buffer)));
    text(out, 200, &format!("{hash:016x}\n"))
}

/// `ITEMS BYTES SUM`: how long the document was, and the sum of its prices as read back from it.
pub fn json(query: &Query, out: ResponseOutparam) -> Outcome {
    let (items, out) = or_mistake(query.number::<u64>("items", Some(100)), out)?;
    let list: Vec<Value> = (0..items)
        .map(|item| json!({ "id": item, "name": format!("item {item}"), "price": item * 3, "tags": ["a", "b", "c"] }))
        .collect();
    let written = json!({ "items": list }).to_string();
    let read: Value = serde_json::from_str(&written).expect("what this program wrote");
    let prices = read["items"].as_array().into_iter().flatten().filter_map(|item| item["price"].as_u64());
    text(out, 200, &format!("{items} {} {}\n", written.len(), prices.sum::<u64>()))
}
