//! Servers of WASI 0.3 are held to the same bounds as those of 0.2: their bodies and instances go through other code.
//!
//! Each request has an instance of its own here; what shares one is in `http_shared.rs`.

use anyhow::Context;
use hyper::http::Method;

use super::http_limits::{SMALL_BODY, too_large};
use super::http_patience::{
    IMPATIENT, ONE_PLACE, SHORT, STALLED, body_stops, breaks_off, free, leave, reader_stalls, stream_stalls,
};
use super::http_serve::{heads, leisure};
use crate::common::Outcome;
use crate::common::containerd::Containerd;
use crate::common::http::{self, BOTH, Connection};
use crate::common::site::{self, Site};

pub const NEWEST: crate::common::Cases = &[
    ("a_slow_reader_costs_no_memory", |containerd| serving(containerd, &[], leisure)),
    ("a_client_that_does_not_read_is_cut", |containerd| serving(containerd, &STALLED, reader_stalls)),
    ("a_stream_whose_client_does_not_read_is_reset", |containerd| serving(containerd, &STALLED, stream_stalls)),
    ("a_large_body_is_413", |containerd| serving(containerd, &SMALL_BODY, too_large)),
    ("a_body_that_stops_coming_is_not_waited_for", |containerd| serving(containerd, &IMPATIENT, body_stops)),
    ("head_has_no_body", |containerd| serving(containerd, &[], heads)),
    ("an_answer_without_its_body_frees_its_place", head_of_endless),
    ("past_its_time_a_body_breaks_off", |containerd| serving(containerd, &SHORT, breaks_off)),
    ("a_client_that_leaves_frees_its_place", leaves),
];

/// `web3.wasm`, and an asynchronous use of it.
fn serving(containerd: &Containerd, settings: &[(&str, &str)], act: impl AsyncFnOnce(&Site<'_>) -> Outcome) -> Outcome {
    let site = Site::start(site::with(containerd.namespace("http").guest("/web3.wasm", &[])?, settings))?;
    http::block_on(act(&site)).with_context(|| format!("the container's log: {:?}", site.log()))
}

/// Nobody wants the body: its guest is told so, and does not write a terabyte for nobody.
fn head_of_endless(containerd: &Containerd) -> Outcome {
    for protocol in BOTH {
        serving(containerd, &[ONE_PLACE], async |site| {
            let mut connection = Connection::open(site.addr, protocol).await?;
            let request = connection.request(Method::HEAD, "/big?bytes=1099511627776", http::empty())?;
            connection.fetch(request).await?.expect(200, "")?;
            free(site.addr).await.with_context(|| format!("{protocol:?}"))
        })?;
    }
    Ok(())
}

fn leaves(containerd: &Containerd) -> Outcome {
    let paths =
        [("/sleep", "begun"), ("/spin", "begun"), ("/sleep-after-head", "begun"), ("/spin-after-head", "spins")];
    for (path, said) in paths {
        for protocol in BOTH {
            serving(containerd, &[ONE_PLACE], async |site| leave(site, protocol, path, said).await)?;
        }
    }
    Ok(())
}
