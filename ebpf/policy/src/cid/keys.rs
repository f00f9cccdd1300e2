//! The keys of connection IDs and tokens, and when they change.
//!
//! The key of a roaming epoch has the place `epoch mod 4`. At any time the keys of two epochs past, the present one and the next are
//! there:
//!
//! 1. An ID counts until the end of the epoch after its own; its key stays one epoch longer, so a change may come late.
//! 2. The next epoch's key is there before anyone signs with it, so kernel and user space need not change at one moment.

use crate::cid::ROAMING_EPOCH_SHIFT;
use crate::siphash::Key;

/// Keys of four epochs. The kernel has the same four.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keys {
    /// By the number that IDs and tokens carry.
    pub keys: [Key; 4],
    /// The one that signs: 0 to 3.
    pub active: u8,
}

impl Keys {
    /// The key of an ID or token that has this byte: bits 5 and 6.
    pub(crate) fn of(&self, byte: u8) -> Key {
        self.keys[usize::from(byte >> 5 & 3)]
    }
}

/// Changes keys as time goes on.
#[derive(Clone, Debug)]
pub struct KeySchedule {
    keys: Keys,
    epoch: u64,
}

impl KeySchedule {
    /// Fresh keys, in use from `now_ns`. `random` gives unpredictable bytes.
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

    /// When to call [`KeySchedule::advance`] again.
    pub fn due_at_ns(&self) -> u64 {
        (self.epoch + 1) << ROAMING_EPOCH_SHIFT
    }

    /// Makes the keys those of `now_ns`; whether they changed.
    pub fn advance(&mut self, now_ns: u64, mut random: impl FnMut() -> [u8; 16]) -> bool {
        let present = now_ns >> ROAMING_EPOCH_SHIFT;
        if present <= self.epoch {
            return false;
        }
        // After a long sleep all four are new, each once.
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
