//! A digest of a run: equal runs have equal ones.

/// FNV-1a over numbers: it must not change with the standard library's hasher.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Digest(u64);

impl Default for Digest {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Digest {
    pub(crate) fn add(&mut self, value: u64) {
        for byte in value.to_le_bytes() {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    pub(crate) fn add_all<const N: usize>(&mut self, values: [u64; N]) {
        for value in values {
            self.add(value);
        }
    }

    pub(crate) fn value(self) -> u64 {
        self.0
    }
}
