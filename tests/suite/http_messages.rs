//! Messages of HTTP/1.1 that are wrong or strange, and how RFC 9112 reads each. Used by `http_hostile`.

use super::http_serve::counted;

/// What follows each message on its connection.
pub const MARKER: &str = "GET /status?code=299 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
/// What is hidden in a message. Its answer shows that the message was read in another way.
const HIDDEN: &str = "GET /status?code=298 HTTP/1.1\r\nHost: a\r\n\r\n";
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// What a message is.
#[derive(Debug, PartialEq, Eq)]
pub enum Reading {
    /// None: the connection ends, with an error or without a word.
    Refused,
    /// One with this answer; the marker is answered as well.
    One(String),
    /// The same, but refusing it is right too, and so is not going on after it.
    Either(String),
    /// One with this answer, after which the connection ends; or it is refused.
    Last(String),
    /// One whose end is clear, and that is answered with an error.
    Declined,
    /// The marker is a part of it.
    Unfinished,
}

use Reading::{Declined, Either, Last, One, Refused, Unfinished};

#[derive(Debug)]
pub struct Message {
    pub name: String,
    pub bytes: Vec<u8>,
    pub reading: Reading,
}

fn message(bytes: impl Into<Vec<u8>>, reading: Reading) -> Message {
    let bytes = bytes.into();
    let name = bytes[..bytes.len().min(160)].escape_ascii().to_string();
    Message { name, bytes, reading }
}

pub fn all() -> Vec<Message> {
    let mut all = lengths();
    all.extend(both_framings());
    all.extend(codings());
    all.extend(chunks());
    all.extend(heads());
    all.extend(lines());
    all
}

/// A request with a body, whose length and hash are its answer. Each field ends in CRLF.
fn post(fields: &str, body: &str) -> String {
    format!("POST /count HTTP/1.1\r\nHost: a\r\n{fields}\r\n{body}")
}

fn body(text: &str) -> String {
    counted(text.as_bytes())
}

fn lengths() -> Vec<Message> {
    let hidden = HIDDEN.len();
    let mut all: Vec<Message> = [
        "+5",
        "-5",
        "5 5",
        "5,5",
        "5, 6",
        "0x5",
        "5a",
        "",
        "5.0",
        "5;",
        "\"5\"",
        "\u{665}",
        "18446744073709551616",
        "99999999999999999999999",
        "18446744073709551615",
    ]
    .iter()
    .map(|length| message(post(&format!("Content-Length: {length}\r\n"), "abcde"), Refused))
    .collect();
    for length in ["5", "  5 ", "\t5\t", "05", "0000000000000000000005"] {
        all.push(message(post(&format!("Content-Length: {length}\r\n"), "abcde"), One(body("abcde"))));
    }
    for (one, other) in [(0, hidden), (hidden, 0), (hidden, hidden + 1), (hidden + 1, hidden)] {
        let fields = format!("Content-Length: {one}\r\nContent-Length: {other}\r\n");
        all.push(message(post(&fields, HIDDEN), Refused));
    }
    let twice = format!("Content-Length: {hidden}\r\nContent-Length: {hidden}\r\n");
    all.push(message(post(&twice, HIDDEN), Either(body(HIDDEN))));
    let once = format!("Content-Length: {hidden}\r\n");
    all.push(message(post(&once, HIDDEN), One(body(HIDDEN))));
    // What asks for the next protocol is still a message of this one.
    let upgrade = format!("{once}Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n");
    all.push(message(post(&upgrade, HIDDEN), One(body(HIDDEN))));
    all.push(message(post(&format!("{once}Connection: content-length\r\n"), HIDDEN), One(body(HIDDEN))));
    all.push(message(post(&format!("{once}Expect: 100-continue\r\n"), HIDDEN), One(body(HIDDEN))));
    all.push(message(post("Content-Length: 99999\r\n", HIDDEN), Unfinished));
    all.push(message(post("", ""), One(body(""))));
    // GET may have a body, and then it is not the next request. One that nobody reads may be the last.
    let get = format!("GET /hello HTTP/1.1\r\nHost: a\r\n{once}\r\n{HIDDEN}");
    all.push(message(get, Either("hello\n".into())));
    all
}

