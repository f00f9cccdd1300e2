//! Capabilities: which the edge needs, which are missing, and how to be rid of them.
//!
//! They belong to a thread: drop them before any other is started. What stays possible without them, with descriptors that are
//! already open: writing maps and mapping them, putting loaded programs in the place of others, running a program on a frame. Not
//! possible: making a map, loading a program, attaching to an interface, changing nftables; the helper does that.
//!
//! A process that runs as root and holds no capability owns its own files, and no one else's.

use caps::errors::CapsError;
use caps::{CapSet, Capability};

/// What attaching takes: maps and programs, interfaces, tracepoints, and the mount of a bpffs.
pub const NEEDED: [Capability; 4] = [
    Capability::CAP_BPF,
    Capability::CAP_NET_ADMIN,
    Capability::CAP_PERFMON,
    Capability::CAP_SYS_ADMIN,
];

/// Those of [`NEEDED`] that the calling thread lacks; all of them if it cannot tell.
#[must_use]
pub fn missing() -> Vec<Capability> {
    let held = caps::read(None, CapSet::Effective).unwrap_or_default();
    NEEDED
        .into_iter()
        .filter(|capability| !held.contains(capability))
        .collect()
}

/// Why privileges could not be given up; some of them may be gone.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PrivilegesError {
    /// Capabilities.
    #[error("cannot give capabilities up: {0}")]
    Capabilities(#[from] CapsError),
    /// Those that files would give.
    #[error("cannot set no_new_privs: {0}")]
    NoNewPrivileges(#[source] std::io::Error),
}

/// Gives up every capability of the calling thread but `keep`, in every set, for good: nothing that it executes gets others, whatever the
/// file says (`no_new_privs`), nor its own back, as far as it may lower the bounding set (which takes CAP_SETPCAP).
///
/// # Errors
///
/// What the kernel says; the thread may then have dropped some.
pub fn drop_capabilities(keep: &[Capability]) -> Result<(), PrivilegesError> {
    rustix::thread::set_no_new_privs(true)
        .map_err(|errno| PrivilegesError::NoNewPrivileges(errno.into()))?;
    let kept = |set| -> Result<_, CapsError> {
        let mut held = caps::read(None, set)?;
        held.retain(|capability| keep.contains(capability));
        Ok(held)
    };
    // While there still is the capability to do so.
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)? {
        for capability in caps::read(None, CapSet::Bounding)? {
            if !keep.contains(&capability) {
                caps::drop(None, CapSet::Bounding, capability)?;
            }
        }
    }
    // The ambient set may hold nothing that the others lack, so it goes first.
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
