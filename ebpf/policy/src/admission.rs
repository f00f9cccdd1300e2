//! Who may open a QUIC connection, decided in user space.
//!
//! Where no XDP program runs, or one that only counts, this holds the same caps and limits, with the reasons that user space can
//! see; where one enforces, it validates tokens and keeps the exact count of connections. Asked once for each first packet and for each
//! connection that opens or closes, by all shards at once; never for other packets.
//!
//! 1. A source is charged only when it has shown its address: by a token, or by completing a handshake.
//! 2. Nothing about an address alone exempts it; a registry peer proves itself in its first packet.
//! 3. The count of a source's connections is exact: every `opened` that was granted is closed once.
//! 4. Memory is bounded: the sketch by its lines, the counts by `sources_max`.

mod counts;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::cid::{KeySchedule, Keys, LocalCid};
use crate::limiter::{Limit, OwnedLines, Purpose, Rotation, Sketch, charge_word};
use crate::proof;
use crate::reason::Reason;
use crate::settings::{self, Caps, Limits};
use crate::siphash::Key;
use crate::source::Source;
use crate::stress::Level;
use crate::token::{self, BadToken, Minted, OriginalId};

use counts::Counts;

/// What may be admitted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdmissionConfig {
    /// Rates; those of QUIC connections and of peers count here.
    pub limits: Limits,
    /// Connections of one source at a time; the one for QUIC counts here.
    pub caps: Caps,
    /// Sources that may have connections at a time.
    pub sources_max: usize,
    /// With this many handshakes half open, who has not shown an address gets a Retry.
    pub half_open_retry: usize,
    /// Lines of each generation of the sketch: 128 bytes of memory for each.
    pub sketch_lines: usize,
}

impl Default for AdmissionConfig {
    /// The operator's defaults, and room for 16,000 busy sources.
    fn default() -> Self {
        Self {
            limits: Limits::default(),
            caps: Caps::default(),
            sources_max: 65_536,
            half_open_retry: 512,
            sketch_lines: 1 << 14,
        }
    }
}

/// What becomes of a first packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum First {
    /// A connection may begin.
    Accept {
        /// From a valid token: the ID that the client began with. Its address is shown.
        original: Option<OriginalId>,
        /// Node tag of the registry peer that proved itself.
        peer: Option<u32>,
    },
    /// It is answered with this.
    Retry(Minted),
    /// It ends here.
    Drop(Reason),
}

/// Decides for all shards of a process.
#[derive(Debug)]
pub struct Admission {
    half_open_retry: usize,
    lines: OwnedLines,
    unvalidated: AtomicU64,
    stress: AtomicU32,
    kernel_charges: AtomicBool,
    present: RwLock<Present>,
    housekeeping: Mutex<Housekeeping>,
    counts: Counts,
}

/// What holds now.
#[derive(Debug)]
struct Present {
    limits: Limits,
    keys: Keys,
    peers: BTreeMap<u32, Key>,
    seed: [Key; 2],
    active: usize,
    old_until_ns: u64,
}

/// What will hold next.
#[derive(Debug)]
struct Housekeeping {
    schedule: KeySchedule,
    rotation: Rotation,
}

/// A first packet, and when it came.
struct Packet<'p> {
    from: SocketAddr,
    dcid: &'p [u8],
    token: &'p [u8],
    half_open: usize,
    now_ns: u64,
}

