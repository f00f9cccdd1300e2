//! The decision on a packet.

pub use crate::action::Action;
use crate::reason::Reason;

/// The message of a passing packet to the table of nftables below (`enum edge_stamp`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Stamp {
    /// The table lets it in.
    Pass = 1,
    /// The table answers it with a refusal.
    Reject = 2,
}

/// What the edge decided on a packet, and what it did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Why.
    pub reason: Reason,
    /// What the edge did with the packet. In mode `count` it passes, whatever the reason is.
    pub action: Action,
    /// The packet was only counted: the mode is `count`, and `enforce` would not have passed it.
    pub counted: bool,
    /// The rule that decided. None: no rule matched and the default decided, or the packet did not
    /// get to the rules.
    pub rule: Option<u16>,
    /// The service that the packet is for. None: it is for no service, or for the host.
    pub service: Option<u8>,
    /// The stamp that the packet carries to the host. None: the packet is not ours, or does not
    /// pass.
    pub stamp: Option<Stamp>,
    /// The Retry that the program transmits. The kernel makes SYN cookies, so their frame is not
    /// modelled.
    pub frame: Option<Vec<u8>>,
    /// The level of stress at that moment: 0 once the lease has ended.
    pub stress: u32,
    /// Generation of the config that decided: 0 or 1.
    pub generation: usize,
}
