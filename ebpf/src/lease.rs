//! The state that only a live node knows, set in the program under a lease: that it lives, its
//! stress, keys, peers and seeds.
//!
//! 1. Stress and counts are valid under the lease: after a node's death they lapse. The settings of
//!    the operator and the rules of the registry stay.
//! 2. One process at a time holds the lease; the number of its run tells its counts from those of
//!    the run before.
//! 3. A key is in its slot before it signs; a generation of the sketch is empty before it is
//!    charged.

use std::collections::BTreeMap;
use std::mem::offset_of;
use std::time::Duration;

use libbpf_rs::{MapCore as _, MapFlags};
use millrace_edge_policy::cid::Keys;
use millrace_edge_policy::limiter::{Limit, Purpose, Rotation, Sketch};
use millrace_edge_policy::settings::{Limits, levels};
use millrace_edge_policy::siphash::Key;
use millrace_edge_policy::source::Source;
use millrace_edge_policy::stress::Level;
use rustix::rand::{GetRandomFlags, getrandom};

use crate::abi::{EdgeBucket, EdgeControl, EdgeKey, GENERATIONS};
use crate::clock::{now_ns, wall_offset_ns};
use crate::maps::{Maps, Plain, Table};

/// Sixteen unpredictable bytes from the kernel (`getrandom`).
///
/// # Errors
///
/// The kernel's error. There is none once its generator was seeded.
pub fn random() -> std::io::Result<[u8; 16]> {
    let mut bytes = [0; 16];
    let mut filled = 0;
    while filled < bytes.len() {
        filled += getrandom(&mut bytes[filled..], GetRandomFlags::empty())?;
    }
    Ok(bytes)
}

/// [`random`] for callers that cannot return an error: without random bytes, the process ends.
#[must_use]
pub fn unpredictable() -> [u8; 16] {
    random().unwrap_or_else(|error| {
        tracing::error!(%error, "the kernel gives no random bytes");
        std::process::abort()
    })
}

/// A source of unpredictable bytes.
pub trait Random: FnMut() -> [u8; 16] {}
impl<F: FnMut() -> [u8; 16]> Random for F {}

/// Makes up all secrets for programs that are about to be attached, so that no host can forge a
/// token or collide with a source before the first node runs.
///
/// # Errors
///
/// See [`random`].
pub fn make_secrets(maps: &Maps) -> std::io::Result<()> {
    for generation in 0..GENERATIONS {
        store_seed(maps, generation, Key::from_bytes(random()?));
    }
    let mut keys = [Key::default(); 4];
    for key in &mut keys {
        *key = Key::from_bytes(random()?);
    }
    store_keys(maps, &Keys { keys, active: 0 });
    Ok(())
}

/// The lease of a live node on the program.
#[derive(Debug)]
pub struct NodeLease<'m> {
    maps: &'m Maps,
    period: Duration,
    rotation: Rotation,
    /// The kernel's peers, once they were set.
    peers: Option<BTreeMap<u32, Key>>,
}

impl<'m> NodeLease<'m> {
    /// Begins the lease as run `run`, with the limits and keys of admission. The first period
    /// starts now.
    pub fn begin(maps: &'m Maps, run: u32, period: Duration, limits: &Limits, keys: &Keys) -> Self {
        let active = load::<u32>(maps, offset_of!(EdgeControl, limiter_active)) as usize & 1;
        let lease = Self {
            maps,
            period,
            rotation: Rotation::new(active, sketch_limits(limits), now_ns()),
            peers: None,
        };
        lease.set_stress(Level::Normal);
        lease.set_keys(keys);
        store(maps, offset_of!(EdgeControl, run), &run);
        lease.renew();
        lease
    }

    /// Renews the lease for another period. The node calls it several times in each.
    pub fn renew(&self) {
        store(
            self.maps,
            offset_of!(EdgeControl, wall_offset_ns),
            &wall_offset_ns(),
        );
        let lease_ns = u64::try_from(self.period.as_nanos()).unwrap_or(u64::MAX / 2);
        self.set_lease(now_ns().saturating_add(lease_ns));
    }

    /// Ends the lease: counts and stress lapse now.
    pub fn end(&self) {
        self.set_lease(0);
    }

    /// Sets the level of stress.
    pub fn set_stress(&self, level: Level) {
        store(self.maps, offset_of!(EdgeControl, stress), &(level as u32));
    }

