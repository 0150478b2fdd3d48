//! What the host gives besides bodies: the request's head, environment, files, random numbers, the time, two logs.
use std::fs;
use std::io::{self, Write};

use serde_json::{Map, Value, json};
use wasip2::cli::environment::get_environment;
use wasip2::clocks::wall_clock;
use wasip2::http::types::{IncomingRequest, Method, ResponseOutparam, Scheme};
use wasip2::random::random::get_random_bytes;

use crate::answer::{Outcome, begin, text};
use crate::query::{Query, or_mistake};

pub fn inspect(request: &IncomingRequest, out: ResponseOutparam) -> Outcome {
    let headers: Vec<Value> = request
        .headers()
        .entries()
        .into_iter()
        .map(|(name, value)| json!([name, String::from_utf8_lossy(&value)]))
        .collect();
    let environment: Map<String, Value> =
        get_environment().into_iter().map(|(key, value)| (key, Value::String(value))).collect();
    let seen = json!({
        "method": method(request.method()),
        "scheme": request.scheme().map(scheme),
        "authority": request.authority(),
        "path_with_query": request.path_with_query(),
        "headers": headers,
        "env": environment,
    });
    let seen = format!("{seen}\n");
    let mut body =
        begin(out, 200, &[("content-type", "application/json"), ("content-length", &seen.len().to_string())]);
    body.put(seen.as_bytes())?;
    body.finish(None);
    Ok(())
}

fn method(method: Method) -> String {
    let name = match method {
        Method::Get => "GET",
        Method::Head => "HEAD",
        Method::Post => "POST",
        Method::Put => "PUT",
        Method::Delete => "DELETE",
        Method::Connect => "CONNECT",
        Method::Options => "OPTIONS",
        Method::Trace => "TRACE",
        Method::Patch => "PATCH",
        Method::Other(other) => return other,
    };
    name.to_owned()
}

fn scheme(scheme: Scheme) -> String {
    match scheme {
        Scheme::Http => "http".to_owned(),
        Scheme::Https => "https".to_owned(),
        Scheme::Other(other) => other,
    }
}

/// `TEXT 1` to `TEXT N` on stdout, `err TEXT` on stderr, then the answer: whoever has it can look into the log.
pub fn log(query: &Query, out: ResponseOutparam) -> Outcome {
    let (lines, out) = or_mistake(query.number::<u64>("lines", Some(1)), out)?;
    let what = query.text("text").unwrap_or("line");
    let mut stdout = io::stdout().lock();
    // A log that is closed is the host's affair, and the answer is due all the same.
    let _ = (1..=lines).try_for_each(|line| writeln!(stdout, "{what} {line}")).and_then(|()| stdout.flush());
    let _ = writeln!(io::stderr(), "err {what}");
    text(out, 200, "logged\n")
}

/// No newline, here or anywhere after it.
pub fn log_partial(out: ResponseOutparam) -> Outcome {
    let mut stdout = io::stdout().lock();
    let _ = stdout.write_all(b"no newline").and_then(|()| stdout.flush());
    text(out, 200, "logged\n")
}

pub fn file(query: &Query, out: ResponseOutparam) -> Outcome {
    let path = query.text("path").map(str::to_owned).ok_or_else(|| "`path=` is missing".to_owned());
    let (path, out) = or_mistake(path, out)?;
    match fs::read(&path) {
        Ok(contents) => {
            let mut body = begin(out, 200, &[("content-length", &contents.len().to_string())]);
            body.put(&contents)?;
            body.finish(None);
            Ok(())
        }
        Err(error) => text(out, 404, &format!("{path}: {error}\n")),
    }
}

pub fn random(out: ResponseOutparam) -> Outcome {
    let hex: String = get_random_bytes(16).iter().map(|byte| format!("{byte:02x}")).collect();
    text(out, 200, &format!("{hex}\n"))
}

pub fn time(out: ResponseOutparam) -> Outcome {
    text(out, 200, &format!("{}\n", wall_clock::now().seconds))
}
