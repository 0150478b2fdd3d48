//! The verb `compile`: what it leaves is what a container looks for.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use troupe_actors::guest::Bounds;

use crate::support::{COUNTED, Fixture, WORKER, concurrent, heavy, module, server};

struct Verb {
    fixture: Fixture,
}

impl Verb {
    fn new() -> Self {
        Self { fixture: Fixture::scripted(COUNTED) }
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.fixture.folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    fn command(&self) -> Command {
        let mut command = Command::new(WORKER);
        command.arg("compile").arg("--cache-dir").arg(&self.fixture.settings.cache_dir);
        command
    }

    fn run(&self, words: &[&str], files: &[&Path]) -> Output {
        self.command().args(words).args(files).output().unwrap()
    }

    /// Its lines, fields apart.
    fn lines(&self, words: &[&str], files: &[&Path]) -> Vec<Vec<String>> {
        let output = self.run(words, files);
        let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success() && stderr.is_empty(), "{stdout}{stderr}");
        stdout.lines().map(|line| line.split('\t').map(str::to_owned).collect()).collect()
    }

    /// Starts what a container would; the worker may not run.
    async fn expect_found(&self, wasm: Vec<u8>, bounds: Bounds) {
        self.fixture.programs().load("/app.wasm", wasm, bounds).await.unwrap();
        assert_eq!(self.fixture.runs(), 0, "it was compiled");
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn column(lines: &[Vec<String>], number: usize) -> Vec<&str> {
    lines.iter().map(|line| line[number].as_str()).collect()
}

#[tokio::test]
async fn every_kind_is_found_by_the_container_that_needs_it() {
    let verb = Verb::new();
    let files = [("m.wasm", module(1)), ("s.wasm", server()), ("c.wasm", concurrent())];
    let paths: Vec<_> = files.iter().map(|(name, wasm)| verb.file(name, wasm)).collect();
    let paths: Vec<_> = paths.iter().map(PathBuf::as_path).collect();
    let lines = verb.lines(&["--bounds", "both"], &paths);
    assert_eq!(column(&lines, 1), ["compiled"; 4]);
    assert_eq!(column(&lines, 2), ["command", "http", "http-guarded", "concurrent"]);
    for line in &lines {
        let entry = verb.fixture.settings.cache_dir.join(&line[0]);
        assert_eq!(line.len(), 6);
        assert_eq!(entry.metadata().unwrap().len().to_string(), line[3]);
        assert!(line[4].parse::<u64>().is_ok());
    }
    let [module, server, concurrent] = files.map(|(_, wasm)| wasm);
    for (wasm, bounds) in [
        (module, Bounds::Explicit),
        (server.clone(), Bounds::Explicit),
        (server, Bounds::Guarded),
        (concurrent, Bounds::Guarded),
    ] {
        verb.expect_found(wasm, bounds).await;
    }
    let again = verb.lines(&["--bounds=both"], &paths);
    assert_eq!(column(&again, 1), ["cached"; 4]);
    assert_eq!(column(&again, 0), column(&lines, 0));
}

#[tokio::test]
async fn servers_are_compiled_for_the_bounds_that_were_asked_for() {
    let verb = Verb::new();
    let path = verb.file("s.wasm", &server());
    assert_eq!(column(&verb.lines(&["--bounds", "guarded"], &[&path]), 2), ["http-guarded"]);
    verb.expect_found(server(), Bounds::Guarded).await;
    assert_eq!(column(&verb.lines(&[], &[&path]), 2), ["http"]);
}

#[tokio::test]
async fn the_modules_of_an_image_are_compiled() {
    let verb = Verb::new();
    let (one, two) = (verb.file("one.wasm", &module(1)), verb.file("two.wasm", &server()));
    let image = verb.fixture.folder.path().join("image.tar");
    let mut builder = Command::new(env!("CARGO_BIN_EXE_oci-tar-builder"));
    builder.args(["--rootfs", "--repo=test.local", "--name=app", "--file"]).arg(format!("{}:data.txt", two.display()));
    builder.arg("--module").arg(&one).arg("--module").arg(&two).arg("-o").arg(&image);
    assert!(builder.output().unwrap().status.success());
    // The folder that the tar file holds, unpacked.
    let folder = verb.fixture.folder.path().join("layout");
    std::fs::create_dir(&folder).unwrap();
    let unpacked = Command::new("tar").arg("-xf").arg(&image).arg("-C").arg(&folder).status().unwrap();
    assert!(unpacked.success());
    let lines = verb.lines(&[], &[&image]);
    let expected = ["/data.txt", "/one.wasm", "/two.wasm"].map(|name| format!("{}:{name}", image.display()));
    assert_eq!(column(&lines, 5), expected);
    assert_eq!(column(&lines, 1), ["compiled", "compiled", "cached"]);
    verb.expect_found(module(1), Bounds::Explicit).await;
    verb.expect_found(server(), Bounds::Explicit).await;
    assert_eq!(column(&verb.lines(&[], &[&folder]), 1), ["cached"; 3]);
}

#[tokio::test]
async fn what_fails_is_named_and_the_rest_is_compiled() {
    let verb = Verb::new();
    let (good, bad) = (verb.file("good.wasm", &module(1)), verb.file("bad.wasm", &module(2)[..20]));
    let native = verb.file("native", b"\x7fELF\x02\x01\x01\0");
    let nobody = ["--address", "/nowhere/containerd.sock"];
    let output = verb.run(&nobody, &[&bad, Path::new("ghcr.io/a/b:latest"), &native, &good]);
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(stdout.lines().count(), 1, "{stdout}");
    let lines: Vec<_> = stderr.lines().collect();
    for (line, (name, why)) in lines.iter().zip([
        ("bad.wasm", "not a valid WebAssembly program"),
        ("ghcr.io/a/b:latest", "connect to containerd at /nowhere/containerd.sock"),
        ("native", "is a Linux program (ELF)"),
    ]) {
        assert!(line.starts_with("troupe: ") && line.contains(name) && line.contains(why), "{line}");
    }
    assert_eq!(lines.len(), 3, "{stderr}");
    verb.expect_found(module(1), Bounds::Explicit).await;
}

#[test]
fn a_cache_that_takes_nothing_is_a_failure() {
    let mut verb = Verb::new();
    let file = verb.file("app.wasm", &module(1));
    for (folder, why) in [("/proc/none", "does not take it"), ("/", "be closed to everyone else")] {
        verb.fixture.settings.cache_dir = folder.into();
        let output = verb.run(&[], &[&file]);
        assert!(output.status.code() == Some(1) && text(&output.stderr).contains(why), "{}", text(&output.stderr));
    }
}

#[test]
fn the_limits_are_those_of_the_runtime_options() {
    let verb = Verb::new();
    let file = verb.file("app.wasm", &[module(1), vec![0; 2000]].concat());
    let options = verb.file("options.toml", b"max_module_size = \"1KiB\"\n");
    let output = verb.run(&["--config", options.to_str().unwrap()], &[&file]);
    assert!(output.status.code() == Some(1) && text(&output.stderr).contains("max_module_size"));
    let wrong = verb.file("wrong.toml", b"colour = 1\n");
    let output = verb.run(&["--config", wrong.to_str().unwrap()], &[&file]);
    assert!(output.status.code() == Some(1) && text(&output.stderr).contains("`colour` is unknown"));
}

/// Filling it with more than it holds would leave the first of them out, and nobody the wiser.
#[test]
fn more_than_the_cache_may_hold_is_a_failure() {
    let verb = Verb::new();
    let options = verb.file("options.toml", b"cache_max_size = \"1MiB\"\n");
    let files: Vec<_> = (0..6).map(|number| verb.file(&format!("{number}.wasm"), &heavy(100 + number))).collect();
    let files: Vec<_> = files.iter().map(PathBuf::as_path).collect();
    let output = verb.run(&["--config", options.to_str().unwrap()], &files);
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(stdout.matches("\tcompiled\t").count(), 6, "{stdout}{stderr}");
    assert!(output.status.code() == Some(1) && stderr.contains("were evicted again"), "{stdout}{stderr}");
}

#[test]
fn a_wrong_command_line_is_told_from_a_failure() {
    let verb = Verb::new();
    assert_eq!(verb.run(&[], &[]).status.code(), Some(2));
    assert_eq!(verb.run(&["--bounds=none"], &[Path::new("x")]).status.code(), Some(2));
    let help = Command::new(WORKER).args(["compile", "--help"]).output().unwrap();
    assert!(help.status.success() && text(&help.stdout).contains("--cache-dir"));
}

#[test]
fn a_terminal_sees_how_far_it_is() {
    let verb = Verb::new();
    let file = verb.file("app.wasm", &module(1));
    let words =
        format!("{WORKER} compile --cache-dir {} {}", verb.fixture.settings.cache_dir.display(), file.display());
    // `script` makes a terminal for the command and copies what it shows.
    let output = Command::new("script").args(["-qec", &words, "/dev/null"]).output().unwrap();
    let shown = text(&output.stdout);
    assert!(output.status.success() && shown.contains("1/1 ") && shown.contains("\tcompiled\tcommand\t"), "{shown:?}");
}
