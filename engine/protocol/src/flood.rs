//! Work that a peer makes on a connection: how fast it may come, and what becomes of a peer that
//! makes more.
//!
//! A connection counts what arrives, and asks its [`FloodGuard`] once in some thousand frames or
//! packets. The guard keeps an *excess* for each kind of work: it grows with the work, shrinks with
//! the time at a fixed rate, and has a bound.
//!
//! Invariants
//! 1. What an honest peer sends is paid for: an answer by its request, a cancellation by its
//!    request, an acknowledgement by the packets that it acknowledges, any other packet by its
//!    bytes that are read. Only the rest counts.
//! 2. An excess is never below 0: nothing is paid for in advance.
//! 3. Frames that come too fast are read later; a connection whose frames are held back all the
//!    time is cut after [`HELD_MAX`]. All other work is cut at its bound: no honest peer comes near
//!    it, and holding back what was decrypted already would save nothing.

mod penalty;

use std::time::{Duration, Instant};

pub use penalty::Penalties;

/// How long the frames of a connection may be held back in one go; twice as long when it goes on
/// and off, because half of the time that passes is taken off again.
pub const HELD_MAX: Duration = Duration::from_secs(5);

/// The smallest packet that asks for an acknowledgement: a short header with a connection ID of 16
/// bytes and a packet number, a PING, and the tag (RFC 9000, 17.3.1; RFC 9001, 5.3).
const ACKED_BYTES_MIN: u64 = 36;

/// Bytes of a stream that pay for a packet: less than half of the smallest full one, for packets
/// that come twice.
const READ_BYTES_PER_PACKET: u64 = 512;

/// Excesses are kept in thousandths, so that a rate of 1 in a second counts in every millisecond.
const SCALE: u64 = 1_000;

/// A kind of work that a peer can make in excess.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(usize)]
pub enum Flood {
    /// Frames of any kind, and streams.
    Frames,
    /// Answers to requests that no one made.
    Answers,
    /// Cancellations of more requests than came.
    Cancellations,
    /// Messages with a stream of their own that the peer begins and does not finish: the stream is
    /// reset, or ends too early or too late.
    Unfinished,
    /// Messages with a stream of their own that stand still, also within their header.
    Stalled,
    /// Probes and their answers, and datagrams that are no frame.
    Probes,
    /// Packets that bring nothing: PING, PADDING, repeats, a byte of a stream at a time.
    Packets,
    /// PATH_CHALLENGE frames (RFC 9000, 19.17); each is answered by a packet of full size.
    PathChallenges,
    /// Connection IDs that the peer gives up (RETIRE_CONNECTION_ID; RFC 9000, 19.16); each is
    /// replaced by a fresh one.
    RetiredIds,
}

impl Flood {
    /// How many kinds there are.
    pub const COUNT: usize = 9;

    /// All kinds, in the order of their numbers.
    pub const ALL: [Self; Self::COUNT] = [
        Self::Frames,
        Self::Answers,
        Self::Cancellations,
        Self::Unfinished,
        Self::Stalled,
        Self::Probes,
        Self::Packets,
        Self::PathChallenges,
        Self::RetiredIds,
    ];

    /// Label on `/metrics` of a connection that is cut for it.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Frames => "flood_frames",
            Self::Answers => "flood_answers",
            Self::Cancellations => "flood_cancellations",
            Self::Unfinished => "flood_unfinished_messages",
            Self::Stalled => "flood_stalled_messages",
            Self::Probes => "flood_probes",
            Self::Packets => "flood_packets",
            Self::PathChallenges => "flood_path_challenges",
            Self::RetiredIds => "flood_retired_ids",
        }
    }

    /// What came too often, for the page of metrics.
    pub fn describe(self) -> &'static str {
        match self {
            Self::Frames => "Frames above `frames_per_second_max`, held back for 5 s and more",
            Self::Answers => "Answers and refusals to requests that this node did not make",
            Self::Cancellations => "Cancellations of more requests than came",
            Self::Unfinished => "Messages whose stream the peer resets, or ends too early or late",
            Self::Stalled => "Messages that stand still, also within their header, or drip",
            Self::Probes => "Probes and their answers, and datagrams that are no frame",
            Self::Packets => "Packets that bring nothing: PING, PADDING, repeats, single bytes",
            Self::PathChallenges => "PATH_CHALLENGE frames, each of which wants a full packet",
            Self::RetiredIds => "Connection IDs that the peer gives up, each of which is replaced",
        }
    }
}

