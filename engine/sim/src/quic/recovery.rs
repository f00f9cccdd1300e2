//! Which packets arrived, which are lost, and when to send something to find out: RFC 9002 without
//! its congestion control.
//!
//! What is left out, on purpose: a sender may have its whole window in flight; a link's queue is
//! bounded by the network's model instead. Losses are told by time alone (RFC 9002, 6.1.2), not by
//! a count of packets, since a jittering link reorders many.
//!
//! Invariants
//! 1. A packet that asks for an acknowledgement is in flight until it is acknowledged or lost.
//! 2. While a packet is in flight, a timer runs: for its loss, or for a probe.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::packet::Frame;

/// Smallest time that counts (RFC 9002, 6.1.2).
const GRANULARITY: Duration = Duration::from_millis(1);
/// How long a peer may hold an acknowledgement back; ours never do.
const ACK_DELAY_MAX: Duration = Duration::from_millis(25);

#[derive(Debug)]
struct InFlight {
    sent_at: Instant,
    bytes: u64,
    frames: Vec<Frame>,
}

/// Packets in flight, and the round trip.
#[derive(Debug)]
pub(crate) struct Recovery {
    next_number: u64,
    in_flight: BTreeMap<u64, InFlight>,
    bytes_in_flight: u64,
    largest_acked: Option<u64>,
    latest_rtt: Duration,
    smoothed_rtt: Option<Duration>,
    rtt_deviation: Duration,
    initial_rtt: Duration,
    /// Probes since the last acknowledgement.
    probes: u32,
    last_sent_at: Option<Instant>,
    pub(crate) sent: usize,
    pub(crate) lost: usize,
}

impl Recovery {
    pub(crate) fn new(initial_rtt: Duration) -> Self {
        Self {
            next_number: 0,
            in_flight: BTreeMap::new(),
            bytes_in_flight: 0,
            largest_acked: None,
            latest_rtt: initial_rtt,
            smoothed_rtt: None,
            rtt_deviation: initial_rtt / 2,
            initial_rtt,
            probes: 0,
            last_sent_at: None,
            sent: 0,
            lost: 0,
        }
    }

    /// The round trip, once it was measured.
    pub(crate) fn rtt(&self) -> Option<Duration> {
        self.smoothed_rtt
    }

    pub(crate) fn bytes_in_flight(&self) -> u64 {
        self.bytes_in_flight
    }

    /// Takes a round trip in (RFC 9002, 5.3).
    pub(crate) fn sample(&mut self, rtt: Duration) {
        self.latest_rtt = rtt;
        match self.smoothed_rtt {
            None => {
                self.smoothed_rtt = Some(rtt);
                self.rtt_deviation = rtt / 2;
            }
            Some(smoothed) => {
                let deviation = smoothed.abs_diff(rtt);
                self.rtt_deviation = (self.rtt_deviation * 3 + deviation) / 4;
                self.smoothed_rtt = Some((smoothed * 7 + rtt) / 8);
            }
        }
    }

    /// Numbers a packet, and keeps what it carries if it asks for an acknowledgement.
    pub(crate) fn on_sent(&mut self, frames: &[Frame], bytes: u64, now: Instant) -> u64 {
        let number = self.next_number;
        self.next_number += 1;
        self.sent += 1;
        if !frames.is_empty() {
            self.bytes_in_flight += bytes;
            self.last_sent_at = Some(now);
            let packet = InFlight {
                sent_at: now,
                bytes,
                frames: frames.to_vec(),
            };
            self.in_flight.insert(number, packet);
        }
        number
    }

    /// Takes an acknowledgement; hands over the frames that arrived.
    pub(crate) fn on_acked(
        &mut self,
        ranges: &[(u64, u64)],
        now: Instant,
        on_frame: &mut impl FnMut(Frame),
    ) {
        for &(start, end) in ranges {
            while let Some((&number, _)) = self.in_flight.range(start..end).next_back() {
                let Some(packet) = self.in_flight.remove(&number) else {
                    break;
                };
                self.bytes_in_flight -= packet.bytes;
                self.probes = 0;
                if self.largest_acked.is_none_or(|largest| largest < number) {
                    self.largest_acked = Some(number);
                    self.sample(now.saturating_duration_since(packet.sent_at));
                }
                packet.frames.into_iter().for_each(&mut *on_frame);
            }
        }
    }

