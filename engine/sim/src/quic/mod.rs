//! A model of one QUIC connection: what the code above sees of quiche, under a virtual clock.
//!
//! It has a handshake of one round trip, packets with numbers and acknowledgements, losses found by
//! time and by probes, streams with flow control, datagrams, an idle timeout and CONNECTION_CLOSE.
//! It has no bytes on the wire, no encryption, no congestion control, no migration and no stateless
//! reset (the product sends none). `docs/decisions/0007-quic-is-modelled.md` says why, and which
//! tests on sockets cover the rest.
//!
//! Invariants
//! 1. The model has no clock and no chance of its own: it is told the time.
//! 2. Nothing of a connection is handed over before its handshake is done on this side.
//! 3. A body's bytes are slices of the sender's chunks until they are read into the receiver's.

pub(crate) mod digest;
pub(crate) mod packet;
mod ranges;
mod receive;
mod recovery;
mod send;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use bytes::Bytes;
use millrace_protocol::peers::ConnKey;
use millrace_transport::TransportConfig;
use millrace_transport::driver::{PathStats, StreamBuffer, StreamError, StreamPath};

use packet::{Frame, Packet};
use ranges::Ranges;
use receive::{ReceiveStreams, Violation, Windows};
use recovery::Recovery;
use send::{SendLimits, SendStreams};

/// Datagrams that may wait on either side, as `quic_config` of the transport sets it.
const DATAGRAMS_MAX: usize = 256;
/// A packet is not begun for less than this.
const FRAME_BYTES_MIN: u64 = 32;

/// Why a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The peer closed it with this code.
    PeerClosed(u64),
    /// This side closed it with this code.
    Closed(u64),
    /// The peer was silent for the idle timeout.
    TimedOut,
    /// The peer broke a limit.
    Violation,
}

/// How far the handshake has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Handshake {
    /// A client that waits for the server's flight; repeats its own at the time given.
    Dialling { repeat_at: Instant },
    /// A server that waits for the client's last flight.
    Accepted,
    /// Done on this side.
    Done,
}

/// One side of a connection.
#[derive(Debug)]
pub(crate) struct Connection {
    key: ConnKey,
    /// What the peer calls it.
    remote: Option<ConnKey>,
    now: Instant,
    handshake: Handshake,
    /// When the client's first flight was sent, each time.
    initials: Vec<Instant>,
    /// The peer's first flight is to be answered, by how often it had been sent before.
    owes_accept: Option<usize>,
    /// The client's last flight is to be sent.
    owes_finish: bool,
    recovery: Recovery,
    received: Ranges,
    packets_received: usize,
    owes_ack: bool,
    owes_ping: bool,
    send: SendStreams,
    receive: ReceiveStreams,
    datagrams_out: VecDeque<Vec<u8>>,
    datagrams_in: VecDeque<Vec<u8>>,
    idle_timeout: Duration,
    idle_at: Instant,
    /// Something that asks for an acknowledgement was sent since the peer was heard.
    has_asked: bool,
    window_bytes: u64,
    packet_bytes: u64,
    close: Option<u64>,
    end: Option<End>,
}

impl Connection {
    /// A connection that this node dials.
    pub(crate) fn dial(key: ConnKey, config: &TransportConfig, now: Instant) -> Self {
        let handshake = Handshake::Dialling { repeat_at: now };
        Self::new(key, None, handshake, config, now)
    }

    /// A connection that a peer dialled, whose name for it is `remote`.
    pub(crate) fn accept(
        key: ConnKey,
        remote: ConnKey,
        config: &TransportConfig,
        now: Instant,
    ) -> Self {
        Self::new(key, Some(remote), Handshake::Accepted, config, now)
    }