/// How much of one kind is borne.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allowance {
    /// By this much an excess shrinks in a second.
    pub per_second: u64,
    /// The bound of the excess.
    pub burst: u64,
}

/// Work that is borne in a second, by kind. Honest peers make none of it for long, whatever their
/// load; so no config key is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FloodRates {
    /// Unasked answers: an honest peer sends none.
    pub answers: u64,
    /// Cancellations beyond the requests that came.
    pub cancellations: u64,
    /// Unfinished messages: a peer that takes back each body of 64 KiB while it sends them with
    /// 5 Gbit/s.
    pub unfinished: u64,
    /// Messages that stand still: a path that fails now and then for longer than an interval of
    /// progress.
    pub stalled: u64,
    /// Probes: one in a second for the health of the connection, some hundreds while the MTU of a
    /// path is searched.
    pub probes: u64,
    /// Packets that bring nothing: they cost a hundredth of a core.
    pub packets: u64,
    /// PATH_CHALLENGE frames: no node sends any.
    pub path_challenges: u64,
    /// Connection IDs given up: two in half of their lifetime, which is minutes.
    pub retired_ids: u64,
}

impl Default for FloodRates {
    fn default() -> Self {
        Self {
            answers: 100,
            cancellations: 1_000,
            unfinished: 10_000,
            stalled: 10,
            probes: 1_000,
            packets: 10_000,
            path_challenges: 10,
            retired_ids: 1,
        }
    }
}

/// What an honest peer may send at once after a silence, as a connection's limits allow it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FloodRoom {
    /// Frames in a second above which they are held back.
    pub frames_per_second: u64,
    /// Requests of the peer that may be in flight: it may take all of them back at once.
    pub requests: u64,
    /// Streams that the peer may have open: it may reset all of them, and all may stand still.
    pub streams: u64,
    /// Bytes that may be in flight, unread, in packets of which the first is lost.
    pub window_bytes: u64,
}

/// The allowances of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FloodConfig {
    allowances: [Allowance; Flood::COUNT],
}

impl FloodConfig {
    /// A quarter of a second of frames; twice what the limits allow of requests, streams and
    /// packets; and of the rest some more than a connection needs in its first second.
    pub fn new(rates: &FloodRates, room: &FloodRoom) -> Self {
        let allowances = Flood::ALL.map(|flood| {
            let (per_second, burst) = match flood {
                Flood::Frames => (room.frames_per_second, room.frames_per_second / 4),
                Flood::Answers => (rates.answers, 4_096),
                Flood::Cancellations => (rates.cancellations, 2 * room.requests + 1_024),
                Flood::Unfinished => (rates.unfinished, 2 * room.streams + 4_096),
                Flood::Stalled => (rates.stalled, 2 * room.streams),
                Flood::Probes => (rates.probes, 4_096),
                Flood::Packets => (rates.packets, 2 * room.window_bytes / 1_024 + 16_384),
                Flood::PathChallenges => (rates.path_challenges, 256),
                Flood::RetiredIds => (rates.retired_ids, 32),
            };
            Allowance { per_second, burst }
        });
        Self { allowances }
    }

    /// How much of this kind is borne.
    pub fn of(&self, flood: Flood) -> Allowance {
        self.allowances[flood as usize]
    }
}

/// What arrived since the guard was asked last. What was not looked at is 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Frames, and for each stream as many as it costs.
    pub frames: u64,
    /// Answers to requests that no one made, or that were answered before.
    pub unasked_answers: u64,
    /// Requests whose header was there.
    pub requests: u64,
    /// Cancellations.
    pub cancellations: u64,
    /// Messages that the peer began and did not finish.
    pub unfinished: u64,
    /// Messages that were cut because they stood still.
    pub stalled: u64,
    /// Probes, their answers, and datagrams that are no frame.
    pub probes: u64,
    /// What QUIC says of packets.
    pub packets: PacketCounts,
}

/// Packets since the guard was asked last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PacketCounts {
    /// Authentic packets that arrived.
    pub received: u64,
    /// Packets sent, also those without anything to acknowledge.
    pub sent: u64,
    /// Bytes of our packets that the peer acknowledged.
    pub acked_bytes: u64,
    /// Bytes that were read from streams, also those that were thrown away.
    pub read_bytes: u64,
    /// Frames that arrived.
    pub frames: u64,
    /// PATH_CHALLENGE frames.
    pub path_challenges: u64,
    /// Connection IDs that the peer gave up.
    pub retired_ids: u64,
}

