//! An established connection above its streams: what is sent and received on it, its calls, its
//! probes, and what it gives up.
//!
//! The endpoint of a shard drives a session over quiche, `engine/sim` over a model of QUIC; the
//! code here is the same for both, generic over the path for each method.
//!
//! Invariants
//! 1. A session begins when the peer's identity is proven, with its hello; nothing of the code
//!    above runs for a connection before.
//! 2. Nothing else of the peer is read before its hello, which says what the connection speaks.
//! 3. Services hear `on_up` before anything of a session and `on_down` after all of it.
//! 4. While its frames are held back nothing of the peer is read: flow control bounds what waits.
//! 5. A session that is closed answers its callers, once, and drops the bodies that are not whole.

mod dispatch;
mod flood;
mod hello;

use std::rc::Rc;
use std::time::{Duration, Instant};

use millrace_protocol::frame::{Hello, HelloError, Kind, Negotiated};
use millrace_protocol::health::{Health, HealthAction, HealthConfig, Rtt};
use millrace_protocol::id::{ConnectionNumber, NodeId};

use crate::allocator::BodyAllocator;
use crate::carrier::Progress;
use crate::config::{PerClass, TransportConfig};
use crate::counters::{Counter, Family};
use crate::inbox::Inbox;
use crate::path::{StreamError, StreamPath};
use crate::progress::progress_interval;
use crate::quic::CloseCode;
use crate::service::handle::{ConnectionHandle, ShardState};
use crate::service::remote::CallId;
use crate::service::router::Router;
use crate::streams::Terms;

use hello::HelloReader;

pub use dispatch::Received;
use dispatch::{Delivery, on_fault};
use flood::Flow;

/// How long a connection may stay silent at least after its peer requested a dial.
pub(crate) const VERIFY_TIMEOUT: Duration = Duration::from_millis(400);

/// What [`Session::poll_transmit`] moved into the path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transmitted {
    /// What stopped it.
    pub progress: Progress,
    /// Requests or answers went onto lanes, and no body is under way: trains are to be short.
    pub has_exchanges: bool,
    /// The peer stopped a lane: the connection is to be closed for the violation.
    pub is_stopped: bool,
}

/// One established connection.
#[derive(Debug)]
pub struct Session {
    pub(crate) handle: Rc<ConnectionHandle>,
    /// What we said.
    hello: Hello,
    hello_reader: HelloReader,
    /// What the two hellos agree on, once the peer's was read.
    negotiated: Option<Negotiated>,
    inbox: Inbox,
    /// Whether what the peer sends is read.
    flow: Flow,
    /// From when the connection is up.
    health: Option<Health>,
    /// When silence is judged next, and the packets sent until the last time.
    keep_alive: Option<(Instant, usize)>,
    /// When the progress of unfinished messages is judged next.
    judge_at: Option<Instant>,
    /// When it is judged next whether the peer reads its answers.
    judge_answers_at: Option<Instant>,
    /// Answers that were cut because the peer did not read them.
    unread_cut: u64,
    /// A sign of life was asked for when this many packets had been received.
    verify_from: Option<usize>,
    lost_seen: usize,
    /// Packets received until the last health probe.
    received_seen: usize,
    /// Bytes of messages with streams of their own, in both directions, until the last look.
    moved_seen: u64,
    /// A body came forward since the connection was replaced.
    has_drained_bodies: bool,
}

impl Session {
    /// Begins with the hello. `slot` names the connection in [`ShardState::next_dirty`];
    /// `is_server` tells which side of it we are (RFC 9000, 2.1).
    pub fn new(
        state: &Rc<ShardState>,
        slot: usize,
        peer: NodeId,
        is_server: bool,
        hello: &Hello,
    ) -> Self {
        let config = &state.config;
        let handle = ConnectionHandle::new(state, slot, peer, is_server);
        handle.control(Kind::Hello, 0, &hello.encode());
        Self {
            handle,
            hello: *hello,
            hello_reader: HelloReader::new(is_server),
            negotiated: None,
            inbox: Inbox::new(peer, config.limits, config.streams_max),
            flow: Flow::new(config, state.now.get()),
            health: None,
            keep_alive: None,
            judge_at: None,
            judge_answers_at: None,
            unread_cut: 0,
            verify_from: None,
            lost_seen: 0,
            received_seen: 0,
            moved_seen: 0,
            has_drained_bodies: false,
        }
    }

