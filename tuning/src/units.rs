//! Sizes and durations as an operator writes them: `"64MiB"`, `"250ms"`.
//!
//! Invariants
//! 1. `Display` then `FromStr` gives the same value back: a printed config is a valid config.
//! 2. A number without a unit is refused, except zero: `"10"` could be seconds or milliseconds.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A number of bytes, written with a unit (`"1452B"`, `"64KiB"`, `"128MiB"`, `"1MB"`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct ByteSize(pub u64);

impl ByteSize {
    /// Whole kibibytes.
    pub const fn kib(count: u64) -> Self {
        Self(count << 10)
    }

    /// Whole mebibytes.
    pub const fn mib(count: u64) -> Self {
        Self(count << 20)
    }

    /// Whole gibibytes.
    pub const fn gib(count: u64) -> Self {
        Self(count << 30)
    }

    /// The number of bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }
}

/// A duration, written with a unit (`"20us"`, `"250ms"`, `"3s"`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct Period(pub Duration);

impl Period {
    /// Whole microseconds.
    pub const fn micros(count: u64) -> Self {
        Self(Duration::from_micros(count))
    }

    /// Whole milliseconds.
    pub const fn millis(count: u64) -> Self {
        Self(Duration::from_millis(count))
    }

    /// Whole seconds.
    pub const fn secs(count: u64) -> Self {
        Self(Duration::from_secs(count))
    }

    /// The duration.
    pub const fn get(self) -> Duration {
        self.0
    }
}

/// `value` as a `usize`; saturates. The schema's bounds keep every value of a config far inside.
pub fn to_usize(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// `value` as a `u32`; saturates. The schema's bounds keep every value of a config far inside.
pub fn to_u32(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

/// `value` as a `u16`; saturates. The schema's bounds keep every value of a config far inside.
pub fn to_u16(value: u64) -> u16 {
    u16::try_from(value).unwrap_or(u16::MAX)
}

/// Why a size or a duration was refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum UnitError {
    /// The text holds no number.
    #[error("\"{text}\" does not begin with a number")]
    NoNumber {
        /// What was written.
        text: String,
    },
    /// A number other than zero without a unit.
    #[error("\"{text}\" has no unit (known: {known})")]
    NoUnit {
        /// What was written.
        text: String,
        /// The units that would be accepted.
        known: &'static str,
    },
    /// The unit is not known.
    #[error("\"{unit}\" is not a unit (known: {known})")]
    UnknownUnit {
        /// The unit as written.
        unit: String,
        /// The units that would be accepted.
        known: &'static str,
    },
    /// The value does not fit into 64 bits.
    #[error("\"{text}\" is too large to count")]
    TooLarge {
        /// What was written.
        text: String,
    },
    /// The value is not a whole number of the smallest unit.
    #[error("\"{text}\" is not a whole number of {smallest}")]
    NotWhole {
        /// What was written.
        text: String,
        /// Name of the smallest unit.
        smallest: &'static str,
    },
}

impl UnitError {
    /// Stable name of the reason.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NoNumber { .. } => "no_number",
            Self::NoUnit { .. } => "no_unit",
            Self::UnknownUnit { .. } => "unknown_unit",
            Self::TooLarge { .. } => "too_large",
            Self::NotWhole { .. } => "not_whole",
        }
    }
}

/// Largest first, because `Display` takes the first unit that divides.
const SIZE_UNITS: &[(&str, u64)] = &[
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("B", 1),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("kB", 1_000),
];
const SIZE_NAMES: &str = "B, KiB, MiB, GiB, TiB, kB, MB, GB, TB";

const TIME_UNITS: &[(&str, u64)] = &[
    ("h", 3_600_000_000_000),
    ("m", 60_000_000_000),
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
    ("us", 1_000),
    ("ns", 1),
];
const TIME_NAMES: &str = "ns, us, ms, s, m, h";

impl FromStr for ByteSize {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        parse_with(text, SIZE_UNITS, SIZE_NAMES, "bytes").map(Self)
    }
}

impl FromStr for Period {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        parse_with(text, TIME_UNITS, TIME_NAMES, "nanoseconds")
            .map(|nanos| Self(Duration::from_nanos(nanos)))
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        display_with(self.0, SIZE_UNITS, "B", f)
    }
}

impl fmt::Display for Period {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nanos = u64::try_from(self.0.as_nanos()).unwrap_or(u64::MAX);
        display_with(nanos, TIME_UNITS, "s", f)
    }
}