    fn new(
        key: ConnKey,
        remote: Option<ConnKey>,
        handshake: Handshake,
        config: &TransportConfig,
        now: Instant,
    ) -> Self {
        let is_server = remote.is_some();
        // Both sides have the same config, and so know each other's windows.
        let limits = SendLimits {
            connection_bytes: config.lan.connection_window_bytes,
            stream_bytes: config.lan.stream_window_bytes,
            streams: config.streams_max,
        };
        let windows = Windows {
            connection_bytes: config.lan.connection_window_bytes,
            stream_bytes: config.lan.stream_window_bytes,
            streams: config.streams_max,
        };
        Self {
            key,
            remote,
            now,
            handshake,
            initials: Vec::new(),
            owes_accept: None,
            owes_finish: false,
            recovery: Recovery::new(config.lan.initial_rtt),
            received: Ranges::default(),
            packets_received: 0,
            owes_ack: false,
            owes_ping: false,
            send: SendStreams::new(is_server, limits),
            receive: ReceiveStreams::new(is_server, windows),
            datagrams_out: VecDeque::new(),
            datagrams_in: VecDeque::new(),
            idle_timeout: config.idle_timeout,
            idle_at: now + config.idle_timeout,
            has_asked: false,
            window_bytes: config.lan.connection_window_bytes,
            packet_bytes: config.udp_payload_bytes_max as u64,
            close: None,
            end: None,
        }
    }

    /// What the peer calls the connection, once that is known.
    pub(crate) fn remote(&self) -> Option<ConnKey> {
        self.remote
    }

    pub(crate) fn is_server(&self) -> bool {
        self.send.is_server()
    }

    /// Whether the handshake is done on this side.
    pub(crate) fn is_established(&self) -> bool {
        self.handshake == Handshake::Done
    }

    /// How the connection ended, if it did.
    pub(crate) fn end(&self) -> Option<End> {
        self.end
    }

    /// Ends the connection; the peer hears `code`, once.
    pub(crate) fn close(&mut self, code: u64) {
        if self.end.is_none() && self.close.is_none() {
            self.close = Some(code);
        }
    }

    // --- what arrives ---

    /// The client's first flight came, again perhaps.
    pub(crate) fn on_initial(&mut self, repeat: usize, now: Instant) {
        self.heard(now);
        self.owes_accept = Some(repeat);
    }

    /// The server's flight came, in answer to one of ours.
    pub(crate) fn on_accept(&mut self, server: ConnKey, repeat: usize, now: Instant) {
        self.heard(now);
        if matches!(self.handshake, Handshake::Dialling { .. }) {
            self.remote = Some(server);
            self.handshake = Handshake::Done;
            self.owes_finish = true;
            if let Some(sent_at) = self.initials.get(repeat) {
                self.recovery.sample(now - *sent_at);
            }
        }
    }

    /// A packet of the connection came.
    pub(crate) fn on_protected(
        &mut self,
        number: u64,
        acked: &[(u64, u64)],
        frames: Vec<Frame>,
        now: Instant,
    ) {
        let has_finish = || frames.iter().any(|frame| matches!(frame, Frame::Finish));
        // Under keys that this side does not have yet; its sender sends it again.
        if !self.is_established() && !has_finish() {
            return;
        }
        self.heard(now);
        self.owes_ack |= !frames.is_empty();
        if !self.received.insert(number) {
            return;
        }
        if self.handshake == Handshake::Accepted {
            self.handshake = Handshake::Done;
        }
        let send = &mut self.send;
        self.recovery
            .on_acked(acked, now, &mut |frame| match frame {
                Frame::Stream { id, .. } | Frame::ResetStream { id, .. } => send.on_acked(id),
                _ => {}
            });
        for frame in frames {
            if let Err(Violation) = self.on_frame(frame) {
                self.end = Some(End::Violation);
            }
        }
    }

    fn on_frame(&mut self, frame: Frame) -> Result<(), Violation> {
        match frame {
            Frame::Finish | Frame::Ping => {}
            Frame::Stream {
                id,
                offset,
                bytes,
                fin,
            } => return self.receive.on_stream(id, offset, bytes, fin),
            Frame::ResetStream { id, final_bytes } => {
                return self.receive.on_reset(id, final_bytes);
            }
            Frame::MaxData(max) => self.send.on_max_data(max),
            Frame::MaxStreamData { id, max } => self.send.on_max_stream_data(id, max),
            Frame::MaxStreams(max) => self.send.on_max_streams(max),
            Frame::Datagram(datagram) => {
                // A reader that does not keep up loses the newest, as with quiche.
                if self.datagrams_in.len() < DATAGRAMS_MAX {
                    self.datagrams_in.push_back(datagram);
                }
            }
        }
        Ok(())
    }

