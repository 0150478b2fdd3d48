//! Responses. A body is written by a task of its own, which goes on when the handler has returned.
use wasip3::http::types::{ErrorCode, Fields, Response, Trailers};
use wasip3::wit_bindgen::{FutureReader, StreamReader, StreamWriter, spawn_local};
use wasip3::{wit_future, wit_stream};

/// How a body ends.
pub type End = Result<Option<Trailers>, ErrorCode>;

/// A complete answer with its length.
pub fn text(status: u16, text: &str) -> Response {
    whole(status, "text/plain", text)
}

pub fn whole(status: u16, kind: &str, text: &str) -> Response {
    let bytes = text.as_bytes().to_vec();
    let length = bytes.len().to_string();
    streamed(status, &[("content-type", kind), ("content-length", &length)], async move |mut body| {
        body.write_all(bytes).await;
        Ok(None)
    })
}

/// The head now; `write` gives the body and says how it ends. The stream is closed before the end is told.
pub fn streamed<F>(status: u16, headers: &[(&str, &str)], write: F) -> Response
where
    F: AsyncFnOnce(StreamWriter<u8>) -> End + 'static,
{
    let (ended, end) = wit_future::new(|| Ok(None));
    let (body, contents) = wit_stream::new();
    spawn_local(async move {
        let how = write(body).await;
        // Whoever would hear it may be gone.
        let _ = ended.write(how).await;
    });
    head(status, headers, contents, end)
}

/// A response with a body that somebody else ends. The headers are the guest's own, so they are right or it is a mistake
/// in this program.
pub fn head(status: u16, headers: &[(&str, &str)], contents: StreamReader<u8>, end: FutureReader<End>) -> Response {
    let fields: Vec<(String, Vec<u8>)> =
        headers.iter().map(|(name, value)| ((*name).to_owned(), value.as_bytes().to_vec())).collect();
    let fields = Fields::from_list(&fields).expect("headers that are valid");
    let (response, _transmitted) = Response::new(fields, Some(contents), end);
    response.set_status_code(status).expect("a status that is valid");
    response
}