fn display_with(
    count: u64,
    units: &[(&str, u64)],
    zero_unit: &str,
    f: &mut fmt::Formatter<'_>,
) -> fmt::Result {
    let divides = units
        .iter()
        .find(|(_, factor)| count != 0 && count.is_multiple_of(*factor));
    match divides {
        Some((unit, factor)) => f.pad(&format!("{}{unit}", count / factor)),
        None => f.pad(&format!("{count}{zero_unit}")),
    }
}

/// Reads a decimal number and a unit. A fraction is allowed where the result is whole (`"1.5GiB"`).
fn parse_with(
    text: &str,
    units: &[(&str, u64)],
    known: &'static str,
    smallest: &'static str,
) -> Result<u64, UnitError> {
    let trimmed = text.trim();
    let number_len = trimmed
        .find(|c: char| !c.is_ascii_digit() && c != '.' && c != '_')
        .unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(number_len);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let unit = unit.trim_start();
    let digits = |s: &str| s.chars().filter(|c| *c != '_').collect::<String>();
    let (whole, fraction) = (digits(whole), digits(fraction));
    if whole.is_empty() || fraction.contains('.') {
        return Err(UnitError::NoNumber { text: text.into() });
    }
    let too_large = || UnitError::TooLarge { text: text.into() };
    let value: u64 = whole.parse().map_err(|_| too_large())?;
    if unit.is_empty() {
        if value == 0 && fraction.bytes().all(|b| b == b'0') {
            return Ok(0);
        }
        return Err(UnitError::NoUnit {
            text: text.into(),
            known,
        });
    }
    let (_, factor) = units
        .iter()
        .find(|(name, _)| *name == unit)
        .ok_or_else(|| UnitError::UnknownUnit {
            unit: unit.into(),
            known,
        })?;
    let base = value.checked_mul(*factor).ok_or_else(too_large)?;
    let part = fraction_of(&fraction, *factor).ok_or_else(|| UnitError::NotWhole {
        text: text.into(),
        smallest,
    })?;
    base.checked_add(part).ok_or_else(too_large)
}

/// `0.fraction * factor` if that is whole.
fn fraction_of(fraction: &str, factor: u64) -> Option<u64> {
    let fraction = fraction.trim_end_matches('0');
    if fraction.is_empty() {
        return Some(0);
    }
    // 18 digits keep the product below inside 128 bits.
    if fraction.len() > 18 {
        return None;
    }
    let scale = 10u128.pow(u32::try_from(fraction.len()).ok()?);
    let product = fraction.parse::<u128>().ok()? * u128::from(factor);
    product
        .is_multiple_of(scale)
        .then(|| u64::try_from(product / scale).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_with_units_parse_and_print_back() {
        for (text, bytes, printed) in [
            ("0", 0, "0B"),
            ("1452B", 1452, "1452B"),
            ("64KiB", 64 << 10, "64KiB"),
            ("128MiB", 128 << 20, "128MiB"),
            ("128 MiB", 128 << 20, "128MiB"),
            ("1.5GiB", 3 << 29, "1536MiB"),
            ("1MB", 1_000_000, "1000000B"),
            ("1_024B", 1024, "1KiB"),
        ] {
            let size: ByteSize = text.parse().unwrap();
            assert_eq!(size, ByteSize(bytes), "{text}");
            assert_eq!(size.to_string(), printed);
            assert_eq!(printed.parse::<ByteSize>().unwrap(), size);
        }
    }

    #[test]
    fn durations_with_units_parse_and_print_back() {
        for (text, duration, printed) in [
            ("0", Duration::ZERO, "0s"),
            ("20us", Duration::from_micros(20), "20us"),
            ("0.5s", Duration::from_millis(500), "500ms"),
            ("90s", Duration::from_secs(90), "90s"),
            ("2m", Duration::from_secs(120), "2m"),
            ("1h", Duration::from_secs(3600), "1h"),
        ] {
            let period: Period = text.parse().unwrap();
            assert_eq!(period.get(), duration, "{text}");
            assert_eq!(period.to_string(), printed);
            assert_eq!(printed.parse::<Period>().unwrap(), period);
        }
    }

    #[test]
    fn refused_units_say_why() {
        for (text, reason) in [
            ("", "no_number"),
            ("MiB", "no_number"),
            ("1.2.3MiB", "no_number"),
            ("-5MiB", "no_number"),
            ("64", "no_unit"),
            ("64Mb", "unknown_unit"),
            ("99999999999999999999B", "too_large"),
            ("99999999TiB", "too_large"),
            ("1.3B", "not_whole"),
        ] {
            assert_eq!(
                text.parse::<ByteSize>().unwrap_err().reason(),
                reason,
                "{text}"
            );
        }
        assert_eq!(
            "5 minutes".parse::<Period>().unwrap_err().reason(),
            "unknown_unit"
        );
    }
}
