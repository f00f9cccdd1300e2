//! The settings of connections that an operator may change. The figures in `docs/` were measured
//! with the defaults.
//!
//! Every bound of this crate is here: the memory that a peer may make this node hold, the time that
//! it may take, the messages that may wait to be sent.

use std::time::Duration;

use millrace_protocol::body_deadline::BodyDeadlineConfig;
use millrace_protocol::budget::BudgetConfig;
use millrace_protocol::flood::{FloodConfig, FloodRates, FloodRoom};
use millrace_protocol::frame::{Class, Header, Limits};
use millrace_protocol::path::{PathConfig, PathProfile};
use millrace_protocol::peers::CONNECTIONS_PER_PEER_MAX;
use millrace_protocol::rpc::RpcLimits;

/// Connections of a shard that its peers leave to clients without a proof. A member has none while
/// its clock is off, or while a NAT changes its address.
pub const UNPROVEN_ROOM: usize = 16;

/// Congestion control of a connection.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum CongestionControl {
    /// RFC 9438, unpaced: for a LAN, where windows bound what is in flight.
    Cubic,
    /// BBRv2, paced by its release times: for a long path.
    Bbr2 {
        /// The part of a round's bytes that may be lost before BBR takes the path for full: above
        /// the loss that the path has anyway.
        loss_threshold: f32,
    },
}

/// What quiche takes when a connection begins, and does not change after: one of these for each
/// [`PathProfile`].
#[derive(Clone, Debug)]
pub struct ProfileConfig {
    /// Congestion control.
    pub congestion_control: CongestionControl,
    /// Initial congestion window, packets; a long path that is known to carry more gets more.
    pub initial_window_packets: usize,
    /// RTT assumed before the first sample. BBR takes it for a sample: it must not be less than the
    /// path's.
    pub initial_rtt: Duration,
    /// Flow-control window of a connection, bytes: what a peer may have in flight to us, unread.
    pub connection_window_bytes: u64,
    /// Flow-control window of one stream, bytes. On a LAN bytes in flight delay those that follow:
    /// 1 MiB takes 0.6 ms at 14 Gbit/s; jumbo frames want at least 4 MiB. On a long path it bounds
    /// the rate of a body: window divided by RTT.
    pub stream_window_bytes: u64,
}

impl ProfileConfig {
    /// Whether packets leave at release times.
    pub fn is_paced(&self) -> bool {
        matches!(self.congestion_control, CongestionControl::Bbr2 { .. })
    }

    /// For a LAN.
    pub fn lan() -> Self {
        Self {
            congestion_control: CongestionControl::Cubic,
            initial_window_packets: 128,
            initial_rtt: Duration::from_millis(2),
            connection_window_bytes: 4 << 20,
            stream_window_bytes: 1 << 20,
        }
    }

    /// For a long path.
    pub fn wan() -> Self {
        Self {
            congestion_control: CongestionControl::Bbr2 {
                loss_threshold: 0.05,
            },
            initial_window_packets: 512,
            initial_rtt: Duration::from_secs(1),
            connection_window_bytes: 32 << 20,
            stream_window_bytes: 16 << 20,
        }
    }
}

/// One value for each traffic class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PerClass<T> {
    /// Votes, probes, acknowledgements: never waits behind the others.
    pub latency: T,
    /// Ordinary requests.
    pub normal: T,
    /// Bodies that may take their time.
    pub bulk: T,
}

impl<T: Copy> PerClass<T> {
    /// The value of `class`.
    pub fn of(&self, class: Class) -> T {
        match class {
            Class::Latency => self.latency,
            Class::Normal => self.normal,
            Class::Bulk => self.bulk,
        }
    }
}

impl PerClass<u32> {
    pub(crate) fn rpc_limits(self) -> RpcLimits {
        RpcLimits {
            in_flight_max: [self.latency, self.normal, self.bulk],
        }
    }
}

/// Bytes of bodies up to [`INLINE_BYTES_MAX`], on streams of their own, that one peer may have
/// arriving at a shard besides its share of the receive budget: 16 of the longest. They are given
/// back right after their handler, so kept bodies that fill the share never stop them.
///
/// [`INLINE_BYTES_MAX`]: crate::INLINE_BYTES_MAX
pub(crate) const PEER_INLINE_BYTES_MAX: u64 = 1 << 20;

/// Tables, timers, TLS and the buffers of lanes of a connection that is up and idle. An allowance.
const CONNECTION_BYTES: u64 = 512 << 10;

