//! Who may open a QUIC connection, decided in user space.
//!
//! Without an XDP program, or with one that only counts, this module enforces the same caps and
//! limits, with the reasons that user space can see. Under a program that enforces, it validates
//! tokens and keeps the exact counts of handshakes and connections. All shards ask it at once: for
//! each first packet, and for each handshake or connection that begins or ends; never for other
//! packets.
//!
//! 1. A source is charged only after it has shown its address: by a token, or by a completed
//!    handshake.
//! 2. No address is exempt; a registry peer proves itself in its first packet.
//! 3. The count of a source's connections is exact: the caller closes every granted `opened` once.
//!    The count of its half-open handshakes is exact too: the caller ends every accepted handshake
//!    once.
//! 4. The bounds on half-open handshakes do not depend on who charges: the kernel does not see how
//!    handshakes end.
//! 5. Memory is bounded: the sketch by its buckets, connections by `sources_max`, handshakes by the
//!    number that the shards hold.

mod counts;
mod handshakes;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::cid::{KeySchedule, Keys, LocalCid};
use crate::limiter::{Limit, OwnedBuckets, Purpose, Rotation, Sketch, charge_word};
use crate::proof;
use crate::reason::Reason;
use crate::settings::{self, Caps, Limits};
use crate::siphash::Key;
use crate::source::Source;
use crate::stress::Level;
use crate::token::{self, BadToken, Minted, OriginalId};

use counts::Counts;
use handshakes::HandshakeCounts;

/// Limits and bounds of admission.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdmissionConfig {
    /// Rates. Admission uses those of QUIC connections and of peers.
    pub limits: Limits,
    /// Connections of one source at a time. Admission uses the cap for QUIC.
    pub caps: Caps,
    /// Number of sources that may have connections at a time.
    pub sources_max: usize,
    /// From this many half-open handshakes on a shard, a client without a token gets a Retry.
    pub half_open_retry: usize,
    /// From this many half-open handshakes on a shard, only registry peers that prove themselves
    /// may begin another.
    pub half_open_non_members_max: usize,
    /// Half-open handshakes of one source, without those of proven peers. Twice that for its IPv4
    /// /24 or IPv6 /56, four times that for its /48; at most half of each without a token. 0: no
    /// bound.
    pub half_open_source_max: u32,
    /// Half-open handshakes of one registry peer that proved itself. 0: no bound.
    pub half_open_peer_max: u32,
    /// Buckets of each generation of the sketch. Each takes 128 bytes of memory: 64 in each
    /// generation.
    pub sketch_buckets: usize,
}

impl Default for AdmissionConfig {
    /// The operator's defaults, and room for 16,000 busy sources.
    fn default() -> Self {
        Self {
            limits: Limits::default(),
            caps: Caps::default(),
            sources_max: 65_536,
            half_open_retry: 0,
            half_open_non_members_max: 0,
            half_open_source_max: 16,
            half_open_peer_max: 16,
            sketch_buckets: 1 << 14,
        }
        .with_handshakes(1_024)
    }
}

impl AdmissionConfig {
    /// The bounds of a shard that holds `handshakes_max` handshakes: half of them without a token,
    /// all but a sixteenth without a proof. At nine tenths [`stress`](crate::stress) rises to peers
    /// only; a sixteenth lets that happen before non-members find the shard full.
    #[must_use]
    pub fn with_handshakes(self, handshakes_max: usize) -> Self {
        Self {
            half_open_retry: handshakes_max / 2,
            half_open_non_members_max: handshakes_max - handshakes_max / 16,
            ..self
        }
    }
}

/// What entitles a handshake to begin. The handshake is counted under it until it is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entitlement {
    /// Nothing: the shard had room for a client that has not shown its address.
    Unvalidated,
    /// A valid token, which shows the client's address, with the ID that the client began with.
    Token(OriginalId),
    /// The proof of the registry peer with this node tag.
    Peer(u32),
}

/// Which bound of half-open handshakes is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Full {
    /// The shard's bound for non-members.
    Shard,
    /// The bound of the source, or of its prefix.
    Source,
    /// The bound of the registry peer.
    Peer,
}

impl Full {
    /// Label on `/metrics`. It is no [`Reason`], because the kernel never has it.
    pub fn label(self) -> &'static str {
        match self {
            Self::Shard => "handshakes_full",
            Self::Source => "source_handshakes_full",
            Self::Peer => "peer_handshakes_full",
        }
    }
}