    /// The proven peer.
    pub fn peer(&self) -> NodeId {
        self.handle.peer
    }

    /// The connection's number; 0 before it is up.
    pub fn number(&self) -> ConnectionNumber {
        self.handle.number.get()
    }

    /// Round trips of the health probes; `None` before the first.
    pub fn probe_rtt(&self) -> Option<Rtt> {
        self.health.as_ref().and_then(Health::rtt)
    }

    fn config(&self) -> &TransportConfig {
        &self.handle.state.config
    }

    // --- its beginning and its end ---

    /// Reads the peer's hello, if it is there: once, what the two sides agree on. A connection
    /// whose hello is refused is to be closed with [`CloseCode::of_hello`].
    pub fn receive_hello<P: StreamPath>(
        &mut self,
        path: &mut P,
    ) -> Option<Result<Negotiated, HelloError>> {
        let hello = self.hello_reader.read(path)?;
        let negotiated = hello.and_then(|theirs| self.hello.negotiate(&theirs));
        match negotiated {
            Ok(negotiated) => {
                self.negotiated = Some(negotiated);
                self.inbox.open_lane(self.hello_reader.lane());
            }
            Err(error) => {
                let counters = &self.handle.state.counters;
                counters.count(Family::Refused, error.reason());
                tracing::warn!(peer = %self.peer(), %error, "a connection is refused at its hello");
            }
        }
        Some(negotiated)
    }

    /// What the two hellos agree on; `None` before the peer's was read.
    pub fn negotiated(&self) -> Option<Negotiated> {
        self.negotiated
    }

    /// The connection is the peer's current one, and its hello was read: it may be used, is kept
    /// alive, and is probed.
    /// The driver then tells the services, by [`Router::on_up`].
    pub fn up<P: StreamPath>(&mut self, path: &P, number: ConnectionNumber, now: Instant) {
        self.start_keep_alive(path, now);
        let (config, grid) = (health_config(self.config()), self.handle.state.grid);
        self.health = Some(Health::new(config, grid, now));
        self.handle.number.set(number);
        self.handle.state.insert(Rc::clone(&self.handle));
    }

    /// Takes the connection out of use for new messages. More than once does no harm.
    pub fn take_down(&self) {
        self.handle.state.remove(&self.handle);
    }

    /// The connection is gone: what waits for something of it hears so.
    pub fn close(mut self, router: &mut Router) {
        self.take_down();
        self.inbox.clear();
        self.handle.close();
        if self.number() > ConnectionNumber(0) {
            router.on_down(self.peer(), self.number());
        }
    }

    /// The node is gone, as by kill -9: requests end, sinks hear that their bodies are cut, and the
    /// router hears of nothing.
    pub fn abandon(self) {
        self.take_down();
        self.handle.close();
    }

    /// Whether nothing of ours is on its way, no message of the peer has begun to arrive, and no
    /// request waits on either side.
    pub fn is_idle(&self) -> bool {
        self.handle.is_idle() && self.inbox.unfinished() == 0
    }

    /// How long the last bytes and their repeats may take. Of a body that went over a connection
    /// while it drained, the path may hold a window: an interval of progress.
    pub fn linger<P: StreamPath>(&self, path: &P) -> Duration {
        if self.has_drained_bodies || self.moved_bytes() > self.moved_seen {
            progress_interval(self.config(), path.stats().rtt)
        } else {
            linger(path)
        }
    }

    /// Bytes of messages with streams of their own, both ways.
    fn moved_bytes(&self) -> u64 {
        self.handle.out.borrow().moved_bytes() + self.inbox.moved_bytes()
    }

