//! quiche configured from [`TransportConfig`], and the error codes that we close connections with.

use std::fmt;

use boring::ssl::SslContextBuilder;
use millrace_protocol::frame::HelloError;
use millrace_protocol::identity::PublicKey;
use millrace_protocol::path::{PathProfile, RememberedPath, Resume, ResumeStart};
use millrace_protocol::peers::{CloseKind, CloseReason, Refusal};

use crate::config::{CongestionControl, ProfileConfig, TransportConfig};
use crate::ids::ACTIVE_IDS;
use crate::tls::{ALPN_NODE, Credentials, Members, TlsError};

/// Bytes of the longest packet number (RFC 9000, 17.1).
const PACKET_NUMBER_BYTES_MAX: usize = 4;

/// Application error code of CONNECTION_CLOSE (RFC 9000, 20.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum CloseCode {
    /// A clean end: the peer may dial again at once.
    Done = 0,
    /// A newer connection took over.
    Replaced = 1,
    /// The peer is not (or no longer) a member.
    NotAMember = 2,
    /// The peer dialled although its id is the higher one.
    WrongDirection = 3,
    /// The peer broke the protocol.
    Violation = 4,
    /// The peer did not answer probes.
    Unhealthy = 5,
    /// Too many connections.
    NoRoom = 6,
    /// No version of the protocol is common to both.
    Incompatible = 7,
    /// The peer's packets made this node hold too much.
    ExcessiveLoad = 8,
    /// Another node has the peer's key.
    DuplicateIdentity = 9,
    /// The registry names the peer, and no longer the TLS key of this connection.
    KeyRetired = 10,
    /// The peer makes work without need, or did a short while ago.
    Flood = 11,
}

impl CloseCode {
    /// What a peer hears that is refused.
    pub fn of_refusal(refusal: Refusal) -> Self {
        match refusal {
            Refusal::NotAMember => Self::NotAMember,
            Refusal::WrongDirection | Refusal::SelfConnection => Self::WrongDirection,
            Refusal::StaleAttempt => Self::Done,
            Refusal::DuplicateIdentity => Self::DuplicateIdentity,
            _ => Self::NoRoom,
        }
    }

    /// What a peer hears whose hello is refused.
    pub fn of_hello(error: &HelloError) -> Self {
        match error {
            HelloError::Incompatible { .. } => Self::Incompatible,
            _ => Self::Violation,
        }
    }

    /// What a peer hears whose connection is closed.
    pub fn of_reason(reason: CloseReason) -> Self {
        match reason {
            CloseReason::NotAMember => Self::NotAMember,
            CloseReason::Superseded | CloseReason::Drained => Self::Replaced,
            CloseReason::Unresponsive | CloseReason::HelloTimeout => Self::Unhealthy,
            _ => Self::Done,
        }
    }

    /// How a connection ended that the peer closed with `code`: the label on `/metrics`, and
    /// whether it may be dialled again at once.
    pub fn end_by_peer(code: u64) -> (&'static str, CloseKind) {
        match code {
            code if code == Self::Done as u64 => ("peer_done", CloseKind::Clean),
            code if code == Self::Replaced as u64 => ("peer_replaced", CloseKind::Clean),
            code if code == Self::DuplicateIdentity as u64 => {
                (Self::DuplicateIdentity.reason(), CloseKind::Refused)
            }
            code if code == Self::KeyRetired as u64 => ("peer_key_retired", CloseKind::Clean),
            _ => ("peer_closed", CloseKind::Refused),
        }
    }

    /// As [`Self::end_by_peer`], for a connection that this side closed.
    pub fn end_by_us(code: u64) -> (&'static str, CloseKind) {
        let reason = match code {
            code if code == Self::Done as u64 => "done",
            code if code == Self::ExcessiveLoad as u64 => Self::ExcessiveLoad.reason(),
            code if code == Self::KeyRetired as u64 => Self::KeyRetired.reason(),
            _ => "closed",
        };
        (reason, CloseKind::Clean)
    }

    /// Reason phrase on the wire and label on `/metrics`.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Replaced => "using_newer_connection",
            Self::NotAMember => "not_a_member",
            Self::WrongDirection => "wrong_direction",
            Self::Violation => "protocol_violation",
            Self::Unhealthy => "unhealthy",
            Self::NoRoom => "no_room",
            Self::Incompatible => "incompatible_version",
            Self::ExcessiveLoad => "excessive_load",
            Self::DuplicateIdentity => "duplicate_identity",
            Self::KeyRetired => "key_retired",
            Self::Flood => "flood",
        }
    }
}

/// The shortest window of quiche's BBR, packets: enough for PROBE_RTT to end. Without it the
/// initial window is the shortest (issue 2698 of quiche).
const BBR_WINDOW_MIN_PACKETS: usize = 4;

// The gains of BBR once it has started up. Its own (1.25 and 2.25 in probes, else 2.0) let it hold
// two bandwidth-delay products in flight: where the queue is shorter than one, the rest is lost.
const BBR_PROBE_UP_PACING_GAIN: f32 = 1.15;
const BBR_PROBE_UP_CWND_GAIN: f32 = 1.25;
const BBR_CWND_GAIN: f32 = 1.05;

/// QUIC settings and TLS of a shard, for the connections to come.
pub(crate) struct ShardTls {
    /// The TLS key of this node.
    pub(crate) key: PublicKey,
    pub(crate) server: QuicConfigs,
    pub(crate) client: QuicConfigs,
}

