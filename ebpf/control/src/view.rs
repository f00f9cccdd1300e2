//! What metrics and status reports show of a node's edge. The loops write it, any thread reads it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use millrace_edge::metrics::hits;
use millrace_edge::publish::Publisher;

use crate::journal::Refused;
use crate::open::AttachedEdge;

/// What there is to see of a node's edge.
#[derive(Debug)]
pub struct EdgeView {
    /// The edge in the kernel; also after it was detached.
    pub kernel: Option<Arc<AttachedEdge>>,
    status: Mutex<EdgeStatus>,
}

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
    /// How often rules did not follow, by reason: `rules`, `publish`, `journal`.
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
    /// For a node with this edge.
    #[must_use]
    pub fn new(kernel: Option<Arc<AttachedEdge>>) -> Self {
        let status = EdgeStatus {
            is_in_kernel: kernel.is_some(),
            ..EdgeStatus::default()
        };
        Self {
            kernel,
            status: Mutex::new(status),
        }
    }

    /// How it is now. Not to be held for long: the loops wait for it.
    pub fn status(&self) -> MutexGuard<'_, EdgeStatus> {
        // What a panic may have left is still to be seen.
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How often each rule of the set in force decided; empty if that is not known.
    #[must_use]
    pub fn rule_hits(&self) -> Vec<u64> {
        let (set, rules) = self.status().rules;
        let maps = self.kernel.as_ref().map(|kernel| kernel.edge.maps());
        let hits = maps
            .filter(|maps| Publisher::new(maps).config().set == set)
            .map(|maps| {
                let generation = Publisher::new(maps).in_force() as u32;
                hits(maps.hits(), generation, rules as u32).unwrap_or_default()
            });
        hits.unwrap_or_default()
    }
}
