//! The cache by itself: any bytes will do for code here, nothing is mapped or run.

use std::os::unix::fs::PermissionsExt;

use proptest::prelude::*;

use super::*;

struct Fixture {
    folder: tempfile::TempDir,
    cache: Cache,
}

const KEY: Key = Key([7; 32]);

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
    fixture.cache.store(&KEY, &code(b"machine code")).unwrap();
    assert_eq!(contents(&fixture.cache.find(&KEY).unwrap()), b"machine code");
    assert_eq!(fixture.names(), [KEY.to_string()]);
    assert_eq!(fixture.entry().metadata().unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(fixture.folder.path().join("a").metadata().unwrap().permissions().mode() & 0o777, 0o700);
}

#[test]
fn storing_the_same_twice_is_harmless() {
    let fixture = Fixture::new();
    fixture.cache.store(&KEY, &code(b"one")).unwrap();
    fixture.cache.store(&KEY, &code(b"one")).unwrap();
    assert_eq!(contents(&fixture.cache.find(&KEY).unwrap()), b"one");
}

#[test]
fn a_file_system_without_unnamed_files_is_served_too() {
    let fixture = Fixture::new();
    let dead = fixture.folder.path().join("a/b/.tmp-1-1");
    std::fs::write(&dead, "half").unwrap();
    let living = File::create(fixture.folder.path().join("a/b/.tmp-2-1")).unwrap();
    rustix::fs::flock(&living, FlockOperation::NonBlockingLockExclusive).unwrap();
    fixture.cache.store_named(&KEY, &KEY.to_string(), &code(b"named")).unwrap();
    assert_eq!(contents(&fixture.cache.find(&KEY).unwrap()), b"named");
    let mut names = fixture.names();
    names.sort();
    assert_eq!(names, [".tmp-2-1".to_owned(), KEY.to_string()]);
}

#[test]
fn an_entry_under_another_name_is_refused() {
    let fixture = Fixture::new();
    fixture.cache.store(&KEY, &code(b"code")).unwrap();
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
    fixture.cache.store(&KEY, &code(b"code")).unwrap();
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
        fixture.cache.store(&KEY, &code(&bytes)).unwrap();
        let mut stored = std::fs::read(fixture.entry()).unwrap();
        let at = at.index(stored.len());
        if cut { stored.truncate(at) } else { stored[at] ^= 0x10 }
        std::fs::write(fixture.entry(), stored).unwrap();
        prop_assert!(fixture.cache.find(&KEY).is_none());
        prop_assert!(fixture.names().is_empty());
        fixture.cache.store(&KEY, &code(&bytes)).unwrap();
        prop_assert_eq!(contents(&fixture.cache.find(&KEY).unwrap()), bytes);
    }
}
