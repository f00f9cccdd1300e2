//! Control groups for tests: a bound on the memory of a process, and a quota of the CPU for
//! processes and threads.
//!
//! By version 1 of the kernel's interface (cgroups(7)), where each controller has a tree of its own
//! and threads of one process may be in several groups. A group is removed when its handle is
//! dropped, also when the test has failed; end its processes before.

use std::{
    fs,
    path::{Path, PathBuf},
    process,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use crate::wait::within;

/// Where version 1 is mounted.
const ROOT: &str = "/sys/fs/cgroup";

/// The kernel's period for quotas of the CPU, unless another one is set.
const PERIOD: Duration = Duration::from_millis(100);

/// How the names of groups begin; the number of the test's process follows.
const NAME: &str = "millrace-test-";

/// How long an ended process may stay in its group.
const END_PATIENCE: Duration = Duration::from_secs(5);

/// What this host lacks for such groups: controllers that are not mounted by version 1, or not
/// writable.
#[must_use]
pub fn missing() -> Vec<String> {
    let controllers = ["memory", "cpu"].into_iter();
    let lacking = controllers.filter_map(|controller| {
        let group = Cgroup::try_new(controller);
        group
            .err()
            .map(|why| format!("cgroup v1 {controller}: {why}"))
    });
    lacking.collect()
}

/// A group of one controller.
#[derive(Debug)]
pub struct Cgroup {
    folder: PathBuf,
}

impl Cgroup {
    /// A group whose processes together have at most so much memory.
    ///
    /// # Panics
    /// Where [`missing`] says so.
    #[must_use]
    pub fn of_memory(bytes_max: u64) -> Self {
        let group = Self::new("memory");
        group.write("memory.limit_in_bytes", &bytes_max.to_string());
        group
    }

    /// A group whose threads together have so many hundredths of a core.
    ///
    /// # Panics
    /// Where [`missing`] says so.
    #[must_use]
    pub fn of_cpu(percent: u32) -> Self {
        let group = Self::new("cpu");
        group.write("cpu.cfs_period_us", &PERIOD.as_micros().to_string());
        let quota = PERIOD * percent / 100;
        group.write("cpu.cfs_quota_us", &quota.as_micros().to_string());
        group
    }

    fn new(controller: &str) -> Self {
        Self::try_new(controller).unwrap_or_else(|why| panic!("cgroup v1 {controller}: {why}"))
    }

    fn try_new(controller: &str) -> Result<Self, std::io::Error> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let root = Path::new(ROOT).join(controller);
        remove_left_behind(&root);
        let folder = root.join(format!("{NAME}{}-{number}", process::id()));
        fs::create_dir(&folder)?;
        let group = Self { folder };
        // A plain folder has no such file.
        fs::metadata(group.tasks()).map(|_| group)
    }

    /// The file that takes the number of a thread: that moves the thread here.
    #[must_use]
    pub fn tasks(&self) -> PathBuf {
        self.folder.join("tasks")
    }

    /// Moves the thread that calls here; threads and processes that it starts are here too.
    ///
    /// # Panics
    /// When the kernel refuses.
    pub fn enter(&self) {
        self.write("tasks", "0");
    }

    /// Most memory that the group had since [`Self::forget_peak`], bytes.
    ///
    /// # Panics
    /// When this is no group of memory.
    #[must_use]
    pub fn peak_bytes(&self) -> u64 {
        self.number("memory.max_usage_in_bytes", "")
    }

    /// Begins anew with [`Self::peak_bytes`].
    ///
    /// # Panics
    /// When this is no group of memory.
    pub fn forget_peak(&self) {
        self.write("memory.max_usage_in_bytes", "0");
    }

    /// How often memory was wanted that the bound does not allow.
    ///
    /// # Panics
    /// When this is no group of memory.
    #[must_use]
    pub fn failures(&self) -> u64 {
        self.number("memory.failcnt", "")
    }

    /// Processes that the kernel killed for that.
    ///
    /// # Panics
    /// When this is no group of memory.
    #[must_use]
    pub fn killed(&self) -> u64 {
        self.number("memory.oom_control", "oom_kill ")
    }

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
        // The kernel takes a process out a moment after its end was heard of.
        let removed = within(END_PATIENCE, || fs::remove_dir(&self.folder).ok());
        if removed.is_none() {
            eprintln!("{} is left behind", self.folder.display());
        }
    }
}
