//! QUIC through the edge: transports in two namespaces, the listener's behind the program in the kernel.
//!
//! Native XDP is on both ends of the cable, because a veth delivers what a program transmits only to an end that has one.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;
#[path = "../../transport/tests/common/relay.rs"]
mod relay;
#[path = "../../transport/tests/common/mod.rs"]
mod transport;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::namespace::{NODE, OPERATOR, Pair, Pinned, STRANGER, privileged};
use libbpf_rs::MapHandle;
use millrace_edge::clock::now_ns;
use millrace_edge::counts::Counts;
use millrace_edge::edge::{AttachOptions, Edge};
use millrace_edge::frame::{Description, Shape};
use millrace_edge::load::LoadOptions;
use millrace_edge::metrics::Counters;
use millrace_edge::presence::{self, Presence};
use millrace_edge::state::AttachMode;
use millrace_edge_policy::admission::{Admission, AdmissionConfig};
use millrace_edge_policy::cid::{Kind, LocalCid, dcid_of};
use millrace_edge_policy::limiter::Limit;
use millrace_edge_policy::proof;
use millrace_edge_policy::reason::Reason;
use millrace_edge_policy::rules::{Bounds, compile};
use millrace_edge_policy::settings::{self, DefaultAction, Limits, Mode, Service, Settings};
use millrace_edge_policy::siphash::Key;
use millrace_edge_policy::source::Source;
use millrace_edge_policy::stress::Level;
use millrace_protocol::frame::Class;
use millrace_protocol::identity::SigningKey;
use millrace_transport::counters::{Counter, Family};
use millrace_transport::{ConnectionCounts, EdgeStart, TransportConfig};
use relay::Relay;
use transport::{
    ECHO, Event, Node, PATIENCE, bytes_of, key, member, request, shard_config, topology,
};

const POOL_BYTES: u64 = 64 << 20;
const BODY_BYTES: usize = 16 << 20;
/// Longer than any test takes: nobody renews it.
const LEASE: Duration = Duration::from_secs(600);
/// Packets with the same proof: enough for a handshake on a slow machine, and no more come within a test.
const PROOF: u64 = 16;
const RUN: u32 = 7;

const LISTENER: SocketAddr = SocketAddr::new(IpAddr::V4(NODE), 4100);
const DIALLER: SocketAddr = SocketAddr::new(IpAddr::V4(OPERATOR), 4101);
/// In the world, on the way from the dialler to the listener.
const BETWEEN: SocketAddr = SocketAddr::new(IpAddr::V4(STRANGER), 4100);

/// Namespaces and programs. Dropped in this order.
struct Ground {
    edge: Arc<Edge>,
    _pinned: [Pinned; 2],
    pair: Pair,
    _folder: tempfile::TempDir,
}

impl Ground {
    /// None where it cannot be made; that was said then.
    fn new(test: &str) -> Option<Self> {
        if !privileged(test) {
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let pair = Pair::new("quic");
        let pinned = ["node", "world"].map(|side| Pinned(folder.path().join(side)));
        let attach = |pinned: &Pinned, interface: &str| {
            let options = AttachOptions {
                interfaces: vec![interface.into()],
                mode: AttachMode::Native,
                sizes: sizes(),
            };
            Edge::attach(&pinned.pins(), &options).unwrap()
        };
        let [at_node, at_world] = &pinned;
        let edge = pair.node.enter(|| attach(at_node, "mr0"));
        // Nothing is ever put in force there: it passes everything.
        pair.world.enter(|| attach(at_world, "mr1"));
        Some(Self {
            edge: Arc::new(edge),
            _pinned: pinned,
            pair,
            _folder: folder,
        })
    }

    fn count(&self, reason: Reason) -> u64 {
        self.counters().acted_on(reason)
    }

    fn counters(&self) -> Counters {
        Counters::read(self.edge.maps().counters()).unwrap()
    }

    /// What was decided since then, with the number of packets.
    fn since(&self, before: &Counters) -> BTreeMap<&'static str, u64> {
        let now = self.counters();
        let differences = Reason::ALL.iter().map(|reason| {
            let packets = now.acted_on(*reason) - before.acted_on(*reason);
            (reason.label(), packets)
        });
        differences.filter(|(_, packets)| *packets > 0).collect()
    }

