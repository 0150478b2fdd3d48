//! Requests that this guest makes. What the host refuses is told in the answer: 200, its name in `x-error`, all of it in
//! the body.
use wasip2::http::outgoing_handler::handle;
use wasip2::http::types::{
    ErrorCode, Fields, FutureIncomingResponse, IncomingRequest, IncomingResponse, Method, OutgoingRequest,
    RequestOptions, ResponseOutparam, Scheme,
};
use wasip2::io::poll::poll;

use crate::answer::{Body, Outcome, begin};
use crate::bodies::each;
use crate::pump::{Pump, Upload};
use crate::query::{Query, or_mistake};

const MILLISECOND: u64 = 1_000_000;

pub fn fetch(query: &Query, out: ResponseOutparam) -> Outcome {
    let parsed = request(query, Method::Get).and_then(|request| Ok((request, options(query)?)));
    let ((request, options), out) = or_mistake(parsed, out)?;
    let answered = handle(request, Some(options)).and_then(|coming| {
        coming.subscribe().block();
        response(&coming).unwrap_or(Err(ErrorCode::InternalError(None)))
    });
    match answered {
        Ok(upstream) => {
            let mut body = head(&upstream, out);
            let incoming = upstream.consume().expect("the body, which is taken once");
            each(&incoming.stream().expect("the stream, which is taken once"), |piece| {
                body.put(piece)?;
                body.flush()
            })?;
            body.finish(None);
            Ok(())
        }
        Err(error) => refused(&error, out),
    }
}

/// Both bodies at once: the answer may begin before the question has ended.
pub fn proxy(query: &Query, incoming: &IncomingRequest, out: ResponseOutparam) -> Outcome {
    let (outgoing, out) = or_mistake(request(query, Method::Post), out)?;
    let question = incoming.consume().expect("the body, which is taken once");
    let from = question.stream().expect("the stream, which is taken once");
    let mut upload = Upload::new(from, outgoing.body().expect("the body, which is taken once"));
    let coming = match handle(outgoing, None) {
        Ok(coming) => coming,
        Err(error) => return refused(&error, out),
    };
    let answered = loop {
        upload.step();
        if let Some(answered) = response(&coming) {
            break answered;
        }
        let waits = [Some(coming.subscribe()), upload.waits_for()];
        poll(&waits.iter().flatten().collect::<Vec<_>>());
    };
    match answered {
        Ok(upstream) => download(&upstream, &mut upload, out),
        Err(error) => refused(&error, out),
    }
}

fn download(upstream: &IncomingResponse, upload: &mut Upload, out: ResponseOutparam) -> Outcome {
    let body = head(upstream, out);
    let answer = upstream.consume().expect("the body, which is taken once");
    let from = answer.stream().expect("the stream, which is taken once");
    let mut pump = Pump::default();
    loop {
        upload.step();
        if pump.step(&from, body.stream())? {
            break;
        }
        // Children of the streams: they are gone before the next step may drop one.
        let waits = [Some(pump.waits_for(&from, body.stream())), upload.waits_for()];
        poll(&waits.iter().flatten().collect::<Vec<_>>());
    }
    drop(from);
    body.finish(None);
    Ok(())
}

fn request(query: &Query, method: Method) -> Result<OutgoingRequest, String> {
    let url = query.text("url").ok_or("`url=` is missing")?;
    let wrong = || format!("`url={url}`: no URL that the host understands");
    let (scheme, rest) = url.split_once("://").ok_or_else(wrong)?;
    let (authority, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
    let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
    let scheme = match scheme {
        "http" => Scheme::Http,
        "https" => Scheme::Https,
        other => Scheme::Other(other.to_owned()),
    };
    let request = OutgoingRequest::new(Fields::new());
    request
        .set_method(&method)
        .and_then(|()| request.set_scheme(Some(&scheme)))
        .and_then(|()| request.set_authority(Some(authority)))
        .and_then(|()| request.set_path_with_query(Some(&path)))
        .map_err(|()| wrong())?;
    Ok(request)
}

fn options(query: &Query) -> Result<RequestOptions, String> {
    let options = RequestOptions::new();
    limit(query, "connect_ms", |time| options.set_connect_timeout(time))?;
    limit(query, "first_ms", |time| options.set_first_byte_timeout(time))?;
    limit(query, "between_ms", |time| options.set_between_bytes_timeout(time))?;
    Ok(options)
}

fn limit(query: &Query, key: &str, set: impl FnOnce(Option<u64>) -> Result<(), ()>) -> Result<(), String> {
    if query.text(key).is_none() {
        return Ok(());
    }
    let ms: u64 = query.number(key, None)?;
    set(Some(ms.saturating_mul(MILLISECOND))).map_err(|()| format!("`{key}=`: the host has no such limit"))
}

/// None while nothing has come.
fn response(coming: &FutureIncomingResponse) -> Option<Result<IncomingResponse, ErrorCode>> {
    coming.get().map(|once| once.expect("the response, which is taken once"))
}

/// The status of the answer, and what it says its body is.
fn head(upstream: &IncomingResponse, out: ResponseOutparam) -> Body {
    let kind = upstream.headers().get("content-type").pop().unwrap_or_default();
    let kind = str::from_utf8(&kind).ok().filter(|kind| !kind.is_empty()).unwrap_or("application/octet-stream");
    begin(out, upstream.status(), &[("content-type", kind)])
}

fn refused(error: &ErrorCode, out: ResponseOutparam) -> Outcome {
    let all = format!("{error:?}");
    let all = all.strip_prefix("ErrorCode::").unwrap_or(&all);
    let name = all.split([' ', '(']).next().unwrap_or(all);
    let mut body = begin(out, 200, &[("content-type", "text/plain"), ("x-error", name)]);
    body.put(all.as_bytes())?;
    body.finish(None);
    Ok(())
}
