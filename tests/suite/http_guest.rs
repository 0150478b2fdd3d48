//! What a served guest sees and says: the head of its request, its environment, its files, its log; and which guests,
//! settings and toolchains there are.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use hyper::http::{HeaderValue, Method, Request};
use serde_json::Value;

use super::http_serve::{pattern, serving};
use crate::common::containerd::Containerd;
use crate::common::http::{self, BOTH, Connection, Protocol};
use crate::common::site::{self, PREFIX, Site};
use crate::common::{Outcome, base, guests, image};

pub const CASES: crate::common::Cases = &[
    ("the_head_arrives_as_it_was_sent", heads),
    ("the_environment_hides_the_settings", environment),
    ("every_request_has_a_fresh_instance", fresh),
    ("an_instance_is_reused_as_often_as_set", reused),
    ("a_file_is_read_and_its_update_seen", files),
    ("lines_of_the_guest_are_logged_whole", log_lines),
    ("the_access_log_has_a_line_for_each_request", access_log),
    ("wasi_config_gives_the_environment", config),
    ("guests_of_wasi_0_3_are_served", wasi3),
    ("commands_of_wasi_0_3_run", command3),
    ("what_is_neither_command_nor_server_is_refused", neither),
    ("wrong_settings_refuse_the_start", wrong_settings),
    ("settings_come_from_three_sources", sources),
    ("an_address_in_use_refuses_the_start", address_in_use),
];

pub const NEWEST: crate::common::Cases =
    &[("javascript_and_python_are_served", toolchains), ("no_line_of_the_access_log_is_lost", access_log_of_many)];

async fn inspect(connection: &mut Connection, request: Request<http::Outgoing>) -> Result<Value> {
    let answer = connection.fetch(request).await?;
    ensure!(answer.status == 200, "{answer:?}");
    serde_json::from_slice(&answer.body).context("what came, as JSON")
}

fn headers<'a>(seen: &'a Value, name: &str) -> Vec<&'a str> {
    let all = seen["headers"].as_array().map(Vec::as_slice).unwrap_or_default();
    all.iter().filter(|header| header[0] == name).filter_map(|header| header[1].as_str()).collect()
}

fn heads(containerd: &Containerd) -> Outcome {
    serving(containerd, &[], async |site| {
        let paths = ["/inspect", "/inspect?", "/inspect?a=b&c=%2F%20+d", "/inspect?x=/../y//z", "/inspect?%00%ff=ä"];
        for protocol in BOTH {
            let mut connection = Connection::open(site.addr, protocol).await?;
            for path in &paths[..4] {
                for method in ["GET", "PUT", "DELETE", "OPTIONS", "PATCH", "PROPFIND"] {
                    let mut request = connection.request(method.parse()?, path, http::empty())?;
                    for value in ["one", "two, three"] {
                        request.headers_mut().append("x-many", HeaderValue::from_static(value));
                    }
                    request.headers_mut().insert("x-bytes", HeaderValue::from_bytes(b"\xc3\xa4\t\x80")?);
                    request.headers_mut().insert("traceparent", HeaderValue::from_static(TRACE));
                    let seen = inspect(&mut connection, request).await?;
                    ensure!(seen["method"] == method, "{seen}");
                    ensure!(seen["scheme"] == "http", "{seen}");
                    ensure!(seen["authority"] == site.addr.to_string(), "{seen}");
                    ensure!(seen["path_with_query"] == *path, "{path}: {seen}");
                    ensure!(headers(&seen, "x-many") == ["one", "two, three"], "{seen}");
                    ensure!(headers(&seen, "x-bytes") == ["ä\t\u{fffd}"], "{seen}");
                    ensure!(headers(&seen, "traceparent") == [TRACE], "{seen}");
                }
            }
        }
        // The authority is the client's word, whatever address it came to; the absolute form wins over Host.
        for (line, host, authority) in [
            ("/inspect", "shop.example", "shop.example"),
            ("/inspect", "shop.example:81", "shop.example:81"),
            ("http://shop.example/inspect", "shop.example", "shop.example"),
        ] {
            let head = format!("GET {line} HTTP/1.1\r\nhOsT: {host}\r\nConnection: close\r\n\r\n");
            let (answer, _) = http::exchange(site.addr, head.as_bytes(), Duration::from_secs(5))?;
            let text = String::from_utf8_lossy(&answer);
            let body = text.split_once("\r\n\r\n").with_context(|| format!("{head:?}: {text:?}"))?.1;
            let seen: Value = serde_json::from_str(body).with_context(|| format!("{head:?}: {text:?}"))?;
            ensure!(seen["authority"] == authority, "{head:?}: {seen}");
            ensure!(seen["path_with_query"] == "/inspect" && seen["scheme"] == "http", "{head:?}: {seen}");
        }
        Ok(())
    })
}

