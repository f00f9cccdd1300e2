//! TCP connections that are older than the program, or than their port's declaration: counted once,
//! and given back once.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::io::{ErrorKind, Read as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use common::edge::Home;
use common::node::{
    DUAL_PORT, Echo, NODE4, NODE6, Node, OTHER_PORT, REMOTE4, REMOTE6, SILENT_PORT, TCP_PORT,
    connect, echoes, reset,
};
use common::{Namespace, Pair, cpu, privileged, until};
use millrace_edge::counts::TcpCap;
use millrace_edge::edge::{AttachOptions, Edge};
use millrace_edge::interface::AttachMode;
use millrace_edge::load::LoadOptions;
use millrace_edge::privileges::{NEEDED, drop_capabilities, missing};
use millrace_edge_policy::limiter::Limit;
use millrace_edge_policy::reason::Reason;
use millrace_edge_policy::rules::{Bounds, Compiled, compile};
use millrace_edge_policy::settings::{Caps, DefaultAction, Kind, Limits, Mode, Service, Settings};
use millrace_testkit::sockets::connect_from;

const ANY4: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
const ANY6: IpAddr = IpAddr::V6(Ipv6Addr::UNSPECIFIED);
const ALL_PORTS: [u16; 3] = [TCP_PORT, DUAL_PORT, SILENT_PORT];

/// A set with these ports as services, open to all sources within a cap, and with a rate that only
/// the walk stays within: the walk charges none.
fn services(ports: &[u16], cap: u32, source_tcp: Limit) -> Compiled {
    let service = |port: &u16| Service {
        port: *port,
        kind: Kind::Tcp,
        default_action: DefaultAction::Allow,
    };
    let settings = Settings {
        mode: Mode::Enforce,
        services: ports.iter().map(service).collect(),
        limits: Limits {
            source_tcp,
            syn: Limit::NONE,
            ..Limits::default()
        },
        caps: Caps { quic: 0, tcp: cap },
        ..Settings::default()
    };
    let bounds = Bounds {
        rules_max: 10,
        nodes4_max: 100,
        nodes6_max: 100,
    };
    compile(&settings, &[], bounds).unwrap()
}

fn attach(pair: &Pair, home: &Home) -> Edge {
    let options = AttachOptions {
        interfaces: vec!["mr0".into()],
        mode: AttachMode::Native,
        sizes: LoadOptions::default(),
    };
    pair.node
        .enter(|| Edge::attach(&home.pins, &options).unwrap_or_else(|error| panic!("{error}")))
}

fn listen(pair: &Pair, address: IpAddr, port: u16) -> TcpListener {
    pair.node
        .enter(|| TcpListener::bind((address, port)).unwrap())
}

/// Both ends of a connection from the remote host: the client's, the server's.
fn open(pair: &Pair, listener: &TcpListener, to: IpAddr) -> (TcpStream, TcpStream) {
    let client = dial(&pair.remote, to, listener);
    (client, listener.accept().unwrap().0)
}

fn dial(remote: &Namespace, to: IpAddr, listener: &TcpListener) -> TcpStream {
    let port = listener.local_addr().unwrap().port();
    remote.enter(|| connect((to, port).into()).unwrap())
}

fn ended(mut stream: &TcpStream) -> bool {
    stream.read(&mut [0; 8]).unwrap() == 0
}

/// Connects from a port of its own choice.
fn dial_from(namespace: &Namespace, port: u16, to: SocketAddr) -> TcpStream {
    namespace.enter(|| connect_from((ANY4, port).into(), to, common::PATIENCE).unwrap())
}

