//! A value between the text of a config and the field that holds it.

use std::fmt;
use std::net::SocketAddr;

use crate::config::{
    Choice, Cores, DefaultAction, EdgeMode, EdgeScope, HeapCount, HugePages, Mtu, PathChoice, Seed,
    XdpMode,
};
use crate::units::{ByteSize, Period};

/// A value of some [`super::Kind`]; displays as TOML.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// Nothing written and no default.
    Absent,
    /// A whole number.
    Integer(u64),
    /// A size.
    Bytes(ByteSize),
    /// A duration.
    Duration(Period),
    /// A path, name or key.
    Text(String),
    /// One of the words of a [`super::Kind::Choice`].
    Word(&'static str),
    /// IP address and port.
    Address(SocketAddr),
    /// Nodes with their keys.
    Seeds(Vec<Seed>),
    /// Cores that run shards.
    Cores(Cores),
    /// Names of interfaces, roles.
    Names(Vec<String>),
    /// Ports of a protocol.
    Ports(Vec<u64>),
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent => Ok(()),
            Self::Integer(number) => write!(f, "{number}"),
            Self::Bytes(size) => write!(f, "\"{size}\""),
            Self::Duration(period) => write!(f, "\"{period}\""),
            // The toml crate knows how to quote what an operator may put into a path.
            Self::Text(text) => write!(f, "{}", toml::Value::String(text.clone())),
            Self::Word(word) => write!(f, "\"{word}\""),
            Self::Address(address) => write!(f, "\"{address}\""),
            Self::Seeds(list) => {
                let items: Vec<String> = list.iter().map(|seed| format!("\"{seed}\"")).collect();
                write!(f, "[{}]", items.join(", "))
            }
            Self::Cores(Cores::Auto) => write!(f, "\"auto\""),
            Self::Names(list) => {
                let quoted = |name: &String| toml::Value::String(name.clone()).to_string();
                let items: Vec<String> = list.iter().map(quoted).collect();
                write!(f, "[{}]", items.join(", "))
            }
            Self::Cores(Cores::List(list)) | Self::Ports(list) => {
                let items: Vec<String> = list.iter().map(u64::to_string).collect();
                write!(f, "[{}]", items.join(", "))
            }
        }
    }
}

/// A field's type: how it is made from a [`Value`] and turned back into one.
pub(super) trait Setting: Sized {
    /// The value back when it is of another type.
    fn from_value(value: Value) -> Result<Self, Value>;
    fn to_value(&self) -> Value;
}

macro_rules! setting {
    ($type:ty, $variant:ident) => {
        impl Setting for $type {
            fn from_value(value: Value) -> Result<Self, Value> {
                match value {
                    Value::$variant(inner) => Ok(inner),
                    other => Err(other),
                }
            }

            fn to_value(&self) -> Value {
                Value::$variant(self.clone())
            }
        }
    };
}

setting!(u64, Integer);
setting!(ByteSize, Bytes);
setting!(Period, Duration);
setting!(String, Text);
setting!(SocketAddr, Address);
setting!(Vec<Seed>, Seeds);
setting!(Cores, Cores);
setting!(Vec<String>, Names);
setting!(Vec<u64>, Ports);

/// A word that the row's own kind has checked.
macro_rules! choice_setting {
    ($($type:ty),*) => {
        $(impl Setting for $type {
            fn from_value(value: Value) -> Result<Self, Value> {
                match &value {
                    Value::Word(word) => Self::from_word(word).ok_or(value),
                    _ => Err(value),
                }
            }

            fn to_value(&self) -> Value {
                Value::Word(self.word())
            }
        })*
    };
}

choice_setting!(
    HeapCount,
    HugePages,
    Mtu,
    PathChoice,
    XdpMode,
    EdgeMode,
    EdgeScope,
    DefaultAction
);

impl Setting for Option<String> {
    fn from_value(value: Value) -> Result<Self, Value> {
        match value {
            Value::Absent => Ok(None),
            other => String::from_value(other).map(Some),
        }
    }

    fn to_value(&self) -> Value {
        self.clone().map_or(Value::Absent, Value::Text)
    }
}
