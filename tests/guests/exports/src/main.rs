//! A guest with more than one door, for entrypoints of the form `exports.wasm#other`.
//!
//! The core module is also the core of `exports-component.wasm`: `exports.wit` says what each function is there, and
//! the signatures below are exactly what the canonical ABI asks for, so no bindings are generated.
//!
//! | export   | module        | component          | what it does                                             |
//! |----------|---------------|--------------------|----------------------------------------------------------|
//! | `_start` | `() -> ()`    | `wasi:cli/run`     | prints `this is _start`                                  |
//! | `other`  | `() -> ()`    | `func()`           | prints `this is other` and the arguments                 |
//! | `leave`  | `() -> ()`    | `func()`           | prints `this is leave`, exits with 7 (component: 1)      |
//! | `refuse` | `() -> (i32)` | `func() -> result` | prints `this is refuse`, returns an error                |
//! | `answer` | `() -> (i32)` | `func() -> u32`    | returns 42: a signature no entrypoint has                |
//!
//! `leave` is 1 in the component because the preview-1 adapter knows only success and failure.
use std::env;
use std::process;

use realloc as _;

fn main() {
    println!("this is _start");
}

// SAFETY: of all four, the names are ours alone: nothing else that is linked here defines one of them.
#[unsafe(no_mangle)]
pub extern "C" fn other() {
    let arguments: Vec<String> = env::args().collect();
    println!("this is other");
    println!("{}", arguments.join(" "));
}

#[unsafe(no_mangle)]
pub extern "C" fn leave() {
    println!("this is leave");
    process::exit(7);
}

/// 1 is the discriminant of `error` in a `result`.
#[unsafe(no_mangle)]
pub extern "C" fn refuse() -> i32 {
    println!("this is refuse");
    1
}

#[unsafe(no_mangle)]
pub extern "C" fn answer() -> i32 {
    42
}
