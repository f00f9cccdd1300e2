//! The programs with a clock that tests set, and packets for them.

use std::net::{IpAddr, SocketAddr};

use etherparse::PacketBuilder;
use libbpf_rs::{MapCore as _, MapFlags};
use millrace_edge::abi::{EdgeBucket, EdgeConfig, EdgeControl, EdgeMock};
use millrace_edge::load::{LoadOptions, Loaded, Program, Run};
use millrace_edge::metrics::Counters;
use millrace_edge::publish::Publisher;
use millrace_edge_policy::cid::{Keys, LocalCid, Place};
use millrace_edge_policy::reason::Reason;
use millrace_edge_policy::rules::{Bounds, Rule, RuleAction, Temporary, compile};
use millrace_edge_policy::settings::{Caps, DefaultAction, Kind, Limits, Mode, Service, Settings};
use millrace_edge_policy::siphash::Key;
use millrace_edge_policy::{limiter::Limit, proof, token};

use super::privileged;

pub const QUIC_PORT: u16 = 4100;
pub const TCP_PORT: u16 = 8080;
/// In the middle of an epoch of each kind.
pub const START_NS: u64 = (5 << 42) + (7 << 34) + (1 << 33);
/// Sources that a rule rejects.
pub const REJECTED: &str = "203.0.113.0/24";
/// The one registry peer.
const PEER: u32 = 0xabcd;
const CLIENT_PORT: u16 = 40_000;
const INITIAL_BYTES: usize = 1_200;

/// The programs in the kernel, attached to nothing. Every source may send to a QUIC and a TCP port,
/// without limits.
#[derive(Debug)]
pub struct Mocked {
    pub loaded: Loaded,
}

impl Mocked {
    /// None, said aloud, without the rights.
    pub fn load(test: &str) -> Option<Self> {
        if !privileged(test) {
            return None;
        }
        let loaded =
            Loaded::load(&LoadOptions::default()).unwrap_or_else(|error| panic!("{error}"));
        let mocked = Self { loaded };
        let maps = mocked.loaded.maps();
        Publisher::new(maps)
            .publish(&settings_in_force(), 1, None)
            .unwrap();
        let mut control: EdgeControl = maps.control.load(0);
        control.keys = keys().keys.map(Into::into);
        control.key_active = u32::from(keys().active);
        control.seed = [Key { k0: 1, k1: 2 }, Key { k0: 3, k1: 4 }].map(Into::into);
        control.lease_until_ns = u64::MAX;
        maps.control.store(0, &control);
        let peer = [peer_key().k0.to_le_bytes(), peer_key().k1.to_le_bytes()].concat();
        maps.peers()
            .update(&PEER.to_le_bytes(), &peer, MapFlags::ANY)
            .unwrap();
        mocked.set_clock(START_NS);
        Some(mocked)
    }

    /// Changes the set in force.
    pub fn configure(&self, change: impl FnOnce(&mut EdgeConfig)) {
        let maps = self.loaded.maps();
        let generation = Publisher::new(maps).in_force();
        let mut config = maps.load_config(generation);
        change(&mut config);
        maps.store_config(generation, &config);
    }

    pub fn control(&self, change: impl FnOnce(&mut EdgeControl)) {
        let control = &self.loaded.maps().control;
        let mut value = control.load(0);
        change(&mut value);
        control.store(0, &value);
    }

    pub fn set_clock(&self, now_ns: u64) {
        self.set_environment(now_ns, false);
    }

    /// With `read_only`, packets are decided on and charge nothing.
    pub fn set_environment(&self, now_ns: u64, read_only: bool) {
        let mock = EdgeMock {
            now_ns,
            cookie: 1,
            read_only: u32::from(read_only),
            ..EdgeMock::default()
        };
        self.loaded.maps().mock.store(0, &mock);
    }

    /// Empties the sketch and refills the budgets.
    pub fn forget(&self) {
        let maps = self.loaded.maps();
        for table in [&maps.limiter, &maps.budgets] {
            for index in 0..table.len() {
                table.store(index, &EdgeBucket { word: [0; 8] });
            }
        }
    }

    /// The decision on one packet. For one thread at a time: the kernel leaves its decision in a
    /// map.
    pub fn reason(&self, frame: &[u8]) -> Reason {
        self.run(frame);
        Reason::from_index(self.loaded.maps().decision.load(0).reason).unwrap()
    }

    /// Shows a packet to the program, on the calling thread's CPU.
    ///
    /// Never several times in one call: for that the kernel changes its own code first, which takes
    /// milliseconds and a lock, and two threads would hardly ever be at it together.
    pub fn run(&self, frame: &[u8]) -> Run {
        self.loaded.run(Program::EdgeTest, frame, 1).unwrap()
    }

    pub fn counters(&self) -> Counters {
        Counters::read(self.loaded.maps().counters()).unwrap()
    }
}

