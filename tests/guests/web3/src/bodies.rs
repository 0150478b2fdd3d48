//! Bodies in both directions.
use wasip3::http::types::{ErrorCode, Request, Response};
use wasip3::wit_bindgen::{StreamReader, StreamResult, spawn_local};
use wasip3::{wit_future, wit_stream};

use crate::answer::{head, streamed, text};
use crate::query::{number, value};

const CHUNK: usize = 64 * 1024;
/// A prime, so that a piece of the pattern that is lost or moved shows.
const PATTERN: usize = 251;

/// The trailers are handed on unseen.
pub fn echo(request: Request) -> Response {
    let declared = request.get_headers().get("trailer").pop().map(|names| String::from_utf8_lossy(&names).into_owned());
    let mut headers = vec![("content-type", "application/octet-stream")];
    headers.extend(declared.as_deref().map(|names| ("trailer", names)));
    let (_, fine) = wit_future::new(|| Ok(()));
    let (contents, end) = Request::consume_body(request, fine);
    head(200, &headers, handed_on(contents), end)
}

/// The same through the guest's memory, piece by piece.
pub fn handed_on(mut from: StreamReader<u8>) -> StreamReader<u8> {
    let (mut to, contents) = wit_stream::new();
    spawn_local(async move {
        loop {
            let (result, piece) = from.read(Vec::with_capacity(CHUNK)).await;
            // What comes back is what the reader did not take any more.
            let taken = to.write_all(piece).await.is_empty();
            if !taken || !matches!(result, StreamResult::Complete(_)) {
                return;
            }
        }
    });
    contents
}

/// A body that breaks off is told by its end, after all that came of it.
pub async fn count(request: Request) -> Result<Response, ErrorCode> {
    let (_, fine) = wit_future::new(|| Ok(()));
    let (mut from, end) = Request::consume_body(request, fine);
    let (mut length, mut hash) = (0, 0xcbf2_9ce4_8422_2325_u64);
    let mut piece = Vec::with_capacity(CHUNK);
    loop {
        let result;
        (result, piece) = from.read(piece).await;
        length += piece.len();
        hash = piece.drain(..).fold(hash, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        if !matches!(result, StreamResult::Complete(_)) {
            break;
        }
    }
    end.await?;
    Ok(text(200, &format!("{length} {hash:016x}\n")))
}

/// Byte `i` is `i % 251`.
pub fn big(query: &str) -> Response {
    let Some(bytes) = number::<u64>(query, "bytes") else { return text(400, "`bytes=` and a number are missing\n") };
    let length = bytes.to_string();
    let mut headers = vec![("content-type", "application/octet-stream")];
    if value(query, "length").is_some_and(|value| value != "0") {
        headers.push(("content-length", &length));
    }
    streamed(200, &headers, async move |mut body| {
        // A whole number of patterns, so that each piece begins one.
        let piece: Vec<u8> = (0..CHUNK / PATTERN * PATTERN).map(|index| (index % PATTERN) as u8).collect();
        let mut left = bytes;
        while left > 0 {
            let now = left.min(piece.len() as u64);
            if !body.write_all(piece[..now as usize].to_vec()).await.is_empty() {
                break;
            }
            left -= now;
        }
        Ok(None)
    })
}
