//! What waits to be sent on one connection: frames on lanes, messages with streams of their own, datagrams.
//!
//! A lane is a long-lived unidirectional stream on which frames follow each other, so that many small messages share a packet. Messages of one
//! turn go to one lane, the next turn's to the next: packets are full, and a lost packet holds up one lane out of `lanes` only. While the path
//! loses packets, normal messages take streams of their own instead ([`Outbox::set_lossy`]).
//!
//! Invariants
//! 1. `queued[class]` is the number of bytes in `pending` and `blocked` of that class's lanes, and never exceeds its bound plus one frame.
//! 2. A frame is never torn: a lane's bytes are offered to quiche in order until all are taken.

use bytes::Bytes;
use millrace_protocol::frame::{Class, Header, Kind, StreamKind};

use crate::buffers::{QuicConnection, TxBuffer};
use crate::carrier::{Carrier, Outgoing, Pumped, QueueFull};
use crate::config::{PerClass, TransportConfig};
use crate::message::Payload;
use crate::streams::StreamCarrier;

const LATENCY_URGENCY: u8 = 0;
const NORMAL_URGENCY: u8 = 64;

#[derive(Debug)]
struct Lane {
    stream: u64,
    urgency: u8,
    class: Class,
    opened: bool,
    /// Frames not yet offered to quiche.
    pending: Vec<u8>,
    /// Bytes that quiche had no capacity for.
    blocked: Option<Bytes>,
}

impl Lane {
    fn new(stream: u64, class: Class) -> Self {
        let urgency = if class == Class::Latency { LATENCY_URGENCY } else { NORMAL_URGENCY };
        Self { stream, urgency, class, opened: false, pending: Vec::new(), blocked: None }
    }

    /// Offers what waits; returns the bytes taken.
    fn flush(&mut self, path: &mut QuicConnection) -> usize {
        if self.blocked.is_none() && self.pending.is_empty() {
            return 0;
        }
        if !self.opened {
            if path.stream_priority(self.stream, self.urgency, false).is_err() {
                return 0;
            }
            if path.stream_send(self.stream, &[StreamKind::Lane.encode()], false) != Ok(1) {
                return 0;
            }
            self.opened = true;
        }
        let mut flushed = 0;
        loop {
            let buffer = match self.blocked.take() {
                Some(blocked) => blocked,
                None if self.pending.is_empty() => return flushed,
                None => {
                    let capacity = self.pending.capacity().min(16 << 10);
                    Bytes::from(std::mem::replace(&mut self.pending, Vec::with_capacity(capacity)))
                }
            };
            // quiche drops the buffer with an error: keep a reference.
            match path.stream_send_zc(self.stream, TxBuffer::Small(buffer.clone()), false) {
                Ok((taken, _)) => {
                    flushed += taken;
                    if taken < buffer.len() {
                        self.blocked = Some(buffer.slice(taken..));
                        return flushed;
                    }
                }
                Err(_) => {
                    self.blocked = Some(buffer);
                    return flushed;
                }
            }
        }
    }
}

/// The outgoing side of a connection.
#[derive(Debug)]
pub(crate) struct Outbox {
    lanes: Vec<Lane>,
    /// The normal lane of this turn, an index from 1.
    turn_lane: usize,
    queued: [usize; 2],
    queue_max: PerClass<usize>,
    lane_body_max: usize,
    lossy: bool,
    streams: StreamCarrier,
    datagrams: Vec<Vec<u8>>,
    withdrawals: Vec<Header>,
}

