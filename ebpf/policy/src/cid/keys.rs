//! The keys of connection IDs and tokens, and when they change.
//!
//! The key of a roaming epoch has the index `epoch mod 4`. At any time there are keys of the two
//! epochs before the present one, of the present one and of the next:
//!
//! 1. An ID is valid until the end of the epoch after its own. Its key stays one epoch longer, so a
//!    change of keys may come late.
//! 2. The next epoch's key is there before a node signs with it, so kernel and user space need not
//!    change at the same moment.

use crate::cid::ROAMING_EPOCH_SHIFT;
use crate::siphash::Key;

/// Keys of four epochs. The kernel has the same four.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keys {
    /// Indexed by the number that IDs and tokens carry.
    pub keys: [Key; 4],
    /// Index of the key that signs: 0 to 3.
    pub active: u8,
}

impl Keys {
    /// The key of an ID or a token that has this byte: bits 5 and 6 are its index.
    pub(crate) fn of(&self, byte: u8) -> Key {
        self.keys[usize::from(byte >> 5 & 3)]
    }
}

/// Changes the keys as time goes on.
#[derive(Clone, Debug)]
pub struct KeySchedule {
    keys: Keys,
    epoch: u64,
}

impl KeySchedule {
    /// Fresh keys, in use from `now_ns` (CLOCK_MONOTONIC) on. Takes four unpredictable values from
    /// `random`.
    pub fn new(now_ns: u64, mut random: impl FnMut() -> [u8; 16]) -> Self {
        let keys = std::array::from_fn(|_| Key::from_bytes(random()));
        let epoch = now_ns >> ROAMING_EPOCH_SHIFT;
        Self {
            keys: Keys {
                keys,
                active: place(epoch),
            },
            epoch,
        }
    }

    /// The keys since the last [`KeySchedule::advance`].
    pub fn keys(&self) -> Keys {
        self.keys
    }

    /// When to call [`KeySchedule::advance`] again, in nanoseconds of CLOCK_MONOTONIC.
    pub fn due_at_ns(&self) -> u64 {
        (self.epoch + 1) << ROAMING_EPOCH_SHIFT
    }

    /// Moves on to the keys of `now_ns`. Returns whether they changed.
    pub fn advance(&mut self, now_ns: u64, mut random: impl FnMut() -> [u8; 16]) -> bool {
        let present = now_ns >> ROAMING_EPOCH_SHIFT;
        if present <= self.epoch {
            return false;
        }
        // After a long sleep all four keys are new; each takes one value.
        let first_new = (self.epoch + 2).max((present + 1).saturating_sub(3));
        for epoch in first_new..=present + 1 {
            self.keys.keys[usize::from(place(epoch))] = Key::from_bytes(random());
        }
        self.epoch = present;
        self.keys.active = place(present);
        true
    }
}

fn place(epoch: u64) -> u8 {
    (epoch & 3) as u8
}
