//! One QUIC connection of a shard: quiche, what routes to it, and what it sends when.
//!
//! What the connection carries is its [`Session`]'s, from when TLS has said who the peer is; how
//! far it has come is its [`Phase`].
//!
//! Invariant: `timer` is armed at the earliest thing this connection waits for.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use millrace_protocol::flood::Flood;
use millrace_protocol::identity::PublicKey;
use millrace_protocol::path::{PathProfile, PathSample};
use millrace_protocol::peers::{Attempt, ConnKey};
use millrace_protocol::timer::TimerId;
use millrace_shards::datapath::Trains;

use crate::address::PeerAddress;
use crate::admission::{ConnectionPermit, HandshakePermit};
use crate::carrier::Progress;
use crate::close_sender::CloseSender;
use crate::config::TransportConfig;
use crate::counters::{Counter, Counters};
use crate::ids::{IdBytes, LiveIds};
use crate::mtu::PathMtu;
use crate::pacing::Pacing;
use crate::phase::Phase;
use crate::quic::CloseCode;
use crate::quic_connection::QuicConnection;
use crate::session::{self, Session};
use crate::status::PeerStatus;

/// While a body streams in, a sixth of a stream's window is acknowledged together: three trains of
/// a window of 1 MiB.
const ACK_WINDOW_PART: u64 = 6;
/// How long that acknowledgement may wait: a hundredth of the delay that we announce
/// (`max_ack_delay`, 25 ms).
const ACK_DELAY: Duration = Duration::from_micros(250);

/// How old a connection is at least when it is replaced: its least RTT has been measured by then,
/// also on a host that was busy when the connection began.
pub(crate) const REPLACE_AFTER: Duration = Duration::from_secs(1);

/// Requests and answers leave in trains of this many packets, and a shard receives as many before
/// it sends: so both ends work at the same time. With 64 in flight, one long train each way would
/// leave each end idle while the other works.
pub(crate) const EXCHANGE_PACKETS: usize = 16;

/// How a connection's turn to send ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sent {
    /// Nothing is left to send now.
    All,
    /// The connection used its share of the turn.
    Budget,
    /// The turn's transmit slots are used up.
    NoSlot,
}

/// One connection.
pub(crate) struct Connection {
    pub(crate) quic: QuicConnection,
    /// Heap bytes that it held when packets last came for it.
    pub(crate) heap_bytes: u64,
    pub(crate) key: ConnKey,
    /// Where the peer is.
    pub(crate) address: PeerAddress,
    /// The address of this host that the peer chose, where the listen address is open; `None`: the
    /// kernel chooses.
    pub(crate) source: Option<IpAddr>,
    /// Our connection IDs.
    pub(crate) ids: LiveIds,
    /// On the listening side, until the handshake is done: the ID that the client chose for its
    /// first packets.
    pub(crate) initial: Option<Vec<u8>>,
    pub(crate) is_server: bool,
    /// The source of an inbound connection came without token and proof, and is not charged for it
    /// yet.
    pub(crate) is_uncharged: bool,
    /// A client without a proof began it, and it is not known to be a member's.
    pub(crate) is_unproven: bool,
    /// Until the handshake of an inbound connection is over.
    pub(crate) handshake_permit: Option<HandshakePermit>,
    /// From when the handshake of an inbound connection has completed.
    pub(crate) connection_permit: Option<ConnectionPermit>,
    /// The dial that this is, until its handshake is done.
    pub(crate) attempt: Option<Attempt>,
    /// Which of the connections of a pair of nodes this is.
    pub(crate) index: usize,
    /// This node's TLS key in the handshake, and from when that is done the peer's.
    pub(crate) own_key: Option<PublicKey>,
    pub(crate) peer_key: Option<PublicKey>,
    /// When it may be replaced, and how long after that again.
    pub(crate) replace_at: Instant,
    pub(crate) replace_interval: Duration,
    /// What it is tuned for.
    pub(crate) profile: PathProfile,
    /// When its packets leave, where the profile paces.
    pub(crate) pacing: Option<Pacing>,
    /// Bytes received since the last time that something was sent, and when the first of them came.
    pub(crate) unacked_bytes: usize,
    unacked_since: Option<Instant>,
    /// Datagrams received since the guard against floods was last asked about packets.
    pub(crate) unjudged_packets: usize,
    /// Connection IDs that the peer gave up since then.
    pub(crate) retired_ids: u64,
    /// What it was closed for, if its peer flooded it.
    pub(crate) flood: Option<Flood>,
    /// Something else than an acknowledgement is to be sent.
    pub(crate) must_send: bool,
    /// TLS failed, because the peer has no group for the key exchange that we take.
    pub(crate) has_no_common_group: bool,
    /// Counted among the shard's handshakes.
    pub(crate) is_handshaking: bool,
    pub(crate) phase: Phase,
    /// From when TLS has said who the peer is.
    pub(crate) session: Option<Session>,
    pub(crate) timer: Option<TimerId>,
    pub(crate) is_dirty: bool,
    /// Something came or was sent since the last housekeeping.
    pub(crate) is_touched: bool,
    /// What was published of it then.
    pub(crate) seen: Option<PeerStatus>,
    /// Sends the last packets once it closes.
    pub(crate) close_sender: CloseSender,
    /// How large packets may be.
    pub(crate) mtu: PathMtu,
    /// Bytes of the packet number in the last probe of the MTU: 1 to 4.
    pub(crate) packet_number_bytes: usize,
}