// Protects the cap from older connections: they count as if the program had seen them open,
// whatever state they are in by now, and no longer once they are closed.
#[test]
fn connections_that_are_older_than_the_program_are_counted() {
    const CAP: u32 = 6;
    if !privileged("connections_that_are_older_than_the_program_are_counted") {
        return;
    }
    let pair = Pair::new("older");
    let only4 = listen(&pair, ANY4, TCP_PORT);
    let dual = listen(&pair, ANY6, DUAL_PORT);
    let plain = open(&pair, &only4, NODE4);
    // The socket's address is IPv4-mapped; the source is the same.
    let mapped = open(&pair, &dual, NODE4);
    let by_client = open(&pair, &only4, NODE4);
    by_client.0.shutdown(Shutdown::Write).unwrap();
    assert!(ended(&by_client.1));
    let by_server = open(&pair, &only4, NODE4);
    by_server.1.shutdown(Shutdown::Write).unwrap();
    assert!(ended(&by_server.0));
    let six = [open(&pair, &dual, NODE6), open(&pair, &dual, NODE6)];

    // No connections to this node's services: closed (TIME_WAIT is the node's), to another port,
    // outgoing, outgoing from a service's port.
    let (client, server) = open(&pair, &only4, NODE4);
    drop(server);
    assert!(ended(&client));
    drop(client);
    let other = listen(&pair, ANY4, OTHER_PORT);
    let elsewhere = open(&pair, &other, NODE4);
    let theirs = pair
        .remote
        .enter(|| TcpListener::bind((ANY4, OTHER_PORT)).unwrap());
    let outwards = dial(&pair.node, REMOTE4, &theirs);
    let from_service = dial_from(&pair.node, SILENT_PORT, (REMOTE4, OTHER_PORT).into());
    // Established, and not accepted yet.
    let waiting = dial(&pair.remote, NODE4, &only4);

    let home = Home::new();
    let edge = attach(&pair, &home);
    // One more is within the rate: the old ones have not been charged.
    let rate = Limit::per(1, Duration::from_secs(3_600), 1);
    let set = services(&ALL_PORTS, CAP, rate);
    edge.publish(&set, 1, None).unwrap();
    let node = Node {
        edge,
        far: None,
        home,
        set,
        pair,
    };
    let counts = || [REMOTE4, REMOTE6].map(|source| node.kernel_count(source));
    assert_eq!((counts(), node.kernel_sources()), ([4, 2], 2));
    // The walk may run any number of times; by now there is one connection more.
    let waiting = (waiting, only4.accept().unwrap().0);
    for _ in 0..2 {
        node.edge.count_open().unwrap();
        assert_eq!(counts(), [5, 2]);
    }
    let last = open(&node.pair, &dual, NODE4);
    assert_eq!(counts(), [6, 2]);
    let set = services(&ALL_PORTS, CAP, Limit::NONE);
    node.edge.publish(&set, 1, None).unwrap();
    assert_eq!(counts(), [6, 2]);
    assert!(node.refuses(NODE4, TCP_PORT), "the cap is full");
    assert!(node.packets(Reason::TcpSourceCap) > 0);
    // One goes, one comes.
    drop(plain);
    until("there is room for one", || counts() == [5, 2]);
    let next = open(&node.pair, &only4, NODE4);
    assert_eq!(counts(), [6, 2]);

    reset(mapped.1);
    drop((by_client, by_server));
    reset(waiting.0);
    until("four more have ended", || counts() == [2, 2]);
    drop((last, next, waiting.1, six));
    until("all have ended", || node.kernel_sources() == 0);
    drop((elsewhere, outwards, from_service));
    assert_eq!(node.kernel_sources(), 0);
}

// Protects the cap when the edge is detached and attached again, as for an upgrade.
#[test]
fn attached_again_it_counts_what_is_open() {
    if !privileged("attached_again_it_counts_what_is_open") {
        return;
    }
    let (pair, home) = (Pair::new("older"), Home::new());
    let listener = listen(&pair, ANY4, TCP_PORT);
    let set = services(&ALL_PORTS, 0, Limit::NONE);
    let edge = attach(&pair, &home);
    edge.publish(&set, 1, None).unwrap();
    let mut held: Vec<_> = (0..3).map(|_| open(&pair, &listener, NODE4)).collect();
    Edge::detach(&home.pins).unwrap();
    drop(edge);
    // No program sees this.
    drop(held.pop());
    held.extend([(); 2].map(|()| open(&pair, &listener, NODE4)));

    let edge = attach(&pair, &home);
    edge.publish(&set, 1, None).unwrap();
    let mut node = Node {
        edge,
        far: None,
        home,
        set,
        pair,
    };
    assert_eq!(node.kernel_count(REMOTE4), 4);
    // What takes the program's place goes on with its counts.
    drop(held.pop());
    until("it is given back", || node.kernel_count(REMOTE4) == 3);
    node.edge.reload().unwrap();
    node.edge.count_open().unwrap();
    assert_eq!(node.kernel_count(REMOTE4), 3);
    drop(held);
    until("nothing is left", || node.kernel_sources() == 0);
}

