//! The counters of the transport: a table of plain counters for the hot path, and a map of reasons
//! for what was refused or lost.
//!
//! Invariants
//! 1. A counter of the table is written by its shard only, relaxed; a reader may be one turn
//!    behind.
//! 2. Reasons are `&'static str`s of our own code: no peer can grow the map.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use millrace_protocol::frame::Class;

macro_rules! counters {
    ($($(#[doc = $doc:literal])+ $variant:ident = $name:literal $({ $key:literal = $value:literal })?,)+) => {
        /// A counter of the hot path.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(usize)]
        pub enum Counter { $($(#[doc = $doc])+ $variant,)+ }

        /// Every counter with its metric name, label and help text, in order.
        pub const COUNTERS: &[CounterInfo] = &[$(CounterInfo {
            counter: Counter::$variant,
            name: $name,
            label: counters!(@label $($key $value)?),
            help: concat!($($doc),+),
        },)+];
    };
    (@label) => { None };
    (@label $key:literal $value:literal) => { Some(($key, $value)) };
}

/// How a counter appears on `/metrics`.
#[derive(Clone, Copy, Debug)]
pub struct CounterInfo {
    /// Which one.
    pub counter: Counter,
    /// Metric name, without the `_total` that OpenMetrics adds.
    pub name: &'static str,
    /// Label key and value.
    pub label: Option<(&'static str, &'static str)>,
    /// What it counts.
    pub help: &'static str,
}

counters! {
    /// Connections that peers opened and that finished their handshake.
    ConnectionsIn = "millrace_transport_connections" { "direction" = "in" },
    /// Connections that we opened and that finished their handshake.
    ConnectionsOut = "millrace_transport_connections" { "direction" = "out" },
    /// Connections dialled.
    Dials = "millrace_transport_dials",
    /// Messages of the latency class sent.
    SentLatency = "millrace_transport_messages_sent" { "class" = "latency" },
    /// Messages of the normal class sent.
    SentNormal = "millrace_transport_messages_sent" { "class" = "normal" },
    /// Messages of the bulk class sent.
    SentBulk = "millrace_transport_messages_sent" { "class" = "bulk" },
    /// Messages of the latency class received.
    ReceivedLatency = "millrace_transport_messages_received" { "class" = "latency" },
    /// Messages of the normal class received.
    ReceivedNormal = "millrace_transport_messages_received" { "class" = "normal" },
    /// Messages of the bulk class received.
    ReceivedBulk = "millrace_transport_messages_received" { "class" = "bulk" },
    /// Body bytes of the latency class sent.
    SentBytesLatency = "millrace_transport_body_bytes_sent" { "class" = "latency" },
    /// Body bytes of the normal class sent.
    SentBytesNormal = "millrace_transport_body_bytes_sent" { "class" = "normal" },
    /// Body bytes of the bulk class sent.
    SentBytesBulk = "millrace_transport_body_bytes_sent" { "class" = "bulk" },
    /// Body bytes of the latency class received.
    ReceivedBytesLatency = "millrace_transport_body_bytes_received" { "class" = "latency" },
    /// Body bytes of the normal class received.
    ReceivedBytesNormal = "millrace_transport_body_bytes_received" { "class" = "normal" },
    /// Body bytes of the bulk class received.
    ReceivedBytesBulk = "millrace_transport_body_bytes_received" { "class" = "bulk" },
    /// QUIC packets sent.
    PacketsSent = "millrace_transport_packets_sent",
    /// UDP datagrams received.
    DatagramsReceived = "millrace_transport_datagrams_received",
    /// Datagrams for no connection of ours that could not open one.
    DatagramsUnroutable = "millrace_transport_datagrams_unroutable",
    /// Datagrams that quiche refused: forged, corrupted or for a connection that is gone.
    DatagramsInvalid = "millrace_transport_datagrams_invalid",
    /// Dial requests that are not for this node, or whose MAC no member made.
    DialRequestsRefused = "millrace_transport_dial_requests_refused",
    /// First packets that were answered by a Retry.
    Retries = "millrace_transport_retries",
    /// Connections whose peer was found at another address, and validated there.
    Migrations = "millrace_transport_migrations",
    /// Padded probes, which find a path's MTU (RFC 8899).
    MtuProbes = "millrace_transport_mtu_probes",
    /// Paths that began to drop packets of the size in use.
    MtuBlackHoles = "millrace_transport_mtu_reductions" { "cause" = "black_hole" },
    /// Devices that began to refuse packets of the size in use, for each connection.
    MtuDevice = "millrace_transport_mtu_reductions" { "cause" = "device" },
    /// Connections that were dialled again because the path was another than they were tuned for.
    PathsReplaced = "millrace_transport_paths_replaced",
    /// Requests that a peer took back before they were answered.
    RequestsCancelled = "millrace_transport_requests_cancelled",
    /// Answers to requests that were no longer waited for.
    AnswersLate = "millrace_transport_answers_late",
    /// Times that frames of a peer were read later, because they came too fast.
    FramesHeld = "millrace_transport_frames_held",
    /// Streams opened by peers.
    StreamsIn = "millrace_transport_streams" { "direction" = "in" },
    /// Streams opened by us.
    StreamsOut = "millrace_transport_streams" { "direction" = "out" },
}

/// What a reason belongs to: the metric family of [`Counters::count`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    /// A connection or handshake that was refused.
    Refused,
    /// A connection that ended.
    Closed,
    /// A message of a peer that was refused; its connection may live on.
    Rejected,
    /// A message of ours that was not sent or not answered.
    Failed,
}

impl Family {
    /// Metric name, without `_total`; the label is `reason`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Refused => "millrace_transport_connections_refused",
            Self::Closed => "millrace_transport_connections_closed",
            Self::Rejected => "millrace_transport_messages_rejected",
            Self::Failed => "millrace_transport_messages_failed",
        }
    }

    /// Help text.
    pub fn help(self) -> &'static str {
        match self {
            Self::Refused => "Connections and handshakes that were refused",
            Self::Closed => "Connections that ended",
            Self::Rejected => "Messages of peers that were refused",
            Self::Failed => "Messages of ours that were not sent or not answered",
        }
    }
}

/// The counters of one shard's transport.
#[derive(Debug)]
pub struct Counters {
    values: Box<[AtomicU64]>,
    reasons: Mutex<BTreeMap<(Family, &'static str), u64>>,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            values: COUNTERS.iter().map(|_| AtomicU64::new(0)).collect(),
            reasons: Mutex::default(),
        }
    }
}