impl Connection {
    pub(crate) fn new(
        quic: QuicConnection,
        key: ConnKey,
        handshake_id: IdBytes,
        peer: SocketAddr,
        is_server: bool,
        config: &TransportConfig,
        now: Instant,
    ) -> Self {
        Self {
            heap_bytes: 0,
            quic,
            key,
            address: PeerAddress::new(peer),
            source: None,
            ids: LiveIds::new(handshake_id),
            initial: None,
            is_server,
            is_uncharged: false,
            is_unproven: false,
            handshake_permit: None,
            connection_permit: None,
            attempt: None,
            index: 0,
            own_key: None,
            peer_key: None,
            replace_at: now + REPLACE_AFTER,
            replace_interval: REPLACE_AFTER,
            profile: PathProfile::Lan,
            pacing: None,
            unacked_bytes: 0,
            unacked_since: None,
            unjudged_packets: 0,
            retired_ids: 0,
            flood: None,
            must_send: true,
            has_no_common_group: false,
            is_handshaking: true,
            phase: Phase::Handshake {
                until: now + config.connect_timeout,
            },
            session: None,
            timer: None,
            is_dirty: false,
            is_touched: true,
            seen: None,
            close_sender: CloseSender::default(),
            mtu: PathMtu::new(config.udp_payload_bytes_max, config.discover_mtu, now),
            packet_number_bytes: 1,
        }
    }

    /// The profile that its quiche was configured for.
    pub(crate) fn tuned_for(mut self, profile: PathProfile, config: &TransportConfig) -> Self {
        self.profile = profile;
        self.pacing = config.profile(profile).is_paced().then(Pacing::default);
        self
    }

    /// Closes the connection; the peer hears `code`.
    pub(crate) fn close(&mut self, code: CloseCode) {
        if self.phase == Phase::Closing {
            return;
        }
        self.phase = Phase::Closing;
        self.quic.close(code as u64, code.reason().as_bytes());
    }

    /// Whether the acknowledgements that are due may wait for more packets. They may while a body
    /// streams in, there is nothing else to send, and less than [`ACK_WINDOW_PART`] of its window
    /// came. quiche acknowledges whenever it is asked to send, and each acknowledgement costs both
    /// sides about as much as three packets of data.
    pub(crate) fn may_delay_ack(&mut self, config: &TransportConfig, now: Instant) -> bool {
        let Some(session) = &mut self.session else {
            return false;
        };
        let in_body = session.take_in_body();
        let window_bytes = config.profile(self.profile).stream_window_bytes;
        let together = window_bytes / ACK_WINDOW_PART;
        if self.phase != Phase::Up
            || self.must_send
            || !in_body
            || self.unacked_bytes as u64 >= together
            || !session.has_nothing_to_send()
        {
            return false;
        }
        let since = *self.unacked_since.get_or_insert(now);
        now < since + ACK_DELAY
    }

