//! The first argument of a container: which file of its image to run, and which function of it.
//!
//! | argument | means |
//! |---|---|
//! | `/app.wasm` | this file |
//! | `./app.wasm`, `bin/app.wasm` | the same, from the working directory |
//! | `app.wasm` | in the working directory, else in `PATH`, else in `/` |
//! | `app.wasm#export` | the file, entered by this function |
//! | none, `""`, `/`, `#export` | the image's only module |
//!
//! Pure. `/` is how Kubernetes says "nothing": CRI insists on a command where an image names none.

use std::path::{Component, Path, PathBuf};

use crate::bundle::Bundle;
use crate::error::{Error, Result};
use crate::image::{Wanted, absolute};

/// Used when the container's environment has no `PATH`.
const DEFAULT_PATH: &str = "/usr/local/bin:/usr/bin:/bin:/";

/// Longer ones are no search path but an attempt to keep us busy.
const MAX_FOLDERS: usize = 100;

/// What a container asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entrypoint {
    /// The file as it was written, without the function.
    pub name: String,
    /// The function.
    pub export: Option<String>,
    /// Where the file can be, best first; absolute. Empty when the argument names none.
    pub paths: Vec<PathBuf>,
}

impl Entrypoint {
    /// Reads the first argument of a container.
    ///
    /// # Errors
    /// `Program` for a `#` without a function.
    pub fn of(bundle: &Bundle) -> Result<Self> {
        let argument = bundle.args.first().map_or("", String::as_str);
        let (name, export) = match argument.split_once('#') {
            Some((_, "")) => {
                let why = "no function follows the #, as in file.wasm#function";
                return Err(Error::Program(format!("{argument}: {why}")));
            }
            Some((name, export)) => (name, Some(export.to_owned())),
            None => (argument, None),
        };
        let paths = if names_nothing(name) { Vec::new() } else { candidates(name, bundle) };
        Ok(Self { name: name.to_owned(), export, paths })
    }

    /// The same question for those who keep modules without a file system.
    pub fn wanted(&self, max_size: u64) -> Wanted {
        let paths = self.paths.iter().map(|path| absolute(path)).collect();
        Wanted { name: self.name.clone(), paths, max_size }
    }
}

fn names_nothing(name: &str) -> bool {
    Path::new(name).components().all(|component| matches!(component, Component::RootDir | Component::CurDir))
}

fn candidates(name: &str, bundle: &Bundle) -> Vec<PathBuf> {
    let mut found = vec![bundle.cwd.join(name)];
    if !name.contains('/') {
        let path = bundle.env.iter().find(|(key, _)| key == "PATH").map_or(DEFAULT_PATH, |(_, value)| value);
        let folders = path.split(':').filter(|folder| folder.starts_with('/')).take(MAX_FOLDERS);
        found.extend(folders.chain(["/"]).map(|folder| Path::new(folder).join(name)));
    }
    found
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entrypoint(argument: Option<&str>, cwd: &str, path: Option<&str>) -> Result<Entrypoint> {
        Entrypoint::of(&Bundle {
            args: argument.into_iter().map(str::to_owned).collect(),
            env: path.map(|path| ("PATH".to_owned(), path.to_owned())).into_iter().collect(),
            cwd: cwd.into(),
            ..Bundle::for_tests()
        })
    }

    fn wanted(argument: &str, cwd: &str) -> Vec<String> {
        let entrypoint = entrypoint(Some(argument), cwd, Some("/bin:relative:/opt")).unwrap();
        entrypoint.wanted(1).paths.iter().map(|path| path.display().to_string()).collect()
    }

    #[test]
    fn a_file_is_looked_for_where_a_shell_would_look() {
        assert_eq!(wanted("/app.wasm", "/work"), ["/app.wasm"]);
        assert_eq!(wanted("app.wasm", "/work"), ["/work/app.wasm", "/bin/app.wasm", "/opt/app.wasm", "/app.wasm"]);
        assert_eq!(wanted("./app.wasm", "/"), ["/app.wasm"]);
        assert_eq!(wanted("./app.wasm", "/work"), ["/work/app.wasm"]);
        assert_eq!(wanted("../a/./app.wasm#run", "/work"), ["/a/app.wasm"]);
        assert_eq!(wanted("../../../../app.wasm", "/work"), ["/app.wasm"]);
        assert_eq!(entrypoint(Some("a"), "/", None).unwrap().paths.len(), 1 + 4 + 1);
    }

    #[test]
    fn nothing_is_the_only_module() {
        for argument in [None, Some(""), Some("/"), Some("."), Some("./"), Some("//"), Some("#run"), Some("/#run")] {
            let entrypoint = entrypoint(argument, "/work", None).unwrap();
            assert!(entrypoint.paths.is_empty(), "{argument:?}");
            assert_eq!(entrypoint.export.is_some(), argument.is_some_and(|argument| argument.ends_with("#run")));
        }
    }

    #[test]
    fn a_hash_without_a_function_is_refused() {
        for argument in ["/app.wasm#", "#"] {
            let error = entrypoint(Some(argument), "/", None).unwrap_err().to_string();
            assert!(error.starts_with(argument) && error.contains("file.wasm#function"), "{error}");
        }
        // Only the first one separates: names of functions may hold anything.
        let entrypoint = entrypoint(Some("a.wasm#b#c"), "/", None).unwrap();
        assert_eq!((&*entrypoint.name, entrypoint.export.as_deref()), ("a.wasm", Some("b#c")));
    }

    proptest! {
        #[test]
        fn every_path_is_absolute_and_stays_inside(argument in any::<String>(), path in any::<Option<String>>()) {
            let Ok(entrypoint) = entrypoint(Some(&argument), "/work", path.as_deref()) else {
                prop_assert!(argument.ends_with('#'));
                return Ok(());
            };
            prop_assert!(entrypoint.paths.len() <= MAX_FOLDERS + 2);
            let export = entrypoint.export.as_ref().map(|export| format!("#{export}")).unwrap_or_default();
            prop_assert_eq!(entrypoint.name.clone() + &export, argument);
            for path in entrypoint.wanted(1).paths {
                let clean = path.components().skip(1).all(|component| matches!(component, Component::Normal(_)));
                prop_assert!(path.is_absolute() && clean, "{:?}", path);
            }
        }

        #[test]
        fn a_path_is_made_absolute_once(path in any::<String>()) {
            let once = absolute(Path::new(&path));
            prop_assert_eq!(absolute(&once), once);
        }
    }
}