fn both_framings() -> Vec<Message> {
    let (coding, end) = ("Transfer-Encoding: chunked\r\n", "0\r\n\r\n");
    let (whole, chunk) = (end.len() + HIDDEN.len(), format!("{:x}\r\n{HIDDEN}\r\n{end}", HIDDEN.len()));
    let long = format!("Content-Length: {whole}\r\n");
    let short = "Content-Length: 4\r\n";
    vec![
        message(post(&format!("{long}{coding}"), &format!("{end}{HIDDEN}")), Last(body(""))),
        message(post(&format!("{coding}{long}"), &format!("{end}{HIDDEN}")), Last(body(""))),
        message(post(&format!("{short}{coding}"), &chunk), Last(body(HIDDEN))),
        message(post(&format!("{coding}{short}"), &chunk), Last(body(HIDDEN))),
        message(post(&format!("{short}{coding}{short}"), &chunk), Last(body(HIDDEN))),
        message(post(&format!("{coding}Content-Length: x\r\n"), &chunk), Last(body(HIDDEN))),
        message(post(&format!("{short}Transfer-Encoding: xchunked\r\n"), &chunk), Refused),
        message(post(&format!("{short}Transfer-Encoding: identity\r\n"), &chunk), Refused),
        // The other field has another name, so there is one framing.
        message(
            post(&format!("Content-Length: {}\r\nTransfer_Encoding: chunked\r\n", chunk.len()), &chunk),
            One(body(&chunk)),
        ),
    ]
}

fn codings() -> Vec<Message> {
    let chunked = format!("{:x}\r\n{HIDDEN}\r\n0\r\n\r\n", HIDDEN.len());
    let with = |fields: &str, reading| message(post(fields, &chunked), reading);
    let mut all = Vec::new();
    for value in [" chunked", "chunked", " Chunked", " CHUNKED", "\tchunked", " \t chunked \t "] {
        all.push(with(&format!("Transfer-Encoding:{value}\r\n"), One(body(HIDDEN))));
    }
    for value in ["identity, chunked", "gzip, chunked", ", chunked", "chunked, chunked"] {
        all.push(with(&format!("Transfer-Encoding: {value}\r\n"), Either(body(HIDDEN))));
    }
    for value in [
        "xchunked",
        "chunkedx",
        "chunked, identity",
        "identity",
        "",
        "\"chunked\"",
        "chunked;q=1",
        "chunked,",
        "chunked x",
        "\u{b}chunked",
        "chunked\0",
        "\0chunked",
        "chunked\u{b}",
        "c\thunked",
        "\r\n chunked",
        "\r\n\tchunked",
        "chunked\r\n ,identity",
        "x\rchunked",
        "chunked\r",
    ] {
        all.push(with(&format!("Transfer-Encoding: {value}\r\n"), Refused));
    }
    all.push(with("Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n", Refused));
    all.push(with("Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n", Either(body(HIDDEN))));
    for name in [
        "Transfer-Encoding ",
        "Transfer-Encoding\t",
        " Transfer-Encoding",
        "Transfer-Encoding\0",
        "Transfer\rEncoding",
        "\u{b}Transfer-Encoding",
    ] {
        all.push(with(&format!("{name}: chunked\r\n"), Refused));
    }
    all.push(with("X: y\nTransfer-Encoding: chunked\r\n", Either(body(HIDDEN))));
    all.push(with("X: y\rTransfer-Encoding: chunked\r\n", Refused));
    let old = format!("POST /count HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{chunked}");
    all.push(message(old, Last(body(HIDDEN))));
    all
}

fn chunks() -> Vec<Message> {
    let with = |chunks: &str, reading| message(post("Transfer-Encoding: chunked\r\n", chunks), reading);
    let mut all = Vec::new();
    for chunks in [
        "5\r\nabcde\r\n0\r\n\r\n",
        "05\r\nabcde\r\n0\r\n\r\n",
        "5;a=b\r\nabcde\r\n0\r\n\r\n",
        "5;a=\"b\"\r\nabcde\r\n0;c\r\n\r\n",
        "2\r\nab\r\n3\r\ncde\r\n000\r\n\r\n",
        // Trailers frame nothing.
        "5\r\nabcde\r\n0\r\nContent-Length: 50\r\n\r\n",
        "5\r\nabcde\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n",
    ] {
        all.push(with(chunks, One(body("abcde"))));
    }
    all.push(with("5 \r\nabcde\r\n0\r\n\r\n", Either(body("abcde"))));
    for size in [
        "G",
        "-5",
        "+5",
        "0x5",
        " 5",
        "",
        "5 5",
        "5,",
        "5\0",
        "\u{665}",
        "10000000000000005",
        "FFFFFFFFFFFFFFFFF",
        "5;\na",
        "5\r",
    ] {
        all.push(with(&format!("{size}\r\nabcde\r\n0\r\n\r\n{HIDDEN}"), Refused));
    }
    for chunks in [
        "5\nabcde\r\n0\r\n\r\n",
        "5\rabcde\r\n0\r\n\r\n",
        "5\r\nabcde0\r\n\r\n",
        "5\r\nabcdeXX0\r\n\r\n",
        "5\r\nabcde\n0\r\n\r\n",
        "5\r\nabcde\r0\r\n\r\n",
        "5\r\nabcdef\r\n0\r\n\r\n",
        "4\r\nabcde\r\n0\r\n\r\n",
        "0\rX\r\n",
        "0\r\n\rX",
        "0\r\n: nothing\r\n\r\n",
        "0\r\nbad : x\r\n\r\n",
    ] {
        all.push(with(&format!("{chunks}{HIDDEN}"), Refused));
    }
    all.push(with(&format!("0\r\n{HIDDEN}"), Refused));
    all.push(with(&format!("5;{}\r\nabcde\r\n0\r\n\r\n", "x".repeat(20_000)), Refused));
    for size in ["FFFFFFFFFFFFFFFF", "7FFFFFFFFFFFFFFF", "FFFFFFFF"] {
        all.push(with(&format!("{size}\r\nabcde\r\n0\r\n\r\n{HIDDEN}"), Unfinished));
    }
    all
}

