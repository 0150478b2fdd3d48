//! Responses: the whole of one in a call, or the head first and then a body that is written piece by piece.
use wasip2::http::types::{Fields, OutgoingBody, OutgoingResponse, ResponseOutparam, Trailers};
use wasip2::io::streams::{OutputStream, StreamError};

/// How a request ends when it does not end well.
pub enum Failure {
    /// The query is wrong: nothing is answered yet, and this is to be answered.
    Mistake(ResponseOutparam, String),
    /// The host closed a stream: whoever is at its other end is gone.
    Stream(StreamError),
}

impl From<StreamError> for Failure {
    fn from(error: StreamError) -> Self {
        Failure::Stream(error)
    }
}

pub type Outcome = Result<(), Failure>;

/// A complete answer with its length.
pub fn text(out: ResponseOutparam, status: u16, text: &str) -> Outcome {
    let length = text.len().to_string();
    let mut body = begin(out, status, &[("content-type", "text/plain"), ("content-length", &length)]);
    body.put(text.as_bytes())?;
    body.finish(None);
    Ok(())
}

/// Sends the head. The status and the headers are the guest's own, so they are right or it is a mistake in this program.
pub fn begin(out: ResponseOutparam, status: u16, headers: &[(&str, &str)]) -> Body {
    let fields: Vec<(String, Vec<u8>)> =
        headers.iter().map(|(name, value)| ((*name).to_owned(), value.as_bytes().to_vec())).collect();
    let response = OutgoingResponse::new(Fields::from_list(&fields).expect("headers that are valid"));
    response.set_status_code(status).expect("a status that is valid");
    send(out, response)
}

/// Sends a head that is made already.
pub fn send(out: ResponseOutparam, response: OutgoingResponse) -> Body {
    let body = response.body().expect("the body, which is taken once");
    let stream = body.write().expect("the stream, which is taken once");
    ResponseOutparam::set(out, Ok(response));
    Body { stream, body }
}

/// A body on its way. Dropped without [`Body::finish`] it is one that never came to its end. The stream is the child of
/// the body, so it is the field that goes first.
pub struct Body {
    stream: OutputStream,
    body: OutgoingBody,
}

impl Body {
    /// Everything of `bytes`, as fast as the host takes it.
    pub fn put(&mut self, mut bytes: &[u8]) -> Result<(), StreamError> {
        while !bytes.is_empty() {
            let room = usize::try_from(self.stream.check_write()?).unwrap_or(usize::MAX);
            if room == 0 {
                self.stream.subscribe().block();
                continue;
            }
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.stream.write(now)?;
            bytes = later;
        }
        Ok(())
    }

    /// Waits until the host has handed on what it was given.
    pub fn flush(&mut self) -> Result<(), StreamError> {
        self.stream.blocking_flush()
    }

    pub fn stream(&self) -> &OutputStream {
        &self.stream
    }

    /// What the host says to the end (a wrong length, a client that is gone) changes nothing here any more.
    pub fn finish(self, trailers: Option<Trailers>) {
        drop(self.stream);
        let _ = OutgoingBody::finish(self.body, trailers);
    }
}
