//! One HTTP server (`wasi:http/incoming-handler` 0.2) for everything a test wants a guest to do; the path says what.
//!
//!     /  /hello            "hello"                       /trailers            body, then the trailer x-checksum: abc
//!     /inspect             what came, as JSON            /status?code         that status, no body
//!     /echo                body and trailers back        /sleep?ms            /sleep-after-head?ms
//!     /count               length and hash of the body   /spin?ms             /spin-after-head?ms   (no ms: for ever)
//!     /big?bytes&length    a pattern of that length      /after?ms            answers, works on, says so on stdout
//!     /hash?rounds         computes                      /json?items          computes and allocates
//!     /alloc?bytes         takes memory                  /alloc-forever       until it is refused
//!     /trap /panic         three ways to end, and one    /trap-after-head     the same where the head is out already
//!     /exit?code           that ends after the head
//!     /never               no answer at all              /error               the answer is an error code
//!     /wrong-length?declared&actual                      /unfinished /leak    bodies without an end
//!     /log?lines&text      lines on stdout and stderr    /log-partial         one without its end
//!     /remember?ms         fills memory with the body    /search              looks for the body in memory
//!     /fetch?url&connect_ms&first_ms&between_ms          /proxy?url           requests of its own
//!     /file?path           a file of its root            /random /time        what else the host gives
//!     /config?key          a value of wasi:config        /static-counter      how often this instance was asked
//!
//! With `say=TEXT` in the query, whatever the path, TEXT is printed first: the request has begun. A mistake in the query is 400, an unknown path 404, whatever the method is. A stream that the host has closed ends the
//! request; stderr says so.
mod answer;
mod bodies;
mod config;
mod compute;
mod endings;
mod host;
mod memory;
mod outgoing;
mod pump;
mod query;
mod time;

use realloc as _;
use wasip2::http::types::{IncomingRequest, ResponseOutparam};

use answer::{Failure, Outcome, text};
use query::Query;

wasip2::http::proxy::export!(Web);

struct Web;

impl wasip2::exports::http::incoming_handler::Guest for Web {
    fn handle(request: IncomingRequest, out: ResponseOutparam) {
        let target = request.path_with_query().unwrap_or_default();
        let (path, query) = target.split_once('?').unwrap_or((&target, ""));
        match route(path, &Query::new(query), request, out) {
            Ok(()) => {}
            Err(Failure::Mistake(out, message)) => {
                let _ = text(out, 400, &format!("{message}\n"));
            }
            Err(Failure::Stream(error)) => eprintln!("web: {path}: {error:?}"),
        }
    }
}

fn route(path: &str, query: &Query, request: IncomingRequest, out: ResponseOutparam) -> Outcome {
    if let Some(text) = query.text("say") {
        println!("{text}");
    }
    match path {
        "/" | "/hello" => text(out, 200, "hello\n"),
        "/inspect" => host::inspect(&request, out),
        "/echo" => bodies::echo(&request, out),
        "/count" => bodies::count(&request, out),
        "/big" => bodies::big(query, out),
        "/trailers" => bodies::trailers(out),
        "/status" => bodies::status(query, out),
        "/wrong-length" => bodies::wrong_length(query, out),
        "/unfinished" => bodies::unfinished(out),
        "/leak" => bodies::leak(out),
        "/sleep" => time::sleep(query, out),
        "/sleep-after-head" => time::sleep_after_head(query, out),
        "/spin" => time::spin(query, out),
        "/spin-after-head" => time::spin_after_head(query, out),
        "/after" => time::after(query, out),
        "/hash" => compute::hash(query, out),
        "/json" => compute::json(query, out),
        "/alloc" => memory::alloc(query, out),
        "/alloc-forever" => memory::alloc_forever(out),
        "/remember" => memory::remember(query, &request, out),
        "/search" => memory::search(&request, out),
        "/static-counter" => memory::static_counter(out),
        "/trap" => endings::trap(),
        "/trap-after-head" => endings::trap_after_head(out),
        "/panic" => panic!("a panic on demand"),
        "/exit" => endings::exit(query, out),
        "/never" => endings::never(out),
        "/error" => endings::error(out),
        "/log" => host::log(query, out),
        "/log-partial" => host::log_partial(out),
        "/file" => host::file(query, out),
        "/config" => config::get(query, out),
        "/random" => host::random(out),
        "/time" => host::time(out),
        "/fetch" => outgoing::fetch(query, out),
        "/proxy" => outgoing::proxy(query, &request, out),
        _ => text(out, 404, "not found\n"),
    }
}
