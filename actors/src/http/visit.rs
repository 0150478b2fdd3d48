//! One request from its head to the last byte of its answer: counted, and told in the access log.
//!
//! Invariant: every request that was taken ends here exactly once, answered completely or cut; the drain's last line adds
//! them up.

use std::sync::Arc;
use std::time::Instant;

use http::{Method, Request, StatusCode, Uri, Version};
use serde_json::json;

use super::progress::Progress;
use crate::guest::{Failure, Place};

/// Bytes of an answer that may wait outside of the limit of requests.
const LITTLE: usize = 64 << 10;

/// A request under way. Dropped before it is complete, it counts as cut.
pub struct Visit {
    connection: Arc<Progress>,
    number: u64,
    begun: Instant,
    uri: Uri,
    is_head: bool,
    status: StatusCode,
    sent: u64,
    place: Option<Place>,
    is_http2: bool,
    end: End,
    /// What the access log will say; only if there is one.
    line: Option<Box<Line>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Open,
    Complete,
    Cut,
}

struct Line {
    method: Method,
    target: String,
    version: http::Version,
    peer: String,
    agent: Option<String>,
    trace: Option<String>,
}

impl Visit {
    /// Begins with the head of a request.
    pub fn begin<B>(connection: &Arc<Progress>, request: &Request<B>) -> Self {
        connection.begun();
        let server = connection.server();
        Self {
            number: server.next_number(),
            begun: Instant::now(),
            uri: request.uri().clone(),
            is_head: request.method() == Method::HEAD,
            status: StatusCode::OK,
            sent: 0,
            place: None,
            is_http2: request.version() == Version::HTTP_2,
            end: End::Open,
            line: server.settings().access_log.then(|| Box::new(Line::of(request, connection))),
            connection: Arc::clone(connection),
        }
    }

    /// Numbers the requests of a container: `REQUEST_ID` in the guest.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// What it asks for, without the query: that may hold secrets.
    pub fn target(&self) -> &str {
        self.uri.path()
    }

    /// Nothing can happen any more that would be told with its target. Where that is lies the head, in a buffer that the
    /// connection can use again from here on.
    pub fn forget_target(&mut self) {
        self.uri = Uri::default();
    }

    /// Its time is over while the client takes the answer piece by piece. A guest that runs is looked after by its task, which
    /// also sees to the first piece.
    pub fn is_overdue(&self) -> bool {
        let timeout = self.connection.server().settings().request_timeout;
        self.sent > 0 && timeout.is_some_and(|timeout| self.begun.elapsed() > timeout)
    }

    /// When its head had come.
    pub fn begun(&self) -> Instant {
        self.begun
    }

    /// The request keeps its place among those that may run until all of its answer is delivered.
    pub fn hold(&mut self, place: Option<Place>) {
        self.place = place;
    }

    /// Bytes of its answer that may wait without a place: none where a connection has many answers.
    pub fn spare(&self) -> usize {
        if self.is_http2 { 0 } else { LITTLE }
    }

    /// The answer has this status.
    pub fn answered(&mut self, status: StatusCode) {
        self.status = status;
    }

    /// The protocol allows no body in this answer.
    pub fn is_bodyless(&self) -> bool {
        self.is_head || matches!(self.status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED)
    }

    /// Bytes of the body were handed to the connection.
    pub fn sent(&mut self, bytes: u64) {
        self.sent += bytes;
    }

    /// All of the answer was handed to the connection.
    pub fn complete(&mut self) {
        if self.end == End::Open {
            self.end = End::Complete;
        }
    }

    /// It was not let finish: whatever the client is told instead, it counts as cut.
    pub fn cut(&mut self) {
        self.end = End::Cut;
    }

    /// The body broke off, and the client will see it.
    pub fn failed(&mut self, failure: &Failure) {
        self.connection.server().report(self.number, self.uri.path(), failure);
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        let complete = self.end == End::Complete;
        let server = self.connection.server();
        self.connection.ended();
        server.ended(complete);
        if let Some(line) = &self.line {
            server.log(&line.text(self, complete));
        }
    }
}

impl Line {
    fn of<B>(request: &Request<B>, connection: &Progress) -> Self {
        let header = |name| request.headers().get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into());
        Self {
            method: request.method().clone(),
            target: request.uri().path_and_query().map_or_else(String::new, ToString::to_string),
            version: request.version(),
            peer: connection.peer().to_string(),
            agent: header("user-agent"),
            trace: header("traceparent"),
        }
    }

    fn text(&self, visit: &Visit, complete: bool) -> String {
        let micros = u64::try_from(visit.begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        let line = json!({
            "request": visit.number,
            "peer": self.peer,
            "method": self.method.as_str(),
            "target": self.target,
            "protocol": format!("{:?}", self.version),
            "status": visit.status.as_u16(),
            "bytes": visit.sent,
            "duration_us": micros,
            "complete": complete,
            "user_agent": self.agent,
            "traceparent": self.trace,
        });
        format!("{line}\n")
    }
}
