//! The counters of a filter.

/// Packets that a filter has seen, by decision.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) seen: u64,
    /// Let through to the stack.
    pub(crate) passed: u64,
    /// Answered by the filter itself.
    pub(crate) answered: u64,
    /// Decided as the row says.
    pub(crate) expected: u64,
}
