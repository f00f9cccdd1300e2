//! A config that forgives nothing, and a flood while the honest peer works.

use std::time::Duration;

use millrace_protocol::flood::Flood;
use millrace_protocol::id::NodeId;
use millrace_transport::{CloseCode, FloodRates};

use super::*;

pub(super) const STREAMS_MAX: u64 = 64;
/// Streams that stand still at a time: fewer than may be left open after they were cut.
const STALLED: u64 = 40;
/// How often the victim judges the progress of messages.
pub(super) const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);
/// Packets that are sent before the client looks what came.
pub(super) const PACKETS_IN_A_ROUND: usize = 200;
/// A flood takes some rounds, each of which a busy host stretches.
const FLOOD_TIME_MAX: Duration = Duration::from_secs(120);

pub(super) fn flood_config() -> TransportConfig {
    let profile = |profile| ProfileConfig {
        connection_window_bytes: MIB,
        stream_window_bytes: MIB / 4,
        ..profile
    };
    TransportConfig {
        lan: profile(ProfileConfig::lan()),
        wan: profile(ProfileConfig::wan()),
        streams_max: STREAMS_MAX,
        stream_progress_interval: PROGRESS_INTERVAL,
        flood_rates: FloodRates {
            answers: 0,
            cancellations: 0,
            unfinished: 0,
            stalled: 0,
            probes: 0,
            packets: 0,
            path_challenges: 0,
            retired_ids: 0,
        },
        ..TransportConfig::default()
    }
}

impl Testbed {
    fn cut(&self, flood: Flood) -> u64 {
        self.victim.reason(Family::Closed, flood.reason())
    }

    /// Takes turns with `send`, while the honest peer works, until the victim has cut the
    /// connection for this flood. Nothing is refused to the honest peer meanwhile.
    pub(super) fn flood(&self, raw: &mut Raw, flood: Flood, mut send: impl FnMut(&mut Raw)) {
        let before = self.cut(flood);
        let end = Instant::now() + FLOOD_TIME_MAX;
        while self.cut(flood) == before {
            assert!(Instant::now() < end, "{flood:?} is borne");
            let error = raw.quic.peer_error();
            assert!(error.is_none(), "{flood:?}: it ended for {error:?}");
            send(raw);
            raw.turn();
            self.check();
        }
        assert_eq!(self.cut(flood), before + 1);
        let is_told = raw.drive(PATIENCE, |quic| quic.peer_error().is_some());
        assert!(is_told, "{flood:?}: the peer hears of it");
        let error = raw.quic.peer_error().unwrap();
        assert_eq!(error.error_code, CloseCode::Flood as u64);
        self.check_after_flood();
    }

    fn check_after_flood(&self) {
        self.check();
        let counted = self.honest.transport.counters()[0].reasons();
        assert!(counted.is_empty(), "the honest peer counts {counted:?}");
        let status = self.victim.transport.status();
        until("the status says so", || {
            let shards = status.shards();
            shards.iter().any(|shard| shard.floods_cut > 0)
        });
    }

    /// How often frames of the honest peer were held back.
    pub(super) fn honest_holds(&self) -> u64 {
        let peers = self.victim.transport.status().peers();
        let honest = peers.iter().find(|peer| peer.node_id == self.honest.id());
        honest.unwrap().frames_held
    }

    pub(super) fn hostile_id(&self) -> NodeId {
        self.hostile[0].node_id()
    }
}

/// Messages on streams of their own, some at a time, that stand until they are cut. Then the peer
/// ends their streams and begins anew.
pub(super) struct Standing {
    next: u64,
    /// The streams that stand, and what was counted before.
    open: Vec<u64>,
    cut_before: u64,
}

impl Standing {
    pub(super) fn new() -> Self {
        Self {
            next: 0,
            open: Vec::new(),
            cut_before: 0,
        }
    }

    pub(super) fn turn(
        &mut self,
        raw: &mut Raw,
        stalled: u64,
        drips: bool,
        begin: impl Fn(u64) -> Vec<u8>,
    ) {
        if !self.open.is_empty() && stalled >= self.cut_before + self.open.len() as u64 {
            for stream in self.open.drain(..) {
                raw.quic.stream_send(stream, &[], true).ok();
            }
        }
        let begun = raw.quic.peer_streams_left_uni().min(STALLED);
        if self.open.is_empty() && begun > 0 {
            self.cut_before = stalled;
            for n in self.next..self.next + begun {
                let stream = Raw::stream(n);
                raw.quic.stream_send(stream, &begin(n), false).ok();
                self.open.push(stream);
            }
            self.next += begun;
        } else if drips {
            for stream in &self.open {
                raw.quic.stream_send(*stream, &[7], false).ok();
            }
        }
    }
}
