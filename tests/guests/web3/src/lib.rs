//! An HTTP server for WASI 0.3 (`wasi:http/handler`, asynchronous): what differs from 0.2 in the host has a path here.
//!
//!     /  /hello           "hello"                         /inspect            what came, as JSON
//!     /echo               body and trailers back          /trailers           body, then the trailer x-checksum: abc
//!     /count              length and hash of the body     /big?bytes&length   a pattern of that length
//!     /sleep?ms           waits, then answers             /sleep-after-head?ms
//!     /spin?ms            the same with the CPU           /spin-after-head?ms (no ms: for ever), says so
//!     /after?ms           answers, works on, says so on stdout
//!     /trap               /trap-after-head                /error              the answer is an error code
//!     /unfinished         the body ends with an error     /static-counter     how often this instance was asked
//!     /file?path=PATH     a file, relative to its root    /make?path=PATH     makes a folder
//!     /fetch?url=URL      a request of its own            /connect?addr       a socket of its own, to IP:PORT
//!
//! With `say=TEXT` in the query, whatever the path, TEXT is printed first: the request has begun. Several requests may run
//! in one instance at the same time; nothing here is shared between them but the counter.
mod answer;
mod bodies;
mod files;
mod outgoing;
mod query;
mod routes;
mod sockets;

use realloc as _;
use wasip3::http::types::{ErrorCode, Request, Response};

wasip3::http::service::export!(Web);

struct Web;

impl wasip3::exports::http::handler::Guest for Web {
    async fn handle(request: Request) -> Result<Response, ErrorCode> {
        let target = request.get_path_with_query().unwrap_or_default();
        let (path, query) = target.split_once('?').unwrap_or((&target, ""));
        if let Some(text) = query::value(query, "say") {
            println!("{text}");
        }
        match path {
            "/" | "/hello" => Ok(answer::text(200, "hello\n")),
            "/inspect" => Ok(routes::inspect(&request)),
            "/echo" => Ok(bodies::echo(request)),
            "/count" => bodies::count(request).await,
            "/big" => Ok(bodies::big(query)),
            "/trailers" => Ok(routes::trailers()),
            "/sleep" => Ok(routes::sleep(query).await),
            "/sleep-after-head" => Ok(routes::sleep_after_head(query)),
            "/spin" => Ok(routes::spin(query)),
            "/spin-after-head" => Ok(routes::spin_after_head(query)),
            "/after" => Ok(routes::after(query)),
            "/trap" => routes::trap(),
            "/trap-after-head" => Ok(routes::trap_after_head()),
            "/error" => Err(ErrorCode::InternalError(Some("an error on demand".to_owned()))),
            "/unfinished" => Ok(routes::unfinished()),
            "/static-counter" => Ok(routes::static_counter()),
            "/file" => Ok(files::read(query).await),
            "/make" => Ok(files::make(query).await),
            "/fetch" => Ok(outgoing::fetch(query).await),
            "/connect" => Ok(sockets::connect(query).await),
            _ => Ok(answer::text(404, "not found\n")),
        }
    }
}