impl PacketCounts {
    /// Packets that something else pays for. An acknowledgement is paid for by a packet of ours
    /// that was acknowledged: there are at most as many as were sent, and at most as many as fit
    /// into the acknowledged bytes, which a peer that only asks for acknowledgements leaves at 0.
    fn paid(&self) -> u64 {
        let acknowledged = self.sent.min(self.acked_bytes / ACKED_BYTES_MIN);
        let read = self.read_bytes / READ_BYTES_PER_PACKET;
        acknowledged
            .saturating_add(self.frames)
            .saturating_add(read)
    }
}

impl Counts {
    /// By how much the excess of a kind grows, or shrinks.
    fn change(&self, flood: Flood) -> i64 {
        let (made, paid) = match flood {
            Flood::Frames => (self.frames, 0),
            Flood::Answers => (self.unasked_answers, 0),
            Flood::Cancellations => (self.cancellations, self.requests),
            Flood::Unfinished => (self.unfinished, 0),
            Flood::Stalled => (self.stalled, 0),
            Flood::Probes => (self.probes, 0),
            Flood::Packets => (self.packets.received, self.packets.paid()),
            Flood::PathChallenges => (self.packets.path_challenges, 0),
            Flood::RetiredIds => (self.packets.retired_ids, 0),
        };
        let signed = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        signed(made) - signed(paid)
    }
}

/// What is to become of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It goes on.
    Go,
    /// No more of its frames are to be read before then.
    Hold(Instant),
    /// It is to be closed.
    Cut(Flood),
}

/// The excesses of one connection.
#[derive(Clone, Debug)]
pub struct FloodGuard {
    config: FloodConfig,
    /// In thousandths.
    excess: [u64; Flood::COUNT],
    /// Until when the time is taken off the excesses.
    counted_until: Instant,
    /// How long frames were held back, less half of the time since.
    held: Duration,
}

impl FloodGuard {
    /// The guard of a connection that begins at `now`.
    pub fn new(config: FloodConfig, now: Instant) -> Self {
        Self {
            config,
            excess: [0; Flood::COUNT],
            counted_until: now,
            held: Duration::ZERO,
        }
    }

    /// Takes up what arrived until `now`, since the last call.
    pub fn judge(&mut self, counts: &Counts, now: Instant) -> Verdict {
        let passed_ms = self.pass(now);
        let mut cut = None;
        for flood in Flood::ALL {
            let excess = &mut self.excess[flood as usize];
            let change = counts.change(flood).saturating_mul(SCALE as i64);
            let Allowance { per_second, burst } = self.config.of(flood);
            // First what came, then the time in which it came: at its rate nothing adds up.
            *excess = excess
                .saturating_add_signed(change)
                .saturating_sub(per_second.saturating_mul(passed_ms));
            let burst = burst.saturating_mul(SCALE);
            if flood != Flood::Frames && *excess > burst {
                cut = cut.or(Some(flood));
            }
        }
        match cut {
            Some(flood) => Verdict::Cut(flood),
            None if counts.frames > 0 => self.judge_frames(now),
            None => Verdict::Go,
        }
    }

    /// Frames are held back until their excess is down to its bound.
    fn judge_frames(&mut self, now: Instant) -> Verdict {
        let Allowance { per_second, burst } = self.config.of(Flood::Frames);
        let excess = self.excess[Flood::Frames as usize];
        let over = excess.saturating_sub(burst.saturating_mul(SCALE));
        if over == 0 {
            return Verdict::Go;
        }
        // A thousandth of a frame each millisecond for each frame in a second.
        let wait = Duration::from_millis(over.div_ceil(per_second.max(1)));
        self.held = self.held.saturating_add(wait);
        if self.held > HELD_MAX {
            return Verdict::Cut(Flood::Frames);
        }
        Verdict::Hold(now + wait)
    }

    /// The time since the last look, in whole milliseconds: what is left counts in the next one.
    fn pass(&mut self, now: Instant) -> u64 {
        let passed = now.saturating_duration_since(self.counted_until);
        let passed_ms = u64::try_from(passed.as_millis()).unwrap_or(u64::MAX);
        let passed = Duration::from_millis(passed_ms);
        self.counted_until += passed;
        self.held = self.held.saturating_sub(passed / 2);
        passed_ms
    }
}

#[cfg(test)]
mod tests;
