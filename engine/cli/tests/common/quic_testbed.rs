//! Two namespaces with the edge in the kernel on both ends of the cable, a listener behind it, and
//! the peer that dials it.
#![allow(unreachable_pub, reason = "shared by test crates")]

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use libbpf_rs::MapHandle;
use millrace_edge::clock::now_ns;
use millrace_edge::counts::Counts;
use millrace_edge::edge::{AttachOptions, Edge};
use millrace_edge::frame::{Description, Shape};
use millrace_edge::interface::AttachMode;
use millrace_edge::lease::{self, NodeLease};
use millrace_edge::load::LoadOptions;
use millrace_edge::metrics::Counters;
use millrace_edge_policy::admission::{Admission, AdmissionConfig};
use millrace_edge_policy::limiter::Limit;
use millrace_edge_policy::reason::Reason;
use millrace_edge_policy::rules::{Bounds, compile};
use millrace_edge_policy::settings::{self, DefaultAction, Limits, Mode, Service, Settings};
use millrace_edge_policy::siphash::Key;
use millrace_edge_policy::source::Source;
use millrace_edge_policy::stress::Level;
use millrace_protocol::identity::SigningKey;
use millrace_testkit::until;
use millrace_transport::{ConnectionCounts, EdgeStart, PathConfig, PathProfile, TransportConfig};

use crate::common::namespace::{NODE, NON_MEMBER, OPERATOR, Pair, Pinned, privileged};
use crate::transport::{Node, key, member, shard_config, topology};

pub const POOL_BYTES: u64 = 64 << 20;
pub const BODY_BYTES: usize = 16 << 20;
/// Longer than any test takes: no test renews it.
pub const LEASE: Duration = Duration::from_secs(600);
/// Packets with the same proof: enough for a handshake on a slow machine, and no more come within a
/// test.
pub const PROOF: u64 = 16;
pub const RUN: u32 = 7;

pub const LISTENER: SocketAddr = SocketAddr::new(IpAddr::V4(NODE), 4100);
pub const DIALLER: SocketAddr = SocketAddr::new(IpAddr::V4(OPERATOR), 4101);
/// No host has it.
const NOWHERE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 77, 0, 250)), 4101);
/// On the remote host, on the way from the dialler to the listener.
pub const BETWEEN: SocketAddr = SocketAddr::new(IpAddr::V4(NON_MEMBER), 4100);

/// Namespaces and programs. Dropped in this order.
pub struct Testbed {
    pub edge: Arc<Edge>,
    _pinned: [Pinned; 2],
    pub pair: Pair,
    _folder: tempfile::TempDir,
}

impl Testbed {
    /// None where it cannot be made; that was said then.
    pub fn new(test: &str) -> Option<Self> {
        if !privileged(test) {
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let pair = Pair::new("quic");
        let pinned = ["node", "remote"].map(|side| Pinned(folder.path().join(side)));
        let attach = |pinned: &Pinned, interface: &str| {
            let options = AttachOptions {
                interfaces: vec![interface.into()],
                mode: AttachMode::Native,
                sizes: sizes(),
            };
            Edge::attach(&pinned.pins(), &options).unwrap()
        };
        let [at_node, at_remote] = &pinned;
        let edge = pair.node.enter(|| attach(at_node, "mr0"));
        // Nothing is ever put in force there: it passes everything.
        pair.remote.enter(|| attach(at_remote, "mr1"));
        Some(Self {
            edge: Arc::new(edge),
            _pinned: pinned,
            pair,
            _folder: folder,
        })
    }

    pub fn count(&self, reason: Reason) -> u64 {
        self.counters().acted_on(reason)
    }

    pub fn counters(&self) -> Counters {
        Counters::read(self.edge.maps().counters()).unwrap()
    }

    /// What was decided since then, with the number of packets.
    pub fn since(&self, before: &Counters) -> BTreeMap<&'static str, u64> {
        let now = self.counters();
        let differences = Reason::ALL.iter().map(|reason| {
            let packets = now.acted_on(*reason) - before.acted_on(*reason);
            (reason.label(), packets)
        });
        differences.filter(|(_, packets)| *packets > 0).collect()
    }

    /// QUIC connections of a source, as the kernel sees them.
    pub fn connections(&self, source: Ipv4Addr) -> u32 {
        let description = Description {
            from: (source, 40_000).into(),
            to_port: LISTENER.port(),
            shape: Shape::QuicInitial,
            payload_bytes: None,
        };
        let trace = self.edge.trace(&description.frame()).unwrap();
        trace.connections.quic
    }

    /// A socket of the remote host that sends to the listener.
    pub fn socket(&self, from: Ipv4Addr) -> UdpSocket {
        let socket = self.pair.remote.enter(|| UdpSocket::bind((from, 0)));
        let socket = socket.unwrap();
        socket.connect(LISTENER).unwrap();
        socket
    }
}

pub fn sizes() -> LoadOptions {
    LoadOptions {
        trie_nodes4: 64,
        trie_nodes6: 64,
        limiter_buckets: 1_024,
        rules_max: 16,
        peers_max: 16,
        sources_max: 64,
        replies_max: 16,
        ..LoadOptions::default()
    }
}

/// Tells the kernel what the transport counts.
#[derive(Debug)]
pub struct Told {
    edge: Arc<Edge>,
    counts: Counts,
    source_quic: Limit,
}

