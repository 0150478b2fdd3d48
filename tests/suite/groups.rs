//! Which containers share a process: by the runtime options, by annotation, and by name of the Kubernetes namespace.

use anyhow::{Result, ensure};

use crate::common::Outcome;
use crate::common::containerd::Containerd;
use crate::common::ctr::{Client, Container, Run};

pub const CASES: crate::common::Cases = &[
    ("the_default_is_a_process_a_namespace", default),
    ("pod_is_a_process_each", pod),
    ("node_is_one_process_for_all", node),
    ("the_annotation_wins", annotation),
    ("a_kubernetes_namespace_has_its_own", kubernetes),
    ("a_wrong_option_is_an_error", wrong_option),
    ("a_wrong_annotation_is_an_error", wrong_annotation),
];

fn sleeper<'a>(client: &Client<'a>) -> Result<Run<'a>> {
    client.guest("/sleeper.wasm", &[])
}

/// Starts them all and counts the processes they live in.
fn processes(runs: Vec<Run<'_>>) -> Result<usize> {
    let containers = runs.iter().map(Run::detached).collect::<Result<Vec<_>>>()?;
    let mut daemons = containers.iter().map(Container::daemon).collect::<Result<Vec<_>>>()?;
    daemons.sort_unstable();
    daemons.dedup();
    for container in containers {
        ensure!(container.kill_and_wait("SIGKILL")?.0.exit_code() == 137);
        container.delete()?;
    }
    Ok(daemons.len())
}

fn default(containerd: &Containerd) -> Outcome {
    let (one, other) = (containerd.namespace("groups-a"), containerd.namespace("groups-b"));
    let runs = vec![sleeper(&one)?, sleeper(&one)?, sleeper(&other)?, sleeper(&other)?];
    ensure!(processes(runs)? == 2);
    Ok(())
}

fn pod(containerd: &Containerd) -> Outcome {
    let file = containerd.more_options("pod", "group = \"pod\"")?;
    let client = containerd.namespace("groups-a");
    let run = || anyhow::Ok(sleeper(&client)?.options(file.clone()));
    ensure!(processes(vec![run()?, run()?, run()?])? == 3);
    Ok(())
}

/// As CRI would say that a container belongs to a pod of a Kubernetes namespace.
fn of_kubernetes<'a>(run: Run<'a>, namespace: &str) -> Run<'a> {
    run.option("--annotation", &format!("io.kubernetes.cri.sandbox-namespace={namespace}"))
}

fn node(containerd: &Containerd) -> Outcome {
    let file = containerd.more_options("node", "group = \"node\"")?;
    let client = containerd.namespace("groups-a");
    let run = |name| anyhow::Ok(of_kubernetes(sleeper(&client)?.options(file.clone()), name));
    ensure!(processes(vec![run("shop")?, run("bank")?, run("shop")?])? == 1);
    Ok(())
}

fn annotation(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("groups-a");
    let run = || anyhow::Ok(sleeper(&client)?.option("--annotation", "troupe.dev/group=pod"));
    ensure!(processes(vec![run()?, run()?])? == 2);
    let file = containerd.more_options("pod", "group = \"pod\"")?;
    let run = || anyhow::Ok(sleeper(&client)?.options(file.clone()).option("--annotation", "troupe.dev/group=node"));
    ensure!(processes(vec![run()?, run()?])? == 1);
    Ok(())
}

fn kubernetes(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("groups-a");
    let run = |name| anyhow::Ok(of_kubernetes(sleeper(&client)?, name));
    ensure!(processes(vec![run("shop")?, run("bank")?, run("shop")?])? == 2);
    Ok(())
}

fn wrong_option(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("groups-a");
    for (lines, named) in [
        ("group = \"cluster\"", "cluster"),
        ("grup = \"pod\"", "grup"),
        ("compile_timeout = \"soon\"", "compile_timeout"),
        ("max_module_size = -1", "max_module_size"),
        ("this is no toml", "toml"),
    ] {
        let file = containerd.more_options("wrong", lines)?;
        client.guest("/kit.wasm", &["exit", "0"])?.options(file).expect_error(named)?;
    }
    let none = containerd.folder().join("no-such-file.toml");
    client.guest("/kit.wasm", &["exit", "0"])?.options(none).expect_error("no-such-file.toml")?;
    client.expect_empty()
}

fn wrong_annotation(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("groups-a");
    let run = client.guest("/kit.wasm", &["exit", "0"])?.option("--annotation", "troupe.dev/group=cluster");
    run.expect_error("cluster")?;
    client.expect_empty()
}