const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

fn environment(containerd: &Containerd) -> Outcome {
    let run = containerd.namespace("http").guest(site::WEB, &[])?.option("--env", "COLOUR=red");
    let site = Site::start(site::with(run, &[("REQUEST_TIMEOUT", "7s"), ("ACCESS_LOG", "off")]))?;
    http::block_on(async {
        let mut ids = HashSet::new();
        for protocol in BOTH {
            let mut connection = Connection::open(site.addr, protocol).await?;
            for _ in 0..5 {
                let request = connection.request(Method::GET, "/inspect", http::empty())?;
                let seen = inspect(&mut connection, request).await?;
                let env = seen["env"].as_object().context("an environment")?;
                ensure!(env["COLOUR"] == "red" && env["PATH"] == "/bin", "{env:?}");
                ensure!(env.keys().all(|name| !name.contains("WASMTIME") && !name.contains("TROUPE")), "{env:?}");
                ids.insert(env["REQUEST_ID"].to_string());
            }
        }
        ensure!(ids.len() == 10, "{ids:?}");
        Ok(())
    })
}

fn fresh(containerd: &Containerd) -> Outcome {
    serving(containerd, &[], async |site| {
        let mut clients = tokio::task::JoinSet::new();
        for number in 0..16 {
            let addr = site.addr;
            clients.spawn(async move {
                let mut connection = Connection::open(addr, BOTH[number % 2]).await?;
                for _ in 0..20 {
                    connection.get("/static-counter").await?.expect(200, "1\n")?;
                }
                anyhow::Ok(())
            });
        }
        while let Some(client) = clients.join_next().await {
            client??;
        }
        Ok(())
    })
}

fn reused(containerd: &Containerd) -> Outcome {
    serving(containerd, &[("INSTANCE_REUSE", "3"), ("INSTANCE_IDLE_TIMEOUT", "300ms")], async |site| {
        let mut connection = Connection::open(site.addr, Protocol::One).await?;
        for _ in 0..4 {
            for expected in ["1\n", "2\n", "3\n"] {
                connection.get("/static-counter").await?.expect(200, expected)?;
            }
        }
        connection.get("/static-counter").await?.expect(200, "1\n")?;
        tokio::time::sleep(Duration::from_millis(900)).await;
        connection.get("/static-counter").await?.expect(200, "1\n")?;
        // Its own number, whoever was served before; and a guest that failed serves no other.
        let request = connection.request(Method::GET, "/inspect", http::empty())?;
        let first = inspect(&mut connection, request).await?["env"]["REQUEST_ID"].clone();
        ensure!(connection.get("/trap").await?.status == 500);
        let request = connection.request(Method::GET, "/inspect", http::empty())?;
        let second = inspect(&mut connection, request).await?["env"]["REQUEST_ID"].clone();
        ensure!(first != second, "{first} {second}");
        connection.get("/static-counter").await?.expect(200, "1\n")
    })
}

/// Laid out as Kubernetes lays out a ConfigMap: a link to a folder that is swapped for another.
fn files(containerd: &Containerd) -> Outcome {
    let root = base::folder(&format!("roots/config-{}", containerd.version))?;
    fs::copy(guests::built("web.wasm")?, root.join("web.wasm"))?;
    let config = root.join("config");
    for version in ["one", "two"] {
        fs::create_dir_all(config.join(version))?;
        fs::write(config.join(version).join("colour"), format!("colour of {version}"))?;
    }
    symlink("one", config.join("..data"))?;
    symlink("..data/colour", config.join("colour"))?;
    let site = Site::start(containerd.namespace("http").rootfs(&root, &[site::WEB]))?;
    http::block_on(async {
        let mut connection = Connection::open(site.addr, Protocol::One).await?;
        connection.get("/file?path=/config/colour").await?.expect(200, "colour of one")?;
        symlink("two", config.join("..new"))?;
        fs::rename(config.join("..new"), config.join("..data"))?;
        connection.get("/file?path=/config/colour").await?.expect(200, "colour of two")?;
        for outside in ["/etc/passwd", "/../../../../../../etc/passwd", "/none"] {
            ensure!(connection.get(&format!("/file?path={outside}")).await?.status == 404, "{outside}");
        }
        Ok(())
    })
}