/// Limits, windows and times of the transport. See each field.
#[derive(Clone, Debug)]
pub struct TransportConfig {
    /// Largest UDP payload sent, bytes (1,200..=16,383). 1,452 fits an Ethernet MTU of 1,500 with
    /// IPv6.
    pub udp_payload_bytes_max: usize,
    /// Whether the path's MTU is discovered (RFC 8899), from 1,200 up to `udp_payload_bytes_max`;
    /// otherwise the latter is taken as given.
    pub discover_mtu: bool,
    /// A PING is sent when a connection was silent this long.
    pub keep_alive: Duration,
    /// A connection that was silent this long is lost (RFC 9000, 10.1).
    pub idle_timeout: Duration,
    /// A handshake and the peer's hello must be done in this time, on both sides.
    pub connect_timeout: Duration,
    /// First delay before dialling a failed peer again; doubles with jitter up to
    /// `redial_delay_max`.
    pub redial_delay_min: Duration,
    /// Longest delay between dials.
    pub redial_delay_max: Duration,
    /// How long a replaced or stopping connection may finish what it carries.
    pub drain_timeout: Duration,
    /// Connections to each peer, spread over the shards (1..=8).
    pub connections_per_peer: u8,
    /// Which connections get which profile.
    pub paths: PathConfig,
    /// The profile of short paths.
    pub lan: ProfileConfig,
    /// The profile of long and of unknown paths.
    pub wan: ProfileConfig,
    /// Unidirectional streams that a peer may have open to us.
    pub streams_max: u64,
    /// Lanes (long-lived streams of small frames) for the normal class.
    pub lanes: u8,
    /// Bytes that may wait to be sent to a peer on lanes, for each class; small frames of the bulk
    /// class share the normal lanes. Refusals and cancellations take more: 16 bytes for each
    /// request that may be in flight.
    pub lane_queue_bytes: PerClass<usize>,
    /// Messages with a stream of their own that may wait or be in flight to a peer, for each class.
    pub stream_queue_messages: PerClass<usize>,
    /// Bytes of answers to a peer that may wait to be sent on streams of their own, on a
    /// connection: the next one is refused with `Busy`, and one that is longer with `TooLarge`.
    /// Answers in chunks lie in the pool, and have a bound of their own
    /// ([`Self::unread_answers_bytes`]).
    pub answer_queue_bytes: u64,
    /// Bytes that may wait to be sent on all connections of the shard together: on lanes, and
    /// answers outside the pool. Who holds some gets more only while it holds no more than stays
    /// free.
    pub queue_bytes_max: u64,
    /// Message streams of one class that are fed at the same time.
    pub streams_active_max: usize,
    /// Requests of ours in flight to a peer, for each class.
    pub requests_out_max: PerClass<u32>,
    /// Requests of a peer in flight at us, for each class.
    pub requests_in_max: PerClass<u32>,
    /// Body bytes that one peer may make this shard hold at a time, arriving or kept; beside them
    /// is 1 MiB for small bodies (`PEER_INLINE_BYTES_MAX`). Counted apart from them, the bodies of
    /// answers that no peer has read may take as many bytes.
    pub receive_budget_peer_bytes: u64,
    /// Bytes of bodies up to 64 KiB that all peers together may make this shard hold beside the
    /// chunk pool; further ones lie in the pool.
    pub inline_bytes_max: u64,
    /// Body bytes that all peers together may make this shard hold; at most its chunk pool. One
    /// peer alone reaches half of it.
    pub receive_budget_bytes: u64,
    /// A message stream must bring this much in each `stream_progress_interval`, or be done.
    pub stream_progress_bytes: u64,
    /// How often a message stream's progress is judged; 20 round trips where that is longer, up to
    /// a minute.
    pub stream_progress_interval: Duration,
    /// How long a request with [`Deadline::Progress`](crate::Deadline::Progress) waits for its turn
    /// or its answer while nothing comes forward: also what a peer has to store a body.
    pub body_patience: Duration,
    /// The least rate that is expected of bodies, bytes in a second: what a peer is told of such a
    /// request's deadline follows from it, and how long a replaced connection may go on.
    pub body_bytes_per_second_min: u64,
    /// Sizes of frames and bodies.
    pub limits: Limits,
    /// Interval of health probes.
    pub probe_interval: Duration,
    /// Probes lost in a row before a connection is given up, if nothing else arrives meanwhile.
    pub probe_failures_max: u32,
    /// Probes that the shard sends in a second to all its peers together: with more peers each is
    /// probed, and kept alive, less often, down to four times in [`Self::idle_timeout`].
    pub probes_per_second_max: u32,
    /// Dials under way, but for those that have taken two seconds.
    pub dials_max: usize,
    /// Connections that one shard holds, handshakes included. What its peers need of them
    /// ([`Self::connections_min`]) is kept for peers.
    pub connections_max: usize,
    /// Of them, connections that others began and whose handshake is not finished.
    pub handshakes_max: usize,
    /// Heap bytes that QUIC may hold for all connections of a shard: what came and cannot be read
    /// yet, and its own state. Above it, the connection that holds most is closed; and each above
    /// twice its window and 1 MiB. It counts only where the program's allocator is a
    /// [`CountingAllocator`](millrace_shards::CountingAllocator).
    pub quic_heap_bytes_max: u64,
    /// Packets that one connection may send in a turn; four trains of 45.
    pub packets_per_turn: usize,
    /// Frames of a peer that a connection takes in a second. Above it they are read later; a
    /// connection that stays above it is closed.
    pub frames_per_second_max: u64,
    /// What else a peer may make a connection do, where it is of no use to either side.
    pub flood_rates: FloodRates,
}

