//! The TLS keys of a node: what its registry record names beside its identity key, and what follows
//! from a change of them.
//!
//! A handshake proves a TLS key. A node that never rotated has one, its identity key. A rotation
//! has three steps: a version names the old key and a new one; the node takes the new one up
//! ([`OwnKey`]), and its connections are replaced ([`KeyReplacements`]); a version names the new
//! one alone.
//!
//! 1. A record has one or two keys, which differ.
//! 2. A node takes up a new key after its peers had time to hear of it, and never one whose secret
//!    half it does not hold.
//! 3. Nothing here depends on the wall clock but [`Validity`], which no peer checks.

mod certificate;
mod own;
mod replace;

pub use certificate::{RENEWAL_CHECK_INTERVAL, Validity};
pub use own::{OwnKey, Standing};
pub use replace::KeyReplacements;

use crate::identity::PublicKey;
use thiserror::Error;

/// The TLS keys of one node: the newest, and during a rotation the one that it replaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TlsKeys {
    newest: PublicKey,
    older: Option<PublicKey>,
}

/// Why a list is no node's TLS keys.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum TlsKeysError {
    /// There are none, or more than a rotation needs.
    #[error("{count} TLS keys; 1 or 2 are allowed")]
    Count {
        /// How many there are.
        count: usize,
    },
    /// Both are the same.
    #[error("both TLS keys are the same")]
    Same,
}

/// Why a step of a rotation cannot be taken.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum RotationError {
    /// The record has two keys already.
    #[error("a rotation to {newest} is under way: finish or abandon it first")]
    UnderWay {
        /// The key that replaces the other.
        newest: PublicKey,
    },
    /// The record has one key.
    #[error("no rotation is under way")]
    NotUnderWay,
    /// The record has the key already.
    #[error("{key} is the node's TLS key already")]
    Same {
        /// The key.
        key: PublicKey,
    },
}

impl TlsKeys {
    /// The most keys of a record.
    pub const MAX: usize = 2;

    /// This key alone.
    pub fn one(key: PublicKey) -> Self {
        Self {
            newest: key,
            older: None,
        }
    }

    /// The keys of a record, the older one first.
    ///
    /// # Errors
    /// When there are none or more than [`Self::MAX`], or both are the same.
    pub fn of(keys: &[PublicKey]) -> Result<Self, TlsKeysError> {
        match *keys {
            [key] => Ok(Self::one(key)),
            [older, newest] if older == newest => Err(TlsKeysError::Same),
            [older, newest] => Ok(Self {
                newest,
                older: Some(older),
            }),
            _ => Err(TlsKeysError::Count { count: keys.len() }),
        }
    }

    /// The key that the node is to use.
    pub fn newest(&self) -> PublicKey {
        self.newest
    }

    /// The key that it replaces, while a rotation is under way.
    pub fn older(&self) -> Option<PublicKey> {
        self.older
    }

    /// Both keys, the older one first.
    pub fn iter(&self) -> impl Iterator<Item = PublicKey> + use<> {
        self.older.into_iter().chain([self.newest])
    }

    /// Whether `key` is one of them.
    pub fn contains(&self, key: &PublicKey) -> bool {
        self.newest == *key || self.older == Some(*key)
    }

    /// The first step of a rotation: `key` beside the one that it is to replace.
    ///
    /// # Errors
    /// [`RotationError::UnderWay`], [`RotationError::Same`].
    pub fn begin(&self, key: PublicKey) -> Result<Self, RotationError> {
        let newest = self.newest;
        if self.contains(&key) {
            return Err(RotationError::Same { key });
        }
        match self.older {
            Some(_) => Err(RotationError::UnderWay { newest }),
            None => Ok(Self {
                newest: key,
                older: Some(newest),
            }),
        }
    }

    /// The last step: the newest key alone.
    ///
    /// # Errors
    /// [`RotationError::NotUnderWay`].
    pub fn finish(&self) -> Result<Self, RotationError> {
        self.older
            .map(|_| Self::one(self.newest))
            .ok_or(RotationError::NotUnderWay)
    }

    /// Takes the first step back: the older key alone.
    ///
    /// # Errors
    /// [`RotationError::NotUnderWay`].
    pub fn abandon(&self) -> Result<Self, RotationError> {
        self.older.map(Self::one).ok_or(RotationError::NotUnderWay)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(seed: u8) -> PublicKey {
        PublicKey::from_bytes([seed; 32])
    }

    // Protects the bound of two keys, and the order of a rotation's steps.
    #[test]
    fn a_rotation_goes_from_one_key_over_two_to_one() {
        let [a, b, c] = [1, 2, 3].map(key);
        assert_eq!(TlsKeys::of(&[]), Err(TlsKeysError::Count { count: 0 }));
        assert_eq!(
            TlsKeys::of(&[a, b, c]),
            Err(TlsKeysError::Count { count: 3 })
        );
        assert_eq!(TlsKeys::of(&[a, a]), Err(TlsKeysError::Same));

        let one = TlsKeys::of(&[a]).unwrap();
        assert_eq!(one.finish(), Err(RotationError::NotUnderWay));
        assert_eq!(one.abandon(), Err(RotationError::NotUnderWay));
        assert_eq!(one.begin(a), Err(RotationError::Same { key: a }));

        let both = one.begin(b).unwrap();
        assert_eq!(TlsKeys::of(&[a, b]), Ok(both));
        assert_eq!((both.newest(), both.older()), (b, Some(a)));
        assert_eq!(both.iter().collect::<Vec<_>>(), [a, b]);
        assert!(both.contains(&a) && both.contains(&b) && !both.contains(&c));
        let under_way = Err(RotationError::UnderWay { newest: b });
        assert_eq!(both.begin(c), under_way);

        let [finished, abandoned] = [both.finish().unwrap(), both.abandon().unwrap()];
        assert_eq!(finished, TlsKeys::one(b));
        assert_eq!(abandoned, one);
        assert!(!finished.contains(&a));
    }
}