    /// Feeds quiche and builds packets into trains, within the turn's budget.
    pub(crate) fn transmit(
        &mut self,
        trains: &mut Trains<'_>,
        config: &TransportConfig,
        counters: &Counters,
        now: Instant,
    ) -> Sent {
        // RFC 9002, 7.7: what is but an acknowledgement is not paced.
        let is_acknowledgement = self.unacked_bytes > 0
            && self
                .session
                .as_ref()
                .is_none_or(Session::has_nothing_to_send);
        self.unacked_bytes = 0;
        self.unacked_since = None;
        self.must_send = false;
        self.begin_paced_turn(now);
        let mut more = Sent::All;
        let mut in_short_trains = false;
        let mut failed = false;
        let mut is_drained = false;
        let (to, allowed_bytes) = self.address.target();
        trains.set_source(self.source);
        let (mut packets, mut sent_bytes) = (0, 0);
        if let (Some(pacing), Some(session)) = (&mut self.pacing, &self.session)
            && self.phase != Phase::Closing
            && !session.has_nothing_to_send()
            && pacing.marks_idleness(now)
        {
            // The mark must be in a packet without data, before the data: see `pacing`.
            if self.quic.ping()
                && let Some(buffer) = trains.packet(self.mtu.bytes())
                && let Ok((len, _)) = self.quic.send(buffer)
            {
                trains.push(len, to);
                packets += 1;
                sent_bytes += len;
            }
        }
        if let Some(session) = &mut self.session
            && self.phase != Phase::Closing
        {
            let moved = session.poll_transmit(&mut self.quic);
            in_short_trains = moved.has_exchanges;
            if moved.is_stopped {
                self.close(CloseCode::Violation);
            } else if moved.progress == Progress::More {
                more = Sent::Budget;
            }
        }
        let mut out = self
            .session
            .as_ref()
            .map(|session| session.handle.out.borrow_mut());
        let more = loop {
            if packets == config.packets_per_turn {
                break Sent::Budget;
            }
            // Goes on when more has come from that address.
            if sent_bytes >= allowed_bytes {
                break Sent::All;
            }
            if let Some(pacing) = &mut self.pacing
                && self.phase != Phase::Closing
                && !(is_acknowledgement && packets == 0)
                && !pacing.may_send(release_time(&self.quic, now), now)
            {
                break more;
            }
            let Some(buffer) = trains.packet(self.mtu.bytes()) else {
                break Sent::NoSlot;
            };
            let built = if self.phase == Phase::Closing {
                self.close_sender.send(&mut self.quic, buffer)
            } else {
                self.quic.send(buffer).map(|(len, _)| len)
            };
            match built {
                Ok(len) => {
                    trains.push(len, to);
                    packets += 1;
                    sent_bytes += len;
                    if let Some(pacing) = &mut self.pacing {
                        pacing.packet_sent(len, now);
                    }
                    if let Some(out) = &mut out {
                        out.on_packet_sent(len);
                    }
                    if in_short_trains && packets % EXCHANGE_PACKETS == 0 {
                        trains.finish();
                    }
                }
                Err(quiche::Error::Done) => {
                    is_drained = more == Sent::All;
                    break more;
                }
                Err(_) => {
                    failed = true;
                    break Sent::All;
                }
            }
        };
        drop(out);
        if let (Some(pacing), Some(session)) = (&mut self.pacing, &self.session) {
            pacing.sent(is_drained && session.has_nothing_to_send());
        }
        self.address.sent(sent_bytes);
        if failed {
            self.close(CloseCode::Violation);
        }
        counters.add(Counter::PacketsSent, packets as u64);
        more
    }

    fn begin_paced_turn(&mut self, now: Instant) {
        let Some(pacing) = &mut self.pacing else {
            return;
        };
        pacing.begin_turn();
        if !pacing.is_sample_due(now) {
            return;
        }
        if let Some(sample) = self.quic.rate_sample() {
            pacing.sample(sample, now);
        }
    }

    /// The earliest thing this connection waits for.
    pub(crate) fn next_timeout(&self) -> Option<Instant> {
        let session = self.session.as_ref().and_then(Session::next_timeout);
        let acknowledge = self.unacked_since.map(|since| since + ACK_DELAY);
        [
            self.quic.timeout_instant(),
            self.phase.next_timeout(),
            session,
            acknowledge,
            self.mtu.next_timeout(),
            self.pacing.as_ref().and_then(Pacing::next_timeout),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// What the last housekeeping measured of the path.
    pub(crate) fn path_sample(&self) -> Option<PathSample> {
        let path = self.path()?;
        Some(PathSample {
            rtt: path.min_rtt?,
            bandwidth_bytes_per_s: path.max_bandwidth,
            has_filled: path.startup_exit.is_some(),
        })
    }

    /// The path that is in use; others are where the peer was before.
    pub(crate) fn path(&self) -> Option<quiche::PathStats> {
        self.quic.path_stats().find(|path| path.active)
    }

    /// How long the last bytes and their repeats may take.
    pub(crate) fn linger(&self) -> Duration {
        match &self.session {
            Some(session) => session.linger(&self.quic),
            None => session::linger(&self.quic),
        }
    }
}

/// When the next packet is to leave, if that is not now.
fn release_time(quic: &QuicConnection, now: Instant) -> Option<Instant> {
    quic.get_next_release_time()?.time(now)
}