    /// QUIC connections of a source, as the kernel sees them.
    fn connections(&self, source: Ipv4Addr) -> u32 {
        let description = Description {
            from: (source, 40_000).into(),
            to_port: LISTENER.port(),
            shape: Shape::QuicInitial,
            payload_bytes: None,
        };
        let trace = self.edge.trace(&description.frame()).unwrap();
        trace.connections.quic
    }

    /// A socket of the world that sends to the listener.
    fn socket(&self, from: Ipv4Addr) -> UdpSocket {
        let socket = self.pair.world.enter(|| UdpSocket::bind((from, 0)));
        let socket = socket.unwrap();
        socket.connect(LISTENER).unwrap();
        socket
    }
}

fn sizes() -> LoadOptions {
    LoadOptions {
        trie_nodes4: 64,
        trie_nodes6: 64,
        limiter_lines: 1_024,
        rules_max: 16,
        peers_max: 16,
        sources_max: 64,
        replies_max: 16,
        ..LoadOptions::default()
    }
}

/// Tells the kernel what the transport counts.
#[derive(Debug)]
struct Told {
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
        presence::charge_validated(self.edge.maps(), source, self.source_quic);
    }
}

/// A listener behind the edge, and the key of the peer that dials it.
struct Scene<'g> {
    ground: &'g Ground,
    listener: Node,
    dialler: SigningKey,
    admission: Arc<Admission>,
    presence: Presence<'g>,
}

impl<'g> Scene<'g> {
    fn new(ground: &'g Ground) -> Self {
        let mut keys = [key(1), key(2)];
        keys.sort_by_key(SigningKey::node_id);
        let [dialler, listener] = keys;
        let limits = Limits {
            proof: Limit::per(1, Duration::from_secs(600), PROOF),
            ..Limits::default()
        };
        put_in_force(&ground.edge, limits);
        let config = AdmissionConfig {
            limits,
            ..AdmissionConfig::default()
        };
        let random = || presence::random().unwrap();
        let admission = Arc::new(Admission::new(config, now_ns(), random));
        admission.set_kernel_charges(true);
        let maps = ground.edge.maps();
        let presence = Presence::begin(maps, RUN, LEASE, &limits, &admission.keys());
        let map = MapHandle::try_from(maps.quic_sources()).unwrap();
        let told = Told {
            edge: Arc::clone(&ground.edge),
            counts: Counts::new(map, RUN).unwrap(),
            source_quic: limits.source_quic,
        };
        let edge = EdgeStart {
            admission: Some(Arc::clone(&admission)),
            counts: Some(Arc::new(told)),
            ..EdgeStart::default()
        };
        let members = [member(&dialler, DIALLER), member(&listener, LISTENER)];
        let topology = topology(members, 1);
        let listener = ground.pair.node.enter(|| {
            let shards = vec![shard_config(POOL_BYTES); 2];
            Node::start_behind(listener, LISTENER, &topology, config_of(), shards, edge)
        });
        let scene = Self {
            ground,
            listener,
            dialler,
            admission,
            presence,
        };
        scene.know_peers(true);
        scene
    }

    fn press(&self, level: Level) {
        self.admission.set_stress(level);
        self.presence.set_stress(level);
    }

    /// Whether proofs of peers are known. Without its key the dialler is a client like any other.
    fn know_peers(&self, known: bool) {
        let keys: BTreeMap<u32, Key> = if known {
            self.listener.transport.peer_keys()
        } else {
            BTreeMap::new()
        };
        assert_eq!(keys.len(), usize::from(known));
        self.presence.set_peers(&keys).unwrap();
        self.admission.set_peers(keys);
    }

    /// Starts the dialler, which believes the listener to be at `to`.
    fn dial(&self, to: SocketAddr) -> Node {
        let members = [
            member(&self.dialler, DIALLER),
            member(&self.listener.key, to),
        ];
        let topology = topology(members, 1);
        let key = self.dialler.clone();
        self.ground.pair.world.enter(|| {
            let shards = vec![shard_config(POOL_BYTES); 2];
            let edge = EdgeStart::default();
            Node::start_behind(key, DIALLER, &topology, config_of(), shards, edge)
        })
    }