fn log_lines(containerd: &Containerd) -> Outcome {
    serving(containerd, &[("LOG_REQUEST_ID", "on")], async |site| {
        let mut clients = tokio::task::JoinSet::new();
        for number in 0..8 {
            let (addr, text) = (site.addr, format!("client-{number}-").repeat(20));
            clients.spawn(async move { http::get(addr, Protocol::One, &format!("/log?lines=40&text={text}")).await });
        }
        while let Some(answer) = clients.join_next().await {
            answer??.expect(200, "logged\n")?;
        }
        http::get(site.addr, Protocol::One, "/log-partial").await?.expect(200, "logged\n")?;
        let log = site.wait_log("] no newline\n")?;
        for number in 0..8 {
            let text = format!("client-{number}-").repeat(20);
            let about: Vec<_> = log.lines().filter(|line| line.contains(&format!("client-{number}-"))).collect();
            let ids: HashSet<_> = about.iter().filter_map(|line| line.split(' ').next()).collect();
            ensure!(about.len() == 41 && ids.len() == 1, "{} lines, ids {ids:?}", about.len());
            let id = ids.into_iter().next().unwrap_or_default();
            for line in 1..=40 {
                let whole = format!("{id} {text} {line}");
                ensure!(about.iter().filter(|seen| **seen == whole).count() == 1, "{whole:?} is not there once");
            }
            ensure!(about.contains(&format!("{id} err {text}").as_str()), "stderr is missing");
        }
        Ok(())
    })
}

fn access_log(containerd: &Containerd) -> Outcome {
    serving(containerd, &[("ACCESS_LOG", "on")], async |site| {
        for (number, protocol) in BOTH.into_iter().enumerate() {
            let mut connection = Connection::open(site.addr, protocol).await?;
            let mut request = connection.request(Method::GET, &format!("/hello?n={number}"), http::empty())?;
            request.headers_mut().insert("traceparent", HeaderValue::from_static(TRACE));
            request.headers_mut().insert("user-agent", HeaderValue::from_static("a \"browser\""));
            connection.fetch(request).await?.expect(200, "hello\n")?;
            ensure!(connection.get(&format!("/trap?n={number}")).await?.status == 500);
        }
        let log = site.wait_log("/trap?n=1")?;
        let lines: Vec<Value> = log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        ensure!(lines.len() == 4, "{log}");
        for (number, protocol) in ["HTTP/1.1", "HTTP/2.0"].into_iter().enumerate() {
            let line = lines.iter().find(|line| line["target"] == format!("/hello?n={number}")).context("a line")?;
            ensure!(line["protocol"] == protocol && line["status"] == 200 && line["bytes"] == 6, "{line}");
            ensure!(line["traceparent"] == TRACE && line["user_agent"] == "a \"browser\"", "{line}");
            ensure!(line["method"] == "GET" && line["complete"] == true && line["duration_us"].is_u64(), "{line}");
            let line = lines.iter().find(|line| line["target"] == format!("/trap?n={number}")).context("a line")?;
            ensure!(line["status"] == 500, "{line}");
        }
        Ok(())
    })
}

/// More at once than the blocking thread that writes the file keeps up with.
fn access_log_of_many(containerd: &Containerd) -> Outcome {
    const CLIENTS: usize = 32;
    const EACH: usize = 200;
    serving(containerd, &[("ACCESS_LOG", "on")], async |site| {
        let mut clients = tokio::task::JoinSet::new();
        for number in 0..CLIENTS {
            let addr = site.addr;
            clients.spawn(async move {
                let mut connection = Connection::open(addr, BOTH[number % 2]).await?;
                for _ in 0..EACH {
                    connection.get("/hello").await?.expect(200, "hello\n")?;
                }
                anyhow::Ok(())
            });
        }
        while let Some(client) = clients.join_next().await {
            client??;
        }
        site.told("\"target\":\"/hello\"", CLIENTS * EACH).await?;
        let log = site.log();
        let lines = log.lines().map(serde_json::from_str::<Value>).collect::<Result<Vec<_>, _>>()?;
        let numbers: HashSet<_> = lines.iter().map(|line| line["request"].as_u64()).collect();
        ensure!(numbers.len() == CLIENTS * EACH, "{} different numbers", numbers.len());
        Ok(())
    })
}

