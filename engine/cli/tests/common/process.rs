//! What a process and its threads may do, as the kernel says.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use caps::Capability;

/// Of a thread.
#[derive(Debug)]
pub struct Privileges {
    /// By set, as `/proc` names them: `Inh`, `Prm`, `Eff`, `Bnd`, `Amb`.
    pub capabilities: BTreeMap<String, u64>,
    /// What it executes gets no more than it has.
    pub no_new_privileges: bool,
}

impl Privileges {
    pub fn of(thread: &Path) -> Self {
        Self::of_living(thread).unwrap()
    }

    /// None if the thread has ended.
    fn of_living(thread: &Path) -> Option<Self> {
        let text = fs::read_to_string(thread.join("status")).ok()?;
        let sets = text.lines().filter_map(|line| {
            let (name, bits) = line.strip_prefix("Cap")?.split_once(':')?;
            Some((name.to_owned(), u64::from_str_radix(bits.trim(), 16).ok()?))
        });
        Some(Self {
            capabilities: sets.collect(),
            no_new_privileges: text.lines().any(|line| line == "NoNewPrivs:\t1"),
        })
    }
}

/// The folders of a process's threads.
pub fn threads(process: u32) -> Vec<PathBuf> {
    let threads = fs::read_dir(format!("/proc/{process}/task")).unwrap();
    threads.map(|thread| thread.unwrap().path()).collect()
}

pub fn children(process: u32) -> Vec<u32> {
    let path = format!("/proc/{process}/task/{process}/children");
    let text = fs::read_to_string(path).unwrap();
    let numbers = text.split_whitespace();
    numbers.map(|number| number.parse().unwrap()).collect()
}

pub fn bits(capabilities: &[Capability]) -> u64 {
    capabilities.iter().map(|one| 1 << one.index()).sum()
}

/// No thread of a node has, or can get, more than what locks memory.
pub fn assert_harmless(process: u32) {
    let kept = bits(&[Capability::CAP_IPC_LOCK]);
    let threads = threads(process);
    let mut looked_at = 0;
    for thread in &threads {
        let Some(held) = Privileges::of_living(thread) else {
            continue;
        };
        looked_at += 1;
        assert!(held.no_new_privileges, "{}", thread.display());
        assert_eq!(held.capabilities.len(), 5);
        for (set, bits) in held.capabilities {
            assert_eq!(bits & !kept, 0, "{set} of {}", thread.display());
        }
    }
    assert!(looked_at > 2, "{threads:?}");
}