/// The decision on a first packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum First {
    /// A handshake may begin, and counts as half open. The caller must call
    /// [`Admission::handshake_over`] once.
    Accept(Entitlement),
    /// The caller answers with this Retry.
    Retry(Minted),
    /// The caller drops the packet.
    Drop(Reason),
    /// The caller drops the packet: too many handshakes are half open.
    Full(Full),
}

/// Admission for all shards of a process.
#[derive(Debug)]
pub struct Admission {
    half_open_retry: usize,
    half_open_non_members_max: usize,
    buckets: OwnedBuckets,
    unvalidated: AtomicU64,
    stress: AtomicU32,
    kernel_charges: AtomicBool,
    present: RwLock<Present>,
    housekeeping: Mutex<Housekeeping>,
    counts: Counts,
    handshakes: HandshakeCounts,
}

/// What is in force.
#[derive(Debug)]
struct Present {
    limits: Limits,
    keys: Keys,
    peers: BTreeMap<u32, Key>,
    seed: [Key; 2],
    active: usize,
    old_until_ns: u64,
}

/// The schedules that decide what comes into force next.
#[derive(Debug)]
struct Housekeeping {
    schedule: KeySchedule,
    rotation: Rotation,
}

/// A first packet, and the time of its arrival.
struct Packet<'p> {
    from: SocketAddr,
    dcid: &'p [u8],
    token: &'p [u8],
    half_open: usize,
    now_ns: u64,
}

impl Admission {
    /// Admission within `config`, from `now_ns` (CLOCK_MONOTONIC, nanoseconds) on. Takes six
    /// unpredictable values from `random`.
    pub fn new(config: AdmissionConfig, now_ns: u64, mut random: impl FnMut() -> [u8; 16]) -> Self {
        let schedule = KeySchedule::new(now_ns, &mut random);
        let rotation = Rotation::new(0, sketch_limits(&config.limits), now_ns);
        let present = Present {
            limits: config.limits,
            keys: schedule.keys(),
            peers: BTreeMap::new(),
            seed: [random(), random()].map(Key::from_bytes),
            active: 0,
            old_until_ns: 0,
        };
        Self {
            half_open_retry: config.half_open_retry,
            half_open_non_members_max: config.half_open_non_members_max,
            buckets: OwnedBuckets::new(config.sketch_buckets),
            unvalidated: AtomicU64::new(0),
            stress: AtomicU32::new(Level::Normal as u32),
            kernel_charges: AtomicBool::new(false),
            present: RwLock::new(present),
            housekeeping: Mutex::new(Housekeeping { schedule, rotation }),
            counts: Counts::new(config.caps.quic, config.sources_max),
            handshakes: HandshakeCounts::new(
                config.half_open_source_max,
                config.half_open_peer_max,
            ),
        }
    }

    /// Decides on a packet that may begin a connection.
    ///
    /// `dcid` is its destination ID, which belongs to no live connection. `token` is its token,
    /// empty if it has none. `half_open` is the number of handshakes that the asking shard has
    /// begun and not completed; the largest number, where it has room for registry peers alone.
    /// `now_ns` is CLOCK_MONOTONIC, `wall_ns` the time since 1970, both in
    /// nanoseconds.
    pub fn first_packet(
        &self,
        from: SocketAddr,
        dcid: &[u8],
        token: &[u8],
        half_open: usize,
        now_ns: u64,
        wall_ns: u64,
    ) -> First {
        let packet = Packet {
            from,
            dcid,
            token,
            half_open,
            now_ns,
        };
        let present = self.present();
        if LocalCid::check(dcid, &present.keys, from, now_ns).is_ok() {
            // We issued this ID, and its connection is gone: a client may not choose it for a new
            // one.
            return First::Drop(Reason::QuicUnknownId);
        }
        let peer = proof::check(dcid, from.ip(), wall_ns, |tag| {
            present.peers.get(&tag).copied()
        });
        let decided = match peer {
            Some(tag) => self.proven(&present, &packet, tag),
            None => self.non_member(&present, &packet),
        };
        decided.unwrap_or_else(First::Drop)
    }

    /// Ends a handshake that [`First::Accept`] granted, whether it completed or failed.
    pub fn handshake_over(&self, from: SocketAddr, by: Entitlement) {
        self.handshakes.end(Source::of(from.ip()), by);
    }

    /// Half-open handshakes of this source, without those of proven peers.
    pub fn half_open(&self, source: Source) -> u32 {
        self.handshakes.of_source(source)
    }

