//! What becomes of a packet.

pub use crate::action::Action;
use crate::reason::Reason;

/// What a packet that passes says to the table below (`enum edge_stamp`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Stamp {
    /// Let it in.
    Pass = 1,
    /// Answer it with a refusal.
    Reject = 2,
}

/// What was decided on a packet, and what was done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Why.
    pub reason: Reason,
    /// What was done with the packet; in mode `count` it passes whatever the reason says.
    pub action: Action,
    /// Counted only: mode `count`, and enforcing would not have passed it.
    pub counted: bool,
    /// The rule that decided; none: no rule was asked, or the default decided.
    pub rule: Option<u16>,
    /// The service that the packet is for; none: it is for none, or for the host.
    pub service: Option<u8>,
    /// What the packet carries on to the host; none: it is not ours, or does not pass.
    pub stamp: Option<Stamp>,
    /// The Retry that is transmitted. A SYN cookie is the kernel's: its frame is not modelled.
    pub frame: Option<Vec<u8>>,
    /// Stress as it held at that moment: 0 once the lease has ended.
    pub stress: u32,
    /// Generation of the config that decided: 0 or 1.
    pub generation: usize,
}
