//! How long the path to a peer is, and what that means for a connection to it.
//!
//! A connection gets one of two profiles when it begins. [`PathMemory`] chooses it by the RTT that
//! is remembered of the peer, and says when a measurement contradicts the choice. It also remembers
//! the bandwidth of long paths, so that the next connection need not search for it from the start
//! (careful resume, draft-ietf-tsvwg-careful-resume).
//!
//! 1. A peer whose RTT is not known gets [`PathProfile::Wan`]: on a LAN that costs a part of the
//!    rate, while the LAN's profile on a long path costs nearly all of it.
//! 2. A profile that the operator named for a peer, or for all, is never contradicted.
//! 3. The two limits lie apart, so that a path near the limit keeps its profile.
//! 4. At most `peers_max` peers are remembered.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::id::NodeId;

/// What a connection is tuned for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PathProfile {
    /// A short path: CUBIC, small windows, no pacing.
    Lan,
    /// A long path: BBRv2, paced, with windows for its bandwidth times its RTT.
    Wan,
}

impl PathProfile {
    /// Both, in the order of [`Self::index`].
    pub const ALL: [Self; 2] = [Self::Lan, Self::Wan];

    /// Its place in arrays with a value for each profile.
    pub fn index(self) -> usize {
        self as usize
    }

    /// The word in the config, in `status` and in the log.
    pub fn label(self) -> &'static str {
        match self {
            Self::Lan => "lan",
            Self::Wan => "wan",
        }
    }
}

/// How profiles are chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathConfig {
    /// The profile of all peers; `None`: each peer's RTT decides.
    pub profile: Option<PathProfile>,
    /// Peers with a profile of their own.
    pub peers: BTreeMap<NodeId, PathProfile>,
    /// The longest RTT of a LAN.
    pub lan_rtt_max: Duration,
    /// Peers remembered.
    pub peers_max: usize,
}

impl Default for PathConfig {
    fn default() -> Self {
        Self {
            profile: None,
            peers: BTreeMap::new(),
            lan_rtt_max: Duration::from_millis(5),
            peers_max: 1_024,
        }
    }
}

/// What is known of the path to a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RememberedPath {
    /// The least RTT of the last connection.
    pub rtt: Duration,
    /// The most bytes in a second that the path has delivered; `None`: no connection has filled it.
    pub bandwidth_bytes_per_s: Option<u64>,
}

/// Where congestion control of a remembered path begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resume {
    /// RTT to assume before the first sample: twice the remembered one, 100 ms to 3 s.
    pub initial_rtt: Duration,
    /// Initial congestion window and pacing rate; `None`: the path's bandwidth is not known.
    pub start: Option<ResumeStart>,
}

/// Half of the bandwidth that a path had: as fast as the draft lets a connection jump.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResumeStart {
    /// Bytes.
    pub window_bytes: u64,
    /// Bytes in a second.
    pub pacing_bytes_per_s: u64,
}

impl RememberedPath {
    /// The shortest RTT that is assumed: a little more than the path's own costs nothing, and one
    /// less than it spoils what BBR measures.
    const INITIAL_RTT_MIN: Duration = Duration::from_millis(100);
    /// The longest: a peer that acknowledges late must not keep its next handshakes from repeating
    /// what is lost.
    const INITIAL_RTT_MAX: Duration = Duration::from_secs(3);

    /// The part of the bandwidth that a connection begins with: nine sixteenths. BBR remembers a
    /// little less than the path carries, and half of the path is to be used in the second round
    /// trip.
    const START_PART: (u64, u64) = (9, 16);

    /// Where a new connection begins, with at most `window_bytes_max` in flight.
    pub fn resume(&self, window_bytes_max: u64) -> Resume {
        let start = self.bandwidth_bytes_per_s.map(|bandwidth| {
            let pacing_bytes_per_s = bandwidth / Self::START_PART.1 * Self::START_PART.0;
            let in_flight = u128::from(pacing_bytes_per_s) * self.rtt.as_micros() / 1_000_000;
            let window_bytes = u64::try_from(in_flight).unwrap_or(u64::MAX);
            ResumeStart {
                window_bytes: window_bytes.min(window_bytes_max),
                pacing_bytes_per_s,
            }
        });
        Resume {
            initial_rtt: self
                .rtt
                .saturating_mul(2)
                .clamp(Self::INITIAL_RTT_MIN, Self::INITIAL_RTT_MAX),
            start,
        }
    }
}