    /// Half-open handshakes of the registry peer with this node tag.
    pub fn half_open_of_peer(&self, tag: u32) -> u32 {
        self.handshakes.of_peer(tag)
    }

    /// Charges a source whose handshake completed without a token: it has now shown its address.
    ///
    /// Charges nothing while the kernel charges: then the node charges the kernel's sketch instead.
    pub fn validated(&self, from: SocketAddr, now_ns: u64) {
        if !self.kernel_charges() {
            let present = self.present();
            let limits = settings::levels(present.limits.source_quic);
            let source = Source::of(from.ip());
            self.sketch(&present)
                .charge_source(source, Purpose::Quic, &limits, now_ns);
        }
    }

    /// Counts a connection whose handshake completed. The caller must call [`Admission::closed`]
    /// once for each success.
    ///
    /// # Errors
    ///
    /// [`Reason::QuicSourceCap`] if the source has as many connections as its cap allows, or if
    /// `sources_max` other sources have connections. Nothing is counted then.
    pub fn opened(&self, from: SocketAddr) -> Result<(), Reason> {
        if self.counts.open(Source::of(from.ip())) {
            Ok(())
        } else {
            Err(Reason::QuicSourceCap)
        }
    }

    /// Ends a connection that [`Admission::opened`] counted.
    pub fn closed(&self, from: SocketAddr) {
        self.counts.close(Source::of(from.ip()));
    }

    /// Number of connections that this source has.
    pub fn connections(&self, source: Source) -> u32 {
        self.counts.of(source)
    }

    /// Sets the level of stress for all shards.
    pub fn set_stress(&self, level: Level) {
        self.stress.store(level as u32, Ordering::Relaxed);
    }

    /// Sets whether the kernel charges sources and budgets. While it does, admission charges
    /// neither.
    pub fn set_kernel_charges(&self, charges: bool) {
        self.kernel_charges.store(charges, Ordering::Relaxed);
    }

    /// Puts other limits and caps in force. What sources have spent and opened still counts.
    pub fn set_limits(&self, limits: Limits, caps: Caps) {
        self.housekeeping().rotation.widen(sketch_limits(&limits));
        self.counts.set_cap(caps.quic);
        self.present_mut().limits = limits;
    }

    /// Sets the keys that this node shares with registry peers, by node tag.
    pub fn set_peers(&self, peers: BTreeMap<u32, Key>) {
        self.present_mut().peers = peers;
    }

    /// The keys of connection IDs and tokens that are in force.
    pub fn keys(&self) -> Keys {
        self.present().keys
    }

    /// Changes keys and seeds when they are due. The caller calls it about once a second, with
    /// CLOCK_MONOTONIC in nanoseconds and unpredictable values. Returns whether the keys changed.
    pub fn tick(&self, now_ns: u64, mut random: impl FnMut() -> [u8; 16]) -> bool {
        let mut housekeeping = self.housekeeping();
        let changed = housekeeping.schedule.advance(now_ns, &mut random);
        if changed {
            self.present_mut().keys = housekeeping.schedule.keys();
        }
        if now_ns >= housekeeping.rotation.due_at_ns() {
            // All words of the idle generation are past, so no shard reads them. Clearing takes too
            // long to hold the lock that shards wait for.
            let sketch = self.sketch(&self.present());
            sketch.clear_idle();
            if let Some(switch) = housekeeping.rotation.turn(now_ns, random()) {
                let mut present = self.present_mut();
                present.seed[switch.active] = switch.seed;
                present.old_until_ns = switch.old_until_ns;
                present.active = switch.active;
            }
        }
        changed
    }

    /// Decides on a packet of a registry peer that proved itself.
    fn proven(&self, present: &Present, packet: &Packet<'_>, tag: u32) -> Result<First, Reason> {
        self.begin(packet, Entitlement::Peer(tag), || {
            if self.kernel_charges() {
                return Ok(());
            }
            let sketch = self.sketch(present);
            let proof = Source::from_bytes(std::array::from_fn(|i| packet.dcid[i])).words();
            let peer = [u64::from(tag), 0];
            let now_ns = packet.now_ns;
            if !sketch.charge(proof, Purpose::Proof, 0, present.limits.proof, now_ns) {
                return Err(Reason::QuicProofReplayed);
            }
            if !sketch.charge(peer, Purpose::Peer, 0, present.limits.peer, now_ns) {
                return Err(Reason::QuicPeerBudget);
            }
            Ok(())
        })
    }

