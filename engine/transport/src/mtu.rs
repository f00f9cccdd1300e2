//! The size of a connection's packets: found by probes (RFC 8899), and given up when the path no
//! longer carries it. A pure machine: it decides what to probe; `mtu_probe.rs` sends the probes.
//!
//! quiche's own discovery is off: what it once saw fail it never tries again on that connection,
//! so it cannot follow a path that recovers. A probe here is a health probe, padded, in a packet of
//! its own; the peer's short reply proves its size. All other packets are built in buffers of
//! [`PathMtu::bytes`].
//!
//! A doubt costs little and is settled soon: packets have [`BASE_BYTES`] at once, and probes of
//! four sizes, the doubted one among them, tell a round trip later what the path carries. So the
//! machine doubts on little ground: after [`TIMEOUTS_MAX`] probe timeouts of QUIC (PTO; RFC 9002,
//! 6.2), after [`MISSES_MAX`] unanswered probes of the size in use, or when the kernel refuses a
//! packet.
//!
//! Invariants
//! 1. `BASE_BYTES <= bytes <= bytes_max`, and `bytes` grows to no size that a probe did not prove.
//! 2. At most [`ROUND_PROBES`] probes are in flight, and each is waited for until a deadline.
//! 3. While nothing at all is acknowledged, nothing is learnt from unanswered probes: an outage is
//!    no black hole.

mod search;

use std::time::{Duration, Instant};

use search::{PRECISION_BYTES, ROUND_PROBES, Search};

/// Every path of QUIC carries this much (RFC 9000, 14).
pub(crate) const BASE_BYTES: usize = 1_200;

/// A size in use is probed again so long after its last proof, also on an idle connection: it
/// notices before the next body. 1,452 bytes in this time are 1.2 kbit/s.
const VERIFY_INTERVAL: Duration = Duration::from_secs(10);

/// As [`VERIFY_INTERVAL`], when packets were lost since. A path that loses packets all the time is
/// not burdened more than this.
const VERIFY_AFTER_LOSS: Duration = Duration::from_secs(1);

/// Unanswered probes of the size in use, in a row, that end its use.
const MISSES_MAX: u32 = 2;

/// PTOs since the last proof that end the use of a size. The first asks for a proof; the packets of
/// the second have [`BASE_BYTES`], so that a body goes on with them.
const TIMEOUTS_MAX: u64 = 2;

/// A larger size is tried so long after the last search, when bytes enough were sent to make it
/// worth a lost packet. Doubled after each try in vain, up to `RAISE_INTERVAL_MAX`, which is
/// PMTU_RAISE_TIMER (RFC 8899, 5.1.1).
const RAISE_INTERVAL_MIN: Duration = Duration::from_secs(10);
const RAISE_INTERVAL_MAX: Duration = Duration::from_secs(600);

/// Bytes that a connection has sent since the last search when it tries a larger size. One that is
/// idle gains nothing by it, and cubic gives back a window that one loss cut only while data flows.
const RAISE_SENT_BYTES: u64 = 1 << 20;

/// The shortest wait for a reply: the peer's shard may be busy with a body.
const REPLY_TIMEOUT_MIN: Duration = Duration::from_millis(100);

/// The longest wait for a reply, doubled in an outage.
const REPLY_TIMEOUT_MAX: Duration = Duration::from_secs(2);

/// Set in the number of every probe, where a challenge of `address.rs` has another bit, and a
/// health probe none.
const MARK: u32 = 1 << 30;

/// Set in the numbers of challenges.
const CHALLENGE: u32 = 1 << 31;

/// What QUIC has counted on the connection's path.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Traffic {
    /// UDP payload bytes sent.
    pub(crate) sent_bytes: u64,
    /// Of them, acknowledged.
    pub(crate) acked_bytes: u64,
    /// Packets lost.
    pub(crate) lost_packets: u64,
    /// PTOs that expired.
    pub(crate) timeouts: u64,
    /// The PTO, without backoff.
    pub(crate) timeout: Duration,
}

/// Why packets became smaller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// The path drops larger ones, whether a router says so or not.
    BlackHole,
    /// The kernel refuses them: the MTU of the device.
    Device,
}

/// Packets became smaller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reduction {
    pub(crate) cause: Cause,
    /// UDP payload bytes before.
    pub(crate) from_bytes: usize,
    /// UDP payload bytes now.
    pub(crate) to_bytes: usize,
}

/// A probe that waits for its reply.
#[derive(Debug)]
struct Probe {
    number: u32,
    bytes: usize,
    until: Instant,
}

#[derive(Debug)]
enum State {
    /// The size is given, or the connection is not up yet.
    Fixed,
    Searching {
        search: Search,
        /// The size in use before, and why it is doubted.
        doubted: Option<(usize, Cause)>,
    },
    Settled,
}