/// What a connection measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PathSample {
    /// Least RTT of the connection.
    pub rtt: Duration,
    /// The greatest bandwidth that it saw, bytes in a second.
    pub bandwidth_bytes_per_s: Option<u64>,
    /// Whether the connection has filled the path: a bandwidth below the remembered one counts only
    /// then.
    pub has_filled: bool,
}

/// The paths to the peers of one shard.
#[derive(Debug)]
pub struct PathMemory {
    config: PathConfig,
    paths: BTreeMap<NodeId, RememberedPath>,
}

impl PathMemory {
    /// A memory that begins with what an earlier run of the node knew.
    pub fn new(
        config: PathConfig,
        remembered: impl IntoIterator<Item = (NodeId, RememberedPath)>,
    ) -> Self {
        let paths = remembered.into_iter().take(config.peers_max).collect();
        Self { config, paths }
    }

    /// What is remembered of `peer`.
    pub fn get(&self, peer: &NodeId) -> Option<RememberedPath> {
        self.paths.get(peer).copied()
    }

    /// The profile for a connection to `peer`.
    pub fn profile(&self, peer: &NodeId) -> PathProfile {
        self.fixed(peer).unwrap_or_else(|| match self.get(peer) {
            Some(path) if path.rtt <= self.config.lan_rtt_max => PathProfile::Lan,
            _ => PathProfile::Wan,
        })
    }

    /// The profile that the operator named for `peer`, if there is one.
    pub fn fixed(&self, peer: &NodeId) -> Option<PathProfile> {
        self.config.peers.get(peer).copied().or(self.config.profile)
    }

    /// Takes what a connection to `peer` measured.
    pub fn measured(&mut self, peer: &NodeId, sample: PathSample) {
        let before = self.get(peer);
        if before.is_none() && self.paths.len() >= self.config.peers_max {
            return;
        }
        let known = before.and_then(|path| path.bandwidth_bytes_per_s);
        let bandwidth_bytes_per_s = match sample.bandwidth_bytes_per_s {
            Some(new) if sample.has_filled => Some(new),
            // A connection that carried little has shown that the path carries that much.
            Some(new) => known.map(|known| known.max(new)),
            None => known,
        };
        let path = RememberedPath {
            rtt: sample.rtt,
            bandwidth_bytes_per_s,
        };
        self.paths.insert(*peer, path);
    }

    /// The profile that a connection to `peer` should have, if its least RTT contradicts the one
    /// that it has.
    pub fn contradicts(
        &self,
        peer: &NodeId,
        has: PathProfile,
        rtt: Duration,
    ) -> Option<PathProfile> {
        let wanted = match self.fixed(peer) {
            Some(fixed) => fixed,
            None if rtt <= self.config.lan_rtt_max => PathProfile::Lan,
            None if rtt > 2 * self.config.lan_rtt_max => PathProfile::Wan,
            None => has,
        };
        (wanted != has).then_some(wanted)
    }

    /// What is remembered, in the order of ids.
    pub fn iter(&self) -> impl Iterator<Item = (NodeId, RememberedPath)> {
        self.paths.iter().map(|(id, path)| (*id, *path))
    }

    /// Forgets the peers for which `is_member` does not hold.
    pub fn retain(&mut self, mut is_member: impl FnMut(&NodeId) -> bool) {
        self.paths.retain(|id, _| is_member(id));
    }
}

#[cfg(test)]
mod tests {
    use super::PathProfile::{Lan, Wan};
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn id(seed: u8) -> NodeId {
        NodeId::from_public_key_der(&[seed])
    }

    fn sample(rtt: Duration, bandwidth: Option<u64>, has_filled: bool) -> PathSample {
        PathSample {
            rtt,
            bandwidth_bytes_per_s: bandwidth,
            has_filled,
        }
    }

