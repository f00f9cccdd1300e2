//! What metrics and status reports show of a node's edge. The loops write it, any thread reads it.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::journal::Refused;

/// What there is to see of a node's edge.
#[derive(Debug)]
pub struct EdgeView(Mutex<EdgeStatus>);

/// How a node's edge is.
#[derive(Debug, Clone, Default)]
pub struct EdgeStatus {
    /// The program in the kernel refuses for this node; otherwise user space alone does.
    pub is_in_kernel: bool,
    /// Level of stress: 0, 1 or 2.
    pub stress: u32,
    /// Version of the registry whose rules are in force; 0: none yet.
    pub registry_version: u64,
    /// A newer version, whose rules are refused.
    pub refused: Option<Refused>,
    /// What does not follow now, and why: what [`Self::refusals`] names, `interface NAME`, and the
    /// node's own `config` or the `registry`, where a set was rolled back.
    pub failures: BTreeMap<String, String>,
    /// How often that was: `lock`, `journal`, `rules`, `publish`, `table`.
    pub refusals: BTreeMap<&'static str, u64>,
    /// How often the table of nftables was put back after another program changed it.
    pub tables_restored: u64,
    /// How often the program was put on an interface that was made anew.
    pub reattached: u64,
    /// How often it could not be.
    pub attach_failures: u64,
    /// Interfaces that the program is not on, though it should be.
    pub interfaces_gone: Vec<String>,
    /// The set in force that was seen last, and how many inbound rules it has.
    pub rules: (u32, usize),
}

impl EdgeView {
    /// For a node whose program is in the kernel, or not.
    #[must_use]
    pub fn new(is_in_kernel: bool) -> Self {
        Self(Mutex::new(EdgeStatus {
            is_in_kernel,
            ..EdgeStatus::default()
        }))
    }

    /// How it is now. Not to be held for long: the loops wait for it.
    pub fn status(&self) -> MutexGuard<'_, EdgeStatus> {
        // What a panic may have left is still to be seen.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
