//! Bodies in both directions, those included that are not what their head says.
use std::mem;

use wasip2::http::types::{Fields, IncomingBody, IncomingRequest, OutgoingResponse, ResponseOutparam, Trailers};
use wasip2::io::streams::{InputStream, StreamError};

use crate::answer::{Body, Outcome, begin, send, text};
use crate::compute::{FNV_START, fnv};
use crate::query::{Query, or_mistake};

const CHUNK: usize = 64 * 1024;
/// A prime, so that a piece of the pattern that is lost or moved shows.
const PATTERN: usize = 251;

/// Hands back what comes when it comes; the head goes out before the first byte is read, and so it says which trailers
/// are to be expected: those that the request announced.
pub fn echo(request: &IncomingRequest, out: ResponseOutparam) -> Outcome {
    let header = |name| request.headers().get(name).pop().map(|value| String::from_utf8_lossy(&value).into_owned());
    let (kind, trailers) = (header("content-type"), header("trailer"));
    let mut headers = vec![("content-type", kind.as_deref().unwrap_or("application/octet-stream"))];
    headers.extend(trailers.as_deref().map(|names| ("trailer", names)));
    let mut body = begin(out, 200, &headers);
    let trailers = read(request, |piece| {
        body.put(piece)?;
        body.flush()
    })?;
    body.finish(trailers);
    Ok(())
}

pub fn count(request: &IncomingRequest, out: ResponseOutparam) -> Outcome {
    let mut length: u64 = 0;
    let mut hash = FNV_START;
    read(request, |piece| {
        length += piece.len() as u64;
        hash = fnv(hash, piece);
        Ok(())
    })?;
    text(out, 200, &format!("{length} {hash:016x}\n"))
}

/// Each piece of the request's body as the host gives it, then its trailers.
pub fn read(
    request: &IncomingRequest,
    mut take: impl FnMut(&mut [u8]) -> Result<(), StreamError>,
) -> Result<Option<Trailers>, StreamError> {
    let body = request.consume().expect("the body, which is taken once");
    let stream = body.stream().expect("the stream, which is taken once");
    each(&stream, &mut take)?;
    drop(stream);
    let trailers = IncomingBody::finish(body);
    trailers.subscribe().block();
    // Trailers that fail to come are an error of the body as well, only one that is noticed late.
    match trailers.get() {
        Some(Ok(Ok(trailers))) => Ok(trailers),
        _ => Err(StreamError::Closed),
    }
}

/// Until the stream ends. One that fails is an error, and not an end.
pub fn each(
    stream: &InputStream,
    mut take: impl FnMut(&mut [u8]) -> Result<(), StreamError>,
) -> Result<(), StreamError> {
    loop {
        match stream.blocking_read(CHUNK as u64) {
            Ok(mut piece) => take(&mut piece)?,
            Err(StreamError::Closed) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// Byte `i` is `i % 251`.
pub fn big(query: &Query, out: ResponseOutparam) -> Outcome {
    let (bytes, out) = or_mistake(query.number::<u64>("bytes", None), out)?;
    let length = bytes.to_string();
    let mut headers = vec![("content-type", "application/octet-stream")];
    if query.text("length").is_some_and(|value| value != "0") {
        headers.push(("content-length", &length));
    }
    let mut body = begin(out, 200, &headers);
    pattern(&mut body, bytes)?;
    body.finish(None);
    Ok(())
}

fn pattern(body: &mut Body, bytes: u64) -> Result<(), StreamError> {
    // A whole number of patterns, so that each piece begins one.
    let piece: Vec<u8> = (0..CHUNK / PATTERN * PATTERN).map(|index| (index % PATTERN) as u8).collect();
    let mut left = bytes;
    while left > 0 {
        let now = left.min(piece.len() as u64);
        body.put(&piece[..now as usize])?;
        left -= now;
    }
    Ok(())
}

pub fn trailers(out: ResponseOutparam) -> Outcome {
    let mut body = begin(out, 200, &[("content-type", "text/plain"), ("trailer", "x-checksum")]);
    body.put(b"body\n")?;
    let trailers = Fields::from_list(&[("x-checksum".to_owned(), b"abc".to_vec())]).expect("trailers that are valid");
    body.finish(Some(trailers));
    Ok(())
}

pub fn status(query: &Query, out: ResponseOutparam) -> Outcome {
    let (code, out) = or_mistake(query.number::<u16>("code", None), out)?;
    let response = OutgoingResponse::new(Fields::new());
    let set = response.set_status_code(code).map_err(|()| format!("the host knows no status {code}"));
    let ((), out) = or_mistake(set, out)?;
    send(out, response).finish(None);
    Ok(())
}

/// Ends its body with too little or too much, and does not look at what the host says to it.
pub fn wrong_length(query: &Query, out: ResponseOutparam) -> Outcome {
    let lengths =
        query.number::<u64>("declared", None).and_then(|declared| Ok((declared, query.number("actual", None)?)));
    let ((declared, actual), out) = or_mistake(lengths, out)?;
    let mut body = begin(out, 200, &[("content-length", &declared.to_string())]);
    let _ = pattern(&mut body, actual);
    body.finish(None);
    Ok(())
}

pub fn unfinished(out: ResponseOutparam) -> Outcome {
    let mut body = begin(out, 200, &[]);
    body.put(b"chunk\n")?;
    body.flush()?;
    drop(body);
    Ok(())
}

/// The body stays open when the handler returns: only the end of the instance can end it.
pub fn leak(out: ResponseOutparam) -> Outcome {
    let mut body = begin(out, 200, &[]);
    body.put(b"chunk\n")?;
    body.flush()?;
    mem::forget(body);
    Ok(())
}