/// The packet size of one connection.
#[derive(Debug)]
pub(crate) struct PathMtu {
    bytes_max: usize,
    bytes: usize,
    discovers: bool,
    state: State,
    /// Sizes to be probed, the next one last.
    due: Vec<usize>,
    probes: Vec<Probe>,
    number: u32,
    seen: Traffic,
    /// PTOs since the last proof.
    timeouts: u64,
    /// Probes of the size in use, unanswered since the last proof.
    misses: u32,
    proven_at: Instant,
    verify_at: Instant,
    raise_at: Option<Instant>,
    raise_interval: Duration,
    /// What was sent when the last search ended.
    searched_at_bytes: u64,
    reduction: Option<Reduction>,
}

impl PathMtu {
    /// Packets of at most `bytes_max`: from the start, or where `discovers`, once the path is known
    /// to carry them.
    pub(crate) fn new(bytes_max: usize, discovers: bool, now: Instant) -> Self {
        Self {
            bytes_max,
            bytes: if discovers {
                BASE_BYTES.min(bytes_max)
            } else {
                bytes_max
            },
            discovers,
            state: State::Fixed,
            due: Vec::new(),
            probes: Vec::new(),
            number: 0,
            seen: Traffic::default(),
            timeouts: 0,
            misses: 0,
            proven_at: now,
            verify_at: now,
            raise_at: None,
            raise_interval: RAISE_INTERVAL_MIN,
            searched_at_bytes: 0,
            reduction: None,
        }
    }

    /// UDP payload bytes of the largest packet to build.
    #[inline]
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether a probe reply with this number answers a probe of this machine.
    pub(crate) fn is_reply(number: u32) -> bool {
        number & (MARK | CHALLENGE) == MARK
    }

    /// Packets became smaller; told once.
    pub(crate) fn take_reduction(&mut self) -> Option<Reduction> {
        self.reduction.take()
    }

    /// The connection is up: its peer answers probes.
    pub(crate) fn start(&mut self) {
        if !self.discovers || !matches!(self.state, State::Fixed) {
            return;
        }
        if self.bytes_max < self.bytes + PRECISION_BYTES {
            self.state = State::Settled;
        } else {
            self.search(Search::up_to(self.bytes_max, self.seen.acked_bytes), None);
        }
    }

    /// The number and the size of the next probe, if one is to be sent.
    #[inline]
    pub(crate) fn next_probe(&self) -> Option<(u32, usize)> {
        let bytes = *self.due.last()?;
        Some((MARK | self.number, bytes))
    }

    /// The next probe has left, in a packet of `bytes`, which may be a little smaller than wanted.
    /// `timeout` is the PTO.
    pub(crate) fn on_probe_sent(&mut self, bytes: usize, timeout: Duration, now: Instant) {
        self.due.pop();
        let silent_rounds = match &self.state {
            State::Searching { search, .. } => search.silent_rounds(),
            _ => 0,
        };
        let wait = (2 * timeout).clamp(REPLY_TIMEOUT_MIN, REPLY_TIMEOUT_MAX);
        let wait = (wait * (1 << silent_rounds.min(8))).min(REPLY_TIMEOUT_MAX);
        self.probes.push(Probe {
            number: MARK | self.number,
            bytes,
            until: now + wait,
        });
        self.number = (self.number + 1) % MARK;
        self.invariants();
    }

    /// The peer answered the probe with this number. One that lies harms its own connection alone.
    pub(crate) fn on_reply(&mut self, number: u32, now: Instant) {
        let Some(index) = self.probes.iter().position(|probe| probe.number == number) else {
            return;
        };
        let bytes = self.probes.swap_remove(index).bytes;
        self.timeouts = 0;
        self.misses = 0;
        self.proven_at = now;
        self.verify_at = now + VERIFY_INTERVAL;
        self.bytes = self.bytes.max(bytes);
        if let State::Searching { search, .. } = &mut self.state {
            search.on_answer();
            // What is smaller passes too.
            self.probes.retain(|probe| probe.bytes > self.bytes);
            self.due.retain(|due| *due > self.bytes);
            self.end_round(now);
        }
        self.invariants();
    }

    /// The kernel refused packets of `bytes`: the device does not carry them.
    pub(crate) fn on_refused(&mut self, bytes: usize, now: Instant) {
        if matches!(self.state, State::Fixed) || bytes <= BASE_BYTES {
            return;
        }
        self.probes.retain(|probe| probe.bytes < bytes);
        self.due.retain(|due| *due < bytes);
        if bytes <= self.bytes {
            self.doubt(bytes - 1, Cause::Device);
        } else if let State::Searching { search, .. } = &mut self.state {
            search.exclude(bytes);
            self.end_round(now);
        }
        self.invariants();
    }

    /// When [`Self::on_timeout`] is due.
    pub(crate) fn next_timeout(&self) -> Option<Instant> {
        let reply = self.probes.iter().map(|probe| probe.until).min();
        if !matches!(self.state, State::Settled) {
            return reply;
        }
        let is_verified = self.bytes > BASE_BYTES && self.is_quiet();
        let verify = is_verified.then_some(self.verify_at);
        let raise = self.raise_at.filter(|_| self.is_quiet());
        [reply, verify, raise].into_iter().flatten().min()
    }

