//! Unpredictable bytes.

use ring::rand::{SecureRandom, SystemRandom};

/// Bytes of the system's generator, which does not fail once it was seeded.
pub(crate) fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).ok();
    bytes
}
