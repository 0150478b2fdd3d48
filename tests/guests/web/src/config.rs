//! `wasi:config`: what the container was configured with.
use wasip2::http::types::ResponseOutparam;

use crate::answer::{Outcome, text};
use crate::query::{Query, or_mistake};

wit_bindgen::generate!({
    inline: "
        package troupe:web;
        world configured { import wasi:config/store@0.2.0-rc.1; }
        package wasi:config@0.2.0-rc.1 {
            interface store {
                variant error { upstream(string), io(string) }
                get: func(key: string) -> result<option<string>, error>;
                get-all: func() -> result<list<tuple<string, string>>, error>;
            }
        }
    ",
    world: "troupe:web/configured",
    generate_all,
});

use wasi::config::store;

/// The value of one key; without a key the number of all.
pub fn get(query: &Query, out: ResponseOutparam) -> Outcome {
    let Some(key) = query.text("key") else {
        let all = store::get_all().map(|all| all.len().to_string()).map_err(|error| format!("{error:?}"));
        let (count, out) = or_mistake(all, out)?;
        return text(out, 200, &format!("{count}\n"));
    };
    match store::get(key) {
        Ok(Some(value)) => text(out, 200, &format!("{value}\n")),
        Ok(None) => text(out, 404, "no such key\n"),
        Err(error) => text(out, 500, &format!("{error:?}\n")),
    }
}
