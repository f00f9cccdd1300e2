//! The server's side: the state of each request that is being served.

use super::RpcLimits;
use crate::frame::{Class, FailureCode};
use std::fmt;
use thiserror::Error;

/// Why a request is not accepted.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum InFlightError {
    /// The bound of its class is reached: answer with [`FailureCode::Busy`].
    #[error("too many {} requests in flight from this peer", .0.label())]
    Busy(Class),
    /// The peer uses an id that is in flight: it breaks the protocol.
    #[error("request id {0} is in flight already")]
    PeerDuplicateId(u32),
}

impl InFlightError {
    /// Stable label for metrics and logs.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Busy(_) => "in_flight_busy",
            Self::PeerDuplicateId(_) => "peer_duplicate_id",
        }
    }

    /// The code to answer with; none when the connection is to be closed.
    pub fn failure_code(&self) -> Option<FailureCode> {
        match self {
            Self::Busy(_) => Some(FailureCode::Busy),
            Self::PeerDuplicateId(_) => None,
        }
    }
}

/// Requests of one peer that are being served, each with its state.
///
/// Ids are the peer's. Their low bits are positions in the peer's own table, so a plain table
/// by those bits finds them; two ids that meet in one place (a peer with larger limits) count as
/// one too many.
pub struct InFlight<S> {
    limits: RpcLimits,
    slots: Vec<Option<(u32, Class, S)>>,
    counts: [u32; 3],
}

impl<S> InFlight<S> {
    /// Nothing in flight. The table grows to the sum of the limits, rounded up to a power of two.
    pub fn new(limits: RpcLimits) -> Self {
        Self {
            limits,
            slots: Vec::new(),
            counts: [0; 3],
        }
    }

    /// Accepts a request, with its state.
    ///
    /// # Errors
    /// When the class is full, or the peer uses an id that is in flight; the state is dropped.
    pub fn begin(&mut self, id: u32, class: Class, state: S) -> Result<(), InFlightError> {
        let place = self.place(id);
        if place >= self.slots.len() {
            self.slots
                .resize_with((place + 1).next_power_of_two(), || None);
        }
        let slot = &mut self.slots[place];
        if slot.as_ref().is_some_and(|(held, ..)| *held == id) {
            return Err(InFlightError::PeerDuplicateId(id));
        }
        let count = &mut self.counts[class.index()];
        if slot.is_some() || *count >= self.limits.in_flight_max[class.index()] {
            return Err(InFlightError::Busy(class));
        }
        *count += 1;
        *slot = Some((id, class, state));
        self.invariants();
        Ok(())
    }

    /// The state of a request that is being served.
    pub fn get_mut(&mut self, id: u32) -> Option<&mut S> {
        let place = self.place(id);
        match self.slots.get_mut(place)? {
            Some((held, _, state)) if *held == id => Some(state),
            _ => None,
        }
    }

    /// Forgets a request that was answered or cancelled, and returns its state; none if it was not
    /// in flight.
    pub fn end(&mut self, id: u32) -> Option<S> {
        let place = self.place(id);
        let (_, class, state) = self
            .slots
            .get_mut(place)?
            .take_if(|(held, ..)| *held == id)?;
        self.counts[class.index()] -= 1;
        self.invariants();
        Some(state)
    }

    /// Empties the table after the loss of the connection, and returns every state.
    pub fn take_all(&mut self, on_lost: &mut impl FnMut(u32, S)) {
        self.counts = [0; 3];
        for (id, _, state) in self.slots.iter_mut().filter_map(Option::take) {
            on_lost(id, state);
        }
    }

    /// Number of requests of a class that are being served.
    pub fn in_flight(&self, class: Class) -> u32 {
        self.counts[class.index()]
    }

    fn place(&self, id: u32) -> usize {
        id as usize % (self.limits.slots().max(1) as usize).next_power_of_two()
    }

    fn invariants(&self) {
        debug_assert!(
            self.counts
                .iter()
                .zip(self.limits.in_flight_max)
                .all(|(count, max)| *count <= max)
        );
    }
}

impl<S> fmt::Debug for InFlight<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InFlight")
            .field("counts", &self.counts)
            .finish()
    }
}