    /// Until when the connection may go on after its replacement: for an interval of progress, if
    /// messages with streams of their own came forward since the last call and are not whole.
    pub fn drains_until<P: StreamPath>(&mut self, path: &P, now: Instant) -> Option<Instant> {
        let moved = self.moved_bytes();
        let out = self.handle.out.borrow();
        let is_carrying = out.has_streams() || self.inbox.unfinished() > 0;
        drop(out);
        let has_moved = std::mem::replace(&mut self.moved_seen, moved) < moved;
        let interval = progress_interval(self.config(), path.stats().rtt);
        self.has_drained_bodies |= is_carrying && has_moved;
        (is_carrying && has_moved).then(|| now + interval)
    }

    /// Bytes that wait to be sent, for each class; small frames of class bulk count as normal.
    pub fn queued_bytes(&self) -> PerClass<u64> {
        self.handle.out.borrow().queued_bytes()
    }

    /// Takes back a request of another shard or thread, if it is one of this session's.
    pub(crate) fn cancel(&self, call: &CallId) {
        if self.handle.serial == call.serial {
            self.handle.cancel(call.header);
        }
    }

    /// Takes back the requests that no one waits for any more.
    pub(crate) fn cancel_abandoned(&self) {
        self.handle.cancel_abandoned();
    }

    // --- what arrives ---

    /// Reads everything that the last packets made readable, and hands over what is whole: nothing
    /// before the hello.
    pub fn receive<P: StreamPath>(
        &mut self,
        path: &mut P,
        router: &mut Router,
        scratch: &mut [u8],
        bodies: &mut BodyAllocator,
        now: Instant,
    ) -> Received {
        let mut received = Received::default();
        if self.negotiated.is_none() || !self.flow.is_open(now) {
            return received;
        }
        let handle = Rc::clone(&self.handle);
        let mut delivery = Delivery {
            handle: &handle,
            router,
            now,
            received: &mut received,
        };
        while self.flow.goes_on(&handle, now)
            && let Some(stream) = path.stream_readable_next()
        {
            let inbox = &mut self.inbox;
            if let Err((fault, header)) = inbox.read(path, stream, scratch, bodies, &mut delivery) {
                on_fault(&handle, fault, header, delivery.received);
            }
            // Before another stream brings the rest of a request.
            cancel_arriving(&handle, inbox, path, delivery.received);
        }
        while self.flow.is_open(now)
            && let Some(datagram) = path.datagram_recv()
        {
            delivery.on_datagram(&datagram);
            cancel_arriving(&handle, &mut self.inbox, path, delivery.received);
        }
        handle.set_received_bytes(self.inbox.moved_bytes());
        let opened = self.inbox.take_opened();
        if opened > 0 {
            handle.state.counters.add(Counter::StreamsIn, opened);
            handle.work.streams(opened);
            if self.judge_at.is_none() && self.inbox.unfinished() > 0 {
                self.judge_at = Some(now + progress_interval(self.config(), path.stats().rtt));
            }
        }
        received
    }

    /// The peer answered the health probe `sequence`.
    pub fn on_probe_reply(&mut self, sequence: u32, now: Instant) {
        if let Some(health) = &mut self.health {
            health.reply_received(sequence, now);
        }
    }

    /// Whether a body in chunks came forward, and is not whole, since the last call.
    pub(crate) fn take_in_body(&mut self) -> bool {
        self.inbox.take_in_body()
    }

    // --- what is sent ---

    /// Moves what waits into the path.
    pub fn poll_transmit<P: StreamPath>(&mut self, path: &mut P) -> Transmitted {
        self.handle.clear_dirty();
        let mut out = self.handle.out.borrow_mut();
        let progress = out.poll_transmit(path);
        let has_exchanges = out.take_exchanges();
        let is_stopped = out.is_stopped();
        if !is_stopped {
            let opened = out.take_streams_opened();
            self.handle.state.counters.add(Counter::StreamsOut, opened);
        }
        let stopped = out.take_stopped();
        if self.judge_answers_at.is_none() && out.may_have_answers() {
            let interval = progress_interval(self.config(), path.stats().rtt);
            self.judge_answers_at = Some(self.handle.state.now.get() + interval);
        }
        drop(out);
        stopped
            .iter()
            .for_each(|header| self.handle.on_stopped(header));
        self.handle.wake_writable();
        Transmitted {
            progress,
            has_exchanges,
            is_stopped,
        }
    }

