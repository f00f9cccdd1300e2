//! What becomes of a packet.

/// What becomes of a packet in mode `enforce`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Goes on to the host.
    Pass,
    /// Is answered from here: a Retry or a SYN cookie.
    Transmit,
    /// Ends here.
    Drop,
}