// Protects the cap of a port that becomes a service while the node runs, which has no capabilities
// by then; and of a port that is a service again after a set is taken back.
#[test]
fn a_port_that_is_declared_later_brings_its_connections() {
    if !privileged("a_port_that_is_declared_later_brings_its_connections") {
        return;
    }
    let (pair, home) = (Pair::new("older"), Home::new());
    let first = listen(&pair, ANY4, TCP_PORT);
    let second = listen(&pair, ANY6, DUAL_PORT);
    let edge = attach(&pair, &home);
    let [one, both] =
        [&[TCP_PORT][..], &[TCP_PORT, DUAL_PORT]].map(|ports| services(ports, 0, Limit::NONE));
    edge.publish(&one, 1, None).unwrap();
    let mut held = vec![open(&pair, &first, NODE4)];
    held.extend([(); 2].map(|()| open(&pair, &second, NODE4)));
    let node = Node {
        edge,
        far: None,
        home,
        set: both,
        pair,
    };
    assert_eq!(node.kernel_count(REMOTE4), 1);
    node.pair.node.enter(|| {
        drop_capabilities(&[]).unwrap();
        assert_eq!(missing(), NEEDED);
        node.edge.publish(&node.set, 2, None).unwrap();
    });
    assert_eq!(node.kernel_count(REMOTE4), 3);

    let confirm_within = Duration::from_secs(3_600);
    node.edge.publish(&one, 3, Some(confirm_within)).unwrap();
    // Counted is counted, also while the port is no service.
    drop(held.pop());
    until("it is given back", || node.kernel_count(REMOTE4) == 2);
    held.push(open(&node.pair, &second, NODE4));
    assert_eq!(node.kernel_count(REMOTE4), 2);
    node.edge.revert().unwrap();
    assert_eq!(node.kernel_count(REMOTE4), 3);
    drop(held);
    until("nothing is left", || node.kernel_sources() == 0);
}

// Protects counts from races: connections open and close on both CPUs, also in the queue of a
// listener that closes, while the walk runs, programs are replaced, and the edge is detached and
// attached again.
#[test]
fn a_walk_among_opening_and_closing_connections_counts_each_once() {
    const ATTACHES: usize = 2;
    const RELOADS: usize = 2;
    const WALKS: usize = 100;
    let test = "a_walk_among_opening_and_closing_connections_counts_each_once";
    if !privileged(test) || !cpu::are_two(test) {
        return;
    }
    let (pair, home) = (Pair::new("older"), Home::new());
    let _echo = Echo::serve(listen(&pair, ANY6, DUAL_PORT), TcpCap::new(0));
    let set = services(&ALL_PORTS, 0, Limit::NONE);
    let (edge, held) = beside_churn(&pair, || {
        let mut last = None;
        for _ in 0..ATTACHES {
            if last.take().is_some() {
                Edge::detach(&home.pins).unwrap();
            }
            let mut edge = attach(&pair, &home);
            edge.publish(&set, 1, None).unwrap();
            for _ in 0..RELOADS {
                (0..WALKS).for_each(|_| edge.count_open().unwrap());
                edge.reload().unwrap();
            }
            last = Some(edge);
        }
        last.unwrap()
    });
    let node = Node {
        edge,
        far: None,
        home,
        set,
        pair,
    };
    let counted = || node.kernel_count(REMOTE4) == held.len() as u64;
    until("what is held is counted", counted);
    node.edge.count_open().unwrap();
    assert!(counted(), "{}", node.kernel_count(REMOTE4));
    drop(held);
    until("all have ended", || node.kernel_sources() == 0);
}

/// Acts while connections open and end; returns those that were open all the time.
fn beside_churn<T>(pair: &Pair, act: impl FnOnce() -> T) -> (T, Vec<TcpStream>) {
    const THREADS: usize = 2;
    const HELD: usize = 3;
    let done = AtomicBool::new(false);
    let churn = |thread| {
        cpu::pin(thread % 2);
        let held: Vec<_> = (0..HELD).map(|_| served()).collect();
        while !done.load(Ordering::Relaxed) {
            open_and_end();
        }
        held
    };
    thread::scope(|scope| {
        let over = Over(&done);
        let churn = &churn;
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| scope.spawn(move || pair.remote.enter(|| churn(thread))))
            .collect();
        scope.spawn(|| pair.node.enter(|| close_listeners(&done)));
        let result = act();
        drop(over);
        let held = threads
            .into_iter()
            .flat_map(|thread| thread.join().unwrap());
        (result, held.collect())
    })
}

/// Ends the churn, also when the test fails.
struct Over<'d>(&'d AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn served() -> TcpStream {
    let stream = connect((NODE4, DUAL_PORT).into()).unwrap();
    assert!(echoes(&stream));
    stream
}

fn open_and_end() {
    let [first, second, third] = [(); 3].map(|()| served());
    reset(first);
    second.shutdown(Shutdown::Write).unwrap();
    drop(third);
}

/// Closes listeners with connections that no process has accepted; the client is the node itself.
fn close_listeners(done: &AtomicBool) {
    while !done.load(Ordering::Relaxed) {
        // A file that the walk looks at is closed when the walk is over.
        let listener = match TcpListener::bind((NODE4, TCP_PORT)) {
            Err(error) if error.kind() == ErrorKind::AddrInUse => continue,
            bound => bound.unwrap(),
        };
        let clients: [TcpStream; 4] = [(); 4].map(|()| connect((NODE4, TCP_PORT).into()).unwrap());
        drop(listener);
        clients.into_iter().for_each(reset);
    }
}
