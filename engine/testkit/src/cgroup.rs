//! A control group for a process of a test: a bound on its memory, and a quota of the CPU
//! (cgroups(7)).
//!
//! By the kernel's version 2, or version 1 where the host has mounted that; each controller has a
//! tree of its own there. A group is removed when its handle is dropped, also when the test has
//! failed; end its processes before.

use std::{
    fs,
    path::{Path, PathBuf},
    process,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use crate::wait::within;

/// Where hosts mount version 2, alone and beside version 1.
const UNIFIED_ROOTS: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];

/// The kernel's period for quotas of the CPU, unless another one is set.
const PERIOD: Duration = Duration::from_millis(100);

/// How the names of groups begin; the number of the test's process follows.
const NAME: &str = "millrace-test-";

/// Tells the groups of a process apart.
static NEXT: AtomicU32 = AtomicU32::new(0);

fn new_name() -> String {
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("{NAME}{}-{number}", process::id())
}

/// How long an ended process may stay in its group.
const END_PATIENCE: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// The part of a group that is under one controller.
#[derive(Debug)]
struct Part {
    folder: PathBuf,
    version: Version,
}

/// A group with a bound on memory and a quota of the CPU.
#[derive(Debug)]
pub struct Cgroup {
    memory: Part,
    cpu: Part,
}

/// What this host lacks for such groups: controllers that are not mounted, or not writable.
#[must_use]
pub fn missing() -> Vec<String> {
    let controllers = ["memory", "cpu"].into_iter();
    let lacking = controllers.filter_map(|controller| tree(controller).err());
    lacking.collect()
}

/// Where the groups of a controller are.
fn tree(controller: &str) -> Result<Part, String> {
    let folder = Path::new(UNIFIED_ROOTS[0]).join(controller);
    let has = |file| folder.join(file).exists();
    let (folder, version) = if has("cgroup.procs") && !has("cgroup.controllers") {
        (folder, Version::One)
    } else {
        let has_it = |root: &&&str| {
            let controllers = fs::read_to_string(Path::new(root).join("cgroup.controllers"));
            controllers.is_ok_and(|all| all.split_whitespace().any(|its| its == controller))
        };
        let root = UNIFIED_ROOTS.iter().find(has_it);
        let root = root.ok_or_else(|| format!("cgroup {controller}: not mounted"))?;
        let enabled = fs::write(
            Path::new(root).join("cgroup.subtree_control"),
            format!("+{controller}"),
        );
        enabled.map_err(|error| format!("cgroup {controller}: {root}: {error}"))?;
        (PathBuf::from(root), Version::Two)
    };
    let probe = folder.join(new_name());
    let created = fs::create_dir(&probe).and_then(|()| fs::remove_dir(&probe));
    created.map_err(|error| format!("cgroup {controller}: {}: {error}", folder.display()))?;
    Ok(Part { folder, version })
}

impl Cgroup {
    /// A group whose processes together have at most so much memory, and so many hundredths of a
    /// core.
    ///
    /// # Panics
    /// Where [`missing`] says so.
    #[must_use]
    pub fn new(memory_bytes_max: u64, cpu_percent: u32) -> Self {
        let name = new_name();
        let part = |controller| {
            let tree = tree(controller).unwrap_or_else(|why| panic!("{why}"));
            remove_left_behind(&tree.folder);
            let folder = tree.folder.join(&name);
            // One folder is for both in version 2.
            if !folder.exists() {
                fs::create_dir(&folder).unwrap_or_else(|error| panic!("{folder:?}: {error}"));
            }
            Part { folder, ..tree }
        };
        let group = Self {
            memory: part("memory"),
            cpu: part("cpu"),
        };
        let bytes = memory_bytes_max.to_string();
        let (quota, period) = (PERIOD * cpu_percent / 100, PERIOD.as_micros());
        let quota = quota.as_micros();
        match group.memory.version {
            Version::One => group.memory.write("memory.limit_in_bytes", &bytes),
            Version::Two => group.memory.write("memory.max", &bytes),
        }
        match group.cpu.version {
            Version::One => {
                group.cpu.write("cpu.cfs_period_us", &period.to_string());
                group.cpu.write("cpu.cfs_quota_us", &quota.to_string());
            }
            Version::Two => group.cpu.write("cpu.max", &format!("{quota} {period}")),
        }
        group
    }

    /// The files that take the number of a process: written to both, it moves the process here.
    #[must_use]
    pub fn procs(&self) -> [PathBuf; 2] {
        [&self.memory, &self.cpu].map(|part| part.folder.join("cgroup.procs"))
    }

    /// Most memory that the group had, bytes.
    ///
    /// # Panics
    /// Here and below: when the kernel does not say so.
    #[must_use]
    pub fn peak_bytes(&self) -> u64 {
        match self.memory.version {
            Version::One => self.memory.number("memory.max_usage_in_bytes", ""),
            Version::Two => self.memory.number("memory.peak", ""),
        }
    }

    /// How often memory was wanted that the bound does not allow.
    #[must_use]
    pub fn failures(&self) -> u64 {
        match self.memory.version {
            Version::One => self.memory.number("memory.failcnt", ""),
            Version::Two => self.memory.number("memory.events", "max "),
        }
    }

    /// Processes that the kernel killed for that.
    #[must_use]
    pub fn killed(&self) -> u64 {
        match self.memory.version {
            Version::One => self.memory.number("memory.oom_control", "oom_kill "),
            Version::Two => self.memory.number("memory.events", "oom_kill "),
        }
    }
}

impl Part {
    /// The number behind `name` on a line of a file.
    fn number(&self, file: &str, name: &str) -> u64 {
        let path = self.folder.join(file);
        let text =
            fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let mut lines = text.lines().filter_map(|line| line.strip_prefix(name));
        let number = lines.find_map(|number| number.parse().ok());
        number.unwrap_or_else(|| panic!("{}: {text}", path.display()))
    }

    fn write(&self, file: &str, text: &str) {
        let path = self.folder.join(file);
        fs::write(&path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
}

/// Removes the groups of tests that were killed.
fn remove_left_behind(root: &Path) {
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let rest = name.to_str().and_then(|name| name.strip_prefix(NAME));
        let process = rest.and_then(|rest| rest.split('-').next());
        if process.is_some_and(|process| !Path::new("/proc").join(process).exists()) {
            // One in which a process goes on stays.
            fs::remove_dir(entry.path()).ok();
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for Part { folder, .. } in [&self.memory, &self.cpu] {
            // The kernel takes a process out a moment after its end was heard of.
            let removed = within(END_PATIENCE, || {
                fs::remove_dir(folder).ok();
                (!folder.exists()).then_some(())
            });
            if removed.is_none() {
                eprintln!("{} is left behind", folder.display());
            }
        }
    }
}