    // Protects long paths from the LAN's profile, a LAN from the long paths' one, and a path near
    // the limit from being dialled again and again.
    #[test]
    fn the_rtt_decides_unless_the_operator_has() {
        let cases = [
            // fixed for all, fixed for the peer, remembered ms, had, measured ms: chosen, wanted
            (None, None, None, Wan, 5, Wan, Some(Lan)),
            (None, None, None, Wan, 6, Wan, None),
            (None, None, Some(5), Lan, 5, Lan, None),
            (None, None, Some(5), Lan, 10, Lan, None),
            (None, None, Some(5), Lan, 11, Lan, Some(Wan)),
            (None, None, Some(6), Wan, 10, Wan, None),
            (Some(Lan), None, Some(600), Lan, 600, Lan, None),
            (Some(Wan), None, Some(1), Wan, 1, Wan, None),
            (Some(Lan), Some(Wan), Some(1), Wan, 1, Wan, None),
            (None, Some(Lan), Some(600), Lan, 600, Lan, None),
            // The operator has changed it while the connection lives.
            (Some(Lan), None, None, Wan, 600, Lan, Some(Lan)),
        ];
        for case @ (all, one, remembered, had, measured, chosen, wanted) in cases {
            let config = PathConfig {
                profile: all,
                peers: one.map(|profile| (id(1), profile)).into_iter().collect(),
                ..PathConfig::default()
            };
            let remembered = remembered.map(|ms| RememberedPath {
                rtt: ms * MS,
                bandwidth_bytes_per_s: None,
            });
            let memory = PathMemory::new(config, remembered.map(|path| (id(1), path)));
            assert_eq!(memory.profile(&id(1)), chosen, "{case:?}");
            assert_eq!(
                memory.contradicts(&id(1), had, measured * MS),
                wanted,
                "{case:?}"
            );
        }
    }

    // Protects the start of the next connection: a little traffic says nothing against what a body
    // has shown, and a body that filled a slower path does.
    #[test]
    fn only_a_filled_path_lowers_the_bandwidth() {
        let cases = [
            (None, Some(100), false, None),
            (None, Some(100), true, Some(100)),
            (Some(100), Some(50), false, Some(100)),
            (Some(100), Some(50), true, Some(50)),
            (Some(100), Some(200), false, Some(200)),
            (Some(100), None, true, Some(100)),
        ];
        for case @ (before, measured, has_filled, after) in cases {
            let path = RememberedPath {
                rtt: 150 * MS,
                bandwidth_bytes_per_s: before,
            };
            let mut memory = PathMemory::new(PathConfig::default(), [(id(1), path)]);
            memory.measured(&id(1), sample(140 * MS, measured, has_filled));
            let path = memory.get(&id(1)).unwrap();
            assert_eq!(
                (path.rtt, path.bandwidth_bytes_per_s),
                (140 * MS, after),
                "{case:?}"
            );
        }
    }

    // Protects the path: a resumed connection begins with a part of the bandwidth, and assumes no
    // RTT below the path's.
    #[test]
    fn a_connection_resumes_with_a_part_of_the_bandwidth() {
        let path = |rtt_ms: u32, bandwidth| RememberedPath {
            rtt: rtt_ms * MS,
            bandwidth_bytes_per_s: bandwidth,
        };
        // 300 Mbit/s for 150 ms are 5.6 MB.
        let resume = path(150, Some(37_500_000)).resume(32 << 20);
        assert_eq!(resume.initial_rtt, 300 * MS);
        let start = ResumeStart {
            window_bytes: 3_164_062,
            pacing_bytes_per_s: 21_093_750,
        };
        assert_eq!(resume.start, Some(start));
        let bounded = path(600, Some(u64::MAX)).resume(32 << 20).start.unwrap();
        assert_eq!(bounded.window_bytes, 32 << 20);
        let short = path(1, None).resume(32 << 20);
        assert_eq!((short.initial_rtt, short.start), (100 * MS, None));
        let late = path(60_000, None).resume(32 << 20);
        assert_eq!(late.initial_rtt, 3_000 * MS);
    }

    // Protects the memory of the node.
    #[test]
    fn no_more_peers_are_remembered_than_the_bound_says() {
        let config = PathConfig {
            peers_max: 2,
            ..PathConfig::default()
        };
        let mut memory = PathMemory::new(config, []);
        for seed in 0..4 {
            memory.measured(&id(seed), sample(MS, None, false));
        }
        assert_eq!(memory.iter().count(), 2);
        memory.retain(|peer| *peer == id(1));
        memory.measured(&id(3), sample(MS, None, false));
        let held: Vec<_> = memory.iter().map(|(peer, _)| peer).collect();
        assert!(held.len() == 2 && held.contains(&id(1)) && held.contains(&id(3)));
    }
}
