//! What the paths do.
use std::hint::spin_loop;
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::{Map, Value, json};
use wasip3::cli::environment::get_environment;
use wasip3::clocks::monotonic_clock::{now, wait_for};
use wasip3::http::types::{ErrorCode, Fields, Method, Request, Response, Scheme};
use wasip3::wit_bindgen::{StreamWriter, spawn_local};

use crate::answer::{streamed, text, whole};
use crate::query::{number, value};

const MILLISECOND: u64 = 1_000_000;
const PLAIN: &[(&str, &str)] = &[("content-type", "text/plain")];

static ASKED: AtomicU32 = AtomicU32::new(0);

pub fn inspect(request: &Request) -> Response {
    let headers: Vec<Value> = request
        .get_headers()
        .copy_all()
        .into_iter()
        .map(|(name, value)| json!([name, String::from_utf8_lossy(&value)]))
        .collect();
    let environment: Map<String, Value> =
        get_environment().into_iter().map(|(key, value)| (key, Value::String(value))).collect();
    let seen = json!({
        "method": method(request.get_method()),
        "scheme": request.get_scheme().map(scheme),
        "authority": request.get_authority(),
        "path_with_query": request.get_path_with_query(),
        "headers": headers,
        "env": environment,
    });
    whole(200, "application/json", &format!("{seen}\n"))
}

fn method(method: Method) -> String {
    match method {
        Method::Other(other) => other,
        // The names of the others are what Debug says, in capitals.
        known => format!("{known:?}").trim_start_matches("Method::").to_uppercase(),
    }
}

fn scheme(scheme: Scheme) -> String {
    match scheme {
        Scheme::Http => "http".to_owned(),
        Scheme::Https => "https".to_owned(),
        Scheme::Other(other) => other,
    }
}

pub fn trailers() -> Response {
    streamed(200, &[("content-type", "text/plain"), ("trailer", "x-checksum")], async |mut body| {
        body.write_all(b"body\n".to_vec()).await;
        let trailers = Fields::from_list(&[("x-checksum".to_owned(), b"abc".to_vec())]);
        Ok(Some(trailers.expect("trailers that are valid")))
    })
}

pub async fn sleep(query: &str) -> Response {
    let Some(ms) = ms(query) else { return no_ms() };
    wait_for(ms).await;
    text(200, "slept\n")
}

pub fn sleep_after_head(query: &str) -> Response {
    let Some(ms) = ms(query) else { return no_ms() };
    streamed(200, PLAIN, async move |mut body: StreamWriter<u8>| {
        body.write_all(b"first\n".to_vec()).await;
        wait_for(ms).await;
        body.write_all(b"second\n".to_vec()).await;
        Ok(None)
    })
}

pub fn spin(query: &str) -> Response {
    let Some(time) = spin_time(query) else { return no_ms() };
    compute(time);
    text(200, "spun\n")
}

pub fn spin_after_head(query: &str) -> Response {
    let Some(time) = spin_time(query) else { return no_ms() };
    streamed(200, PLAIN, async move |mut body: StreamWriter<u8>| {
        body.write_all(b"first\n".to_vec()).await;
        // While a guest computes, the host hands on nothing of its instance: this goes out before.
        wait_for(10 * MILLISECOND).await;
        println!("spins");
        compute(time);
        body.write_all(b"second\n".to_vec()).await;
        Ok(None)
    })
}

/// Without `ms` it never ends.
fn spin_time(query: &str) -> Option<u64> {
    if value(query, "ms").is_none() { Some(u64::MAX) } else { ms(query) }
}

fn compute(time: u64) {
    let start = now();
    while now().saturating_sub(start) < time {
        (0..100_000_u32).for_each(|turn| {
            std::hint::black_box(turn);
            spin_loop();
        });
    }
}

pub fn after(query: &str) -> Response {
    let Some(ms) = ms(query) else { return no_ms() };
    spawn_local(async move {
        wait_for(ms).await;
        println!("after done");
    });
    text(200, "done\n")
}

#[cfg(target_family = "wasm")]
pub fn trap() -> ! {
    core::arch::wasm32::unreachable()
}

/// So that an editor, which looks at this for its own machine, finds no mistake.
#[cfg(not(target_family = "wasm"))]
pub fn trap() -> ! {
    std::process::abort()
}

pub fn trap_after_head() -> Response {
    streamed(200, PLAIN, async |mut body| {
        body.write_all(b"first\n".to_vec()).await;
        trap()
    })
}

pub fn unfinished() -> Response {
    streamed(200, PLAIN, async |mut body| {
        body.write_all(b"chunk\n".to_vec()).await;
        Err(ErrorCode::InternalError(Some("a body without its end, on demand".to_owned())))
    })
}

pub fn static_counter() -> Response {
    let asked = ASKED.fetch_add(1, Ordering::Relaxed) + 1;
    text(200, &format!("{asked}\n"))
}

/// In nanoseconds.
fn ms(query: &str) -> Option<u64> {
    number::<u64>(query, "ms").map(|ms| ms.saturating_mul(MILLISECOND))
}

fn no_ms() -> Response {
    text(400, "`ms=` and a number of milliseconds are missing\n")
}
