//! One QUIC connection of a shard: its phases, and what it does with what arrives.
//!
//! ```text
//! Handshake -> AwaitHello -> Up -> Draining -> Closing -> removed
//!      \____________\_________\_______________/
//! ```
//!
//! Invariants
//! 1. There is a handle from `AwaitHello` on, and nothing of the code above runs for this connection before its identity is proven.
//! 2. A connection is `Up` from the peer's first frame on, not from the end of the handshake, which a client sees before the server judged it.
//! 3. `timer` is armed at the earliest thing this connection waits for.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use millrace_protocol::budget::Reservation;
use millrace_protocol::frame::{Carriage, FailureCode, Header, Hello, Kind};
use millrace_protocol::health::{Health, HealthAction};
use millrace_protocol::id::NodeId;
use millrace_protocol::peers::{Attempt, ConnKey};
use millrace_protocol::rpc::RpcError;
use millrace_protocol::timer::TimerId;
use millrace_shards::datapath::Trains;

use crate::address::PeerAddress;
use crate::admission::{ConnectionPermit, HandshakePermit};
use crate::buffers::QuicConnection;
use crate::carrier::Progress;
use crate::close_sender::CloseSender;
use crate::config::TransportConfig;
use crate::counters::{Counter, Counters, Family};
use crate::ids::{IdBytes, LiveIds};
use crate::inbox::{Arrived, Inbox, Room, StreamFault, wants_answer};
use crate::quic::CloseCode;
use crate::service::handle::ConnectionHandle;
use crate::service::message::{Answer, Defer, Handler, Inbound, InboundBody};

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// TLS is not done; given up at `until`.
    Handshake { until: Instant },
    /// TLS is done; the peer's first frame is still to come. `Peers` bounds the wait.
    AwaitHello,
    /// In use.
    Up,
    /// Takes no new messages of ours; closed when idle, at `until`, or when [`millrace_protocol::peers::Peers`] says so.
    Draining {
        until: Option<Instant>,
        code: CloseCode,
    },
    /// As `Draining`, and idle: what quiche still has to send gets until `until`.
    Lingering { until: Instant, code: CloseCode },
    /// CONNECTION_CLOSE was queued; quiche keeps the connection for three PTOs (RFC 9000, 10.2).
    Closing,
}

/// How long a connection may stay silent after its peer requested a dial.
pub(crate) const VERIFY_TIMEOUT: Duration = Duration::from_millis(400);

/// The part of a stream's window that is acknowledged together while a body streams in: three trains of 1 MiB.
const ACK_WINDOW_PART: u64 = 6;
/// How long their acknowledgement may wait; a hundredth of the delay that we announce (`max_ack_delay`, 25 ms).
const ACK_DELAY: Duration = Duration::from_micros(250);

/// Requests and answers leave in trains of this many packets, and are taken up in turns of as many, so that both ends work at the same
/// time: with 64 in flight, one long train each way would leave each end idle while the other works.
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

/// What arrived that the endpoint has to act on, gathered while the connection is borrowed.
#[derive(Debug, Default)]
pub(crate) struct Events {
    pub(crate) hello: Option<Hello>,
    pub(crate) probe_replies: Vec<u32>,
    pub(crate) reservations: Vec<Reservation>,
    pub(crate) fault: Option<&'static str>,
}