/// `GET /hello` with these fields.
fn get(fields: &str) -> String {
    format!("GET /hello HTTP/1.1\r\n{fields}\r\n")
}

fn heads() -> Vec<Message> {
    let hello = || "hello\n".to_owned();
    let mut all = Vec::new();
    for fields in [
        "Host: a\r\nX\0: y\r\n",
        "Host: a\r\nX: \0\r\n",
        "Host : a\r\n",
        "Host: a\r\n: empty\r\n",
        "Host: a\r\nnothing\r\n",
        " Host: a\r\n",
        "Host: a\r\n folded\r\n",
        "Host: a\r\n\tfolded\r\n",
        "Host: a\r\nX: y\rZ: w\r\n",
        "Host: a\r\nX(): y\r\n",
        "Host: a\r\nX\u{e9}: y\r\n",
        "Host: a\r\nX: \u{7f}\r\n",
        "Host: a\r\n\r",
    ] {
        all.push(message(get(fields), Refused));
    }
    for fields in ["", "Host: a\r\nHost: b\r\n", "Host: a\r\nHost: a\r\n", "X: y\r\n", "Host: a\r\nX: y\r\nhost: b\r\n"]
    {
        all.push(message(get(fields), Declined));
    }
    for fields in ["Host: a\r\nX:\r\n", "HOST: a\r\nx: \t \r\n", "hOsT:a\r\n"] {
        all.push(message(get(fields), One(hello())));
    }
    all.push(message(get("Host: a\nX: y\r\n"), Either(hello())));
    all.push(message("GET /hello HTTP/1.1\nHost: a\n\n", Either(hello())));
    all.push(message("\r\nGET /hello HTTP/1.1\r\nHost: a\r\n\r\n", Either(hello())));
    all.push(message("GET /hello HTTP/1.1\rHost: a\r\r", Refused));
    all.push(message("GET /hello HTTP/1.0\r\nHost: a\r\n\r\n", Last(hello())));
    all.push(message(get(&format!("Host: a\r\nX: {}\r\n", "y".repeat(70_000))), Refused));
    all.push(message(get(&format!("Host: a\r\n{}: y\r\n", "x".repeat(70_000))), Refused));
    // More than one reader of a proxy's request.
    all.push(message("GET http://b/hello HTTP/1.1\r\nHost: a\r\n\r\n", One(hello())));
    all.push(message("GET http://b/hello HTTP/1.1\r\n\r\n", Declined));
    all.push(message("GET http://b/hello HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", Declined));
    all
}

fn lines() -> Vec<Message> {
    let mut all = Vec::new();
    for line in [
        "GET /hello",
        "GET /hello HTTP/0.9",
        "GET /hello HTTP/2.0",
        "GET /hello HTTP/3",
        "GET /hello HTTP/1.1x",
        "GET /hello http/1.1",
        "GET /hello HTTP/11",
        "GET /hello HTTP/",
        "GET  /hello HTTP/1.1",
        "GET /hello  HTTP/1.1",
        " GET /hello HTTP/1.1",
        "GET\t/hello HTTP/1.1",
        "GET /hel lo HTTP/1.1",
        "GET /\0 HTTP/1.1",
        "G\0T / HTTP/1.1",
        "GET /hello HTTP/1.1 HTTP/1.1",
        "G(T /hello HTTP/1.1",
        "GET",
        "",
        "\0",
        "GET /hello HTTP/1.1\rX: y",
        "\u{16}\u{3}\u{1}\u{2}",
    ] {
        all.push(message(format!("{line}\r\nHost: a\r\n\r\n"), Refused));
    }
    let hidden = format!("Content-Length: {}\r\n\r\n{HIDDEN}", HIDDEN.len());
    all.push(message("CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n", Declined));
    all.push(message(format!("CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n{hidden}"), Declined));
    all.push(message(format!("POST /nowhere HTTP/1.1\r\nHost: a\r\n{hidden}"), Declined));
    all.push(message(format!("POST /hello HTTP/1.1\r\n{hidden}"), Declined));
    all.push(message(format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "x".repeat(30_000)), Declined));
    all.push(message(format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "x".repeat(70_000)), Refused));
    all.push(message(format!("{} / HTTP/1.1\r\nHost: a\r\n\r\n", "X".repeat(70_000)), Refused));
    all
}