/// On one containerd only: these two are large, and take a while to compile.
fn toolchains(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("http");
    let modules = [guests::built("js.wasm")?, guests::built("py.wasm")?];
    let tar = image::pack("toolchains", &[&modules[0], &modules[1]], &["--workdir=/"])?;
    client.import("test.local/toolchains:latest", &tar)?;
    for guest in ["/js.wasm", "/py.wasm"] {
        let run = client.image("test.local/toolchains:latest", &[guest]).within(Duration::from_secs(400));
        let site = Site::start(run)?;
        http::block_on(async {
            for protocol in BOTH {
                let mut connection = Connection::open(site.addr, protocol).await?;
                connection.get("/hello").await?.expect(200, "hello\n")?;
                let large = Bytes::from(pattern(300_000));
                ensure!(connection.post("/echo", large.clone()).await?.body == large, "{guest} {protocol:?}");
                let counted = connection.get("/json?items=100").await?;
                ensure!(counted.status == 200 && counted.text().starts_with("100 "), "{counted:?}");
            }
            Ok(())
        })
        .with_context(|| format!("{guest}: {}", site.log()))?;
        site.drain("SIGTERM", 0)?;
    }
    Ok(())
}

fn config(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("http");
    // A command that compares one value.
    client.guest("/config.wasm", &[])?.option("--env", "GREETING=hello").expect(0)?;
    client.guest("/config.wasm", &[])?.option("--env", "GREETING=hullo").expect(1)?;
    client.guest("/config.wasm", &[])?.expect(1)?;
    let site = Site::start(client.guest(site::WEB, &[])?.option("--env", "GREETING=hello you"))?;
    http::block_on(async {
        let mut connection = Connection::open(site.addr, Protocol::One).await?;
        connection.get("/config?key=GREETING").await?.expect(200, "hello you\n")?;
        connection.get("/config?key=PATH").await?.expect(200, "/bin\n")?;
        for key in ["greeting", "WASMTIME_HTTP_PROXY_SOCKET_ADDR", "HOME"] {
            connection.get(&format!("/config?key={key}")).await?.expect(404, "no such key\n")?;
        }
        let request = connection.request(Method::GET, "/inspect", http::empty())?;
        let seen = inspect(&mut connection, request).await?;
        let variables = seen["env"].as_object().context("an environment")?.len();
        // All but the request's own.
        connection.get("/config").await?.expect(200, &format!("{}\n", variables - 1))
    })
}

fn wasi3(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("http");
    let site = Site::start(client.guest("/web3.wasm", &[])?.option("--env", "COLOUR=red"))?;
    http::block_on(async {
        for protocol in BOTH {
            let mut connection = Connection::open(site.addr, protocol).await?;
            connection.get("/hello").await?.expect(200, "hello\n")?;
            connection.get("/static-counter").await?.expect(200, "1\n")?;
            connection.get("/sleep?ms=50").await?.expect(200, "slept\n")?;
            let large = Bytes::from(pattern(1_000_000));
            ensure!(connection.post("/echo", large.clone()).await?.body == large, "{protocol:?}");
            let mut request = connection.request(Method::GET, "/trailers", http::empty())?;
            request.headers_mut().insert("te", HeaderValue::from_static("trailers"));
            let answer = connection.fetch(request).await?;
            ensure!(answer.trailers.as_ref().is_some_and(|trailers| trailers["x-checksum"] == "abc"), "{answer:?}");
            let request = connection.request(Method::GET, "/inspect?a=b", http::empty())?;
            let seen = inspect(&mut connection, request).await?;
            ensure!(seen["scheme"] == "http" && seen["authority"] == site.addr.to_string(), "{seen}");
            ensure!(seen["path_with_query"] == "/inspect?a=b" && seen["env"]["COLOUR"] == "red", "{seen}");
            ensure!(seen["env"]["REQUEST_ID"].is_string(), "{seen}");
            ensure!(connection.get("/trap").await?.status == 500);
            ensure!(connection.get("/error").await?.status == 500);
            for broken in ["/trap-after-head", "/unfinished"] {
                ensure!(http::get(site.addr, protocol, broken).await.is_err(), "{broken} ended cleanly");
            }
            http::get(site.addr, protocol, "/hello").await?.expect(200, "hello\n")?;
        }
        Ok(())
    })
    .with_context(|| site.log())?;
    site.drain("SIGTERM", 0).map(drop)
}

