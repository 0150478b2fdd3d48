//! Which of an image's modules a container means. Pure.
//!
//! An image of one module means that one, whatever the name: tools disagree about what a layer's title is, or give none,
//! and commands written for the older shims count on it. Among several, a name has to fit exactly one.

use std::collections::HashSet;
use std::path::Path;

use troupe_actors::{Wanted, absolute};

use super::document::Descriptor;

/// More names make no message better.
const MAX_LISTED: usize = 20;
const MAX_SHOWN: usize = 100;

/// The layer that is wanted. There is at least one.
///
/// # Errors
/// In words, with the names to choose from.
pub fn choose<'a>(layers: &'a [Descriptor], wanted: &Wanted) -> Result<&'a Descriptor, String> {
    let named = || shown(&wanted.name);
    match layers {
        [only] => return Ok(only),
        _ if wanted.paths.is_empty() => {
            return Err(format!(
                "it has {} modules, and the first argument names none: {}",
                layers.len(),
                list(layers)
            ));
        }
        _ => {}
    }
    let titles: Vec<_> = layers.iter().map(|layer| layer.title().map(|title| absolute(Path::new(title)))).collect();
    for path in &wanted.paths {
        let fits = layers.iter().zip(&titles).filter(|(_, title)| title.as_ref() == Some(path));
        let fits: Vec<_> = fits.map(|(layer, _)| layer).collect();
        let distinct: HashSet<_> = fits.iter().map(|layer| &layer.digest).collect();
        match (fits.first(), distinct.len()) {
            (Some(fit), 1) => return Ok(fit),
            (Some(_), count) => {
                let name = named();
                return Err(format!(
                    "{count} of its modules are called {name}; name one by its number: {}",
                    list(layers)
                ));
            }
            (None, _) => {}
        }
    }
    let position = wanted.name.parse::<usize>().ok().and_then(|number| layers.get(number));
    position.ok_or_else(|| format!("no module of it is called {}; it has {}", named(), list(layers)))
}

/// What messages call the chosen one.
pub fn name(layer: &Descriptor, wanted: &Wanted) -> String {
    match layer.title() {
        _ if !wanted.paths.is_empty() => wanted.name.clone(),
        Some(title) => shown(title),
        None => layer.digest.clone(),
    }
}

fn list(layers: &[Descriptor]) -> String {
    let one = |(number, layer): (usize, &Descriptor)| match layer.title() {
        Some(title) => format!("{number} ({})", shown(title)),
        None => format!("{number} (without a title)"),
    };
    let mut listed: Vec<_> = layers.iter().enumerate().take(MAX_LISTED).map(one).collect();
    if layers.len() > MAX_LISTED {
        listed.push("…".to_owned());
    }
    listed.join(", ")
}

/// A name from an image, made fit for a message.
fn shown(name: &str) -> String {
    name.chars().filter(|c| !c.is_control()).take(MAX_SHOWN).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn layers(titles: &[&str]) -> Vec<Descriptor> {
        let layer = |(number, title): (usize, &&str)| Descriptor {
            digest: number.to_string(),
            annotations: Some([("org.opencontainers.image.title".to_owned(), (*title).to_owned())].into()),
            ..Default::default()
        };
        titles.iter().enumerate().map(layer).collect()
    }

    fn wanted(name: &str, paths: &[&str]) -> Wanted {
        Wanted { name: name.into(), paths: paths.iter().map(Into::into).collect(), max_size: 1 }
    }

    fn chosen(titles: &[&str], wanted: &Wanted) -> Result<String, String> {
        choose(&layers(titles), wanted).map(|layer| layer.digest.clone())
    }

    #[test]
    fn the_only_module_needs_no_name() {
        for wanted in [wanted("", &[]), wanted("/other.wasm", &["/other.wasm"])] {
            assert_eq!(chosen(&["app.wasm"], &wanted).unwrap(), "0");
            assert_eq!(chosen(&[""], &wanted).unwrap(), "0");
        }
    }

    #[test]
    fn several_are_told_apart_by_title_or_position() {
        let titles = ["app.wasm", "/bin/tool.wasm", "0", ""];
        for (name, paths, expected) in [
            ("app.wasm", &["/work/app.wasm", "/bin/app.wasm", "/app.wasm"][..], "0"),
            ("tool.wasm", &["/work/tool.wasm", "/bin/tool.wasm", "/tool.wasm"], "1"),
            ("3", &["/3"], "3"),
            // A title is a name, and a name comes before a number.
            ("0", &["/0"], "2"),
        ] {
            assert_eq!(chosen(&titles, &wanted(name, paths)).unwrap(), expected, "{name}");
        }
    }

    #[test]
    fn what_is_not_clear_is_refused_with_the_names() {
        let list = "0 (a.wasm), 1 (b.wasm), 2 (a.wasm), 3 (without a title)";
        for (name, paths, words) in [
            ("", &[][..], "4 modules, and the first argument names none"),
            ("/a.wasm", &["/a.wasm"], "2 of its modules are called /a.wasm; name one by its number"),
            ("/c.wasm", &["/c.wasm"], "no module of it is called /c.wasm"),
            ("4", &["/4"], "no module of it is called 4"),
        ] {
            let error = chosen(&["a.wasm", "b.wasm", "a.wasm", ""], &wanted(name, paths)).unwrap_err();
            assert!(error.contains(words) && error.contains(list), "{error}");
        }
    }

    #[test]
    fn equal_modules_of_one_name_are_one() {
        let mut layers = layers(&["a.wasm", "a.wasm"]);
        layers[1].digest = layers[0].digest.clone();
        assert!(choose(&layers, &wanted("/a.wasm", &["/a.wasm"])).is_ok());
    }

    #[test]
    fn messages_stay_short_and_clean() {
        let long = "x".repeat(10_000) + "\n\u{1b}[31m";
        let titles = vec![long.as_str(); 1000];
        let error = chosen(&titles, &wanted(&long, &["/y"])).unwrap_err();
        assert!(error.chars().count() < 3000 && !error.contains(char::is_control), "{}", error.len());
    }

    proptest! {
        #[test]
        fn a_choice_is_one_of_them_and_never_a_guess(titles in prop::collection::vec("[ab]{0,2}", 1..6), name in "[ab0-9/]{0,3}") {
            let titles: Vec<&str> = titles.iter().map(String::as_str).collect();
            let path = absolute(Path::new(&name));
            let paths = if path == Path::new("/") { vec![] } else { vec![path.clone()] };
            let fits = titles.iter().filter(|title| !title.is_empty() && absolute(Path::new(title)) == path).count();
            match choose(&layers(&titles), &Wanted { name: name.clone(), paths: paths.clone(), max_size: 1 }) {
                Ok(layer) => {
                    let by_number = name.parse::<usize>().is_ok_and(|number| layer.digest == number.to_string());
                    prop_assert!(titles.len() == 1 || (!paths.is_empty() && (fits == 1 || (fits == 0 && by_number))));
                }
                Err(error) => {
                    prop_assert!(titles.len() > 1 && (paths.is_empty() || fits != 1));
                    prop_assert!(error.contains("0 ("));
                }
            }
        }
    }
}
