//! The attacks: each by as many members as it takes.

use crate::attacks::{self, Attack};
use crate::floods;

/// An attack.
pub struct Case {
    pub name: &'static str,
    pub members: usize,
    /// Returns when the victim has seen through it.
    pub attack: fn(&Attack<'_>),
}

impl Case {
    const fn of(name: &'static str, members: usize, attack: fn(&Attack<'_>)) -> Self {
        Self {
            name,
            members,
            attack,
        }
    }
}

pub const SINGLE_BYTES: Case = Case::of("single bytes in full packets", 1, attacks::single_bytes);
pub const SINGLE_BYTES_ALONE: Case = Case::of(
    "single bytes in packets of their own",
    1,
    attacks::single_bytes_alone,
);
pub const PIECES: Case = Case::of("pieces of many members", 36, attacks::pieces);
pub const PUTS: Case = Case::of("puts without end", 1, attacks::puts);
pub const UNFINISHED_BODIES: Case = Case::of(
    "small bodies that do not end",
    20,
    attacks::unfinished_bodies,
);
pub const UNREAD_ANSWERS: Case = Case::of("answers that are not read", 4, attacks::unread_answers);
pub const FLOODS: Case = Case::of("floods", floods::FLOODS.len(), floods::all);