    fn wait_until_up(&self, dialler: &Node) {
        dialler.wait_for_peers(&[self.listener.id()]);
        self.listener.wait_for_peers(&[dialler.id()]);
    }

    fn hang_up(&self, dialler: Node) {
        dialler.transport.shutdown();
        drop(dialler);
        self.listener.wait_for_peers(&[]);
    }

    /// Waits until this many more packets were decided about than `before`.
    fn wait_for(&self, reason: Reason, more: u64, before: &Counters) {
        let wanted = before.acted_on(reason) + more;
        until(reason.label(), || self.ground.count(reason) >= wanted);
    }
}

fn config_of() -> TransportConfig {
    TransportConfig {
        // What was refused is tried again while the test waits.
        connect_timeout: Duration::from_secs(3),
        redial_delay_max: Duration::from_millis(200),
        ..TransportConfig::default()
    }
}

fn put_in_force(edge: &Edge, limits: Limits) {
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

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < end, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn ask(asker: &Node, answerer: &Node, len: usize) {
    let class = if len > 1_000 {
        Class::Bulk
    } else {
        Class::Normal
    };
    let body = request(ECHO, class, asker.body(len));
    let answer = asker.transport.request(answerer.id(), body);
    assert_eq!(bytes_of(&answer.wait(PATIENCE).unwrap()).len(), len);
}

/// The packets of a dialler that gets in: at first by this reason, and then by its connection ID.
fn assert_gets_in(scene: &Scene<'_>, by: Reason) {
    let ground = scene.ground;
    let before = ground.counters();
    let dialler = scene.dial(LISTENER);
    scene.wait_until_up(&dialler);
    let seen = ground.since(&before);
    let firsts = [
        Reason::PassQuicPeer,
        Reason::PassQuicToken,
        Reason::PassQuicInitial,
    ];
    for reason in firsts {
        let came = seen.contains_key(reason.label());
        assert_eq!(came, reason == by, "{}: {seen:?}", reason.label());
    }
    let retried = seen.contains_key(Reason::TxRetry.label());
    assert_eq!(retried, by == Reason::PassQuicToken, "{seen:?}");
    until("the kernel counts it", || ground.connections(OPERATOR) == 1);

    let before = ground.counters();
    for len in [100, BODY_BYTES] {
        ask(&dialler, &scene.listener, len);
        ask(&scene.listener, &dialler, len);
    }
    let mut seen = ground.since(&before);
    // Neighbour discovery is none of the edge's business.
    seen.remove(Reason::PassOther.label());
    let reasons: Vec<_> = seen.keys().copied().collect();
    assert_eq!(reasons, [Reason::PassQuic.label()], "{seen:?}");
    scene.hang_up(dialler);
    until("the kernel forgets it", || {
        ground.connections(OPERATOR) == 0
    });
}

#[test]
fn who_is_entitled_gets_in_at_every_level_of_stress() {
    let Some(ground) = Ground::new("who_is_entitled_gets_in_at_every_level_of_stress") else {
        return;
    };
    let scene = Scene::new(&ground);
    assert_gets_in(&scene, Reason::PassQuicPeer);
    scene.press(Level::Retry);
    assert_gets_in(&scene, Reason::PassQuicPeer);
    scene.press(Level::Peers);
    assert_gets_in(&scene, Reason::PassQuicPeer);

    scene.know_peers(false);
    scene.press(Level::Normal);
    assert_gets_in(&scene, Reason::PassQuicInitial);
    scene.press(Level::Retry);
    assert_gets_in(&scene, Reason::PassQuicToken);
    assert_eq!(
        scene.listener.count(Counter::Retries),
        0,
        "all of them were made in the kernel"
    );
}

#[test]
fn at_the_highest_stress_a_member_needs_its_proof() {
    let Some(ground) = Ground::new("at_the_highest_stress_a_member_needs_its_proof") else {
        return;
    };
    let scene = Scene::new(&ground);
    scene.know_peers(false);
    scene.press(Level::Peers);
    let before = ground.counters();
    let dialler = scene.dial(LISTENER);
    scene.wait_for(Reason::QuicPeersOnly, 2, &before);
    assert_eq!(scene.listener.count(Counter::DatagramsReceived), 0);
    let refused = ground.since(&before);
    assert!(
        !refused.contains_key(Reason::TxRetry.label()),
        "{refused:?}"
    );
    // Its next packets are the same, and somebody knows its key now.
    scene.know_peers(true);
    scene.wait_until_up(&dialler);
    assert!(
        ground
            .since(&before)
            .contains_key(Reason::PassQuicPeer.label())
    );
}

/// The first packet of the dialler, taken on its way.
fn captured(scene: &Scene<'_>) -> Vec<u8> {
    let sink = scene.ground.pair.world.enter(|| UdpSocket::bind(BETWEEN));
    let sink = sink.unwrap();
    sink.set_read_timeout(Some(PATIENCE)).unwrap();
    let dialler = scene.dial(BETWEEN);
    let mut packet = vec![0; 2_000];
    let len = sink.recv(&mut packet).unwrap();
    packet.truncate(len);
    dialler.transport.shutdown();
    let (dcid, _) = dcid_of(&packet).unwrap();
    assert_eq!(dcid.len(), proof::BYTES);
    packet
}

#[test]
fn a_proof_is_worth_nothing_elsewhere_forged_or_too_often() {
    const TAG_AT: usize = 6 + proof::BYTES - 1;
    let Some(ground) = Ground::new("a_proof_is_worth_nothing_elsewhere_forged_or_too_often") else {
        return;
    };
    let scene = Scene::new(&ground);
    scene.press(Level::Peers);
    let packet = captured(&scene);
    let before = ground.counters();
    let decided = |reason| ground.count(reason) - before.acted_on(reason);

    let thief = ground.socket(STRANGER);
    thief.send(&packet).unwrap();
    scene.wait_for(Reason::QuicPeersOnly, 1, &before);
    let owner = ground.socket(OPERATOR);
    let mut forged = packet.clone();
    forged[TAG_AT] ^= 1;
    owner.send(&forged).unwrap();
    scene.wait_for(Reason::QuicPeersOnly, 2, &before);
    assert_eq!(scene.listener.count(Counter::DatagramsReceived), 0);

    // From where it was made it passes, as often as a handshake may need; and then nobody's does.
    for _ in 0..PROOF + 3 {
        owner.send(&packet).unwrap();
    }
    scene.wait_for(Reason::QuicProofReplayed, 3, &before);
    assert_eq!(decided(Reason::PassQuicPeer), PROOF);
    ground.socket(OPERATOR).send(&packet).unwrap();
    scene.wait_for(Reason::QuicProofReplayed, 4, &before);

    // Under less stress the thief is a client that must show its address.
    scene.press(Level::Retry);
    thief.set_read_timeout(Some(PATIENCE)).unwrap();
    thief.send(&packet).unwrap();
    let mut answer = [0; 200];
    thief.recv(&mut answer).unwrap();
    assert_eq!(answer[0] & 0xf0, 0xf0, "a Retry");
    assert_eq!(decided(Reason::TxRetry), 1);
    assert_eq!(decided(Reason::PassQuicPeer), PROOF);
    assert_eq!(scene.listener.count(Counter::ConnectionsIn), 0);
}

/// Packets that claim to belong to a connection.
fn forgeries() -> [Vec<u8>; 3] {
    let id = [0x5a; LocalCid::BYTES];
    let mut short = vec![0x40];
    short.extend(id);
    short.resize(64, 0);
    let long = |first: u8| {
        let mut packet = vec![first, 0, 0, 0, 1, id.len() as u8];
        packet.extend(id);
        packet.push(0);
        packet.resize(1_200, 0);
        packet
    };
    [short, long(0xe0), long(0xf0)]
}

#[test]
fn a_forged_id_dies_in_the_kernel() {
    const EACH: u64 = 100;
    let Some(ground) = Ground::new("a_forged_id_dies_in_the_kernel") else {
        return;
    };
    let scene = Scene::new(&ground);
    let before = ground.counters();
    let socket = ground.socket(STRANGER);
    for level in [Level::Normal, Level::Peers] {
        scene.press(level);
        for packet in forgeries() {
            for _ in 0..EACH {
                socket.send(&packet).unwrap();
            }
        }
    }
    let sent = 2 * 3 * EACH;
    scene.wait_for(Reason::QuicUnknownId, sent, &before);
    assert_eq!(ground.since(&before)["quic_unknown_id"], sent);
    assert_eq!(scene.listener.count(Counter::DatagramsReceived), 0);
}

/// A dialler behind a NAT, and the relay that is the NAT.
fn behind_a_nat(scene: &Scene<'_>) -> (Node, Relay) {
    let relay = scene
        .ground
        .pair
        .world
        .enter(|| Relay::start(BETWEEN, LISTENER));
    let dialler = scene.dial(BETWEEN);
    scene.wait_until_up(&dialler);
    until("both use roaming IDs, and no others", || {
        relay.forget();
        ask(&dialler, &scene.listener, 100);
        relay.wait(Duration::from_millis(100), |passed| {
            let mut ids = [&passed.to_listener, &passed.to_dialler].into_iter();
            ids.all(|ids| !ids.is_empty() && ids.iter().all(|id| id.kind == Kind::Roaming))
        })
    });
    (dialler, relay)
}

#[test]
fn a_client_that_changes_its_port_stays_with_its_shard() {
    const REBINDS: u64 = 3;
    let Some(ground) = Ground::new("a_client_that_changes_its_port_stays_with_its_shard") else {
        return;
    };
    let scene = Scene::new(&ground);
    let (dialler, mut relay) = behind_a_nat(&scene);
    assert_eq!(ground.connections(STRANGER), 1, "as the listener sees it");
    let before = ground.counters();
    let status = scene.listener.transport.status();
    let shard = status.peers()[0].shard;
    for n in 1..=REBINDS {
        relay.forget();
        let body = request(ECHO, Class::Bulk, dialler.body(BODY_BYTES));
        let answer = dialler.transport.request(scene.listener.id(), body);
        let half = BODY_BYTES / 1_452 / 2;
        assert!(relay.wait(PATIENCE, |passed| passed.datagrams >= half));
        ground.pair.world.enter(|| relay.rebind());
        let answer = answer.wait(PATIENCE).unwrap();
        assert_eq!(bytes_of(&answer).len(), BODY_BYTES);
        scene.listener.wait_for_count(Counter::Migrations, n);
        let address = relay.address();
        assert!(status.wait(PATIENCE, |peers| peers[0].address == Some(address)));
        assert_eq!(status.peers()[0].shard, shard);
    }
    let mut seen = ground.since(&before);
    seen.remove(Reason::PassOther.label());
    let reasons: Vec<_> = seen.keys().copied().collect();
    assert_eq!(reasons, [Reason::PassQuic.label()], "{seen:?}");
    for node in [&dialler, &scene.listener] {
        let downs = node.events.try_iter();
        let downs = downs.filter(|event| matches!(event, Event::Down(..)));
        assert_eq!(downs.count(), 0, "the connection lives on");
        assert_eq!(node.reason(Family::Closed, "idle_timeout"), 0);
    }
}

#[test]
fn what_a_repeater_saw_moves_nobody_and_what_it_changes_is_dropped() {
    const TIMES: u64 = 10;
    let Some(ground) =
        Ground::new("what_a_repeater_saw_moves_nobody_and_what_it_changes_is_dropped")
    else {
        return;
    };
    let scene = Scene::new(&ground);
    let (dialler, relay) = behind_a_nat(&scene);
    let before = ground.counters();
    let repeater = ground.socket(OPERATOR);
    for byte in 1..=TIMES as usize {
        let packet = relay.last_short();
        repeater.send(&packet).unwrap();
        let mut changed = packet;
        changed[byte] ^= 1;
        repeater.send(&changed).unwrap();
        // Behind both in the listener's queue.
        ask(&dialler, &scene.listener, 100);
    }
    // A roaming ID whose key or epoch is changed is somebody else's, or too old: it passes in no case.
    until("all are dropped", || {
        let seen = ground.since(&before);
        let dropped = ["quic_unknown_id", "quic_expired_id"].map(|label| seen.get(label).copied());
        dropped.into_iter().flatten().sum::<u64>() == TIMES
    });
    assert_eq!(scene.listener.count(Counter::Migrations), 0);
    repeater
        .set_read_timeout(Some(Duration::from_millis(1)))
        .unwrap();
    let answer = repeater.recv(&mut [0; 2_000]);
    assert!(answer.is_err(), "nothing is sent there");
}