    /// CONNECTION_CLOSE came.
    pub(crate) fn on_close(&mut self, code: u64) {
        self.end.get_or_insert(End::PeerClosed(code));
    }

    fn heard(&mut self, now: Instant) {
        self.now = now;
        self.packets_received += 1;
        self.has_asked = false;
        self.restart_idle_timer();
    }

    /// RFC 9000, 10.1: three probe timeouts at least.
    fn restart_idle_timer(&mut self) {
        let timeout = self.idle_timeout.max(self.recovery.probe_timeout() * 3);
        self.idle_at = self.now + timeout;
    }

    // --- time ---

    /// When [`Self::on_timeout`] is due.
    pub(crate) fn next_timeout(&self) -> Option<Instant> {
        if self.end.is_some() {
            return None;
        }
        let handshake = match self.handshake {
            Handshake::Dialling { repeat_at } => Some(repeat_at),
            Handshake::Accepted | Handshake::Done => None,
        };
        let waits = [Some(self.idle_at), handshake, self.recovery.next_timeout()];
        waits.into_iter().flatten().min()
    }

    /// Does what is due.
    pub(crate) fn on_timeout(&mut self, now: Instant) {
        self.now = now;
        if self.end.is_none() && self.idle_at <= now {
            self.end = Some(End::TimedOut);
        }
        let mut lost = Vec::new();
        // What it repeats may be gone: a probe asks for an acknowledgement all the same.
        self.owes_ping |= self.recovery.on_timeout(now, &mut |frame| lost.push(frame));
        for frame in lost {
            match frame {
                Frame::Finish => self.owes_finish = true,
                Frame::Stream { .. } | Frame::ResetStream { .. } => self.send.on_lost(frame),
                Frame::MaxData(_) | Frame::MaxStreams(_) | Frame::MaxStreamData { .. } => {
                    self.receive.on_lost(&frame);
                }
                // Datagrams are not sent again.
                Frame::Ping | Frame::Datagram(_) => {}
            }
        }
    }

    // --- what leaves ---

    /// The next packet. `may_fill` says whether the link has room for more than an answer.
    pub(crate) fn poll_transmit(&mut self, now: Instant, may_fill: bool) -> Option<Packet> {
        self.now = now;
        if self.end.is_some() {
            return None;
        }
        if let Some(code) = self.close {
            self.end = Some(End::Closed(code));
            return self.remote.map(|to| Packet::Close { to, code });
        }
        if let Handshake::Dialling { repeat_at } = self.handshake {
            return self.poll_initial(repeat_at);
        }
        let to = self.remote?;
        if let Some(repeat) = self.owes_accept.take() {
            return Some(Packet::Accept {
                client: to,
                server: self.key,
                repeat,
            });
        }
        if !self.is_established() {
            return None;
        }
        let frames = self.gather(may_fill);
        let owes_ack = std::mem::take(&mut self.owes_ack);
        if frames.is_empty() && !owes_ack {
            return None;
        }
        let acked = self.received.named();
        let bytes = frames.iter().map(Frame::wire_bytes).sum();
        let number = self.recovery.on_sent(&frames, bytes, now);
        if !frames.is_empty() && !std::mem::replace(&mut self.has_asked, true) {
            self.restart_idle_timer();
        }
        Some(Packet::Protected {
            to,
            number,
            acked,
            frames,
        })
    }

    /// The client's first flight, repeated after one, three, seven ... probe timeouts.
    fn poll_initial(&mut self, repeat_at: Instant) -> Option<Packet> {
        if repeat_at > self.now {
            return None;
        }
        let repeat = self.initials.len();
        let doubled = self.recovery.initial_probe_timeout() * (1 << repeat.min(16));
        self.initials.push(self.now);
        self.handshake = Handshake::Dialling {
            repeat_at: self.now + doubled,
        };
        let client = self.key;
        Some(Packet::Initial { client, repeat })
    }