impl Counters {
    /// Adds `n`; only the owning shard writes.
    #[inline]
    pub fn add(&self, counter: Counter, n: u64) {
        let value = &self.values[counter as usize];
        value.store(value.load(Ordering::Relaxed) + n, Ordering::Relaxed);
    }

    /// The value of one counter.
    pub fn get(&self, counter: Counter) -> u64 {
        self.values[counter as usize].load(Ordering::Relaxed)
    }

    /// Counts one event with a reason.
    pub fn count(&self, family: Family, reason: &'static str) {
        let mut reasons = self
            .reasons
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        *reasons.entry((family, reason)).or_default() += 1;
    }

    /// How often `reason` was counted.
    pub fn reason(&self, family: Family, reason: &str) -> u64 {
        let reasons = self
            .reasons
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        reasons
            .iter()
            .filter(|((f, r), _)| *f == family && *r == reason)
            .map(|(_, n)| n)
            .sum()
    }

    /// Every reason counted so far.
    pub fn reasons(&self) -> Vec<(Family, &'static str, u64)> {
        let reasons = self
            .reasons
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        reasons
            .iter()
            .map(|(&(family, reason), &n)| (family, reason, n))
            .collect()
    }

    pub(crate) fn sent(&self, class: Class, body_bytes: usize) {
        let (messages, bytes) = match class {
            Class::Latency => (Counter::SentLatency, Counter::SentBytesLatency),
            Class::Normal => (Counter::SentNormal, Counter::SentBytesNormal),
            Class::Bulk => (Counter::SentBulk, Counter::SentBytesBulk),
        };
        self.add(messages, 1);
        self.add(bytes, body_bytes as u64);
    }

    pub(crate) fn received(&self, class: Class, body_bytes: usize) {
        let (messages, bytes) = match class {
            Class::Latency => (Counter::ReceivedLatency, Counter::ReceivedBytesLatency),
            Class::Normal => (Counter::ReceivedNormal, Counter::ReceivedBytesNormal),
            Class::Bulk => (Counter::ReceivedBulk, Counter::ReceivedBytesBulk),
        };
        self.add(messages, 1);
        self.add(bytes, body_bytes as u64);
    }
}
