//! Capabilities: those that the edge needs, those that are missing, and how to drop them.
//!
//! Capabilities belong to a thread: a process drops them before it starts another thread. Without
//! them, and with descriptors that are open already, a thread can still write and map maps, replace
//! programs by loaded ones, and run a program on a frame. It cannot make a map, load a program,
//! attach to an interface, or change nftables; the helper does that.
//!
//! A process that runs as root and holds no capability has access to root's own files, and to no
//! other user's.

use caps::errors::CapsError;
use caps::{CapSet, Capability};

/// Capabilities that attaching takes: for maps and programs, interfaces, tracepoints, and the mount
/// of a bpffs.
pub const NEEDED: [Capability; 4] = [
    Capability::CAP_BPF,
    Capability::CAP_NET_ADMIN,
    Capability::CAP_PERFMON,
    Capability::CAP_SYS_ADMIN,
];

/// The capabilities of [`NEEDED`] that the calling thread lacks; all of them if it cannot read its
/// own.
#[must_use]
pub fn missing() -> Vec<Capability> {
    let held = caps::read(None, CapSet::Effective).unwrap_or_default();
    NEEDED
        .into_iter()
        .filter(|capability| !held.contains(capability))
        .collect()
}

/// Why privileges could not be dropped. Some of them may be gone.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PrivilegesError {
    /// The kernel refused to drop capabilities.
    #[error("cannot drop capabilities: {0}")]
    Capabilities(#[from] CapsError),
    /// The kernel refused `no_new_privs`.
    #[error("cannot set no_new_privs: {0}")]
    NoNewPrivileges(#[source] std::io::Error),
}

/// Drops every capability of the calling thread except `keep`, in every set, for good. What it
/// executes gets no others, whatever the file grants (`no_new_privs`). It does not get its own back
/// either, provided that the thread may lower the bounding set (CAP_SETPCAP).
///
/// # Errors
///
/// The kernel's error. The thread may have dropped some capabilities then.
pub fn drop_capabilities(keep: &[Capability]) -> Result<(), PrivilegesError> {
    rustix::thread::set_no_new_privs(true)
        .map_err(|errno| PrivilegesError::NoNewPrivileges(errno.into()))?;
    let kept = |set| -> Result<_, CapsError> {
        let mut held = caps::read(None, set)?;
        held.retain(|capability| keep.contains(capability));
        Ok(held)
    };
    // This comes first, while the thread still has the capability to do it.
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)? {
        for capability in caps::read(None, CapSet::Bounding)? {
            if !keep.contains(&capability) {
                caps::drop(None, CapSet::Bounding, capability)?;
            }
        }
    }
    // The ambient set may hold nothing that the other sets lack, so it goes first.
    for set in [
        CapSet::Ambient,
        CapSet::Inheritable,
        CapSet::Effective,
        CapSet::Permitted,
    ] {
        let held = kept(set)?;
        caps::set(None, set, &held)?;
    }
    Ok(())
}
