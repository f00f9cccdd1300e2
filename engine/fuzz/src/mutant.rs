//! Edits a seed as a script says.
//!
//! 1. Every script is valid, and the same script gives the same mutant.
//! 2. A mutant has at most [`MUTANT_BYTES_MAX`] bytes, unless its seed is longer.

/// Longest mutant, except for one of a longer seed: four times what a shard reads of a lane at a
/// time.
pub const MUTANT_BYTES_MAX: usize = 256 << 10;

/// Edits of one mutant. Most faults need one or two: a field, and what must agree with it.
const EDITS_MAX: usize = 6;

/// Values at which lengths, counts and times go wrong.
const EDGES: [u64; 12] = [
    0,
    1,
    16,
    0x3f,
    0x7f,
    0x80,
    0xff,
    0x4000,
    0x7fff_ffff,
    0x8000_0000,
    u64::MAX >> 1,
    u64::MAX,
];

/// A script of edits; zeros follow its end.
struct Script<'s>(&'s [u8]);

impl Script<'_> {
    fn byte(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        *first
    }

    /// A number from 0 to `max`: of every second script one below 128, because headers stand at the
    /// beginning.
    fn up_to(&mut self, max: usize) -> usize {
        let first = usize::from(self.byte());
        let number = if first < 0x80 {
            first
        } else {
            (first & 0x7f) << 16 | usize::from(self.byte()) << 8 | usize::from(self.byte())
        };
        number % (max + 1)
    }
}

/// One of `seeds`, edited as `script` says: its first byte names the seed, the edits follow. None
/// for an empty script, and without seeds.
pub fn mutant(seeds: &[Vec<u8>], script: &[u8]) -> Option<Vec<u8>> {
    let (first, edits) = script.split_first()?;
    let mut bytes = seeds.get(usize::from(*first) % seeds.len().max(1))?.clone();
    let bytes_max = MUTANT_BYTES_MAX.max(bytes.len());
    let mut script = Script(edits);
    for _ in 0..EDITS_MAX {
        if script.0.is_empty() {
            break;
        }
        edit(&mut bytes, seeds, &mut script);
        bytes.truncate(bytes_max);
    }
    Some(bytes)
}

fn edit(bytes: &mut Vec<u8>, seeds: &[Vec<u8>], script: &mut Script<'_>) {
    let kind = script.byte() % 10;
    let at = script.up_to(bytes.len());
    match kind {
        // A bit, a byte.
        0 => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << (script.byte() % 8);
            }
        }
        1 => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte = script.byte();
            }
        }
        // A number.
        2 => {
            let edge = EDGES[script.up_to(EDGES.len() - 1)];
            overwrite(bytes, at, edge, script.byte());
        }
        3 => {
            // What is left behind a length of two or four bytes, or nearly.
            let left = (bytes.len() - at) as u64;
            let near = left.wrapping_sub(u64::from(script.byte() % 8));
            overwrite(bytes, at, near, script.byte());
        }
        // The length of the whole.
        4 => bytes.truncate(at),
        5 => {
            let filler = script.byte();
            let more = script.up_to(0x2000);
            bytes.resize(bytes.len() + more, filler);
        }
        // A piece: taken away, put in, repeated, brought from elsewhere.
        6 => {
            let end = at + script.up_to(bytes.len() - at);
            bytes.drain(at..end);
        }
        7 => {
            let new = script.up_to(8).min(script.0.len());
            let (piece, rest) = script.0.split_at(new);
            bytes.splice(at..at, piece.iter().copied());
            script.0 = rest;
        }
        8 => {
            let end = at + script.up_to(bytes.len() - at);
            let piece = bytes[at..end].to_vec();
            let times = script
                .up_to(0xff)
                .min(MUTANT_BYTES_MAX / piece.len().max(1));
            bytes.splice(at..at, piece.repeat(times));
        }
        _ => {
            let other = &seeds[usize::from(script.byte()) % seeds.len()];
            let from = script.up_to(other.len());
            let end = from + script.up_to(other.len() - from);
            bytes.splice(at..at, other[from..end].iter().copied());
        }
    }
}

/// Writes `value` over what stands at `at`, as far as there is room: `form` says in how many bytes,
/// and in which order.
fn overwrite(bytes: &mut [u8], at: usize, value: u64, form: u8) {
    let width = 1 << (form & 3);
    let (little, big) = (value.to_le_bytes(), value.to_be_bytes());
    let encoded = if form & 4 == 0 {
        &little[..width]
    } else {
        &big[8 - width..]
    };
    for (byte, new) in bytes[at..].iter_mut().zip(encoded) {
        *byte = *new;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seeds() -> Vec<Vec<u8>> {
        vec![b"the first".to_vec(), vec![7; 300], Vec::new()]
    }

    /// Protects the targets from mutants that never come near a valid input.
    #[test]
    fn a_script_says_what_is_edited() {
        #[rustfmt::skip]
        let cases: [(&str, &[u8], &[u8]); 10] = [
            ("no edit", &[0], b"the first"),
            ("another seed", &[2], b""),
            ("more seeds than there are", &[3], b"the first"),
            ("a bit", &[0, 0, 4, 5], b"the First"),
            ("a byte", &[0, 1, 0, b'T'], b"The first"),
            ("a number, big endian", &[0, 2, 0, 7, 5], b"\x40\x00e first"),
            ("a length of what is left", &[0, 3, 8, 0, 0], b"the firs\x01"),
            ("the end", &[0, 4, 3], b"the"),
            ("a piece", &[0, 6, 3, 6], b"the"),
            ("two edits", &[0, 7, 3, 1, b'!', 4, 4], b"the!"),
        ];
        for (name, script, wanted) in cases {
            let found = mutant(&seeds(), script).unwrap_or_default();
            assert_eq!(
                found.escape_ascii().to_string(),
                wanted.escape_ascii().to_string(),
                "{name}"
            );
        }
        assert_eq!(mutant(&seeds(), &[]), None);
        assert_eq!(mutant(&[], &[1]), None);
    }

    /// Protects the tests' memory, and the promise that every script is valid.
    #[test]
    fn a_mutant_is_bounded() {
        let seeds = seeds();
        bolero::check!().for_each(|script: &[u8]| {
            if let Some(mutant) = mutant(&seeds, script) {
                assert!(mutant.len() <= MUTANT_BYTES_MAX);
            }
        });
    }

    /// Protects decoders of long inputs: the end of a seed is within reach.
    #[test]
    fn every_place_is_within_reach() {
        let seeds = [vec![0; 70_000]];
        let place = 69_999_u32.to_be_bytes();
        let script = [0, 1, 0x80 | place[1], place[2], place[3], 9];
        let mutant = mutant(&seeds, &script).unwrap_or_default();
        assert_eq!(mutant.iter().position(|byte| *byte == 9), Some(69_999));
    }
}