    /// Decides on a packet without a valid proof.
    fn non_member(&self, present: &Present, packet: &Packet<'_>) -> Result<First, Reason> {
        if OriginalId::new(packet.dcid).is_none() {
            return Err(Reason::QuicIdLength);
        }
        let stress = Level::from_number(self.stress.load(Ordering::Relaxed));
        if stress == Level::Peers {
            return Err(Reason::QuicPeersOnly);
        }
        let original = packet.original(&present.keys)?;
        let source = packet.source();
        if self.counts.is_full(source) {
            return Err(Reason::QuicSourceCap);
        }
        let sketch = self.sketch(present);
        let limits = &settings::levels(present.limits.source_quic);
        let (kernel_charges, now_ns) = (self.kernel_charges(), packet.now_ns);
        if !kernel_charges && !sketch.look_source(source, Purpose::Quic, limits, now_ns) {
            return Err(Reason::QuicSourceRate);
        }
        if let Some(original) = original {
            if packet.half_open >= self.half_open_non_members_max {
                return Ok(First::Full(Full::Shard));
            }
            return self.begin(packet, Entitlement::Token(original), || {
                if kernel_charges || sketch.charge_source(source, Purpose::Quic, limits, now_ns) {
                    Ok(())
                } else {
                    Err(Reason::QuicSourceRate)
                }
            });
        }
        if stress == Level::Normal
            && packet.half_open < self.half_open_retry
            && self.begin_unvalidated(present, packet)
        {
            return Ok(First::Accept(Entitlement::Unvalidated));
        }
        token::mint(packet.dcid, packet.from, &present.keys, packet.now_ns)
            .map(First::Retry)
            .ok_or(Reason::QuicRetryFailed)
    }

    /// Counts a handshake as half open if there is room and `charge` agrees. The charge comes last:
    /// a packet that is refused for lack of room costs no rate.
    fn begin(
        &self,
        packet: &Packet<'_>,
        by: Entitlement,
        charge: impl FnOnce() -> Result<(), Reason>,
    ) -> Result<First, Reason> {
        if let Err(full) = self.handshakes.begin(packet.source(), by) {
            return Ok(First::Full(full));
        }
        charge().inspect_err(|_| self.handshakes.end(packet.source(), by))?;
        Ok(First::Accept(by))
    }

    /// Whether a handshake without a token may begin. If not, the client gets a Retry, which costs
    /// the owner of a forged address nothing.
    fn begin_unvalidated(&self, present: &Present, packet: &Packet<'_>) -> bool {
        let (source, by) = (packet.source(), Entitlement::Unvalidated);
        if self.handshakes.begin(source, by).is_err() {
            return false;
        }
        let limit = present.limits.unvalidated;
        let within = self.kernel_charges() || charge_word(&self.unvalidated, limit, packet.now_ns);
        if !within {
            self.handshakes.end(source, by);
        }
        within
    }

    fn kernel_charges(&self) -> bool {
        self.kernel_charges.load(Ordering::Relaxed)
    }

    fn sketch(&self, present: &Present) -> Sketch<'_, OwnedBuckets> {
        Sketch {
            buckets: &self.buckets,
            seed: present.seed,
            active: present.active,
            old_until_ns: present.old_until_ns,
        }
    }

    // No lock is held across code that could leave its data half changed, so a poisoned lock holds
    // valid data.

    fn present(&self) -> RwLockReadGuard<'_, Present> {
        self.present.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn present_mut(&self) -> RwLockWriteGuard<'_, Present> {
        self.present.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn housekeeping(&self) -> MutexGuard<'_, Housekeeping> {
        self.housekeeping
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

fn sketch_limits(limits: &Limits) -> impl Iterator<Item = Limit> {
    settings::levels(limits.source_quic)
        .into_iter()
        .chain([limits.peer, limits.proof])
}

impl Packet<'_> {
    fn source(&self) -> Source {
        Source::of(self.from.ip())
    }

    /// The original ID in the token, if the packet has one of a node. One of anybody else counts as
    /// none.
    fn original(&self, keys: &Keys) -> Result<Option<OriginalId>, Reason> {
        if self.token.is_empty() {
            return Ok(None);
        }
        match token::open(self.token, self.dcid, self.from, keys, self.now_ns) {
            Ok(original) => Ok(Some(original)),
            Err(BadToken::Unknown) => Ok(None),
            Err(BadToken::Forged) => Err(Reason::QuicBadToken),
            Err(BadToken::Expired) => Err(Reason::QuicExpiredToken),
        }
    }
}

#[cfg(test)]
mod tests;
