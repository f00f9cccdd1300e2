//! One mistake in a config, or one obstacle on the host: its position, its reason, its fix. Also
//! the positions of a config's keys.

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
    /// The first character of the text: the position of a problem that has no line of its own.
    pub const START: Self = Self { line: 1, column: 1 };

    /// The position of byte `byte` of `text`; a byte past the end has the position of the end.
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

/// The positions of the keys that a config writes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Origins(BTreeMap<String, Position>);

impl Origins {
    /// Notes the position of `key`.
    pub(crate) fn insert(&mut self, key: String, position: Position) {
        self.0.insert(key, position);
    }

    /// The position of a key; `None` when the config does not write it.
    pub fn of(&self, key: &str) -> Option<Position> {
        self.0.get(key).copied()
    }

    /// The position to report for a key: its own, else its section's, else the start of the text.
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
    /// The node would not start, or would not do what its operator asked for.
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
    /// The value has another type than the key.
    WrongType,
    /// A size or duration that cannot be read.
    BadUnit,
    /// The value has the right type, but is no valid address, public key or choice.
    BadValue,
    /// Outside the key's bounds.
    OutOfRange,
    /// Two keys contradict each other.
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
    /// Position in the config; of the section or the first line when the config does not write the
    /// key.
    pub position: Position,
    /// The dotted key, if it concerns one.
    pub key: String,
    /// What kind of mistake.
    pub kind: ProblemKind,
    /// Whether the node can start with it.
    pub severity: Severity,
    /// The mistake, one sentence without a period.
    pub reason: String,
    /// The fix, one sentence without a period.
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
