//! Requests that this guest makes. What the host refuses is told in the answer: 200, its name in `x-error`, all of it in
//! the body.
use std::fmt::Debug;

use wasip3::http::client::send;
use wasip3::http::types::{Fields, Request, Response, Scheme};
use wasip3::wit_future;

use crate::answer::{head, streamed, text};
use crate::bodies::handed_on;
use crate::query::value;

pub async fn fetch(query: &str) -> Response {
    let Some(request) = value(query, "url").and_then(request) else {
        return text(400, "`url=` and a URL that the host understands are missing\n");
    };
    match send(request).await {
        Ok(upstream) => answer(upstream),
        Err(error) => refused(&error),
    }
}

fn request(url: &str) -> Option<Request> {
    let (scheme, rest) = url.split_once("://")?;
    let (authority, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
    let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
    let scheme = match scheme {
        "http" => Scheme::Http,
        "https" => Scheme::Https,
        other => Scheme::Other(other.to_owned()),
    };
    let (_, no_trailers) = wit_future::new(|| Ok(None));
    let (request, _transmitted) = Request::new(Fields::new(), None, no_trailers, None);
    request
        .set_scheme(Some(&scheme))
        .and_then(|()| request.set_authority(Some(authority)))
        .and_then(|()| request.set_path_with_query(Some(&path)))
        .ok()?;
    Some(request)
}

/// The status of the upstream's answer, what it says its body is, and the body with its end.
fn answer(upstream: Response) -> Response {
    let status = upstream.get_status_code();
    let kind = upstream.get_headers().get("content-type").pop().unwrap_or_default();
    let kind = str::from_utf8(&kind).ok().filter(|kind| !kind.is_empty()).unwrap_or("application/octet-stream");
    let (_, fine) = wit_future::new(|| Ok(()));
    let (contents, end) = Response::consume_body(upstream, fine);
    head(status, &[("content-type", kind)], handed_on(contents), end)
}

pub fn refused(error: &impl Debug) -> Response {
    let all = format!("{error:?}");
    let all = all.strip_prefix("ErrorCode::").unwrap_or(&all).to_owned();
    let name = all.split([' ', '(']).next().unwrap_or(&all).to_owned();
    streamed(200, &[("content-type", "text/plain"), ("x-error", &name)], async move |mut body| {
        body.write_all(all.into_bytes()).await;
        Ok(None)
    })
}
