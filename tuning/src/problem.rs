//! One mistake in a config or one obstacle on the host: where, why, and what to do about it;
//! and where the keys of a config stand.

use std::collections::BTreeMap;
use std::fmt;

/// A place in the config text; both count from one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// Line of the text.
    pub line: usize,
    /// Character within the line.
    pub column: usize,
}

impl Position {
    /// The first character of the text: where a thing that is missing altogether is reported.
    pub const START: Self = Self { line: 1, column: 1 };

    /// The position of a byte of `text`; past the end is the end.
    pub fn of(text: &str, byte: usize) -> Self {
        let mut byte = byte.min(text.len());
        while !text.is_char_boundary(byte) {
            byte -= 1;
        }
        let before = &text[..byte];
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        Self {
            line: before.matches('\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
        }
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

/// Where each written key of a config stands.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Origins(BTreeMap<String, Position>);

impl Origins {
    /// Notes where `key` is written.
    pub(crate) fn insert(&mut self, key: String, position: Position) {
        self.0.insert(key, position);
    }

    /// Where the key is written; `None` for a default.
    pub fn of(&self, key: &str) -> Option<Position> {
        self.0.get(key).copied()
    }

    /// Where to point for a key: at itself, else at its section, else at the start.
    pub fn nearest(&self, key: &str) -> Position {
        let mut name = key;
        loop {
            if let Some(position) = self.of(name) {
                return position;
            }
            match name.rsplit_once('.') {
                Some((parent, _)) => name = parent,
                None => return Position::START,
            }
        }
    }
}

/// Whether a node with this problem can start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// The node would not start, or not do what was asked.
    Error,
    /// The node starts; the operator should know.
    Warning,
}

impl Severity {
    /// The word that is printed.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warning => "warning",
        }
    }
}

/// What kind of mistake; stable names for scripts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ProblemKind {
    /// Not TOML.
    Syntax,
    /// A key or section that does not exist.
    UnknownKey,
    /// A required key is missing.
    MissingKey,
    /// Another type than the key's.
    WrongType,
    /// A size or duration that cannot be read.
    BadUnit,
    /// Readable, but not a valid value of its kind (an address, a public key, a choice).
    BadValue,
    /// Outside the key's bounds.
    OutOfRange,
    /// Two keys that cannot both hold.
    Contradiction,
    /// The host does not allow it.
    Environment,
}

impl ProblemKind {
    /// The stable name.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Syntax => "syntax",
            Self::UnknownKey => "unknown_key",
            Self::MissingKey => "missing_key",
            Self::WrongType => "wrong_type",
            Self::BadUnit => "bad_unit",
            Self::BadValue => "bad_value",
            Self::OutOfRange => "out_of_range",
            Self::Contradiction => "contradiction",
            Self::Environment => "environment",
        }
    }
}

/// One finding of a check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Where in the config; the section or the first line when the key is not written there.
    pub position: Position,
    /// The dotted key, if it concerns one.
    pub key: String,
    /// What kind of mistake.
    pub kind: ProblemKind,
    /// Whether the node can start with it.
    pub severity: Severity,
    /// What is wrong, one sentence without a period.
    pub reason: String,
    /// What to do, one sentence without a period.
    pub fix: String,
}

impl Problem {
    /// `file:line:column: reason; fix: …`, with the word `warning` before the reason of a warning.
    pub fn render(&self, file: &str) -> String {
        let warning = match self.severity {
            Severity::Error => "",
            Severity::Warning => "warning: ",
        };
        format!(
            "{file}:{}: {warning}{}; fix: {}",
            self.position, self.reason, self.fix
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_count_lines_and_characters_from_one() {
        let text = "a = 1\nü = 2\n";
        assert_eq!(Position::of(text, 0), Position { line: 1, column: 1 });
        assert_eq!(Position::of(text, 6), Position { line: 2, column: 1 });
        // Inside and after the two-byte letter: the column counts characters, not bytes.
        assert_eq!(Position::of(text, 7), Position { line: 2, column: 1 });
        assert_eq!(Position::of(text, 8), Position { line: 2, column: 2 });
        assert_eq!(Position::of(text, 999), Position { line: 3, column: 1 });
        assert_eq!(Position::of("", 0), Position::START);
    }
}