fn command3(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("http");
    for code in [0, 1, 42] {
        let done = client.guest("/cli3.wasm", &["two words", "ä", &code.to_string()])?.expect(code)?;
        ensure!(done.text() == format!("/cli3.wasm\ntwo words\nä\n{code}\n"), "{done:?}");
    }
    Ok(())
}

/// Functions, and none to begin with.
const LIBRARY: &str = r#"(component
  (core module $m (func (export "f") (result i32) (i32.const 42)))
  (core instance $i (instantiate $m))
  (func (export "answer") (result u32) (canon lift (core func $i "f"))))"#;

fn neither(containerd: &Containerd) -> Outcome {
    let root = base::folder(&format!("roots/neither-{}", containerd.version))?;
    fs::copy(guests::inline("library.wasm", LIBRARY)?, root.join("library.wasm"))?;
    let run = containerd.namespace("http").rootfs(&root, &["/library.wasm"]);
    run.expect_error("exports neither wasi:cli/run to start with nor a wasi:http handler to serve; it exports: answer")
}

fn wrong_settings(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("http");
    for (name, value) in [
        ("SOCKET_ADDR", "8080"),
        ("SOCKET_ADDR", "localhost:99999"),
        ("BACKLOG", "-1"),
        ("REQUEST_TIMEOUT", "5"),
        ("DRAIN_TIMEOUT", "soon"),
        ("MAX_BODY", "64 apples"),
        ("MAX_CONCURRENT_REQUESTS", "0"),
        ("INSTANCE_REUSE", "0"),
        ("ACCESS_LOG", "yes"),
        ("OUTGOING", "http://"),
        ("BOUNDS_CHECKS", ""),
        ("NO_SUCH_THING", "1"),
    ] {
        let run = site::with(client.guest(site::WEB, &[])?.flag("--net-host"), &[(name, value)]);
        let done = run.to_end()?;
        ensure!(done.code != Some(0), "{name}={value} was taken");
        ensure!(done.stderr.contains(&format!("{PREFIX}{name}")), "{name}={value}: {}", done.stderr);
        // containerd may have quoted the quotes.
        ensure!(done.stderr.replace('\\', "").contains(&format!("\"{value}\"")), "{name}={value}: {}", done.stderr);
    }
    client.expect_empty()
}

fn sources(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("http");
    let file = containerd.folder().join("http.toml");
    let options = |lines: &str| fs::write(&file, format!("{}{lines}\n", containerd.default_options()));
    options("http_request_timeout = \"300ms\"\nhttp_max_body = \"10\"")?;
    let run = || anyhow::Ok(client.guest(site::WEB, &[])?.options(file.clone()));
    let of_option = Site::start(run()?)?;
    let of_annotation = Site::start(run()?.option("--annotation", "troupe.dev/http-request-timeout=30s"))?;
    let annotated = run()?.option("--annotation", "troupe.dev/http-request-timeout=30s");
    let of_variable = Site::start(site::with(annotated, &[("REQUEST_TIMEOUT", "300ms")]))?;
    http::block_on(async {
        for (site, status) in [(&of_option, 504), (&of_annotation, 200), (&of_variable, 504)] {
            let answer = http::get(site.addr, Protocol::One, "/sleep?ms=900").await?;
            ensure!(answer.status == status, "expected {status}, got {answer:?}");
            let mut connection = Connection::open(site.addr, Protocol::One).await?;
            ensure!(connection.post("/count", "more than ten").await?.status == 413);
        }
        Ok(())
    })?;
    let wrong = run()?.option("--annotation", "troupe.dev/http-request-timeout=never");
    site::anywhere(wrong).expect_error("troupe.dev/http-request-timeout")?;
    options("http_request_timeout = \"never\"")?;
    site::anywhere(run()?).expect_error("http_request_timeout")
}

fn address_in_use(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("http");
    let site = site::web(&client, &[])?;
    let addr = site.addr.to_string();
    let second = site::with(client.guest(site::WEB, &[])?.flag("--net-host"), &[("SOCKET_ADDR", &addr)]);
    second.expect_error(&addr)?;
    http::block_on(async { http::get(site.addr, Protocol::One, "/hello").await?.expect(200, "hello\n") })?;
    // Stopped and gone, it leaves its port to the next at once, whatever connections there were.
    site.drain("SIGTERM", 0)?;
    let _again = site::with(client.guest(site::WEB, &[])?.flag("--net-host"), &[("SOCKET_ADDR", &addr)]).detached()?;
    http::block_on(async { http::get(site.addr, Protocol::One, "/hello").await?.expect(200, "hello\n") })
}