impl Admission {
    /// Admits within `config`, from `now_ns` on. `random` gives unpredictable bytes: six times.
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
            lines: OwnedLines::new(config.sketch_lines),
            unvalidated: AtomicU64::new(0),
            stress: AtomicU32::new(Level::Normal as u32),
            kernel_charges: AtomicBool::new(false),
            present: RwLock::new(present),
            housekeeping: Mutex::new(Housekeeping { schedule, rotation }),
            counts: Counts::new(config.caps.quic, config.sources_max),
        }
    }

    /// What becomes of a packet that may begin a connection.
    ///
    /// `dcid` is its destination ID and belongs to no live connection, `token` its token (empty: none), `half_open` the handshakes
    /// begun and not completed, `wall_ns` nanoseconds since 1970.
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
            // Ours, and its connection is gone: nobody may choose it for a new one.
            return First::Drop(Reason::QuicUnknownId);
        }
        let peer = proof::check(dcid, from.ip(), wall_ns, |tag| {
            present.peers.get(&tag).copied()
        });
        let decided = match peer {
            Some(tag) => self.proven(&present, &packet, tag),
            None => self.stranger(&present, &packet),
        };
        decided.unwrap_or_else(First::Drop)
    }

    /// A handshake completed without a token: its source has now shown its address, and is charged.
    ///
    /// Where the kernel charges, its sketch is charged instead, by whoever maps it.
    pub fn validated(&self, from: SocketAddr, now_ns: u64) {
        if !self.kernel_charges() {
            let present = self.present();
            let limits = settings::levels(present.limits.source_quic);
            let source = Source::of(from.ip());
            self.sketch(&present)
                .charge_source(source, Purpose::Quic, &limits, now_ns);
        }
    }

    /// Counts a connection whose handshake completed; refused at the cap. What was granted must be [`Admission::closed`] once.
    pub fn opened(&self, from: SocketAddr) -> Result<(), Reason> {
        if self.counts.open(Source::of(from.ip())) {
            Ok(())
        } else {
            Err(Reason::QuicSourceCap)
        }
    }

    /// A connection that [`Admission::opened`] granted is over.
    pub fn closed(&self, from: SocketAddr) {
        self.counts.close(Source::of(from.ip()));
    }

    /// Connections that this source has.
    pub fn connections(&self, source: Source) -> u32 {
        self.counts.of(source)
    }

    /// Sets the level of stress, for all shards.
    pub fn set_stress(&self, level: Level) {
        self.stress.store(level as u32, Ordering::Relaxed);
    }

    /// Sets whether the kernel charges sources and budgets; then they are not charged here as well.
    pub fn set_kernel_charges(&self, charges: bool) {
        self.kernel_charges.store(charges, Ordering::Relaxed);
    }

    /// Puts other limits and caps into force. What sources have spent and opened so far still counts.
    pub fn set_limits(&self, limits: Limits, caps: Caps) {
        self.housekeeping().rotation.widen(sketch_limits(&limits));
        self.counts.set_cap(caps.quic);
        self.present_mut().limits = limits;
    }

    /// Sets the keys that we share with registry peers, by node tag.
    pub fn set_peers(&self, peers: BTreeMap<u32, Key>) {
        self.present_mut().peers = peers;
    }

    /// The keys of connection IDs and tokens, as they are now.
    pub fn keys(&self) -> Keys {
        self.present().keys
    }

    /// Changes keys and seeds when it is time to. To be called about once a second; true: the keys changed. `random` gives
    /// unpredictable bytes.
    pub fn tick(&self, now_ns: u64, mut random: impl FnMut() -> [u8; 16]) -> bool {
        let mut housekeeping = self.housekeeping();
        let changed = housekeeping.schedule.advance(now_ns, &mut random);
        if changed {
            self.present_mut().keys = housekeeping.schedule.keys();
        }
        if now_ns >= housekeeping.rotation.due_at_ns() {
            // What the idle generation held is past, so nobody reads it; emptying takes too long to hold the lock that shards wait for.
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

    /// A registry peer that proved itself.
    fn proven(&self, present: &Present, packet: &Packet<'_>, tag: u32) -> Result<First, Reason> {
        if !self.kernel_charges() {
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
        }
        Ok(First::Accept {
            original: None,
            peer: Some(tag),
        })
    }

    /// Anybody else.
    fn stranger(&self, present: &Present, packet: &Packet<'_>) -> Result<First, Reason> {
        if OriginalId::new(packet.dcid).is_none() {
            return Err(Reason::QuicIdLength);
        }
        let stress = Level::from_number(self.stress.load(Ordering::Relaxed));
        if stress == Level::Peers {
            return Err(Reason::QuicPeersOnly);
        }
        let original = packet.original(&present.keys)?;
        let source = Source::of(packet.from.ip());
        if self.counts.is_full(source) {
            return Err(Reason::QuicSourceCap);
        }
        self.within_rates(present, source, original.is_some(), packet.now_ns)?;
        if original.is_some() || self.may_be_unvalidated(present, stress, packet) {
            return Ok(First::Accept {
                original,
                peer: None,
            });
        }
        token::mint(packet.dcid, packet.from, &present.keys, packet.now_ns)
            .map(First::Retry)
            .ok_or(Reason::QuicRetryFailed)
    }

    /// Looks at all levels of the source, and charges them if it has shown its address.
    fn within_rates(
        &self,
        present: &Present,
        source: Source,
        shown: bool,
        now_ns: u64,
    ) -> Result<(), Reason> {
        let sketch = self.sketch(present);
        let limits = &settings::levels(present.limits.source_quic);
        let within = self.kernel_charges()
            || sketch.look_source(source, Purpose::Quic, limits, now_ns)
                && (!shown || sketch.charge_source(source, Purpose::Quic, limits, now_ns));
        if within {
            Ok(())
        } else {
            Err(Reason::QuicSourceRate)
        }
    }

    fn may_be_unvalidated(&self, present: &Present, stress: Level, packet: &Packet<'_>) -> bool {
        stress == Level::Normal
            && packet.half_open < self.half_open_retry
            && (self.kernel_charges()
                || charge_word(&self.unvalidated, present.limits.unvalidated, packet.now_ns))
    }

    fn kernel_charges(&self) -> bool {
        self.kernel_charges.load(Ordering::Relaxed)
    }

    fn sketch(&self, present: &Present) -> Sketch<'_, OwnedLines> {
        Sketch {
            lines: &self.lines,
            seed: present.seed,
            active: present.active,
            old_until_ns: present.old_until_ns,
        }
    }

    // No lock is held across code that could leave its data half changed, so a poisoned one is as good as any.

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
    /// What the token gives, if there is one.
    fn original(&self, keys: &Keys) -> Result<Option<OriginalId>, Reason> {
        if self.token.is_empty() {
            return Ok(None);
        }
        match token::open(self.token, self.dcid, self.from, keys, self.now_ns) {
            Ok(original) => Ok(Some(original)),
            Err(BadToken::Forged) => Err(Reason::QuicBadToken),
            Err(BadToken::Expired) => Err(Reason::QuicExpiredToken),
        }
    }
}

#[cfg(test)]
mod tests;
