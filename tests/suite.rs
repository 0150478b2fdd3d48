//! The integration tests: the real binary under three real containerds, and alone.
//!
//! ```text
//! cases of suite/*.rs × containerd 1.6, 1.7, 2.1   "1.7::exits::code_of_proc_exit"   (some on the newest only)
//! some of them with pods on cgroup v2              "1.7-cgroup2::pods_life::…"         (where the machine has version 1)
//! cases of the bare binary                         "bare::api::create_twice"
//! ```
//! One private containerd a version is shared by the cases and started by the first that needs it; what it leaves
//! behind at the end fails the run. `cargo test --test suite -- 2.1::stdio` runs a part, as any test of cargo.
//! They need root, and what `make test` installs.

mod common;
mod suite {
    pub mod api;
    pub mod cache;
    pub mod cache_images;
    pub mod cache_shared;
    pub mod daemon;
    pub mod exits;
    pub mod greedy;
    pub mod groups;
    pub mod hostile;
    pub mod http_capacity;
    pub mod http_concurrent;
    pub mod http_drain;
    pub mod http_failures;
    pub mod http_guest;
    pub mod http_hostile;
    pub mod http_isolation;
    pub mod http_limits;
    pub mod http_load;
    pub mod http_messages;
    pub mod http_outgoing;
    pub mod http_patience;
    pub mod http_serve;
    pub mod http_shared;
    pub mod http_swap;
    pub mod images;
    pub mod images_absent;
    pub mod images_choice;
    pub mod images_hostile;
    pub mod limits;
    pub mod limits_cri;
    pub mod limits_http;
    pub mod load;
    pub mod native;
    pub mod native_api;
    pub mod native_life;
    pub mod neighbours;
    pub mod packing;
    pub mod pods;
    pub mod pods_cgroup;
    pub mod pods_images;
    pub mod pods_life;
    pub mod pods_load;
    pub mod pods_net;
    pub mod readme;
    pub mod recovery;
    pub mod restart;
    pub mod shutdown;
    pub mod stdio;
    pub mod users;
    pub mod volumes;
    pub mod volumes_hostile;
}

use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Result, bail};
use libtest_mimic::{Arguments, Failed, Trial};

use common::cgroup;
use common::containerd::{Containerd, VERSIONS};
use common::node::Cgroups;
use common::{BareCases, Cases, Outcome, base};

/// What `suite/*.rs` offer.
const OVER_CONTAINERD: &[(&str, Cases)] = &[
    ("exits", suite::exits::CASES),
    ("stdio", suite::stdio::CASES),
    ("hostile", suite::hostile::CASES),
    ("groups", suite::groups::CASES),
    ("cache", suite::cache::CASES),
    ("cache_images", suite::cache_images::CASES),
    ("cache_shared", suite::cache_shared::CASES),
    ("load", suite::load::CASES),
    ("limits", suite::limits::CASES),
    ("limits_http", suite::limits_http::CASES),
    ("restart", suite::restart::CASES),
    ("neighbours", suite::neighbours::CASES),
    ("daemon", suite::daemon::CASES),
    ("native", suite::native::CASES),
    ("native_life", suite::native_life::CASES),
    ("recovery", suite::recovery::CASES),
    ("greedy", suite::greedy::CASES),
    ("shutdown", suite::shutdown::CASES),
    ("http_serve", suite::http_serve::CASES),
    ("http_guest", suite::http_guest::CASES),
    ("http_drain", suite::http_drain::CASES),
    ("http_limits", suite::http_limits::CASES),
    ("http_patience", suite::http_patience::CASES),
    ("http_failures", suite::http_failures::CASES),
    ("http_capacity", suite::http_capacity::CASES),
    ("http_load", suite::http_load::CASES),
    ("http_outgoing", suite::http_outgoing::CASES),
    ("http_hostile", suite::http_hostile::CASES),
    ("http_isolation", suite::http_isolation::CASES),
    ("http_shared", suite::http_shared::CASES),
    ("images", suite::images::CASES),
    ("images_absent", suite::images_absent::CASES),
    ("images_choice", suite::images_choice::CASES),
    ("images_hostile", suite::images_hostile::CASES),
    ("packing", suite::packing::CASES),
    ("readme", suite::readme::CASES),
    ("users", suite::users::CASES),
    ("volumes", suite::volumes::CASES),
    ("volumes_hostile", suite::volumes_hostile::CASES),
];
/// Over a containerd that makes pods.
const IN_PODS: &[(&str, Cases)] = &[
    ("limits_cri", suite::limits_cri::CASES),
    ("pods", suite::pods::CASES),
    ("pods_cgroup", suite::pods_cgroup::CASES),
    ("pods_cgroup", suite::pods_cgroup::COUNTED),
    ("pods_images", suite::pods_images::CASES),
    ("pods_life", suite::pods_life::CASES),
    ("pods_load", suite::pods_load::CASES),
    ("pods_net", suite::pods_net::CASES),
];
/// Over one that sees cgroup v2 and nothing else, on a machine where all the others see version 1, which has the
/// controllers: a Linux program of `ctr`, which asks for CPU shares, could not be there.
const ON_CGROUP_2: &[(&str, Cases)] =
    &[("pods_cgroup", suite::pods_cgroup::CASES), ("pods_life", suite::pods_life::CASES)];