    /// Whether nothing but acknowledgements is to be sent.
    pub(crate) fn has_nothing_to_send(&self) -> bool {
        !self.handle.is_dirty() && self.handle.out.borrow().is_idle()
    }

    // --- time ---

    /// When [`Self::on_timeout`] is due.
    pub fn next_timeout(&self) -> Option<Instant> {
        let calls = self.handle.next_deadline();
        let health = self.health.as_ref().and_then(Health::poll_timeout);
        let keep_alive = self.keep_alive.map(|(at, _)| at);
        let waits = [
            calls,
            health,
            keep_alive,
            self.judge_at,
            self.judge_answers_at,
            self.flow.opens_at(),
        ];
        waits.into_iter().flatten().min()
    }

    /// Does what is due: deadlines, PING, probes, messages that do not come forward. What the
    /// connection is to be closed with, if it is to be.
    pub fn on_timeout<P: StreamPath>(&mut self, path: &mut P, now: Instant) -> Option<CloseCode> {
        let (inbox, config) = (&self.inbox, self.config());
        let mut interval = None;
        self.handle.expire(now, &mut |id| {
            let interval =
                interval.get_or_insert_with(|| progress_interval(config, path.stats().rtt));
            (inbox.is_answering(id), *interval)
        });
        self.keep_alive(path, now);
        let mut close = self.probe(path, now).then_some(CloseCode::Unhealthy);
        // What is held back could not come forward.
        if let (Some(at), Some(opens_at)) = (&mut self.judge_at, self.flow.opens_at()) {
            let interval = progress_interval(&self.handle.state.config, path.stats().rtt);
            *at = (*at).max(opens_at + interval);
        }
        if self.judge_at.is_some_and(|at| at <= now) && self.judge_streams(path, now) {
            close = Some(CloseCode::Violation);
        }
        if self.judge_answers_at.is_some_and(|at| at <= now) {
            self.judge_answers(path, now);
        }
        close
    }

    /// From time to time: takes up whether the path loses packets, and which streams of ours the
    /// peer stopped. quiche frees those, and says so, only when it is asked about them; it says so
    /// once, so an idle lane or a message among them hears of it here. Whether packets were lost
    /// since the last time.
    pub fn housekeep<P: StreamPath>(&mut self, path: &mut P) -> bool {
        let lost = path.stats().lost;
        let is_lossy = std::mem::replace(&mut self.lost_seen, lost) < lost;
        let mut out = self.handle.out.borrow_mut();
        let mut has_stopped = out.ask_for_stopped_lanes(path);
        while let Some(stream) = path.stream_writable_next() {
            if path.stream_capacity(stream) == Err(StreamError::Stopped) {
                has_stopped |= out.on_stopped(stream);
            }
        }
        out.set_lossy(is_lossy);
        drop(out);
        if has_stopped {
            self.handle.mark_dirty();
        }
        is_lossy
    }

    /// Asks the peer for a sign of life. How long it may take: at least 400 ms, and room for a loss
    /// and its repeat. None when the connection is over.
    pub fn probe_liveness<P: StreamPath>(&mut self, path: &mut P) -> Option<Duration> {
        let stats = path.stats();
        self.verify_from = Some(stats.received);
        let wait = VERIFY_TIMEOUT.max(stats.rtt.unwrap_or(Duration::ZERO) * 6);
        // Repeated by the path until it is acknowledged.
        path.send_ping().then_some(wait)
    }

    /// Whether the sign of life that was asked for has come; said once.
    #[inline]
    pub fn take_liveness<P: StreamPath>(&mut self, path: &P) -> bool {
        let is_alive = self
            .verify_from
            .is_some_and(|seen| path.stats().received > seen);
        if is_alive {
            self.verify_from = None;
        }
        is_alive
    }

    /// From now on a PING is sent when nothing else was for the interval of the config.
    fn start_keep_alive<P: StreamPath>(&mut self, path: &P, now: Instant) {
        let state = &self.handle.state;
        let interval = state.idle_interval(state.config.keep_alive);
        let at = state.grid.next(now, interval);
        self.keep_alive = Some((at, path.stats().sent));
    }

