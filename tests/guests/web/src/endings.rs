//! Requests that do not end with a response.
use wasip2::cli::exit::exit_with_code;
use wasip2::http::types::{ErrorCode, ResponseOutparam};

use crate::answer::{Outcome, begin};
use crate::query::{Query, or_mistake};

#[cfg(target_family = "wasm")]
pub fn trap() -> ! {
    core::arch::wasm32::unreachable()
}

/// So that an editor, which looks at this for its own machine, finds no mistake.
#[cfg(not(target_family = "wasm"))]
pub fn trap() -> ! {
    std::process::abort()
}

pub fn trap_after_head(out: ResponseOutparam) -> Outcome {
    let mut body = begin(out, 200, &[("content-type", "text/plain")]);
    body.put(b"first\n")?;
    body.flush()?;
    trap()
}

pub fn exit(query: &Query, out: ResponseOutparam) -> Outcome {
    let (code, _out) = or_mistake(query.number("code", Some(0)), out)?;
    exit_with_code(code);
    Ok(())
}

pub fn never(out: ResponseOutparam) -> Outcome {
    drop(out);
    Ok(())
}

pub fn error(out: ResponseOutparam) -> Outcome {
    ResponseOutparam::set(out, Err(ErrorCode::InternalError(Some("an error on demand".to_owned()))));
    Ok(())
}