impl ConnectionCounts for Told {
    fn opened(&self, source: Source) {
        self.counts.opened(source.to_ip());
    }

    fn closed(&self, source: Source) {
        self.counts.closed(source.to_ip());
    }

    fn validated(&self, source: Source) {
        lease::charge_validated(self.edge.maps(), source, self.source_quic);
    }
}

/// A listener behind the edge, and the key of the peer that dials it.
pub struct ConnectedTestbed<'g> {
    pub testbed: &'g Testbed,
    pub listener: Node,
    pub dialler: SigningKey,
    pub admission: Arc<Admission>,
    pub lease: NodeLease<'g>,
}

impl<'g> ConnectedTestbed<'g> {
    pub fn new(testbed: &'g Testbed) -> Self {
        let mut keys = [key(1), key(2)];
        keys.sort_by_key(SigningKey::node_id);
        let [dialler, listener] = keys;
        let limits = Limits {
            proof: Limit::per(1, Duration::from_secs(600), PROOF),
            ..Limits::default()
        };
        put_in_force(&testbed.edge, limits);
        let config = AdmissionConfig {
            limits,
            ..AdmissionConfig::default()
        };
        let random = || lease::random().unwrap();
        let admission = Arc::new(Admission::new(config, now_ns(), random));
        admission.set_kernel_charges(true);
        let maps = testbed.edge.maps();
        let lease = NodeLease::begin(maps, RUN, LEASE, &limits, &admission.keys());
        let map = MapHandle::try_from(maps.quic_sources()).unwrap();
        let told = Told {
            edge: Arc::clone(&testbed.edge),
            counts: Counts::new(map, RUN).unwrap(),
            source_quic: limits.source_quic,
        };
        let edge = EdgeStart {
            admission: Some(Arc::clone(&admission)),
            counts: Some(Arc::new(told)),
            ..EdgeStart::default()
        };
        // A dial request that reached the dialler would tell it where the listener is, and a test's
        // dialler may know of a NAT only.
        let members = [member(&dialler, NOWHERE), member(&listener, LISTENER)];
        let topology = topology(members, 1);
        let listener = testbed.pair.node.enter(|| {
            let shards = vec![shard_config(POOL_BYTES); 2];
            Node::start_behind(listener, LISTENER, &topology, config_of(), shards, edge)
        });
        let mut connected = Self {
            testbed,
            listener,
            dialler,
            admission,
            lease,
        };
        connected.know_peers(true);
        connected
    }

    pub fn press(&self, level: Level) {
        self.admission.set_stress(level);
        self.lease.set_stress(level);
    }

    /// Whether proofs of peers are known. Without its key the dialler is a client like any other.
    pub fn know_peers(&mut self, known: bool) {
        let keys: BTreeMap<u32, Key> = if known {
            self.listener.transport.peer_keys()
        } else {
            BTreeMap::new()
        };
        assert_eq!(keys.len(), usize::from(known));
        self.lease.set_peers(&keys).unwrap();
        self.admission.set_peers(keys);
    }

    /// Starts the dialler, which believes the listener to be at `to`.
    pub fn dial(&self, to: SocketAddr) -> Node {
        let members = [
            member(&self.dialler, DIALLER),
            member(&self.listener.key, to),
        ];
        let topology = topology(members, 1);
        let key = self.dialler.clone();
        self.testbed.pair.remote.enter(|| {
            let shards = vec![shard_config(POOL_BYTES); 2];
            let edge = EdgeStart::default();
            Node::start_behind(key, DIALLER, &topology, config_of(), shards, edge)
        })
    }

    pub fn wait_until_up(&self, dialler: &Node) {
        dialler.wait_for_peers(&[self.listener.id()]);
        self.listener.wait_for_peers(&[dialler.id()]);
    }

    pub fn hang_up(&self, dialler: Node) {
        dialler.transport.shutdown();
        drop(dialler);
        self.listener.wait_for_peers(&[]);
    }

    /// Waits until this many more packets were decided about than `before`.
    pub fn wait_for(&self, reason: Reason, more: u64, before: &Counters) {
        let wanted = before.acted_on(reason) + more;
        until(reason.label(), || self.testbed.count(reason) >= wanted);
    }
}

pub fn config_of() -> TransportConfig {
    TransportConfig {
        // On a busy host too, no connection is dialled again for its profile.
        paths: PathConfig {
            profile: Some(PathProfile::Lan),
            ..PathConfig::default()
        },
        // What was refused is tried again while the test waits.
        connect_timeout: Duration::from_secs(3),
        redial_delay_max: Duration::from_millis(200),
        ..TransportConfig::default()
    }
}

pub fn put_in_force(edge: &Edge, limits: Limits) {
    let settings = Settings {
        mode: Mode::Enforce,
        services: vec![Service {
            port: LISTENER.port(),
            kind: settings::Kind::Quic,
            default_action: DefaultAction::Allow,
        }],
        limits,
        ..Settings::default()
    };
    let bounds = Bounds {
        rules_max: 16,
        nodes4_max: 64,
        nodes6_max: 64,
    };
    let set = compile(&settings, &[], bounds).unwrap();
    edge.publish(&set, 1, None).unwrap();
}
