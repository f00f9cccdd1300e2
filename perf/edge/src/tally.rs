//! What a filter counts.

/// What a filter says of the packets that it has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) seen: u64,
    /// Let through to the stack.
    pub(crate) passed: u64,
    /// Answered by the filter itself.
    pub(crate) answered: u64,
    /// Went the way that the row is about.
    pub(crate) expected: u64,
}