impl Outbox {
    /// `is_server`: which side of the connection we are; it decides our stream ids (RFC 9000, 2.1).
    pub(crate) fn new(config: &TransportConfig, is_server: bool) -> Self {
        let first = if is_server { 3 } else { 2 };
        let mut lanes = vec![Lane::new(first, Class::Latency)];
        lanes.extend((1..=u64::from(config.lanes.max(1))).map(|i| Lane::new(first + 4 * i, Class::Normal)));
        let first_message = first + 4 * lanes.len() as u64;
        Self {
            lanes,
            turn_lane: 1,
            queued: [0; 2],
            queue_max: config.lane_queue_bytes,
            lane_body_max: config.limits.lane_body_bytes_max as usize,
            lossy: false,
            streams: StreamCarrier::new(first_message, config.stream_queue_messages, config.streams_active_max),
            datagrams: Vec::new(),
            withdrawals: Vec::new(),
        }
    }

    /// Whether the path lost packets lately.
    pub(crate) fn set_lossy(&mut self, lossy: bool) {
        self.lossy = lossy;
    }

    /// Queues a message on a lane, or on a stream of its own when its body is large.
    pub(crate) fn push(&mut self, header: Header, body: Payload) -> Result<(), QueueFull> {
        let alone = self.lossy && header.class == Class::Normal && matches!(header.kind, Kind::Request | Kind::Response);
        match body.as_slice() {
            Some(slice) if slice.len() <= self.lane_body_max && !alone => self.push_frame(header, slice),
            _ => self.streams.offer(Outgoing { header, body }),
        }
    }

    /// Queues a frame on a lane.
    pub(crate) fn push_frame(&mut self, header: Header, body: &[u8]) -> Result<(), QueueFull> {
        // Small frames of the bulk class share the normal lanes, and their bound.
        let lane = if header.class == Class::Latency { 0 } else { self.turn_lane };
        let lane = &mut self.lanes[lane];
        let queued = &mut self.queued[lane.class as usize];
        if *queued >= self.queue_max.of(lane.class) {
            return Err(QueueFull);
        }
        *queued += Header::BYTES + body.len();
        lane.pending.extend_from_slice(&header.encode());
        lane.pending.extend_from_slice(body);
        Ok(())
    }

    /// Queues a QUIC datagram (RFC 9221); the newest win when too many wait.
    pub(crate) fn push_datagram(&mut self, header: Header, body: &[u8]) {
        const WAITING_MAX: usize = 256;
        if self.datagrams.len() == WAITING_MAX {
            self.datagrams.remove(0);
        }
        let mut datagram = Vec::with_capacity(Header::BYTES + body.len());
        datagram.extend_from_slice(&header.encode());
        datagram.extend_from_slice(body);
        self.datagrams.push(datagram);
    }

    /// Takes a message back at the next feed if it has not left whole; says so to the peer otherwise.
    pub(crate) fn withdraw(&mut self, header: Header) {
        self.withdrawals.push(header);
    }

    /// Moves what waits into quiche.
    pub(crate) fn feed(&mut self, path: &mut QuicConnection) -> Pumped {
        for header in std::mem::take(&mut self.withdrawals) {
            if !self.streams.withdraw(Some(path), &header) && header.kind == Kind::Request {
                let cancel = Header { kind: Kind::Cancel, body_bytes: 0, arg: 0, ..header };
                // A full queue loses the cancellation: the answer is then dropped as late.
                self.push_frame(cancel, &[]).ok();
            }
        }
        for datagram in self.datagrams.drain(..) {
            // Its sender repeats it until acknowledged.
            path.dgram_send_buf(datagram).ok();
        }
        for lane in &mut self.lanes {
            let taken = lane.flush(path);
            let queued = &mut self.queued[lane.class as usize];
            *queued = queued.saturating_sub(taken);
        }
        self.turn_lane = self.turn_lane % (self.lanes.len() - 1) + 1;
        self.streams.pump(path)
    }

    pub(crate) fn take_streams_opened(&mut self) -> u64 {
        self.streams.take_opened()
    }

    /// Whether everything was handed to quiche.
    pub(crate) fn is_idle(&self) -> bool {
        self.streams.is_idle()
            && self.withdrawals.is_empty()
            && self.lanes.iter().all(|lane| lane.pending.is_empty() && lane.blocked.is_none())
    }
}