/// One connection.
pub(crate) struct Connection {
    pub(crate) quic: QuicConnection,
    pub(crate) key: ConnKey,
    /// Where the peer is.
    pub(crate) address: PeerAddress,
    /// Our connection IDs.
    pub(crate) ids: LiveIds,
    /// The ID that the client chose for its first packets, on the listening side until the handshake is done.
    pub(crate) initial: Option<Vec<u8>>,
    pub(crate) is_server: bool,
    /// The source of an inbound connection is still to be charged for it: it brought no token and no proof.
    pub(crate) is_uncharged: bool,
    /// Until the handshake of an inbound connection is over.
    pub(crate) handshake_permit: Option<HandshakePermit>,
    /// From when the handshake of an inbound connection has completed.
    pub(crate) connection_permit: Option<ConnectionPermit>,
    /// The dial that this is, until its handshake is done.
    pub(crate) attempt: Option<Attempt>,
    /// Which of the connections of a pair of nodes this is.
    pub(crate) index: usize,
    /// A sign of life was asked for when this many packets had been received.
    pub(crate) verify_from: Option<usize>,
    /// Bytes received since the last time that something was sent, and when the first of them came.
    pub(crate) unacked_bytes: usize,
    unacked_since: Option<Instant>,
    /// Something else than an acknowledgement is to be sent.
    pub(crate) must_send: bool,
    /// ConnectionPermit among the shard's handshakes.
    pub(crate) is_handshaking: bool,
    pub(crate) phase: Phase,
    pub(crate) handle: Option<Rc<ConnectionHandle>>,
    pub(crate) inbox: Inbox,
    pub(crate) health: Option<Health>,
    pub(crate) timer: Option<TimerId>,
    pub(crate) is_dirty: bool,
    /// When the progress of unfinished messages is judged next.
    pub(crate) judge_at: Option<Instant>,
    /// When silence is judged next, and the packets sent until the last time.
    keep_alive: Option<(Instant, usize)>,
    lost_seen: usize,
    /// What it may still send once it closes.
    pub(crate) close_sender: CloseSender,
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
            quic,
            key,
            address: PeerAddress::new(peer),
            ids: LiveIds::new(handshake_id),
            initial: None,
            is_server,
            is_uncharged: false,
            handshake_permit: None,
            connection_permit: None,
            attempt: None,
            index: 0,
            verify_from: None,
            unacked_bytes: 0,
            unacked_since: None,
            must_send: true,
            is_handshaking: true,
            phase: Phase::Handshake {
                until: now + config.connect_timeout,
            },
            handle: None,
            inbox: Inbox::new(config.limits, config.streams_max),
            health: None,
            timer: None,
            is_dirty: false,
            judge_at: None,
            keep_alive: None,
            lost_seen: 0,
            close_sender: CloseSender::default(),
        }
    }

    /// The proven peer.
    pub(crate) fn peer(&self) -> Option<NodeId> {
        self.handle.as_ref().map(|handle| handle.peer)
    }

    /// Closes the connection; the peer hears `code`.
    pub(crate) fn close(&mut self, code: CloseCode) {
        if self.phase == Phase::Closing {
            return;
        }
        self.phase = Phase::Closing;
        // Already closing or closed for another reason: that reason stands.
        self.quic
            .close(true, code as u64, code.reason().as_bytes())
            .ok();
    }

    /// Reads everything that the last packets made readable, calling the handler for what is whole.
    pub(crate) fn read<H: Handler>(
        &mut self,
        handler: &mut H,
        scratch: &mut [u8],
        room: &mut impl Room,
        now: Instant,
        events: &mut Events,
    ) {
        let Some(handle) = self.handle.clone() else {
            return;
        };
        while let Some(stream) = self.quic.stream_readable_next() {
            let result = self
                .inbox
                .read(&mut self.quic, stream, scratch, room, &mut |arrived| {
                    on_arrived(&handle, handler, arrived, now, events);
                });
            if let Err((fault, header)) = result {
                on_fault(&handle, fault, header, events);
            }
        }
        while let Ok(datagram) = self.quic.dgram_recv_buf() {
            on_datagram(&handle, handler, &datagram, now, events);
        }
    }

    /// Cuts messages that do not come forward.
    pub(crate) fn judge_streams(
        &mut self,
        room: &mut impl Room,
        now: Instant,
        config: &TransportConfig,
    ) {
        let Some(handle) = self.handle.clone() else {
            return;
        };
        let mut events = Events::default();
        self.inbox.cut_stalled(
            &mut self.quic,
            config.stream_progress_bytes,
            room,
            &mut |fault, header| on_fault(&handle, fault, header, &mut events),
        );
        if events.fault.is_some() {
            self.close(CloseCode::Violation);
        }
        self.judge_at =
            (self.inbox.unfinished() > 0).then(|| now + config.stream_progress_interval);
    }

    /// Whether the acknowledgements that are due may wait for more packets: while a body streams in, nothing else is to be said and
    /// less than a part of its window came. quiche acknowledges whenever it is asked to send, and every acknowledgement costs both sides
    /// about as much as three packets of data.
    pub(crate) fn may_delay_ack(&mut self, now: Instant) -> bool {
        let in_body = self.inbox.take_in_body();
        let Some(handle) = self.handle.as_ref().filter(|_| self.phase == Phase::Up) else {
            return false;
        };
        let together = handle.state.config.stream_window_bytes / ACK_WINDOW_PART;
        if self.must_send || !in_body || self.unacked_bytes as u64 >= together {
            return false;
        }
        if handle.is_dirty() || !handle.out.borrow().is_idle() {
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
    ) -> Sent {
        self.unacked_bytes = 0;
        self.unacked_since = None;
        self.must_send = false;
        let mut more = Sent::All;
        let mut in_short_trains = false;
        let mut failed = false;
        if let Some(handle) = &self.handle
            && !matches!(self.phase, Phase::Closing)
        {
            let mut out = handle.out.borrow_mut();
            if out.poll_transmit(&mut self.quic) == Progress::More {
                more = Sent::Budget;
            }
            in_short_trains = out.take_exchanges();
            if out.is_stopped() {
                drop(out);
                self.close(CloseCode::Violation);
                more = Sent::All;
            } else {
                counters.add(Counter::StreamsOut, out.take_streams_opened());
            }
        }
        let (to, allowed_bytes) = self.address.target();
        let (mut packets, mut sent_bytes) = (0, 0);
        let mut out = self.handle.as_ref().map(|handle| handle.out.borrow_mut());
        let more = loop {
            if packets == config.packets_per_turn {
                break Sent::Budget;
            }
            // Goes on when more came from there.
            if sent_bytes >= allowed_bytes {
                break Sent::All;
            }
            let Some(buffer) = trains.packet(config.udp_payload_bytes_max) else {
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
                    if let Some(out) = &mut out {
                        out.on_packet_sent(len);
                    }
                    if in_short_trains && packets % EXCHANGE_PACKETS == 0 {
                        trains.finish();
                    }
                }
                Err(quiche::Error::Done) => break more,
                Err(_) => {
                    failed = true;
                    break Sent::All;
                }
            }
        };
        drop(out);
        self.address.sent(sent_bytes);
        if failed {
            self.close(CloseCode::Violation);
        }
        counters.add(Counter::PacketsSent, packets as u64);
        more
    }

    /// The earliest thing this connection waits for.
    pub(crate) fn next_timeout(&self) -> Option<Instant> {
        let phase = match self.phase {
            Phase::Handshake { until } | Phase::Lingering { until, .. } => Some(until),
            Phase::Draining { until, .. } => until,
            Phase::AwaitHello | Phase::Up | Phase::Closing => None,
        };
        let calls = self
            .handle
            .as_ref()
            .and_then(|handle| handle.next_deadline());
        let health = self.health.as_ref().and_then(Health::poll_timeout);
        let keep_alive = self.keep_alive.map(|(at, _)| at);
        let acknowledge = self.unacked_since.map(|since| since + ACK_DELAY);
        [
            self.quic.timeout_instant(),
            phase,
            calls,
            health,
            keep_alive,
            acknowledge,
            self.judge_at,
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// The path that is in use; others are where the peer was before.
    pub(crate) fn path(&self) -> Option<quiche::PathStats> {
        self.quic.path_stats().find(|path| path.active)
    }

    /// How long the last bytes and their repeats may take: three round trips, within bounds.
    pub(crate) fn linger(&self) -> Duration {
        const SHORTEST: Duration = Duration::from_millis(5);
        const LONGEST: Duration = Duration::from_millis(500);
        let rtt = self.path().map_or(SHORTEST, |path| path.rtt);
        (3 * rtt).clamp(SHORTEST, LONGEST)
    }

    /// Asks the peer for a sign of life. False when an answer cannot be expected within [`VERIFY_TIMEOUT`].
    pub(crate) fn probe_liveness(&mut self) -> bool {
        let rtt = self.path().map_or(Duration::ZERO, |path| path.rtt);
        // Room for a loss and its repeat.
        if rtt * 6 > VERIFY_TIMEOUT {
            return false;
        }
        self.verify_from = Some(self.quic.stats().recv);
        // Repeated by quiche until it is acknowledged.
        self.quic.send_ack_eliciting().is_ok()
    }

    /// From now on a PING is sent when nothing else was for `interval`.
    pub(crate) fn start_keep_alive(&mut self, interval: Duration, now: Instant) {
        self.keep_alive = Some((now + interval, self.quic.stats().sent));
    }

    /// Sends a PING (RFC 9000, 10.1.2) if it is time and nothing was sent since the last time.
    pub(crate) fn keep_alive(&mut self, interval: Duration, now: Instant) {
        let Some((_, sent)) = self.keep_alive.filter(|(at, _)| *at <= now) else {
            return;
        };
        if self.quic.stats().sent == sent {
            // A connection that is closing needs no PING.
            self.quic.send_ack_eliciting().ok();
        }
        self.start_keep_alive(interval, now);
    }

    /// Sends the probes that are due. True when the peer has missed too many.
    pub(crate) fn probe(&mut self, now: Instant) -> bool {
        let (Some(health), Some(handle)) = (&mut self.health, &self.handle) else {
            return false;
        };
        while let Some(action) = health.poll_action(now) {
            match action {
                HealthAction::Probe { sequence } => handle.datagram(Kind::Probe, sequence),
                HealthAction::CloseAndRedial => return true,
            }
        }
        false
    }

    /// Frees streams of ours that the peer stopped after quiche had taken all of them: it does so only when asked about them.
    pub(crate) fn sweep_stopped_streams(&mut self) {
        while let Some(stream) = self.quic.stream_writable_next() {
            self.quic.stream_capacity(stream).ok();
        }
    }

    /// Whether the path lost packets since the last look.
    pub(crate) fn has_lost_packets(&mut self) -> bool {
        let lost = self.quic.stats().lost;
        std::mem::replace(&mut self.lost_seen, lost) < lost
    }
}

pub(crate) fn on_arrived<H: Handler>(
    handle: &Rc<ConnectionHandle>,
    handler: &mut H,
    arrived: Arrived<'_>,
    now: Instant,
    events: &mut Events,
) {
    match arrived {
        Arrived::Frame(header, body) => {
            on_message(
                handle,
                handler,
                header,
                InboundBody::Slice(body),
                now,
                events,
            );
        }
        Arrived::Message(header, body, reservation) => {
            on_message(
                handle,
                handler,
                header,
                InboundBody::Chunks(body),
                now,
                events,
            );
            events.reservations.push(reservation);
        }
    }
}

/// Datagrams carry probes, and one-way messages whose sender repeats them.
fn on_datagram<H: Handler>(
    handle: &Rc<ConnectionHandle>,
    handler: &mut H,
    datagram: &[u8],
    now: Instant,
    events: &mut Events,
) {
    let limits = &handle.state.config.limits;
    let parsed = datagram
        .split_first_chunk()
        .map(|(header, body)| (Header::decode(header), body));
    let header = match parsed {
        Some((Ok(header), body)) if header.body_bytes as usize == body.len() => Ok((header, body)),
        Some((Err(error), _)) => Err(error.reason()),
        _ => Err("peer_datagram_length"),
    };
    match header {
        Ok((header, body)) if header.check(Carriage::Lane, limits).is_ok() => {
            on_message(
                handle,
                handler,
                header,
                InboundBody::Slice(body),
                now,
                events,
            );
        }
        Ok(_) => handle
            .state
            .counters
            .count(Family::Rejected, "peer_datagram_kind"),
        Err(reason) => handle.state.counters.count(Family::Rejected, reason),
    }
}

fn on_message<H: Handler>(
    handle: &Rc<ConnectionHandle>,
    handler: &mut H,
    header: Header,
    body: InboundBody<'_>,
    now: Instant,
    events: &mut Events,
) {
    let counters = &handle.state.counters;
    let inbound = |deadline, body| Inbound {
        peer: handle.peer,
        connection: handle.number.get(),
        class: header.class,
        method: header.method,
        deadline,
        body,
    };
    let exchanged = &handle.state.exchanged;
    match header.kind {
        Kind::Request => {
            exchanged.set(exchanged.get() + 1);
            counters.received(header.class, body.len() as usize);
            let deadline = now + Duration::from_millis(header.arg.into());
            let defer = Defer {
                handle,
                class: header.class,
                id: header.id,
            };
            match handler.on_request(inbound(Some(deadline), body), defer) {
                Answer::Reply(body) => handle.answer(header.class, header.id, Ok(body)),
                Answer::Failure(code) => handle.answer(header.class, header.id, Err(code)),
                Answer::Deferred => {}
            }
        }
        Kind::Send => {
            counters.received(header.class, body.len() as usize);
            handler.on_send(inbound(None, body));
        }
        Kind::Response => {
            exchanged.set(exchanged.get() + 1);
            counters.received(header.class, body.len() as usize);
            handle.on_answer(header.id, Ok(body.into_payload()));
        }
        Kind::Failure => {
            // Refused before all of it was there: the rest need not be sent.
            handle.withdraw(Kind::Request, header.class, header.id, false);
            handle.on_answer(
                header.id,
                Err(RpcError::Peer(FailureCode::from_arg(header.arg))),
            );
        }
        Kind::Cancel => handle.on_cancel(header.class, header.id),
        Kind::Probe => handle.datagram(Kind::ProbeReply, header.arg),
        Kind::ProbeReply => events.probe_replies.push(header.arg),
        Kind::Hello => match body {
            InboundBody::Slice(bytes) => match Hello::decode(bytes) {
                Ok(hello) => events.hello = Some(hello),
                Err(error) => {
                    counters.count(Family::Rejected, error.reason());
                    events.fault = Some(error.reason());
                }
            },
            InboundBody::Chunks(_) => events.fault = Some("peer_misplaced_frame"),
        },
    }
}

/// Counts a cut stream; a request among them is answered, since its sender may still wait.
pub(crate) fn on_fault(
    handle: &Rc<ConnectionHandle>,
    fault: StreamFault,
    header: Option<Header>,
    events: &mut Events,
) {
    handle
        .state
        .counters
        .count(Family::Rejected, fault.reason());
    if fault.is_fatal() {
        events.fault = Some(fault.reason());
        return;
    }
    let Some(header) = header else { return };
    match fault {
        StreamFault::Reset => handle.state.counters.add(Counter::RequestsCancelled, 1),
        StreamFault::NoRoom if wants_answer(&header) => {
            handle.answer(header.class, header.id, Err(FailureCode::TooLarge));
        }
        _ if wants_answer(&header) => {
            handle.answer(header.class, header.id, Err(FailureCode::Malformed));
        }
        _ if header.kind == Kind::Response => {
            handle.withdraw(Kind::Request, header.class, header.id, true);
            let error = match fault {
                StreamFault::NoRoom => RpcError::LocalNoBudget,
                _ => RpcError::PeerProtocol,
            };
            handle.on_answer(header.id, Err(error));
        }
        _ => {}
    }
}
