//! Compiling happens once: the next container of a module maps what the first has left.

use std::fs;
use std::path::PathBuf;

use anyhow::{Result, ensure};

use crate::common::containerd::Containerd;
use crate::common::{Outcome, SOON, proc, wait};

pub const CASES: crate::common::Cases = &[
    ("the_second_container_does_not_compile", once),
    ("containers_share_the_mapped_code", shared),
    ("the_next_process_finds_it", next_process),
    ("equal_modules_at_once_are_compiled_once", at_once),
    ("a_broken_entry_is_compiled_again", broken),
    ("the_folder_is_roots_alone", private),
];

/// A containerd whose folder of compiled code is new.
pub fn fresh(containerd: &Containerd, name: &str, case: impl FnOnce(&Containerd) -> Outcome) -> Outcome {
    let own = Containerd::start(containerd.version, &format!("{}-cache-{name}", containerd.version))?;
    case(&own).map_err(|error| error.context(format!("its own containerd: {}\n", own.log_since(0))))?;
    own.close()
}

/// What the shims' log says about compiling; every compile is one line of it.
pub fn compiles(containerd: &Containerd) -> usize {
    containerd.whole_log_since(0).matches(": compiled module=").count()
}

fn once(containerd: &Containerd) -> Outcome {
    fresh(containerd, "once", |containerd| {
        let client = containerd.namespace("cache");
        for _ in 0..3 {
            client.guest("/kit.wasm", &["exit", "3"])?.expect(3)?;
        }
        ensure!(compiles(containerd) == 1, "{} compiles", compiles(containerd));
        client.guest("/kit-component.wasm", &["exit", "0"])?.expect(0)?;
        ensure!(compiles(containerd) == 2, "{} compiles", compiles(containerd));
        let files = entries(containerd)?;
        ensure!(files.len() == 2, "something else lies beside the two artifacts: {files:?}");
        Ok(())
    })
}

/// All files of the folder.
pub fn entries(containerd: &Containerd) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut folders = vec![containerd.cache()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() { folders.push(path) } else { files.push(path) }
        }
    }
    Ok(files)
}

fn shared(containerd: &Containerd) -> Outcome {
    fresh(containerd, "shared", |containerd| {
        let client = containerd.namespace("cache");
        let first = client.guest("/kit.wasm", &["sleep", "0"])?.detached()?;
        let daemon = first.daemon()?;
        let before = proc::code_below(daemon, &containerd.cache())?;
        ensure!(before.len() == 1, "one module is mapped as {before:?}");
        let others =
            (0..5).map(|_| client.guest("/kit.wasm", &["sleep", "0"])?.detached()).collect::<Result<Vec<_>>>()?;
        ensure!(proc::code_below(daemon, &containerd.cache())? == before, "mapped again");
        for container in others.into_iter().chain([first]) {
            container.kill_and_wait("SIGKILL")?;
            container.delete()?;
        }
        Ok(())
    })
}

fn next_process(containerd: &Containerd) -> Outcome {
    fresh(containerd, "next", |containerd| {
        for namespace in ["cache-a", "cache-b"] {
            containerd.namespace(namespace).guest("/kit.wasm", &["exit", "3"])?.expect(3)?;
        }
        ensure!(compiles(containerd) == 1, "{} compiles", compiles(containerd));
        Ok(())
    })
}

fn at_once(containerd: &Containerd) -> Outcome {
    fresh(containerd, "atonce", |containerd| {
        let client = containerd.namespace("cache");
        let run = client.guest("/kit.wasm", &["exit", "3"])?;
        let jobs =
            (0..10).map(|number| run.clone().id(&format!("same-{number}")).spawn()).collect::<Result<Vec<_>>>()?;
        for job in jobs {
            ensure!(job.finish(SOON)?.code == Some(3));
        }
        ensure!(compiles(containerd) == 1, "{} compiles", compiles(containerd));
        Ok(())
    })
}

/// A disk that was full or a power cut: the entry is there and wrong.
fn broken(containerd: &Containerd) -> Outcome {
    fresh(containerd, "broken", |containerd| {
        let client = containerd.namespace("cache");
        client.guest("/kit.wasm", &["exit", "3"])?.expect(3)?;
        wait::until_true("the process to end", SOON, || Ok(containerd.shims().is_empty()))?;
        let largest =
            entries(containerd)?.into_iter().max_by_key(|file| fs::metadata(file).map_or(0, |data| data.len()));
        let file = largest.ok_or_else(|| anyhow::anyhow!("the cache is empty"))?;
        let content = fs::read(&file)?;
        fs::write(&file, &content[..content.len() / 2])?;
        client.guest("/kit.wasm", &["exit", "3"])?.expect(3)?;
        ensure!(compiles(containerd) == 2, "{} compiles", compiles(containerd));
        Ok(())
    })
}

fn private(containerd: &Containerd) -> Outcome {
    use std::os::unix::fs::MetadataExt;
    containerd.namespace("cache").guest("/kit.wasm", &["exit", "3"])?.expect(3)?;
    let folder = fs::metadata(containerd.cache())?;
    ensure!(folder.mode() & 0o777 == 0o700 && folder.uid() == 0, "mode {:o}", folder.mode());
    Ok(())
}