pub fn settings_in_force() -> millrace_edge_policy::rules::Compiled {
    let service = |port, kind| Service {
        port,
        kind,
        default_action: DefaultAction::Allow,
    };
    let none = Limit::NONE;
    let settings = Settings {
        mode: Mode::Enforce,
        services: vec![service(QUIC_PORT, Kind::Quic), service(TCP_PORT, Kind::Tcp)],
        limits: Limits {
            unvalidated: none,
            syn: none,
            version: none,
            dial_request: none,
            reject: none,
            source_quic: none,
            source_tcp: none,
            peer: none,
            proof: none,
            id: none,
        },
        caps: Caps { quic: 0, tcp: 0 },
        ..Settings::default()
    };
    let reject = Rule::temporary(&Temporary {
        prefix: REJECTED.parse().unwrap(),
        action: RuleAction::Reject,
        until_unix_seconds: u64::MAX,
    });
    let bounds = Bounds {
        rules_max: 10,
        nodes4_max: 100,
        nodes6_max: 100,
    };
    compile(&settings, &[reject], bounds).unwrap()
}

pub fn keys() -> Keys {
    Keys {
        keys: [1, 2, 3, 4].map(|number| Key {
            k0: number,
            k1: !number,
        }),
        active: 2,
    }
}

fn peer_key() -> Key {
    Key { k0: 5, k1: 6 }
}

/// A UDP datagram, or a SYN to the TCP port without payload, from an address of either family.
fn frame(source: IpAddr, payload: Option<&[u8]>) -> Vec<u8> {
    let link = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 2], [2, 0, 0, 0, 0, 1]);
    let ip = match source {
        IpAddr::V4(source) => link.ipv4(source.octets(), [192, 0, 2, 1], 64),
        IpAddr::V6(source) => link.ipv6(source.octets(), [0xfd; 16], 64),
    };
    let mut frame = Vec::new();
    match payload {
        Some(payload) => ip
            .udp(CLIENT_PORT, QUIC_PORT)
            .write(&mut frame, payload)
            .unwrap(),
        None => ip
            .tcp(CLIENT_PORT, TCP_PORT, 1, 64_000)
            .syn()
            .write(&mut frame, &[])
            .unwrap(),
    }
    frame
}

/// Gives a frame of this module another source of its family. The program does not check checksums.
pub fn set_source(frame: &mut [u8], source: IpAddr) {
    match source {
        IpAddr::V4(source) => frame[26..30].copy_from_slice(&source.octets()),
        IpAddr::V6(source) => frame[22..38].copy_from_slice(&source.octets()),
    }
}

/// A first packet of this version.
pub fn long_header(version: u32, id: &[u8], token: &[u8]) -> Vec<u8> {
    let mut payload = vec![0xc0];
    payload.extend(version.to_be_bytes());
    payload.push(id.len() as u8);
    payload.extend(id);
    payload.push(0);
    payload.push(token.len() as u8);
    payload.extend(token);
    payload.resize(INITIAL_BYTES, 0x5a);
    payload
}

/// A client's very first packet.
pub fn initial(source: IpAddr) -> Vec<u8> {
    frame(source, Some(&long_header(1, &[7; 8], &[])))
}

/// A client's first packet after a Retry.
pub fn initial_with_token(source: IpAddr, now_ns: u64) -> Vec<u8> {
    let client = SocketAddr::new(source, CLIENT_PORT);
    let minted = token::mint(&[7; 8], client, &keys(), now_ns).unwrap();
    frame(
        source,
        Some(&long_header(1, &minted.retry_id, &minted.token)),
    )
}

/// First packet of a registry peer that proves itself; each nonce makes another proof.
pub fn initial_of_peer(source: IpAddr, nonce: u64, now_ns: u64) -> Vec<u8> {
    let [n0, n1, n2, n3, n4, n5, ..] = nonce.to_le_bytes();
    let nonce = [n0, n1, n2, n3, n4, n5];
    let id = proof::make(0, PEER, nonce, source, now_ns, peer_key());
    frame(source, Some(&long_header(1, &id, &[])))
}

/// A packet of an established connection.
pub fn short_header(source: IpAddr, now_ns: u64) -> Vec<u8> {
    let place = Place {
        shard: 0,
        generation: 1,
        slot: 2,
    };
    let mut payload = vec![0x40];
    payload.extend(LocalCid::issue_roaming(place, 3, &keys(), now_ns));
    payload.resize(60, 0x5a);
    frame(source, Some(&payload))
}

/// A first packet of a version that the node does not speak.
pub fn initial_of_another_version(source: IpAddr) -> Vec<u8> {
    frame(source, Some(&long_header(2, &[7; 8], &[])))
}

pub fn dial_request(source: IpAddr) -> Vec<u8> {
    let mut payload = vec![0x0d, 0];
    payload.extend(b"dial");
    payload.resize(80, 0);
    frame(source, Some(&payload))
}

pub fn syn(source: IpAddr) -> Vec<u8> {
    frame(source, None)
}