impl Default for TransportConfig {
    fn default() -> Self {
        Self {
            udp_payload_bytes_max: 1_452,
            discover_mtu: true,
            keep_alive: Duration::from_secs(1),
            idle_timeout: Duration::from_secs(15),
            connect_timeout: Duration::from_secs(20),
            redial_delay_min: Duration::from_millis(50),
            redial_delay_max: Duration::from_secs(10),
            drain_timeout: Duration::from_secs(2),
            connections_per_peer: 1,
            paths: PathConfig::default(),
            lan: ProfileConfig::lan(),
            wan: ProfileConfig::wan(),
            streams_max: 1_024,
            lanes: 4,
            lane_queue_bytes: PerClass {
                latency: 1 << 20,
                normal: 4 << 20,
                bulk: 4 << 20,
            },
            stream_queue_messages: PerClass {
                latency: 1_024,
                normal: 1_024,
                bulk: 256,
            },
            answer_queue_bytes: 8 << 20,
            queue_bytes_max: 128 << 20,
            inline_bytes_max: 32 << 20,
            streams_active_max: 8,
            requests_out_max: PerClass {
                latency: 4_096,
                normal: 4_096,
                bulk: 256,
            },
            requests_in_max: PerClass {
                latency: 4_096,
                normal: 4_096,
                bulk: 256,
            },
            receive_budget_peer_bytes: 256 << 20,
            receive_budget_bytes: 512 << 20,
            stream_progress_bytes: 64 << 10,
            stream_progress_interval: Duration::from_secs(5),
            body_patience: Duration::from_secs(30),
            body_bytes_per_second_min: 125_000,
            limits: Limits::default(),
            probe_interval: Duration::from_secs(1),
            probe_failures_max: 10,
            connections_max: 4_096,
            probes_per_second_max: 64,
            dials_max: 32,
            handshakes_max: 1_024,
            quic_heap_bytes_max: 512 << 20,
            packets_per_turn: 180,
            frames_per_second_max: 4_000_000,
            flood_rates: FloodRates::default(),
        }
    }
}

impl TransportConfig {
    /// How often a connection is probed, or kept alive, that would be every `interval`, where a
    /// shard has so many `peers`: often enough for [`Self::idle_timeout`] in any case.
    pub(crate) fn idle_interval(&self, interval: Duration, peers: usize) -> Duration {
        let peers = u32::try_from(peers).unwrap_or(u32::MAX);
        let shared = Duration::from_secs(1) * peers / self.probes_per_second_max.max(1);
        interval.max(shared.min(self.idle_timeout / 4))
    }

    /// The settings of a profile.
    pub fn profile(&self, profile: PathProfile) -> &ProfileConfig {
        match profile {
            PathProfile::Lan => &self.lan,
            PathProfile::Wan => &self.wan,
        }
    }

    /// Connections of each pair of nodes, where this one has so many shards.
    pub fn pair_connections(&self, shards: usize) -> u8 {
        let max = shards.clamp(1, 8) as u8;
        self.connections_per_peer.clamp(1, max)
    }

    /// Peers that one of so many shards keeps connections to, by the machine of one index. Members
    /// beyond it are left out.
    pub fn peers_max(&self, shards: usize) -> usize {
        let pairs = usize::from(self.pair_connections(shards));
        self.connections_max.saturating_sub(UNPROVEN_ROOM) / (pairs * CONNECTIONS_PER_PEER_MAX)
    }

    /// What `connections_max` must be for so many peers on one of so many shards: each may have a
    /// connection, one that is to replace it, and one that drains.
    pub fn connections_min(&self, peers: usize, shards: usize) -> usize {
        let pairs = usize::from(self.pair_connections(shards));
        peers * pairs * CONNECTIONS_PER_PEER_MAX + UNPROVEN_ROOM
    }