    /// The frames of the next packet.
    fn gather(&mut self, may_fill: bool) -> Vec<Frame> {
        let mut frames = Vec::new();
        let mut left = self.packet_bytes;
        let mut add = |frame: Frame, left: &mut u64| {
            *left = left.saturating_sub(frame.wire_bytes());
            frames.push(frame);
        };
        if std::mem::take(&mut self.owes_finish) {
            add(Frame::Finish, &mut left);
        }
        while left >= FRAME_BYTES_MIN
            && let Some(frame) = self.receive.next_frame()
        {
            add(frame, &mut left);
        }
        while may_fill
            && self
                .datagrams_out
                .front()
                .is_some_and(|datagram| 3 + datagram.len() as u64 <= left)
            && let Some(datagram) = self.datagrams_out.pop_front()
        {
            add(Frame::Datagram(datagram), &mut left);
        }
        while may_fill
            && left >= FRAME_BYTES_MIN
            && let Some(frame) = self.send.next_frame(left)
        {
            add(frame, &mut left);
        }
        let owes_ping = std::mem::take(&mut self.owes_ping);
        if owes_ping && frames.is_empty() {
            frames.push(Frame::Ping);
        }
        frames
    }

    /// Whether something waits for room on the link.
    pub(crate) fn wants_to_send(&self) -> bool {
        self.end.is_none()
            && self.is_established()
            && (self.send.wants_to_send() || !self.datagrams_out.is_empty())
    }

    /// Bytes that the connection takes now besides the peer's limits: a window, in flight or not
    /// yet.
    fn room_bytes(&self) -> u64 {
        let held = self.send.unsent() + self.recovery.bytes_in_flight();
        self.window_bytes.saturating_sub(held)
    }

    fn is_closing(&self) -> bool {
        self.close.is_some() || self.end.is_some()
    }
}

impl StreamPath for Connection {
    fn stream_priority(&mut self, stream: u64, urgency: u8) -> Result<(), StreamError> {
        self.send.set_urgency(stream, urgency)
    }

    fn stream_send(&mut self, stream: u64, bytes: &[u8], fin: bool) -> Result<usize, StreamError> {
        let buffer = StreamBuffer::small(Bytes::copy_from_slice(bytes));
        self.stream_send_buffer(stream, buffer, fin)
    }

    fn stream_send_buffer(
        &mut self,
        stream: u64,
        buffer: StreamBuffer,
        fin: bool,
    ) -> Result<usize, StreamError> {
        if self.is_closing() {
            return Err(StreamError::Ended);
        }
        self.send.push(stream, buffer, fin, self.room_bytes())
    }

    fn stream_capacity(&mut self, stream: u64) -> Result<usize, StreamError> {
        if self.is_closing() {
            return Err(StreamError::Ended);
        }
        self.send.capacity(stream, self.room_bytes())
    }

    fn stream_reset(&mut self, stream: u64, _code: u64) {
        // No node looks at the code.
        self.send.reset(stream);
    }

    fn stream_recv(&mut self, stream: u64, out: &mut [u8]) -> Result<(usize, bool), StreamError> {
        let mut filled = 0;
        let len = out.len();
        self.receive.read(stream, len, |bytes| {
            out[filled..filled + bytes.len()].copy_from_slice(bytes);
            filled += bytes.len();
        })
    }

    fn stream_discard(&mut self, stream: u64, len: usize) -> Result<(usize, bool), StreamError> {
        self.receive.read(stream, len, |_| {})
    }

    fn stream_readable_next(&mut self) -> Option<u64> {
        self.receive.next_readable()
    }

    fn stream_writable_next(&mut self) -> Option<u64> {
        // Asked for streams that the peer stopped; no node ever sends STOP_SENDING.
        None
    }

    fn streams_left(&self) -> u64 {
        self.send.left()
    }

    fn datagram_send(&mut self, datagram: Vec<u8>) {
        if self.datagrams_out.len() < DATAGRAMS_MAX {
            self.datagrams_out.push_back(datagram);
        }
    }

    fn datagram_recv(&mut self) -> Option<Vec<u8>> {
        self.datagrams_in.pop_front()
    }

    fn send_ping(&mut self) -> bool {
        self.owes_ping |= !self.is_closing();
        !self.is_closing()
    }

    fn stats(&self) -> PathStats {
        PathStats {
            sent: self.recovery.sent,
            received: self.packets_received,
            lost: self.recovery.lost,
            rtt: self.recovery.rtt(),
        }
    }
}