    /// Sends a PING (RFC 9000, 10.1.2) if it is time and nothing was sent since the last time.
    fn keep_alive<P: StreamPath>(&mut self, path: &mut P, now: Instant) {
        let Some((_, sent)) = self.keep_alive.filter(|(at, _)| *at <= now) else {
            return;
        };
        if path.stats().sent == sent {
            path.send_ping();
        }
        self.start_keep_alive(path, now);
    }

    /// Sends the probes that are due. True when the peer has missed too many, and was silent.
    fn probe<P: StreamPath>(&mut self, path: &P, now: Instant) -> bool {
        let Some(health) = &mut self.health else {
            return false;
        };
        if health.poll_timeout().is_some_and(|at| at <= now) {
            let received = path.stats().received;
            if std::mem::replace(&mut self.received_seen, received) < received {
                health.alive(now);
            }
            let state = &self.handle.state;
            health.set_interval(state.idle_interval(state.config.probe_interval));
        }
        health.handle_timeout(now);
        while let Some(action) = health.poll_action(now) {
            match action {
                HealthAction::Probe { sequence } => self.handle.datagram(Kind::Probe, sequence),
                HealthAction::CloseAndRedial => return true,
            }
        }
        false
    }

    /// Cuts the answers that the peer does not read.
    fn judge_answers<P: StreamPath>(&mut self, path: &mut P, now: Instant) {
        let config = self.config();
        let interval = progress_interval(config, path.stats().rtt);
        let terms = Terms {
            progress_bytes: config.stream_progress_bytes,
            patience: config.body_patience.max(interval),
        };
        let cut = self.handle.out.borrow_mut().cut_unread(path, &terms, now);
        self.judge_answers_at = cut.is_some().then(|| now + interval);
        for header in cut.iter().flatten() {
            self.unread_cut += 1;
            self.handle.on_unread(header);
        }
        self.flow.judge(&self.handle, now);
    }

    /// Answers that were cut since the last call, because the peer did not read them.
    pub fn take_unread_cut(&mut self) -> u64 {
        std::mem::take(&mut self.unread_cut)
    }

    /// Cuts messages that do not come forward. True when the connection is to be closed for it.
    fn judge_streams<P: StreamPath>(&mut self, path: &mut P, now: Instant) -> bool {
        let mut received = Received::default();
        let handle = Rc::clone(&self.handle);
        let config = &handle.state.config;
        self.inbox
            .cut_stalled(path, config.stream_progress_bytes, &mut |fault, header| {
                on_fault(&handle, fault, header, &mut received);
            });
        let is_unfinished = self.inbox.unfinished() > 0;
        let interval = progress_interval(config, path.stats().rtt);
        self.judge_at = is_unfinished.then(|| now + interval);
        self.flow.judge(&handle, now);
        received.fault.is_some()
    }
}

/// Takes up the cancellations of requests that are not in flight: what still arrives of one is
/// thrown away from now on.
#[inline]
fn cancel_arriving<P: StreamPath>(
    handle: &Rc<ConnectionHandle>,
    inbox: &mut Inbox,
    path: &mut P,
    received: &mut Received,
) {
    if received.cancelled.is_empty() {
        return;
    }
    let mut ids = std::mem::take(&mut received.cancelled);
    ids.sort_unstable();
    inbox.cancel(path, &ids, &mut |fault, header| {
        if let Some(header) = &header {
            // Taken up: there is nothing left to remember.
            handle.take_early_cancel(header.id);
        }
        on_fault(handle, fault, header, received);
    });
}

/// How long the last bytes of a connection and their repeats may take: three round trips, within
/// bounds.
pub fn linger<P: StreamPath>(path: &P) -> Duration {
    const SHORTEST: Duration = Duration::from_millis(5);
    // The longest round trip of the reference's nodes is 619 ms.
    const LONGEST: Duration = Duration::from_secs(2);
    let rtt = path.stats().rtt.unwrap_or(SHORTEST);
    (3 * rtt).clamp(SHORTEST, LONGEST)
}

fn health_config(config: &TransportConfig) -> HealthConfig {
    HealthConfig {
        interval: config.probe_interval,
        missed_max: config.probe_failures_max,
        ..Default::default()
    }
}