impl fmt::Debug for ShardTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShardTls")
            .field("key", &self.key)
            .finish_non_exhaustive()
    }
}

impl ShardTls {
    /// # Errors
    /// When BoringSSL refuses a setting.
    pub(crate) fn new(
        config: &TransportConfig,
        credentials: &Credentials,
        members: &Members,
    ) -> Result<Self, TlsError> {
        Ok(Self {
            key: credentials.public_key(),
            server: QuicConfigs::new(config, || credentials.server(members))?,
            client: QuicConfigs::new(config, || credentials.client())?,
        })
    }
}

/// QUIC settings of one side: quiche takes them when a connection begins, so there is one set for
/// each profile.
pub(crate) struct QuicConfigs {
    of: [quiche::Config; 2],
}

impl QuicConfigs {
    /// `builder` makes the TLS of each set.
    ///
    /// # Errors
    /// When BoringSSL refuses it.
    pub(crate) fn new(
        config: &TransportConfig,
        mut builder: impl FnMut() -> Result<SslContextBuilder, TlsError>,
    ) -> Result<Self, TlsError> {
        let mut of = |profile| quic_config(config, config.profile(profile), builder()?);
        Ok(Self {
            of: [of(PathProfile::Lan)?, of(PathProfile::Wan)?],
        })
    }

    /// The settings for a connection to a peer, of whose path this much is remembered.
    pub(crate) fn of(
        &mut self,
        profile: PathProfile,
        config: &TransportConfig,
        remembered: Option<RememberedPath>,
    ) -> &mut quiche::Config {
        let quic = &mut self.of[profile.index()];
        let profile = config.profile(profile);
        if let CongestionControl::Bbr2 { loss_threshold } = profile.congestion_control {
            let resume = remembered.map(|path| path.resume(profile.connection_window_bytes));
            // quiche counts the initial window in the largest packets that it may send.
            let packet_bytes = config.udp_payload_bytes_max as u64;
            resume_at(quic, profile, loss_threshold, resume, packet_bytes);
        }
        quic
    }
}

/// Sets where BBR begins.
fn resume_at(
    quic: &mut quiche::Config,
    config: &ProfileConfig,
    loss_threshold: f32,
    resume: Option<Resume>,
    packet_bytes: u64,
) {
    let packets = |start: ResumeStart| usize::try_from(start.window_bytes / packet_bytes);
    // A path that was slower than unknown ones may be begins as an unknown one.
    let start = resume.and_then(|resume| resume.start).filter(|start| {
        packets(*start).is_ok_and(|packets| packets > config.initial_window_packets)
    });
    let window = start.and_then(|start| packets(start).ok());
    quic.set_initial_congestion_window_packets(window.unwrap_or(config.initial_window_packets));
    quic.set_initial_rtt(resume.map_or(config.initial_rtt, |resume| resume.initial_rtt));
    quic.set_custom_bbr_params(quiche::BbrParams {
        loss_threshold: Some(loss_threshold),
        probe_bw_probe_up_pacing_gain: Some(BBR_PROBE_UP_PACING_GAIN),
        probe_bw_cwnd_gain: Some(BBR_CWND_GAIN),
        probe_bw_up_cwnd_gain: Some(BBR_PROBE_UP_CWND_GAIN),
        min_cwnd_packets: Some(BBR_WINDOW_MIN_PACKETS),
        initial_pacing_rate_bytes_per_second: start.map(|start| start.pacing_bytes_per_s),
        ..quiche::BbrParams::default()
    });
}

pub(crate) fn quic_config(
    config: &TransportConfig,
    profile: &ProfileConfig,
    builder: SslContextBuilder,
) -> Result<quiche::Config, TlsError> {
    let mut quic = quiche::Config::with_boring_ssl_ctx_builder(quiche::PROTOCOL_VERSION, builder)?;
    // Never `verify_peer` from here on: it would replace the verify mode that the builder set.
    quic.set_application_protos(&[ALPN_NODE])?;
    quic.set_max_idle_timeout(config.idle_timeout.as_millis() as u64);
    // Our buffers bound packets, and `mtu.rs` discovers what a path carries: see there. quiche
    // leaves room for the longest packet number when it takes a datagram, so a probe of the largest
    // size needs a little more.
    quic.set_max_send_udp_payload_size(config.udp_payload_bytes_max + PACKET_NUMBER_BYTES_MAX - 1);
    quic.discover_pmtu(false);
    quic.set_max_recv_udp_payload_size(65_527);
    quic.set_initial_max_data(profile.connection_window_bytes);
    quic.set_max_connection_window(profile.connection_window_bytes);
    quic.set_initial_max_stream_data_uni(profile.stream_window_bytes);
    quic.set_max_stream_window(profile.stream_window_bytes);
    quic.set_initial_max_streams_uni(config.streams_max);
    quic.set_initial_max_streams_bidi(0);
    quic.set_initial_congestion_window_packets(profile.initial_window_packets);
    quic.set_initial_rtt(profile.initial_rtt);
    quic.set_cc_algorithm(match profile.congestion_control {
        CongestionControl::Cubic => quiche::CongestionControlAlgorithm::CUBIC,
        CongestionControl::Bbr2 { .. } => quiche::CongestionControlAlgorithm::Bbr2Gcongestion,
    });
    quic.enable_dgram(true, 256, 256);
    quic.set_active_connection_id_limit(ACTIVE_IDS);
    // No peer moves by choice; `address.rs` follows a peer whose NAT rebinds.
    quic.set_disable_active_migration(true);
    quic.grease(false);
    Ok(quic)
}
