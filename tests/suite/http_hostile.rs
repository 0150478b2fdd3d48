//! Clients that mean harm: messages that two readers could read in two ways, and noise.
//!
//! Each message is followed by a marker on the same connection, and often holds a request of its own where its body is, or
//! may be. A server that is wrong about where the message ends answers what was hidden, or the marker out of its turn.

use std::io::Write as _;
use std::net::{Shutdown, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use super::http_messages::{self as messages, Message, Reading};
use crate::common::Outcome;
use crate::common::containerd::Containerd;
use crate::common::http::{self, End};
use crate::common::site::{self, Site};

pub const CASES: crate::common::Cases = &[
    ("a_message_has_one_reading", one_reading),
    ("a_target_with_a_host_wins", absolute_form),
    ("the_preface_may_come_in_pieces", preface),
    ("a_client_that_leaves_after_a_byte_holds_nobody_up", leaves_early),
];

pub const NEWEST: crate::common::Cases = &[("noise_is_refused_and_forgotten", noise)];

const LONG: Duration = Duration::from_secs(5);
/// For an answer that must not come.
const SHORT: Duration = Duration::from_millis(150);

fn one_reading(containerd: &Containerd) -> Outcome {
    let (site, offset) = (site::web(&containerd.namespace("http"), &[])?, containerd.log_length());
    let mut wrong = Vec::new();
    for message in messages::all() {
        for in_bytes in [false, true] {
            // Byte by byte takes its time.
            if in_bytes && (containerd.version != "2.1" || message.bytes.len() > 500) {
                continue;
            }
            let answers = ask(site.addr, &message, in_bytes);
            if !answers.as_ref().is_ok_and(|answers| answers.fit(&message.reading)) {
                let Message { name, reading, .. } = &message;
                wrong.push(format!("{name} (byte by byte: {in_bytes}) is {reading:?}, but: {answers:?}"));
            }
        }
    }
    ensure!(wrong.is_empty(), "{} messages are read wrongly: {wrong:#?}", wrong.len());
    unharmed(containerd, &site, offset)
}

/// What came back on a connection.
#[derive(Debug)]
struct Answers {
    /// Statuses and bodies.
    each: Vec<(u16, String)>,
    end: End,
}

fn ask(addr: SocketAddr, message: &Message, in_bytes: bool) -> Result<Answers> {
    let limit = if message.reading == Reading::Unfinished { SHORT } else { LONG };
    let bytes = [&message.bytes[..], messages::MARKER.as_bytes()].concat();
    let mut stream = http::socket(addr)?;
    // One that is refused may be cut while it is being sent.
    if in_bytes {
        let _ = bytes.iter().try_for_each(|byte| stream.write_all(std::slice::from_ref(byte)));
    } else {
        let _ = stream.write_all(&bytes);
    }
    let (back, end) = http::read_all(&mut stream, limit)?;
    Ok(Answers { each: answers(&String::from_utf8_lossy(&back))?, end })
}

fn answers(text: &str) -> Result<Vec<(u16, String)>> {
    let text = text.replace("HTTP/1.0 ", "HTTP/1.1 ");
    let mut found = Vec::new();
    let mut parts = text.split("HTTP/1.1 ");
    ensure!(parts.next() == Some(""), "no answer of HTTP: {text:?}");
    for part in parts {
        let (head, body) = part.split_once("\r\n\r\n").with_context(|| format!("half a head: {text:?}"))?;
        found.push((head.get(..3).context("no status")?.parse()?, body.to_owned()));
    }
    // An interim answer is none.
    found.retain(|(status, _)| *status != 100);
    Ok(found)
}

impl Answers {
    fn fit(&self, reading: &Reading) -> bool {
        let marker = (299, String::new());
        let closed = self.end != End::Open;
        let is_error = |status: u16| (400..500).contains(&status) || status == 501 || status == 505;
        let is_refusal = |each: &[(u16, String)]| match each {
            [] => true,
            [(status, _)] => is_error(*status),
            _ => false,
        };
        match (reading, &self.each[..]) {
            (Reading::Unfinished, each) => is_refusal(each),
            (Reading::Refused, each) => closed && is_refusal(each),
            (Reading::One(text), [first, second]) => closed && *first == (200, text.clone()) && *second == marker,
            (Reading::One(_), _) => false,
            (Reading::Last(text), [only]) if *only == (200, text.clone()) => closed,
            (Reading::Last(_), each) => closed && is_refusal(each),
            (Reading::Either(text), [first, rest @ ..]) if *first == (200, text.clone()) => {
                closed && (rest.is_empty() || *rest == [marker])
            }
            (Reading::Either(_), each) => closed && is_refusal(each),
            (Reading::Declined, [first, rest @ ..]) => {
                closed && is_error(first.0) && (rest.is_empty() || *rest == [marker])
            }
            (Reading::Declined, []) => closed,
        }
    }
}

/// It still serves, and nothing in it broke.
fn unharmed(containerd: &Containerd, site: &Site<'_>, offset: u64) -> Outcome {
    let (back, end) = http::exchange(site.addr, b"GET /hello HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", LONG)?;
    ensure!(back.ends_with(b"\r\n\r\nhello\n") && end == End::Closed, "{:?}", String::from_utf8_lossy(&back));
    let log = containerd.whole_log_since(offset);
    match log.lines().find(|line| line.contains("panic")) {
        Some(line) => bail!("the daemon broke: {line}"),
        None => Ok(()),
    }
}

/// RFC 9112, section 3.2.2: the field is ignored.
fn absolute_form(containerd: &Containerd) -> Outcome {
    let site = site::web(&containerd.namespace("http"), &[])?;
    let head = "GET http://b.example:81/inspect?x HTTP/1.1\r\nHost: a.example\r\nConnection: close\r\n\r\n";
    let (back, _) = http::exchange(site.addr, head.as_bytes(), LONG)?;
    let text = String::from_utf8_lossy(&back);
    ensure!(text.contains(r#""authority":"b.example:81""#), "{text}");
    ensure!(text.contains(r#""path_with_query":"/inspect?x""#), "{text}");
    Ok(())
}

/// The first frame of a client.
const SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];

fn preface(containerd: &Containerd) -> Outcome {
    let site = site::web(&containerd.namespace("http"), &[])?;
    let mut stream = http::socket(site.addr)?;
    for byte in [messages::PREFACE, SETTINGS].concat() {
        stream.write_all(&[byte])?;
        // A segment each, or nearly so.
        std::thread::yield_now();
    }
    let mut head = [0; 9];
    std::io::Read::read_exact(&mut stream, &mut head).context("the first frame of the server")?;
    ensure!(head[3] == 4, "not SETTINGS but {head:?}");
    // One that turns out to be no preface is no request either, and hides none.
    for length in 3..messages::PREFACE.len() {
        let bytes = [&messages::PREFACE[..length], messages::MARKER.as_bytes()].concat();
        let (back, end) = http::exchange(site.addr, &bytes, LONG)?;
        let text = String::from_utf8_lossy(&back);
        ensure!(end != End::Open && !text.contains("299"), "{length} bytes of the preface: {end:?} {text:?}");
    }
    Ok(())
}

/// As many as there can be workers, and more: one that waited for the rest in a loop would hold up all others.
fn leaves_early(containerd: &Containerd) -> Outcome {
    let (site, offset) = (site::web(&containerd.namespace("http"), &[])?, containerd.log_length());
    for part in
        ["", "P", "PR", "PRI", "G", "GET / HT", "POST /count HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nabc"]
    {
        let clients = (0..8)
            .map(|_| {
                let mut stream = http::socket(site.addr)?;
                stream.write_all(part.as_bytes())?;
                stream.shutdown(Shutdown::Write)?;
                Ok(stream)
            })
            .collect::<Result<Vec<_>>>()?;
        unharmed(containerd, &site, offset).with_context(|| format!("after {part:?}"))?;
        for mut stream in clients {
            let (back, end) = http::read_all(&mut stream, LONG)?;
            ensure!(end != End::Open, "{part:?} and no more: {end:?}, {:?}", String::from_utf8_lossy(&back));
        }
    }
    Ok(())
}

const ROUNDS: usize = 1500;
/// Fewer rounds will do on a machine that is busy.
const BUDGET: Duration = Duration::from_secs(8);
const GROWTH_KIB: u64 = 4 * 1024;

/// Everything above with some bytes changed. The client then says that it is done, and so the connection has to end.
fn noise(containerd: &Containerd) -> Outcome {
    let (site, offset) = (site::web(&containerd.namespace("http"), &[])?, containerd.log_length());
    let mut random = Random(0x7472_6f75_7065_0001);
    let mut seeds: Vec<Vec<u8>> = messages::all().into_iter().map(|message| message.bytes).collect();
    seeds.retain(|seed| seed.len() < 1000);
    // GET / of HTTP/2, with a host.
    let headers = [0, 0, 6, 1, 5, 0, 0, 0, 1, 0x82, 0x86, 0x84, 0x41, 1, b'a'];
    seeds.extend(std::iter::repeat_n([messages::PREFACE, SETTINGS, &headers[..]].concat(), seeds.len() / 4));
    let (begun, mut before, mut rounds) = (Instant::now(), 0, 0);
    while rounds < ROUNDS && (begun.elapsed() < BUDGET || rounds < ROUNDS / 5) {
        if rounds == ROUNDS / 8 {
            before = site.memory_kib()?;
        }
        let bytes = random.mutation(&seeds);
        let mut stream = http::socket(site.addr)?;
        let _ = stream.write_all(&bytes).and_then(|()| stream.shutdown(Shutdown::Write));
        let (_, end) = http::read_all(&mut stream, LONG)?;
        ensure!(end != End::Open, "round {rounds} never ends: {:?}", bytes.escape_ascii().to_string());
        rounds += 1;
    }
    unharmed(containerd, &site, offset)?;
    let growth = site.memory_kib()?.saturating_sub(before);
    ensure!(growth < GROWTH_KIB, "{rounds} messages cost {growth} KiB");
    Ok(())
}

/// xorshift64*: the same noise in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let high = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33;
        usize::try_from(high).unwrap_or_default() % limit.max(1)
    }

    fn mutation(&mut self, seeds: &[Vec<u8>]) -> Vec<u8> {
        const TOKENS: &[&[u8]] = &[
            b"\r\n",
            b"\n",
            b"\r",
            b"\0",
            b":",
            b" ",
            b"\t",
            b"Content-Length: 5\r\n",
            b"chunked",
            b"\xff",
            b"0\r\n\r\n",
            b"ffff",
        ];
        let mut bytes = seeds[self.below(seeds.len())].clone();
        for _ in 0..=self.below(4) {
            let at = self.below(bytes.len());
            let until = (at + 1 + self.below(20)).min(bytes.len());
            match self.below(6) {
                0 => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << (at % 8)),
                1 => drop(bytes.drain(at.min(until)..until)),
                2 => bytes.extend_from_within(at.min(until)..until),
                3 => bytes.truncate(at),
                4 => drop(bytes.splice(at..at, TOKENS[self.below(TOKENS.len())].iter().copied())),
                _ => bytes.extend_from_slice(&seeds[self.below(seeds.len())]),
            }
        }
        bytes
    }
}