    /// Takes up what QUIC has counted since the last time, and does what is due.
    pub(crate) fn on_timeout(&mut self, traffic: &Traffic, now: Instant) {
        let before = std::mem::replace(&mut self.seen, *traffic);
        if matches!(self.state, State::Fixed) {
            return;
        }
        if self.bytes > BASE_BYTES {
            self.timeouts += traffic.timeouts.saturating_sub(before.timeouts);
        }
        let is_settled = matches!(self.state, State::Settled);
        let has_lost = traffic.lost_packets > before.lost_packets;
        if self.timeouts >= TIMEOUTS_MAX {
            self.doubt(self.bytes, Cause::BlackHole);
        } else if is_settled
            && (self.timeouts > 0 || has_lost && now >= self.proven_at + VERIFY_AFTER_LOSS)
        {
            self.verify();
        }
        self.expire(now);
        if matches!(self.state, State::Settled) {
            if now >= self.verify_at {
                self.verify();
            }
            self.raise(now);
        }
        self.end_round(now);
        self.invariants();
    }

    /// Probes that are overdue count as lost.
    fn expire(&mut self, now: Instant) {
        let mut lost_bytes = None;
        self.probes.retain(|probe| {
            let is_awaited = now < probe.until;
            if !is_awaited {
                lost_bytes =
                    Some(lost_bytes.map_or(probe.bytes, |least: usize| least.min(probe.bytes)));
            }
            is_awaited
        });
        let Some(lost_bytes) = lost_bytes else { return };
        match &mut self.state {
            State::Searching { search, .. } => search.on_loss(lost_bytes),
            State::Settled => {
                self.misses += 1;
                if self.misses >= MISSES_MAX {
                    self.doubt(self.bytes, Cause::BlackHole);
                } else {
                    self.verify();
                }
            }
            State::Fixed => {}
        }
    }

    /// Probes the size in use.
    fn verify(&mut self) {
        if self.bytes > BASE_BYTES && self.is_quiet() {
            self.due.push(self.bytes);
        }
    }

    /// Tries a larger size, when it is time and worth it.
    fn raise(&mut self, now: Instant) {
        if self.raise_at.is_none_or(|at| now < at) || !self.is_quiet() {
            return;
        }
        if self.seen.sent_bytes < self.searched_at_bytes + RAISE_SENT_BYTES {
            self.raise_at = Some(now + self.raise_interval);
            return;
        }
        self.raise_interval = (self.raise_interval * 2).min(RAISE_INTERVAL_MAX);
        self.search(Search::raise(self.bytes_max, self.seen.acked_bytes), None);
    }

    /// Gives up the size in use; the path may still carry `high_bytes`.
    fn doubt(&mut self, high_bytes: usize, cause: Cause) {
        let from = match &self.state {
            State::Searching { doubted, .. } => *doubted,
            _ => None,
        };
        let from = from.unwrap_or((self.bytes, cause));
        self.bytes = BASE_BYTES;
        self.raise_interval = RAISE_INTERVAL_MIN;
        let search = Search::among(self.bytes, high_bytes, self.seen.acked_bytes);
        self.search(search, Some(from));
    }

    fn search(&mut self, begun: (Search, Vec<usize>), doubted: Option<(usize, Cause)>) {
        self.probes.clear();
        self.timeouts = 0;
        self.misses = 0;
        self.raise_at = None;
        let (search, due) = begun;
        self.due = due;
        self.state = State::Searching { search, doubted };
    }

    /// Begins the next round of a search when one is over, and ends the search when little is left
    /// to find.
    fn end_round(&mut self, now: Instant) {
        if !self.is_quiet() {
            return;
        }
        let State::Searching { search, doubted } = &mut self.state else {
            return;
        };
        match search.next_round(self.bytes, self.seen.acked_bytes) {
            Some(due) => self.due = due,
            None => {
                let doubted = *doubted;
                self.settle(doubted, now);
            }
        }
    }

    fn settle(&mut self, doubted: Option<(usize, Cause)>, now: Instant) {
        self.state = State::Settled;
        self.verify_at = now + VERIFY_INTERVAL;
        self.searched_at_bytes = self.seen.sent_bytes;
        if let Some((from_bytes, cause)) = doubted
            && from_bytes >= self.bytes + PRECISION_BYTES
        {
            self.reduction = Some(Reduction {
                cause,
                from_bytes,
                to_bytes: self.bytes,
            });
        }
        let is_largest = self.bytes_max < self.bytes + PRECISION_BYTES;
        self.raise_at = (!is_largest).then(|| now + self.raise_interval);
    }

    /// Whether no probe is due or in flight.
    fn is_quiet(&self) -> bool {
        self.due.is_empty() && self.probes.is_empty()
    }

    fn invariants(&self) {
        debug_assert!(self.bytes <= self.bytes_max);
        debug_assert!(self.probes.len() + self.due.len() <= ROUND_PROBES);
    }
}

#[cfg(test)]
mod tests;
