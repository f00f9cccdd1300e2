//! What the edge's program costs by itself: test runs over generated packets, without veth and without stack.

use std::mem::MaybeUninit;

use crate::Result;
use crate::edge::{Case, Edges};
use crate::frames::Shape;
use crate::generator::{Generator, Sources};
use crate::receiver::Receiver;

/// What is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Subject {
    /// Refused by the firewall.
    Deny(Sources),
    /// Firewall, caps, all levels of a fresh source, the global budget, the stamp: passed.
    Admitted(Sources),
    /// The same behind a firewall of 100,000 prefixes.
    Prefixes,
    /// Refused because the source has spent its burst.
    Full(Sources),
    /// Answered in place.
    Retry,
}

/// One measurement.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cost {
    /// Mean for a packet, loop and generator included.
    pub(crate) gross_ns: f64,
    /// The loop, the generator and an empty program.
    pub(crate) loop_ns: f64,
}

impl Cost {
    pub(crate) fn net_ns(&self) -> f64 {
        self.gross_ns - self.loop_ns
    }
}

impl Subject {
    pub(crate) fn label(self) -> String {
        match self {
            Self::Deny(sources) => format!("deny, {} sources", sources.label()),
            Self::Admitted(sources) => format!("full path, admitted, {} sources", sources.label()),
            Self::Prefixes => "full path, admitted, 2^32 sources, 100,000 prefixes".into(),
            Self::Full(sources) => format!("full path, refused, {} sources", sources.label()),
            Self::Retry => "Retry, 2^32 sources".into(),
        }
    }
}