/// On the newest only: they are about the guest or the machine, and take long.
const ON_NEWEST: &[(&str, Cases)] = &[
    ("http_concurrent", suite::http_concurrent::NEWEST),
    ("http_guest", suite::http_guest::NEWEST),
    ("http_patience", suite::http_patience::NEWEST),
    ("http_capacity", suite::http_capacity::NEWEST),
    ("http_hostile", suite::http_hostile::NEWEST),
];
/// Not on the oldest, whose `ctr` cannot ask for it.
const SINCE_1_7: &[(&str, Cases)] = &[("users", suite::users::BY_FLAG)];
const BARE: &[(&str, BareCases)] = &[
    ("api", suite::api::CASES),
    ("images_absent", suite::images_absent::BARE),
    ("http_load", suite::http_load::BARE),
    ("load", suite::load::BARE),
    ("native_api", suite::native_api::BARE),
    ("recovery", suite::recovery::BARE),
    ("shutdown", suite::shutdown::BARE),
    ("packing", suite::packing::BARE),
];

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // Cases measure how fast things happen, and the machine has two cores: one at a time unless asked otherwise.
    arguments.test_threads = arguments.test_threads.or(Some(1));
    if !arguments.list
        && let Err(error) = prepare()
    {
        eprintln!("the tests cannot run: {error:#}");
        return ExitCode::FAILURE;
    }
    let shared = [None, Some(Cgroups::Machine), Some(Cgroups::Unified)]
        .map(|pods| VERSIONS.map(|version| Arc::new(Shared::new(version, pods))));
    let can_swap = arguments.list || suite::http_swap::is_possible();
    let conclusion = libtest_mimic::run(&arguments, trials(&shared, can_swap));
    let mut clean = true;
    for shared in shared.iter().flatten() {
        if let Err(error) = shared.close() {
            eprintln!("{error:#}");
            clean = false;
        }
    }
    // What is left is the guard's to end, which needs the folder.
    if is_all_gone() {
        base::remove();
    } else {
        clean = false;
    }
    if clean { conclusion.exit_code() } else { ExitCode::FAILURE }
}

fn prepare() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("containerd needs root");
    }
    base::create()
}

/// `shared`: without pods, with pods, with pods on cgroup v2.
fn trials([shared, nodes, unified]: &[[Arc<Shared>; VERSIONS.len()]; 3], can_swap: bool) -> Vec<Trial> {
    let mut trials = Vec::new();
    for shared in shared {
        trials.extend(OVER_CONTAINERD.iter().flat_map(|(file, cases)| over(shared, file, cases)));
    }
    for node in nodes {
        trials.extend(IN_PODS.iter().flat_map(|(file, cases)| over(node, file, cases)));
    }
    let is_hybrid = cgroup::is_hybrid();
    for node in unified {
        let cases = ON_CGROUP_2.iter().flat_map(|(file, cases)| over(node, file, cases));
        trials.extend(cases.map(|trial| trial.with_ignored_flag(!is_hybrid)));
    }
    for shared in &shared[1..] {
        trials.extend(SINCE_1_7.iter().flat_map(|(file, cases)| over(shared, file, cases)));
    }
    if let Some(newest) = shared.last() {
        trials.extend(ON_NEWEST.iter().flat_map(|(file, cases)| over(newest, file, cases)));
        let swap = over(newest, "http_swap", suite::http_swap::NEWEST);
        trials.extend(swap.map(|trial| trial.with_ignored_flag(!can_swap)));
    }
    for (file, cases) in BARE {
        for (name, case) in *cases {
            trials.push(Trial::test(format!("bare::{file}::{name}"), || case().map_err(failed)));
        }
    }
    trials
}

fn over(shared: &Arc<Shared>, file: &str, cases: Cases) -> impl Iterator<Item = Trial> {
    cases.iter().map(move |(name, case)| {
        let shared = Arc::clone(shared);
        Trial::test(format!("{}::{file}::{name}", shared.name()), move || shared.run(*case))
    })
}

fn failed(error: anyhow::Error) -> Failed {
    format!("{error:#}").into()
}

/// Nothing that this run started or mounted may outlive it.
fn is_all_gone() -> bool {
    match base::leftovers() {
        Ok(left) if left.is_empty() => true,
        Ok(left) => {
            eprintln!("left behind: {left:#?}");
            false
        }
        // There was no base: the cases were only listed.
        Err(_) => true,
    }
}

/// The containerd of one version, started when first needed.
struct Shared {
    version: &'static str,
    /// Whether it makes pods, and on which cgroups.
    pods: Option<Cgroups>,
    containerd: Mutex<Option<Arc<Containerd>>>,
}

impl Shared {
    fn new(version: &'static str, pods: Option<Cgroups>) -> Self {
        Self { version, pods, containerd: Mutex::default() }
    }

    /// How its cases' names begin.
    fn name(&self) -> String {
        let suffix = if self.pods == Some(Cgroups::Unified) { "-cgroup2" } else { "" };
        format!("{}{suffix}", self.version)
    }

    fn get(&self) -> Result<Arc<Containerd>> {
        let mut containerd = self.containerd.lock().unwrap_or_else(PoisonError::into_inner);
        match &*containerd {
            Some(containerd) => Ok(Arc::clone(containerd)),
            None => {
                let started = match self.pods {
                    None => Containerd::start(self.version, self.version)?,
                    Some(cgroups) => Containerd::start_node(self.version, &format!("{}-node", self.name()), cgroups)?,
                };
                Ok(Arc::clone(containerd.insert(Arc::new(started))))
            }
        }
    }

    /// Runs a case; what containerd and the shims logged meanwhile belongs to its failure.
    fn run(&self, case: fn(&Containerd) -> Outcome) -> Result<(), Failed> {
        let containerd = self.get().map_err(failed)?;
        let offset = containerd.log_length();
        case(&containerd)
            .map_err(|error| failed(error.context(format!("log of containerd:\n{}\n", containerd.log_since(offset)))))
    }

    fn close(&self) -> Result<()> {
        match self.containerd.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(containerd) => containerd.close(),
            None => Ok(()),
        }
    }
}