    /// Hands over the frames of packets that are lost by now, and when a probe is due, of the
    /// oldest packets in flight. True when a probe is due.
    pub(crate) fn on_timeout(&mut self, now: Instant, on_frame: &mut impl FnMut(Frame)) -> bool {
        let delay = self.loss_delay();
        while let Some((_, packet)) = self.overtaken()
            && packet.sent_at + delay <= now
        {
            self.give_up(self.oldest(), on_frame);
        }
        let is_probe_due = self.probe_at().is_some_and(|at| at <= now);
        if is_probe_due {
            self.probes += 1;
            self.last_sent_at = Some(now);
            // Two, as RFC 9002, 6.2.4 allows: one of them may be lost too. The end of the handshake
            // goes first, in every probe: until it has arrived, the server can read nothing else
            // (RFC 9002, 6.2.1 arms no probe for application data before).
            let handshake = self.handshake_in_flight();
            self.give_up(handshake, on_frame);
            self.give_up(self.oldest(), on_frame);
            if handshake.is_none() {
                self.give_up(self.oldest(), on_frame);
            }
        }
        is_probe_due
    }

    /// When [`Self::on_timeout`] is due.
    pub(crate) fn next_timeout(&self) -> Option<Instant> {
        let delay = self.loss_delay();
        let loss = self.overtaken().map(|(_, packet)| packet.sent_at + delay);
        loss.into_iter().chain(self.probe_at()).min()
    }

    /// The probe timeout (RFC 9002, 6.2.1), before it is doubled with each probe.
    pub(crate) fn probe_timeout(&self) -> Duration {
        let rtt = self.smoothed_rtt.unwrap_or(self.initial_rtt);
        rtt + (self.rtt_deviation * 4).max(GRANULARITY) + ACK_DELAY_MAX
    }

    /// The probe timeout before a round trip was measured (RFC 9002, 6.2.2).
    pub(crate) fn initial_probe_timeout(&self) -> Duration {
        (self.initial_rtt * 3).max(GRANULARITY)
    }

    fn probe_at(&self) -> Option<Instant> {
        let sent_at = self.last_sent_at.filter(|_| !self.in_flight.is_empty())?;
        Some(sent_at + self.probe_timeout() * (1 << self.probes.min(16)))
    }

    /// From sending to loss, for a packet with a later one that arrived: a late packet is not lost
    /// yet while the jitter that was seen explains it.
    fn loss_delay(&self) -> Duration {
        let rtt = self.smoothed_rtt.unwrap_or(self.initial_rtt);
        (rtt.max(self.latest_rtt) * 9 / 8).max(GRANULARITY) + self.rtt_deviation * 4
    }

    /// The oldest packet in flight, if a later one arrived.
    fn overtaken(&self) -> Option<(u64, &InFlight)> {
        let (number, packet) = self.in_flight.first_key_value()?;
        let is_overtaken = self.largest_acked.is_some_and(|largest| *number < largest);
        is_overtaken.then_some((*number, packet))
    }

    fn oldest(&self) -> Option<u64> {
        self.in_flight.first_key_value().map(|(number, _)| *number)
    }

    /// The packet in flight that ends the client's handshake.
    fn handshake_in_flight(&self) -> Option<u64> {
        let ends_it = |packet: &InFlight| {
            let mut frames = packet.frames.iter();
            frames.any(|frame| matches!(frame, Frame::Finish))
        };
        let mut packets = self.in_flight.iter();
        packets
            .find(|(_, packet)| ends_it(packet))
            .map(|(number, _)| *number)
    }

    fn give_up(&mut self, number: Option<u64>, on_frame: &mut impl FnMut(Frame)) {
        if let Some(packet) = number.and_then(|number| self.in_flight.remove(&number)) {
            self.bytes_in_flight -= packet.bytes;
            self.lost += 1;
            packet.frames.into_iter().for_each(&mut *on_frame);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Protects a connection on a lossy path: with many packets in flight, the one that lets the
    // server read the others is repeated by every probe, not by every third.
    #[test]
    fn every_probe_repeats_the_end_of_the_handshake() {
        let mut now = Instant::now();
        let mut recovery = Recovery::new(Duration::from_millis(20));
        recovery.on_sent(&[Frame::Finish], 1_000, now);
        for n in 0..6 {
            recovery.on_sent(&[Frame::MaxData(n)], 9, now);
        }
        for probe in 0..5 {
            now = recovery.next_timeout().unwrap();
            let mut lost = Vec::new();
            assert!(recovery.on_timeout(now, &mut |frame| lost.push(frame)));
            assert!(
                matches!(lost[..], [Frame::Finish, Frame::MaxData(_)]),
                "probe {probe}"
            );
            // Each in a packet of its own.
            for frame in lost {
                recovery.on_sent(&[frame], 9, now);
            }
        }
    }
}
