//! From one stream to another without waiting for either, so that two of them can run at once.
use wasip2::http::types::OutgoingBody;
use wasip2::io::poll::Pollable;
use wasip2::io::streams::{InputStream, OutputStream, StreamError};

const CHUNK: u64 = 64 * 1024;

/// What was read and could not be written yet.
#[derive(Default)]
pub struct Pump(Vec<u8>);

impl Pump {
    /// Moves what can be moved now; true when `from` has ended and all of it is written.
    pub fn step(&mut self, from: &InputStream, to: &OutputStream) -> Result<bool, StreamError> {
        loop {
            if self.0.is_empty() {
                match from.read(CHUNK) {
                    Ok(piece) if piece.is_empty() => return Ok(false),
                    Ok(piece) => self.0 = piece,
                    Err(StreamError::Closed) => return Ok(true),
                    Err(error) => return Err(error),
                }
            }
            let room = usize::try_from(to.check_write()?).unwrap_or(usize::MAX);
            if room == 0 {
                return Ok(false);
            }
            let later = self.0.split_off(room.min(self.0.len()));
            to.write(&self.0)?;
            to.flush()?;
            self.0 = later;
        }
    }

    /// When another step is worth it.
    pub fn waits_for(&self, from: &InputStream, to: &OutputStream) -> Pollable {
        if self.0.is_empty() { from.subscribe() } else { to.subscribe() }
    }
}

/// The body of an outgoing request while it is written. The streams are children of bodies, so they go first.
pub struct Upload {
    streams: Option<(InputStream, OutputStream)>,
    pump: Pump,
    body: Option<OutgoingBody>,
}

impl Upload {
    pub fn new(from: InputStream, body: OutgoingBody) -> Self {
        let to = body.write().expect("the stream, which is taken once");
        Upload { streams: Some((from, to)), pump: Pump::default(), body: Some(body) }
    }

    /// A body that cannot go on is dropped without its end. That is no error here: a server may answer before it has
    /// read everything, and its answer is what counts.
    pub fn step(&mut self) {
        let Some((from, to)) = &self.streams else { return };
        let done = self.pump.step(from, to);
        if !matches!(done, Ok(false)) {
            self.streams = None;
            let body = self.body.take();
            if let (Ok(true), Some(body)) = (done, body) {
                let _ = OutgoingBody::finish(body, None);
            }
        }
    }

    pub fn waits_for(&self) -> Option<Pollable> {
        self.streams.as_ref().map(|(from, to)| self.pump.waits_for(from, to))
    }
}
