//! What the machine of `mtu.rs` needs of a connection: sends its probes, tells it what QUIC has
//! counted, and reports its decisions to the operator.
//!
//! A probe is a health probe with a body of padding, in a datagram that has a packet to itself, so
//! that the packet's size is the probe's. A lost one loses nothing else.

use std::time::{Duration, Instant};

use millrace_protocol::frame::{Class, Header, Kind, Method};
use millrace_shards::datapath::Trains;

use crate::connection::Connection;
use crate::counters::{Counter, Counters};
use crate::mtu::{Cause, Traffic};
use crate::phase::Phase;

/// Of a packet with a short header and a datagram: the first byte, the AEAD's tag, and the head of
/// the frame (RFC 9000, 17.3; RFC 9001, 5.3; RFC 9221, 4). The connection ID and the packet number
/// add theirs.
const PACKET_BYTES: usize = 1 + 16 + 3;

/// The delay of acknowledgements that a peer may announce, and does (RFC 9000, 18.2).
const ACK_DELAY_MAX: Duration = Duration::from_millis(25);

/// kGranularity (RFC 9002, 6.1.2).
const GRANULARITY: Duration = Duration::from_millis(1);

impl Connection {
    /// Sends the probes of the path's MTU that are due.
    pub(crate) fn send_mtu_probes(
        &mut self,
        trains: &mut Trains<'_>,
        counters: &Counters,
        now: Instant,
    ) {
        if self.mtu.next_probe().is_none() || self.phase != Phase::Up {
            return;
        }
        // Where the peer's new address is being validated, bytes are counted.
        if self.address.target().1 != usize::MAX {
            return;
        }
        trains.set_source(self.source);
        let timeout = self.traffic().timeout;
        let mut is_first = true;
        while let Some((number, bytes)) = self.mtu.next_probe() {
            // What waits goes first: an acknowledgement would take the probe's room, and after a
            // datagram quiche prefers a stream. Where nothing waits a PING goes first: BBR takes
            // the packets behind it for what they are, application-limited.
            let sent = self.send_packet(self.mtu.bytes(), trains, counters);
            if sent.is_none() && is_first && self.quic.ping() {
                self.send_packet(self.mtu.bytes(), trains, counters);
            }
            is_first = false;
            if self.quic.dgram_send_queue_len() > 0 || !self.queue_probe(number, bytes) {
                return;
            }
            // Alone: the kernel refuses a train as a whole.
            trains.finish();
            let sent = self.send_packet(bytes, trains, counters);
            trains.finish();
            match sent {
                Some(len) if self.quic.dgram_send_queue_len() == 0 => {
                    let short = bytes.saturating_sub(len);
                    self.packet_number_bytes =
                        self.packet_number_bytes.saturating_sub(short).max(1);
                    self.mtu.on_probe_sent(len, timeout, now);
                    counters.add(Counter::MtuProbes, 1);
                }
                // The packet number took more room than the last one did, or the congestion window
                // is full.
                _ => {
                    self.quic.drop_datagrams();
                    self.packet_number_bytes = self.packet_number_bytes % 4 + 1;
                    return;
                }
            }
        }
    }

    /// Gives quiche the datagram that makes a packet of `bytes`.
    fn queue_probe(&mut self, number: u32, bytes: usize) -> bool {
        let id_bytes = self.quic.destination_id().len();
        let overhead = PACKET_BYTES + id_bytes + self.packet_number_bytes + Header::BYTES;
        let padding = bytes.saturating_sub(overhead);
        let header = Header {
            kind: Kind::Probe,
            class: Class::Latency,
            method: Method(0),
            id: 0,
            body_bytes: u32::try_from(padding).unwrap_or(u32::MAX),
            arg: number,
        };
        let mut datagram = vec![0; Header::BYTES + padding];
        datagram[..Header::BYTES].copy_from_slice(&header.encode());
        self.quic.send_datagram(datagram)
    }

    /// Builds one packet of at most `bytes`; its length, if there was anything to send.
    fn send_packet(
        &mut self,
        bytes: usize,
        trains: &mut Trains<'_>,
        counters: &Counters,
    ) -> Option<usize> {
        let to = self.address.target().0;
        let buffer = trains.packet(bytes)?;
        // An error comes again when the rest is sent, and is dealt with there.
        let (len, _) = self.quic.send(buffer).ok()?;
        trains.push(len, to);
        if let Some(session) = &self.session {
            session.handle.out.borrow_mut().on_packet_sent(len);
        }
        counters.add(Counter::PacketsSent, 1);
        Some(len)
    }

    /// Tells the machine what QUIC has counted, and that time has passed.
    pub(crate) fn follow_mtu(&mut self, counters: &Counters, now: Instant) {
        let traffic = self.traffic();
        self.mtu.on_timeout(&traffic, now);
        self.report_mtu(counters);
    }

    /// The kernel refused a packet of `bytes` to the peer.
    pub(crate) fn on_refused(&mut self, bytes: usize, counters: &Counters, now: Instant) {
        self.mtu.on_refused(bytes, now);
        self.report_mtu(counters);
    }

    /// Counts and logs that packets became smaller, if they did. A connection says so at most once
    /// for each search, which takes a round trip and more.
    pub(crate) fn report_mtu(&mut self, counters: &Counters) {
        let Some(reduction) = self.mtu.take_reduction() else {
            return;
        };
        let (counter, why) = match reduction.cause {
            Cause::BlackHole => (Counter::MtuBlackHoles, "its path drops larger ones"),
            Cause::Device => (Counter::MtuDevice, "the device to it refuses larger ones"),
        };
        counters.add(counter, 1);
        let peer = self.session.as_ref().map(|session| session.peer());
        tracing::warn!(
            peer = peer.map(tracing::field::display),
            from_bytes = reduction.from_bytes,
            to_bytes = reduction.to_bytes,
            "packets to a peer are smaller from now on: {why}; the node tries larger ones again"
        );
    }

    fn traffic(&self) -> Traffic {
        let stats = self.quic.stats();
        let path = self.path();
        let timeout = path.as_ref().map_or(ACK_DELAY_MAX, |path| {
            path.rtt + (4 * path.rttvar).max(GRANULARITY) + ACK_DELAY_MAX
        });
        Traffic {
            sent_bytes: stats.sent_bytes,
            acked_bytes: stats.acked_bytes,
            lost_packets: stats.lost as u64,
            timeouts: path.map_or(0, |path| path.total_pto_count as u64),
            timeout,
        }
    }
}
