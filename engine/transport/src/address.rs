//! The address of a connection's peer, and the check of a new one.
//!
//! A NAT may give a peer another port at any time, in the middle of a transfer; the peer does not
//! notice (RFC 9000, 9.3). Its authentic packets then come from the new port, and we answer there.
//! Until the peer has repeated a number that we sent there (8.2), we send at most three times what
//! came from there. quiche is not told: its own migration forgets flow control that was in flight
//! to the old port, which stalls a body now and then, and it uses up one of a few paths for each
//! port. Only the port changes, so congestion control goes on unchanged (9.4).
//!
//! Invariants
//! 1. Only packets from the peer's IP address count: the peer stays the source that was admitted
//!    and counted. A peer that gets another IP address dials again.
//! 2. An attacker that repeats the peer's packets from another port gains nothing: quiche rejects
//!    them as duplicates.
//! 3. A challenge allows one guess: a wrong number ends the move, and the next packet begins
//!    another move with another number.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Set in every challenge, and in no sequence number of a health probe.
const CHALLENGE: u32 = 1 << 31;

/// Bytes that may be sent to an address that is not validated, as a multiple of the bytes that came
/// from there (RFC 9000, 8.1).
const AMPLIFICATION_MAX: usize = 3;

/// A challenge is repeated when packets come later than this after it.
const REPEAT_AFTER: Duration = Duration::from_millis(20);

/// The address of a peer.
#[derive(Clone, Debug)]
pub(crate) struct PeerAddress {
    first: SocketAddr,
    current: SocketAddr,
    moving: Option<Move>,
}

/// The address that it may have moved to.
#[derive(Clone, Debug)]
struct Move {
    to: SocketAddr,
    challenge: u32,
    asked: Option<Instant>,
    received_bytes: usize,
    sent_bytes: usize,
}

impl PeerAddress {
    pub(crate) fn new(first: SocketAddr) -> Self {
        Self {
            first,
            current: first,
            moving: None,
        }
    }

    /// The address that quiche is told, for the connection's whole life.
    pub(crate) fn first(&self) -> SocketAddr {
        self.first
    }

    /// The last one that was validated.
    pub(crate) fn current(&self) -> SocketAddr {
        self.current
    }

    /// Whether the peer's packets may come from here at all.
    pub(crate) fn may_be(&self, from: SocketAddr) -> bool {
        from.ip() == self.current.ip()
    }

    /// Whether the peer is known to be here.
    pub(crate) fn is_settled_at(&self, from: SocketAddr) -> bool {
        self.current == from && self.moving.is_none()
    }

    /// Authentic packets came from `from`. Returns the number that the peer is to repeat, if it is
    /// to be asked now.
    pub(crate) fn seen(
        &mut self,
        from: SocketAddr,
        bytes: usize,
        now: Instant,
        random: impl FnOnce() -> [u8; 4],
    ) -> Option<u32> {
        if from == self.current {
            self.moving = None;
            return None;
        }
        let moving = match &mut self.moving {
            Some(moving) if moving.to == from => moving,
            moving => moving.insert(Move {
                to: from,
                challenge: u32::from_le_bytes(random()) | CHALLENGE,
                asked: None,
                received_bytes: 0,
                sent_bytes: 0,
            }),
        };
        moving.received_bytes += bytes;
        let is_due = moving.asked.is_none_or(|asked| now >= asked + REPEAT_AFTER);
        is_due.then(|| {
            moving.asked = Some(now);
            moving.challenge
        })
    }

    /// Whether this is the answer to a challenge, right or wrong, and no health probe's.
    pub(crate) fn is_answer(repeated: u32) -> bool {
        repeated & CHALLENGE != 0
    }

    /// The peer repeated a number; whether it is at another address now.
    pub(crate) fn answered(&mut self, repeated: u32) -> bool {
        let moved = self
            .moving
            .take()
            .filter(|moving| moving.challenge == repeated);
        if let Some(moving) = &moved {
            self.current = moving.to;
        }
        moved.is_some()
    }

    /// Where to send, and how many bytes; the last packet may exceed them.
    #[inline]
    pub(crate) fn target(&self) -> (SocketAddr, usize) {
        match &self.moving {
            None => (self.current, usize::MAX),
            Some(moving) => {
                let allowed = moving.received_bytes.saturating_mul(AMPLIFICATION_MAX);
                (moving.to, allowed.saturating_sub(moving.sent_bytes))
            }
        }
    }

    /// `bytes` were sent to the [`Self::target`].
    #[inline]
    pub(crate) fn sent(&mut self, bytes: usize) {
        if let Some(moving) = &mut self.moving {
            moving.sent_bytes += bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(port: u16) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, 1], port))
    }

    // Protects against reflection: only the right number makes an address the peer's, and until
    // then few bytes go there.
    #[test]
    fn a_move_is_believed_when_its_number_comes_back() {
        let now = Instant::now();
        let mut address = PeerAddress::new(at(1));
        assert_eq!(address.target(), (at(1), usize::MAX));
        let challenge = address.seen(at(2), 100, now, || [7; 4]).unwrap();
        assert!(PeerAddress::is_answer(challenge) && !PeerAddress::is_answer(7));
        assert_eq!(address.target(), (at(2), 300));
        address.sent(290);
        assert_eq!(address.target(), (at(2), 10));
        address.sent(1_452);
        assert_eq!(address.target(), (at(2), 0));
        assert_eq!(address.current(), at(1));
        // Asked again when it is time, with the same number.
        assert_eq!(address.seen(at(2), 100, now, || [8; 4]), None);
        let later = now + REPEAT_AFTER;
        assert_eq!(
            address.seen(at(2), 1_000, later, || [8; 4]),
            Some(challenge)
        );
        assert!(address.answered(challenge));
        assert_eq!(address.target(), (at(2), usize::MAX));
        assert!(address.is_settled_at(at(2)) && !address.is_settled_at(at(1)));
        assert_eq!(address.first(), at(1));
        assert!(!address.answered(challenge), "a number counts once");
    }

    #[test]
    fn a_wrong_number_ends_the_move_and_so_does_a_packet_from_before() {
        let now = Instant::now();
        let mut address = PeerAddress::new(at(1));
        let challenge = address.seen(at(2), 100, now, || [7; 4]).unwrap();
        assert!(!address.answered(challenge ^ 1));
        assert_eq!(address.target(), (at(1), usize::MAX));
        let other = address.seen(at(2), 100, now, || [9; 4]).unwrap();
        assert_ne!(challenge, other);
        assert_eq!(address.seen(at(1), 100, now, || [9; 4]), None);
        assert!(!address.answered(other));
        assert_eq!(address.current(), at(1));
        // A third place is another move.
        let second = address.seen(at(2), 100, now, || [1; 4]).unwrap();
        let third = address.seen(at(3), 100, now, || [2; 4]).unwrap();
        assert!(second != third && address.answered(third));
        assert_eq!(address.current(), at(3));
    }

    #[test]
    fn another_host_is_not_the_peer() {
        let address = PeerAddress::new(at(1));
        assert!(address.may_be(at(9)));
        assert!(!address.may_be(SocketAddr::from(([192, 0, 2, 2], 1))));
    }
}
