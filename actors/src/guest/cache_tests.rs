//! The cache by itself: any bytes will do for code here, nothing is mapped or run.

use std::os::unix::fs::PermissionsExt;

use proptest::prelude::*;

use super::*;

struct Fixture {
    folder: tempfile::TempDir,
    cache: Cache,
}

const KEY: Key = Key([7; 32]);
const ROOMY: u64 = 1 << 20;

impl Fixture {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(&folder.path().join("a/b")).unwrap().unwrap();
        Self { folder, cache }
    }

    fn entry(&self) -> PathBuf {
        self.folder.path().join("a/b").join(KEY.to_string())
    }

    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.folder.path().join("a/b")).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

fn code(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn contents(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; (file.metadata().unwrap().len() - TRAILER) as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn what_was_stored_is_found() {
    let fixture = Fixture::new();
    assert!(fixture.cache.find(&KEY).is_none());
    fixture.cache.store(&KEY, &code(b"machine code"), ROOMY).unwrap();
    assert_eq!(contents(&fixture.cache.find(&KEY).unwrap()), b"machine code");
    assert_eq!(fixture.names(), [KEY.to_string()]);
    assert_eq!(fixture.entry().metadata().unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(fixture.folder.path().join("a").metadata().unwrap().permissions().mode() & 0o777, 0o700);
}

#[test]
fn storing_the_same_twice_is_harmless() {
    let fixture = Fixture::new();
    fixture.cache.store(&KEY, &code(b"one"), ROOMY).unwrap();
    fixture.cache.store(&KEY, &code(b"one"), ROOMY).unwrap();
    assert_eq!(contents(&fixture.cache.find(&KEY).unwrap()), b"one");
}

#[test]
fn a_file_system_without_unnamed_files_is_served_too() {
    let fixture = Fixture::new();
    fixture.cache.write_named(&KEY, &KEY.to_string(), &code(b"named")).unwrap();
    assert_eq!(contents(&fixture.cache.find(&KEY).unwrap()), b"named");
    assert_eq!(fixture.names(), [KEY.to_string()]);
}

#[test]
fn leftovers_of_the_dead_are_swept_and_the_living_left_alone() {
    let fixture = Fixture::new();
    let folder = fixture.folder.path().join("a/b");
    for dead in [".tmp-1-1", ".turn-dead"] {
        std::fs::write(folder.join(dead), "half").unwrap();
    }
    std::fs::write(folder.join("notes.txt"), "not ours").unwrap();
    let (temporary, _open) = fixture.cache.temporary().unwrap();
    let turn = fixture.cache.turn("living").unwrap().unwrap();
    fixture.cache.store(&KEY, &code(b"code"), ROOMY).unwrap();
    let mut expected = [temporary, ".turn-living".into(), KEY.to_string(), "notes.txt".into()];
    let mut names = fixture.names();
    names.sort();
    expected.sort();
    assert_eq!(names, expected);
    drop(turn);
    assert!(!fixture.names().contains(&".turn-living".to_owned()));
}

#[test]
fn beyond_the_limit_the_longest_unused_entry_goes() {
    let fixture = Fixture::new();
    let limit = 3 * (100 + TRAILER);
    let keys: Vec<Key> = (1..=4).map(|byte| Key([byte; 32])).collect();
    for (age, key) in [400, 300, 200].into_iter().zip(&keys) {
        let file = fixture.cache.store(key, &code(&[0; 100]), limit).unwrap();
        file.set_modified(std::time::SystemTime::now() - std::time::Duration::from_secs(age)).unwrap();
    }
    let mapped = fixture.cache.find(&keys[1]).unwrap();
    fixture.cache.touch(&keys[0]);
    fixture.cache.store(&keys[3], &code(&[0; 100]), limit).unwrap();
    let there: Vec<bool> = keys.iter().map(|key| fixture.cache.find(key).is_some()).collect();
    assert_eq!(there, [true, false, true, true]);
    assert_eq!(contents(&mapped), [0; 100], "who has it open keeps it");
}

#[test]
fn what_never_fits_is_not_stored_and_evicts_nobody() {
    let fixture = Fixture::new();
    fixture.cache.store(&KEY, &code(b"code"), 200).unwrap();
    let error = fixture.cache.store(&Key([8; 32]), &code(&[0; 200]), 200).unwrap_err();
    assert!(error.to_string().contains("cache_max_size"), "{error}");
    assert_eq!(fixture.names(), [KEY.to_string()]);
}

#[test]
fn a_folder_of_another_user_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    std::os::unix::fs::chown(folder.path(), Some(1000), None).unwrap();
    let error = Cache::open(folder.path()).err().unwrap().to_string();
    assert!(error.contains("belongs to uid 1000") && error.contains("chown 0"), "{error}");
}

#[test]
fn an_entry_under_another_name_is_refused() {
    let fixture = Fixture::new();
    fixture.cache.store(&KEY, &code(b"code"), ROOMY).unwrap();
    let other = Key([8; 32]);
    std::fs::copy(fixture.entry(), fixture.entry().with_file_name(other.to_string())).unwrap();
    assert!(fixture.cache.find(&other).is_none());
    assert_eq!(fixture.names(), [KEY.to_string()]);
}

#[test]
fn a_link_or_a_folder_in_place_of_an_entry_is_not_followed() {
    let fixture = Fixture::new();
    std::os::unix::fs::symlink("/etc/passwd", fixture.entry()).unwrap();
    assert!(fixture.cache.find(&KEY).is_none());
    fixture.cache.store(&KEY, &code(b"code"), ROOMY).unwrap();
    assert!(fixture.cache.find(&KEY).is_some());
}

#[test]
fn an_open_folder_is_refused_with_the_command_that_closes_it() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let error = Cache::open(folder.path()).err().unwrap();
    assert!(matches!(error, LoadError::UnsafeCache { .. }));
    assert!(error.to_string().contains(&format!("chmod 0700 {}", folder.path().display())), "{error}");
}

#[test]
fn a_folder_that_cannot_be_made_only_costs_the_cache() {
    assert!(Cache::open(Path::new("/proc/none/cache")).unwrap().is_err());
    assert!(Cache::open(Path::new("/dev/null")).unwrap().is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_damage_is_found_and_removed(
        bytes in proptest::collection::vec(any::<u8>(), 0..400),
        at in any::<proptest::sample::Index>(),
        cut in any::<bool>(),
    ) {
        let fixture = Fixture::new();
        fixture.cache.store(&KEY, &code(&bytes), ROOMY).unwrap();
        let mut stored = std::fs::read(fixture.entry()).unwrap();
        let at = at.index(stored.len());
        if cut { stored.truncate(at) } else { stored[at] ^= 0x10 }
        std::fs::write(fixture.entry(), stored).unwrap();
        prop_assert!(fixture.cache.find(&KEY).is_none());
        prop_assert!(fixture.names().is_empty());
        fixture.cache.store(&KEY, &code(&bytes), ROOMY).unwrap();
        prop_assert_eq!(contents(&fixture.cache.find(&KEY).unwrap()), bytes);
    }
}