    /// Bytes that lanes of class latency and of class normal take beyond their bound: the frame
    /// that goes over it, and for refusals and cancellations alone a header for each request that
    /// may be in flight, in either direction. So a full queue never keeps a refusal from the peer
    /// that waits.
    pub(crate) fn lane_headroom_bytes(&self) -> [usize; 2] {
        let (out, inward) = (&self.requests_out_max, &self.requests_in_max);
        let latency = out.latency.saturating_add(inward.latency);
        let rest = [out.normal, out.bulk, inward.normal, inward.bulk];
        let rest = rest.into_iter().fold(0, u32::saturating_add);
        let frame = Header::BYTES + self.limits.lane_body_bytes_max as usize;
        [latency, rest].map(|requests| frame + requests as usize * Header::BYTES)
    }

    /// Times and rates of requests with bodies.
    pub(crate) fn body_deadline(&self) -> BodyDeadlineConfig {
        BodyDeadlineConfig {
            patience: self.body_patience,
            bytes_per_second_min: self.body_bytes_per_second_min,
            progress_bytes: self.stream_progress_bytes,
        }
    }

    /// What a peer may make a connection do before it counts as a flood.
    pub(crate) fn floods(&self) -> FloodConfig {
        let windows = [&self.lan, &self.wan].map(|profile| profile.connection_window_bytes);
        let room = FloodRoom {
            frames_per_second: self.frames_per_second_max,
            requests: self.cancellations_max() as u64,
            streams: self.streams_max,
            window_bytes: windows[0].max(windows[1]),
        };
        FloodConfig::new(&self.flood_rates, &room)
    }

    /// Sizes of the receive budget of a shard.
    pub fn receive_budget(&self) -> BudgetConfig {
        BudgetConfig {
            total_bytes: self.receive_budget_bytes,
            peer_bytes_max: self.receive_budget_peer_bytes,
            peer_inline_bytes_max: PEER_INLINE_BYTES_MAX,
            inline_bytes_max: self.inline_bytes_max,
        }
    }

    /// What the bodies of unread answers of a shard may take of its chunk pool: as much as the
    /// bodies that one peer may send. So the bodies of all peers have at least half of the receive
    /// budget, whatever is not read.
    pub fn unread_answers_bytes(&self) -> u64 {
        let half = self.receive_budget_bytes / 2;
        self.receive_budget_peer_bytes.min(half)
    }

    /// The longest answer in memory of its own. One on a lane counts against the bound of lanes.
    pub(crate) fn plain_answer_bytes_max(&self) -> u32 {
        let limits = &self.limits;
        let queue = u32::try_from(self.answer_queue_bytes).unwrap_or(u32::MAX);
        queue
            .max(limits.lane_body_bytes_max)
            .min(limits.body_bytes_max)
    }

    /// Cancellations of a peer that are taken up at a time: one for each request that it may have
    /// in flight here. More come at once only from a path that stalled for longer than the
    /// requests' deadlines, or from a peer without manners. They are dropped, not a reason to
    /// close: what is lost with one is the work that it would have saved.
    pub(crate) fn cancellations_max(&self) -> usize {
        let max = &self.requests_in_max;
        let all = [max.latency, max.normal, max.bulk].map(|max| max as usize);
        all.into_iter().fold(0, usize::saturating_add)
    }

    /// What one connection may make this node hold besides chunks, `quic_heap_bytes_max`,
    /// `queue_bytes_max` and `inline_bytes_max`, bytes: refusals and cancellations that wait, and
    /// what the connection itself takes.
    pub fn connection_budget_bytes(&self) -> u64 {
        let headroom: usize = self.lane_headroom_bytes().into_iter().sum();
        headroom as u64 + CONNECTION_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Protects an idle node with many peers, and its connections from their idle timeout.
    #[test]
    fn many_peers_are_probed_less_often_but_often_enough() {
        let config = TransportConfig {
            probes_per_second_max: 10,
            idle_timeout: Duration::from_secs(20),
            ..TransportConfig::default()
        };
        let cases = [
            (0, 1_000),
            (10, 1_000),
            (25, 2_500),
            (50, 5_000),
            (1_000, 5_000),
        ];
        for (peers, interval_ms) in cases {
            let interval = config.idle_interval(Duration::from_secs(1), peers);
            assert_eq!(interval, Duration::from_millis(interval_ms), "{peers}");
        }
        // An operator's longer interval stands.
        let interval = config.idle_interval(Duration::from_secs(30), 1_000);
        assert_eq!(interval, Duration::from_secs(30));
    }
}