    /// Sets the keys of connection IDs and tokens.
    pub fn set_keys(&self, keys: &Keys) {
        store_keys(self.maps, keys);
    }

    /// Replaces the registry peers in the kernel by `peers`, by node tag, if they are others.
    ///
    /// # Errors
    ///
    /// The kernel's error, for example when the map is full. Some peers are set then.
    pub fn set_peers(&mut self, peers: &BTreeMap<u32, Key>) -> Result<(), libbpf_rs::Error> {
        if self.peers.as_ref() == Some(peers) {
            return Ok(());
        }
        self.peers = None;
        let map = self.maps.peers();
        let stale: Vec<Vec<u8>> = map
            .keys()
            .filter(|key| tag_of(key).is_none_or(|tag| !peers.contains_key(&tag)))
            .collect();
        for key in stale {
            map.delete(&key)?;
        }
        for (tag, key) in peers {
            let value = [key.k0.to_le_bytes(), key.k1.to_le_bytes()].concat();
            map.update(&tag.to_le_bytes(), &value, MapFlags::ANY)?;
        }
        self.peers = Some(peers.clone());
        Ok(())
    }

    /// Takes the limits of a published set into account.
    pub fn set_limits(&mut self, limits: &Limits) {
        self.rotation.widen(sketch_limits(limits));
    }

    /// Turns the sketch when a turn is due. The node calls it about once a second.
    pub fn tick(&mut self, random: impl Random) {
        self.tick_at(now_ns(), random);
    }

    /// [`Self::tick`] at this time, in nanoseconds of CLOCK_MONOTONIC.
    pub fn tick_at(&mut self, now_ns: u64, mut random: impl Random) {
        if now_ns < self.rotation.due_at_ns() {
            return;
        }
        self.sketch().clear_idle();
        if let Some(switch) = self.rotation.turn(now_ns, random()) {
            store_seed(self.maps, switch.active, switch.seed);
            let until = offset_of!(EdgeControl, limiter_old_until_ns);
            store(self.maps, until, &switch.old_until_ns);
            let active = switch.active as u32;
            store(self.maps, offset_of!(EdgeControl, limiter_active), &active);
        }
    }

    fn set_lease(&self, until_ns: u64) {
        store(
            self.maps,
            offset_of!(EdgeControl, lease_until_ns),
            &until_ns,
        );
    }

    fn sketch(&self) -> Sketch<'m, Table<EdgeBucket>> {
        sketch(self.maps)
    }
}

/// The kernel's sketch, in its present state.
pub fn sketch(maps: &Maps) -> Sketch<'_, Table<EdgeBucket>> {
    let control: EdgeControl = maps.control.load(0);
    Sketch {
        buckets: &maps.limiter,
        seed: control.seed.map(|seed| Key {
            k0: seed.k0,
            k1: seed.k1,
        }),
        active: control.limiter_active as usize & 1,
        old_until_ns: control.limiter_old_until_ns,
    }
}

/// Charges a source that has shown its address by completing a handshake: the kernel saw no token
/// of it.
pub fn charge_validated(maps: &Maps, source: Source, limit: Limit) {
    sketch(maps).charge_source(source, Purpose::Quic, &levels(limit), now_ns());
}

fn sketch_limits(limits: &Limits) -> impl Iterator<Item = Limit> {
    levels(limits.source_quic)
        .into_iter()
        .chain(levels(limits.source_tcp))
        .chain([limits.peer, limits.proof, limits.id])
}

fn tag_of(key: &[u8]) -> Option<u32> {
    Some(u32::from_le_bytes(key.try_into().ok()?))
}

fn store_seed(maps: &Maps, generation: usize, seed: Key) {
    let offset = offset_of!(EdgeControl, seed) + generation * size_of::<EdgeKey>();
    store(maps, offset, &EdgeKey::from(seed));
}

fn store_keys(maps: &Maps, keys: &Keys) {
    for (place, key) in keys.keys.iter().enumerate() {
        let offset = offset_of!(EdgeControl, keys) + place * size_of::<EdgeKey>();
        store(maps, offset, &EdgeKey::from(*key));
    }
    store(
        maps,
        offset_of!(EdgeControl, key_active),
        &u32::from(keys.active),
    );
}

fn store<F: Plain>(maps: &Maps, offset: usize, value: &F) {
    maps.control.store_part(0, offset, value);
}

fn load<F: Plain>(maps: &Maps, offset: usize) -> F {
    maps.control.load_part(0, offset)
}
