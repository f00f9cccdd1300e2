//! TCP through the edge, with real sockets in namespaces: counts, caps, rates, cookies, and the
//! table behind the program.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::io::Read as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use common::node::{
    DUAL_PORT, Echo, NODE4, NODE6, Node, OTHER_PORT, REFUSED, REMOTE4, REMOTE6, SILENT_PORT,
    TCP_PORT, connect, echoes, reset,
};
use common::{PATIENCE, cpu, ok, privileged, until};
use etherparse::{Ipv4Header, TcpHeader};
use millrace_edge::counts::TcpCap;
use millrace_edge::edge::Edge;
use millrace_edge::interface::AttachMode;
use millrace_edge::nft::{Nft, Table};
use millrace_edge_policy::limiter::Limit;
use millrace_edge_policy::reason::Reason;
use millrace_edge_policy::settings::{Caps, Limits};
use millrace_edge_policy::stress::Level;
use millrace_testkit::sockets::{connect_from, raw_socket};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto, socket_with, sockopt,
};

const ANY4: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
const ANY6: IpAddr = IpAddr::V6(Ipv6Addr::UNSPECIFIED);

/// What these tests are not about.
fn generous() -> Limits {
    Limits {
        source_tcp: Limit::NONE,
        syn: Limit::NONE,
        ..Limits::default()
    }
}

const NO_CAP: Caps = Caps { quic: 0, tcp: 0 };

/// A connection, both ends.
struct Both {
    client: TcpStream,
    server: TcpStream,
}

impl Both {
    fn open(node: &Node, listener: &TcpListener, to: IpAddr) -> Self {
        let port = listener.local_addr().unwrap().port();
        let client = node.connect(to, port).unwrap();
        let (server, _) = listener.accept().unwrap();
        Self { client, server }
    }

    /// Both ends, the client first.
    fn close(self) {
        drop(self.client);
        assert_eq!((&self.server).read(&mut [0; 8]).unwrap(), 0);
        drop(self.server);
    }
}

// Protects the cap: the program counts exactly the connections that the application holds, however
// they end.
#[test]
fn the_kernels_count_is_what_the_application_holds() {
    if !privileged("the_kernels_count_is_what_the_application_holds") {
        return;
    }
    for mode in [AttachMode::Native, AttachMode::Generic] {
        let node = Node::new("tcp", mode, generous(), NO_CAP);
        let only4 = node.listen(ANY4, TCP_PORT);
        let dual = node.listen(ANY6, DUAL_PORT);
        for (listener, to, from) in [
            (&only4, NODE4, REMOTE4),
            // The socket's address is IPv4-mapped; the source is the same.
            (&dual, NODE4, REMOTE4),
            (&dual, NODE6, REMOTE6),
        ] {
            let counts = |held: u64| {
                until("the kernel counts what is held", || {
                    node.kernel_count(from) == held
                });
            };
            let mut held: Vec<Both> = (0..10).map(|_| Both::open(&node, listener, to)).collect();
            counts(10);
            // Closed by the client, which keeps TIME_WAIT.
            held.pop().unwrap().close();
            counts(9);
            // The server closes it: TIME_WAIT is the node's, and is no connection.
            let Both { client, server } = held.pop().unwrap();
            drop(server);
            assert_eq!((&client).read(&mut [0; 8]).unwrap(), 0);
            drop(client);
            counts(8);
            // Half-closed by the client, then by the server: a connection until the other half
            // follows.
            let Both { client, server } = held.pop().unwrap();
            client.shutdown(Shutdown::Write).unwrap();
            assert_eq!((&server).read(&mut [0; 8]).unwrap(), 0);
            assert_eq!(node.kernel_count(from), 8);
            drop(server);
            counts(7);
            let Both { client, server } = held.pop().unwrap();
            server.shutdown(Shutdown::Write).unwrap();
            assert_eq!((&client).read(&mut [0; 8]).unwrap(), 0);
            assert_eq!(node.kernel_count(from), 7);
            drop(client);
            assert_eq!((&server).read(&mut [0; 8]).unwrap(), 0);
            counts(6);
            drop(server);
            // Reset by the client, then by the server.
            let Both { client, server } = held.pop().unwrap();
            reset(client);
            counts(5);
            drop(server);
            reset(held.pop().unwrap().server);
            counts(4);
            // Established, and not accepted yet.
            let waiting = node.connect(to, listener.local_addr().unwrap().port());
            counts(5);
            drop(listener.accept().unwrap());
            drop(waiting);
            counts(4);
            held.into_iter().for_each(Both::close);
            counts(0);
        }
        assert_eq!(node.kernel_sources(), 0, "nothing is left of who left");
    }
}

// Protects the same from races: connections of one source open and close on both CPUs.
#[test]
fn counts_are_exact_on_two_cpus() {
    const THREADS: usize = 4;
    const ROUNDS: usize = 60;
    let test = "counts_are_exact_on_two_cpus";
    if !privileged(test) || !cpu::are_two(test) {
        return;
    }
    let node = Node::new("tcp", AttachMode::Native, generous(), NO_CAP);
    let echo = Echo::serve(node.listen(ANY6, DUAL_PORT), TcpCap::new(0));
    let remote = &node.pair.remote;
    let held_open: Vec<Vec<TcpStream>> = thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| scope.spawn(move || remote.enter(|| busy_client(thread, ROUNDS))))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    let held: usize = held_open.iter().map(Vec::len).sum();
    assert_eq!(held, THREADS * 3);
    until("all others have ended", || echo.held() == held);
    until("and are counted no more", || {
        node.kernel_count(REMOTE4) == held as u64
    });
    assert!(echo.peak() > THREADS, "they were there together");
    drop(held_open);
    until("all have ended", || node.kernel_sources() == 0);
}

/// Opens and ends connections in every way; three are left.
fn busy_client(thread: usize, rounds: usize) -> Vec<TcpStream> {
    cpu::pin(thread % 2);
    let open = || {
        let stream = connect((NODE4, DUAL_PORT).into()).unwrap();
        assert!(echoes(&stream));
        stream
    };
    for round in 0..rounds {
        let (first, second) = (open(), open());
        match round % 3 {
            0 => reset(first),
            1 => first.shutdown(Shutdown::Write).unwrap(),
            _ => drop(first),
        }
        reset(second);
    }
    (0..3).map(|_| open()).collect()
}

// Protects all other connections: one that is not to this node's service is in no count.
#[test]
fn other_connections_are_not_counted() {
    if !privileged("other_connections_are_not_counted") {
        return;
    }
    let node = Node::new("tcp", AttachMode::Native, generous(), NO_CAP);
    // Another namespace has a service on the same port, and the node is its client.
    let theirs = node
        .pair
        .remote
        .enter(|| TcpListener::bind((ANY4, TCP_PORT)).unwrap());
    let outgoing = node
        .pair
        .node
        .enter(|| connect((REMOTE4, TCP_PORT).into()))
        .unwrap();
    let incoming = theirs.accept().unwrap();
    // The node connects from the port of a service.
    let (from, to) = ((ANY4, SILENT_PORT).into(), (REMOTE4, TCP_PORT).into());
    let from_service = node
        .pair
        .node
        .enter(|| connect_from(from, to, PATIENCE).unwrap());
    let second = theirs.accept().unwrap();
    assert_eq!(second.1, (NODE4, SILENT_PORT).into());
    // A port of the node that is no service.
    let other = node.listen(ANY4, OTHER_PORT);
    let third = Both::open(&node, &other, NODE4);
    assert_eq!(node.kernel_sources(), 0);

    // A counted connection shows that counting works, and that none of the above ends it.
    let ours = node.listen(ANY4, TCP_PORT);
    let counted = Both::open(&node, &ours, NODE4);
    until("it is counted", || node.kernel_count(REMOTE4) == 1);
    drop((outgoing, incoming, from_service, second));
    third.close();
    assert_eq!(node.kernel_count(REMOTE4), 1);
    counted.close();
    until("nothing is left", || node.kernel_sources() == 0);
}

// Protects the application: it never holds more connections of a source than the cap, whatever the
// source does.
#[test]
fn the_application_never_holds_more_than_the_cap() {
    const CAP: usize = 6;
    const MORE: usize = 6;
    const ROUNDS: usize = 3;
    if !privileged("the_application_never_holds_more_than_the_cap") {
        return;
    }
    let caps = Caps {
        quic: 0,
        tcp: CAP as u32,
    };
    let node = Node::new("tcp", AttachMode::Native, generous(), caps);
    let cap = TcpCap::new(CAP as u32);
    let echo = Echo::serve(node.listen(ANY4, TCP_PORT), cap.clone());
    for round in 0..ROUNDS {
        let mut streams = burst(&node, CAP + MORE);
        assert_eq!(streams.len(), CAP, "round {round}");
        assert_eq!((echo.held(), echo.peak()), (CAP, CAP));
        assert!(streams.iter().all(echoes), "those that it holds live");
        // The cap is full, also after the storm: the program drops the SYN.
        until("the kernel has forgotten the refused", || {
            node.kernel_count(REMOTE4) == CAP as u64
        });
        let dropped = node.packets(Reason::TcpSourceCap);
        assert!(node.refuses(NODE4, TCP_PORT));
        until("it is counted", || {
            node.packets(Reason::TcpSourceCap) > dropped
        });

        // One goes, one comes.
        let one = streams.pop().unwrap();
        if round % 2 == 0 {
            reset(one);
        } else {
            drop(one);
        }
        until("there is room for one", || {
            node.kernel_count(REMOTE4) == CAP as u64 - 1
        });
        until("the application knows", || {
            cap.connections(REMOTE4) == CAP as u32 - 1
        });
        let next = node.connect(NODE4, TCP_PORT).unwrap();
        assert!(echoes(&next));
        streams.push(next);
        let mut half_closed = Vec::new();
        for (number, stream) in streams.into_iter().enumerate() {
            match number % 3 {
                0 => drop(stream),
                1 => reset(stream),
                _ => {
                    stream.shutdown(Shutdown::Write).unwrap();
                    half_closed.push(stream);
                }
            }
        }
        until("all have ended", || {
            cap.connections(REMOTE4) == 0 && node.kernel_sources() == 0
        });
    }
    assert_eq!((echo.held(), echo.peak()), (0, CAP));
}

/// Opens so many at the same time; returns those that are served.
fn burst(node: &Node, connections: usize) -> Vec<TcpStream> {
    const SERVED_WITHIN: Duration = Duration::from_secs(2);
    let attempt = || {
        node.pair.remote.enter(|| {
            let to = SocketAddr::from((NODE4, TCP_PORT));
            let stream = TcpStream::connect_timeout(&to, SERVED_WITHIN).ok()?;
            // A client that is not served gets an error.
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            echoes(&stream).then_some(stream)
        })
    };
    thread::scope(|scope| {
        let attempts: Vec<_> = (0..connections).map(|_| scope.spawn(attempt)).collect();
        let served = attempts
            .into_iter()
            .filter_map(|attempt| attempt.join().unwrap());
        served.collect()
    })
}

// Protects the listener from one source that opens and closes without end, and other sources from
// it.
#[test]
fn syns_beyond_the_rate_are_dropped() {
    const BURST: u64 = 2;
    if !privileged("syns_beyond_the_rate_are_dropped") {
        return;
    }
    let limits = Limits {
        source_tcp: Limit::per(1, Duration::from_secs(3_600), BURST),
        ..generous()
    };
    let node = Node::new("tcp", AttachMode::Native, limits, NO_CAP);
    let listener = node.listen(ANY6, DUAL_PORT);
    for (to, number) in [(NODE4, 1), (NODE6, 2)] {
        let dropped = node.packets(Reason::TcpSourceRate);
        for _ in 0..BURST {
            Both::open(&node, &listener, to).close();
        }
        // Within the burst none is dropped, however closely they follow each other.
        assert_eq!(node.packets(Reason::PassTcpSyn), BURST * number);
        assert_eq!(node.packets(Reason::TcpSourceRate), dropped, "{to}");
        assert!(node.refuses(to, DUAL_PORT));
        until("it is counted", || {
            node.packets(Reason::TcpSourceRate) > dropped
        });
    }
    assert_eq!(node.packets(Reason::TcpSourceCap), 0);
}

// Protects the listener from a source with many addresses: its prefix has a limit, which its
// neighbours have spent together.
#[test]
fn a_prefix_has_a_limit_of_its_own() {
    // The /24 and the /56 have four times as many.
    const BURST: u64 = 2;
    if !privileged("a_prefix_has_a_limit_of_its_own") {
        return;
    }
    let limits = Limits {
        source_tcp: Limit::per(1, Duration::from_secs(3_600), BURST),
        ..generous()
    };
    // Generic: the far end of the native one knows one remote address only.
    let node = Node::new("tcp", AttachMode::Generic, limits, NO_CAP);
    let listener = node.listen(ANY6, DUAL_PORT);
    node.pair.node.ip("-6 route add fd77::/48 dev mr0");
    let v4 = |number| IpAddr::from([10, 77, 0, 10 + number as u8]);
    let v6 = |number| IpAddr::from([0xfd77, 0, 0, 0x10 + number as u16, 0, 0, 0, 2]);
    prefix_is_limited(&node, &listener, BURST, NODE4, &[0, 1, 2, 3, 4].map(v4));
    prefix_is_limited(&node, &listener, BURST, NODE6, &[0, 1, 2, 3, 4].map(v6));
}

/// All but the last of these neighbours spend their own bursts, and with them that of the prefix.
fn prefix_is_limited(
    node: &Node,
    listener: &TcpListener,
    burst: u64,
    to: IpAddr,
    sources: &[IpAddr],
) {
    for source in sources {
        let (length, flags) = if source.is_ipv6() {
            (128, "nodad")
        } else {
            (32, "")
        };
        let command = format!("addr add {source}/{length} dev mr1 {flags}");
        node.pair.remote.ip(&command);
    }
    let open = |source, patience| {
        let stream = node.pair.remote.enter(|| dial_from(source, to, patience));
        stream.map(|client| Both {
            client,
            server: listener.accept().unwrap().0,
        })
    };
    let (last, others) = sources.split_last().unwrap();
    for source in others {
        for _ in 0..burst {
            open(*source, PATIENCE).unwrap().close();
        }
    }
    let dropped = node.packets(Reason::TcpSourceRate);
    assert!(open(*last, REFUSED).is_none(), "{last}");
    until("it is counted", || {
        node.packets(Reason::TcpSourceRate) > dropped
    });
}

/// A connection to [`DUAL_PORT`] from one of several addresses; none if it is not established in
/// that time.
fn dial_from(source: IpAddr, to: IpAddr, patience: Duration) -> Option<TcpStream> {
    connect_from((source, 0).into(), (to, DUAL_PORT).into(), patience).ok()
}

// Protects the owner of a spoofed source: a SYN alone costs nothing; only a source that has
// answered is charged.
#[test]
fn a_syn_that_is_not_followed_up_costs_nothing() {
    const BURST: u64 = 2;
    if !privileged("a_syn_that_is_not_followed_up_costs_nothing") {
        return;
    }
    let limits = Limits {
        source_tcp: Limit::per(1, Duration::from_secs(3_600), BURST),
        ..generous()
    };
    let node = Node::new("tcp", AttachMode::Native, limits, NO_CAP);
    // Without a listener: a reset answers each SYN, and none is established.
    for _ in 0..BURST * 5 {
        assert!(node.refuses(NODE4, SILENT_PORT));
    }
    assert_eq!(node.packets(Reason::PassTcpSyn), BURST * 5);
    let listener = node.listen(ANY4, TCP_PORT);
    for _ in 0..BURST {
        Both::open(&node, &listener, NODE4).close();
    }
    assert!(node.refuses(NODE4, TCP_PORT));
}

// Protects service under attack: the program answers SYNs itself, and the stack takes up the
// cookies that come back.
#[test]
fn connections_complete_through_cookies() {
    if !privileged("connections_complete_through_cookies") {
        return;
    }
    for mode in [AttachMode::Native, AttachMode::Generic] {
        let node = Node::new("tcp", mode, generous(), NO_CAP);
        node.set_syncookies(2);
        let lease = node.lease();
        let echo = Echo::serve(node.listen(ANY6, DUAL_PORT), TcpCap::new(0));
        for (number, (to, from)) in [(NODE4, REMOTE4), (NODE6, REMOTE6)].into_iter().enumerate() {
            let number = number as u64;
            lease.set_stress(Level::Retry);
            let stack = || ["SyncookiesSent", "SyncookiesRecv"].map(|name| node.netstat(name));
            let [sent, received] = stack();
            let stream = node.connect(to, DUAL_PORT).unwrap();
            assert!(echoes(&stream));
            let case = format!("{mode:?} {to}");
            assert_eq!(node.packets(Reason::TxSynCookie), number + 1, "{case}");
            // The stack took up a cookie that it had not sent itself.
            assert_eq!(stack(), [sent, received + 1], "{case}");
            assert_eq!((echo.held(), node.kernel_count(from)), (1, 1), "{case}");
            // Without a listener the kernel has no cookie to give, and answers the client itself.
            assert!(node.refuses(to, SILENT_PORT));
            lease.set_stress(Level::Normal);
            let plain = node.connect(to, DUAL_PORT).unwrap();
            assert!(echoes(&plain));
            assert_eq!(node.packets(Reason::TxSynCookie), number + 1);
            assert_eq!(node.packets(Reason::PassTcpSyn), 2 * (number + 1));
            drop((stream, plain));
            until("both have ended", || echo.held() == 0);
        }
        until("nothing is left", || node.kernel_sources() == 0);
    }
}

/// Room for a few, so that a flood fills it at once.
fn listen_with_backlog(node: &Node, backlog: i32) -> TcpListener {
    node.pair.node.enter(|| {
        let (kind, flags) = (SocketType::STREAM, SocketFlags::CLOEXEC);
        let listener = socket_with(AddressFamily::INET6, kind, flags, None).unwrap();
        sockopt::set_ipv6_v6only(&listener, false).unwrap();
        rustix::net::bind(&listener, &SocketAddr::from((ANY6, TCP_PORT))).unwrap();
        rustix::net::listen(&listener, backlog).unwrap();
        listener.into()
    })
}

/// One SYN an hour is all that may pass without being asked for more.
fn one_syn() -> Limits {
    Limits {
        syn: Limit::per(1, Duration::from_secs(3_600), 1),
        ..generous()
    }
}

/// Floods the node with SYNs of made-up sources for as long as it lives.
struct Flooding<'a>(&'a AtomicBool);

impl<'a> Flooding<'a> {
    fn begin<'s>(scope: &'s thread::Scope<'s, 'a>, node: &'a Node, over: &'a AtomicBool) -> Self {
        // Half of these are SYNs.
        const PACKETS: u32 = 1 << 12;
        let far = node.far.as_ref().unwrap();
        scope.spawn(move || {
            node.pair.remote.enter(|| {
                while !over.load(Ordering::Relaxed) {
                    far.send(PACKETS);
                }
            });
        });
        Self(over)
    }
}

impl Drop for Flooding<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

// Protects clients under the kernel's default: while the listener's queue has room the queue is the
// bound, then there are cookies.
#[test]
fn a_flood_of_syns_locks_nobody_out() {
    /// Of each family, at each level of stress.
    const CLIENTS: usize = 10;
    const BACKLOG: i32 = 16;
    if !privileged("a_flood_of_syns_locks_nobody_out") {
        return;
    }
    let node = Node::new("tcp", AttachMode::Native, one_syn(), NO_CAP);
    // Otherwise the stack has no route to a made-up source, and keeps no SYN of it.
    node.pair.node.ip("route add default via 10.77.0.2");
    let echo = Echo::serve(listen_with_backlog(&node, BACKLOG), TcpCap::new(0));
    node.set_syncookies(0);
    let lease = node.lease();
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let _ends = Flooding::begin(scope, &node, &over);
        // The control: without cookies the budget holds, and clients share it with the flood.
        until("the budget is spent", || {
            node.packets(Reason::TcpSynBudget) > 0
        });
        for to in [NODE4, NODE6] {
            assert!(node.refuses(to, TCP_PORT), "{to}");
        }
        assert_eq!(node.packets(Reason::PassTcpSyn), 1);
        assert_eq!(node.packets(Reason::TxSynCookie), 0);

        // The value changes now, and the program is not told.
        node.set_syncookies(1);
        until("the queue is full", || {
            node.packets(Reason::TxSynCookie) > 0
        });
        let passed = node.packets(Reason::PassTcpSyn);
        assert!(passed > BACKLOG as u64, "the queue was filled: {passed}");
        let dropped = node.packets(Reason::TcpSynBudget);
        for level in [Level::Normal, Level::Retry, Level::Peers] {
            lease.set_stress(level);
            for to in [NODE4, NODE6].repeat(CLIENTS) {
                let answered = node.packets(Reason::TxSynCookie);
                until("the flood goes on", || {
                    node.packets(Reason::TxSynCookie) > answered
                });
                assert!(echoes(&node.connect(to, TCP_PORT).unwrap()), "{level:?}");
            }
        }
        assert_eq!(node.packets(Reason::TcpSynBudget), dropped);
        let taken_up = node.netstat("SyncookiesRecv");
        assert!(taken_up > 0, "cookies are what let clients in");
        eprintln!(
            "{} clients, {taken_up} by cookies; {} SYNs passed, {} answered",
            6 * CLIENTS,
            node.packets(Reason::PassTcpSyn),
            node.packets(Reason::TxSynCookie),
        );
    });
    assert!(echo.peak() > 0);
}

// Protects the stack: the program drops SYNs that the stack would drop because no application
// accepts.
#[test]
fn a_full_accept_queue_takes_no_syns() {
    const BACKLOG: i32 = 1;
    if !privileged("a_full_accept_queue_takes_no_syns") {
        return;
    }
    for cookies in [1, 2] {
        let node = Node::new("tcp", AttachMode::Native, one_syn(), NO_CAP);
        node.set_syncookies(cookies);
        let listener = listen_with_backlog(&node, BACKLOG);
        // The queue holds one more than the backlog.
        let waiting = [0, 1].map(|_| node.connect(NODE4, TCP_PORT).unwrap());
        until("both wait", || node.kernel_count(REMOTE4) == 2);
        let passed = node.packets(Reason::PassTcpSyn);
        assert!(node.refuses(NODE4, TCP_PORT));
        assert!(node.packets(Reason::TcpSynBudget) > 0);
        assert_eq!(node.packets(Reason::PassTcpSyn), passed);

        drop(listener.accept().unwrap());
        assert!(node.connect(NODE4, TCP_PORT).is_ok());
        drop(waiting);
    }
}

/// Packets that the table has dropped for want of a stamp.
fn unstamped(node: &Node) -> u64 {
    let list = || {
        let mut nft = std::process::Command::new("nft");
        ok(nft.args(["list", "table", "inet", "millrace"]))
    };
    let text = node.pair.node.enter(list);
    let rules = text.lines().filter(|line| line.contains("\"unstamped\""));
    rules
        .map(|rule| {
            let count = rule.split("packets ").nth(1).unwrap();
            count.split(' ').next().unwrap().parse::<u64>().unwrap()
        })
        .sum()
}

// Protects a node that lost its program: its services are closed, and nothing else is.
#[test]
fn a_detached_program_leaves_no_open_node() {
    if !privileged("a_detached_program_leaves_no_open_node") {
        return;
    }
    for mode in [AttachMode::Native, AttachMode::Generic] {
        let node = Node::new("tcp", mode, generous(), NO_CAP);
        node.pair
            .node
            .enter(|| Nft::default().apply(&Table::of(&node.set)).unwrap());
        let service = Echo::serve(node.listen(ANY6, DUAL_PORT), TcpCap::new(0));
        let other = Echo::serve(node.listen(ANY6, OTHER_PORT), TcpCap::new(0));
        for to in [NODE4, NODE6] {
            assert!(echoes(&node.connect(to, DUAL_PORT).unwrap()));
            assert!(echoes(&node.connect(to, OTHER_PORT).unwrap()));
        }
        assert_eq!(unstamped(&node), 0, "{mode:?}");

        Edge::detach(&node.home.pins).unwrap();
        for (to, dropped) in [(NODE4, 0), (NODE6, 1)] {
            assert!(node.refuses(to, DUAL_PORT), "{mode:?}");
            assert!(unstamped(&node) > dropped, "{mode:?}");
            assert!(echoes(&node.connect(to, OTHER_PORT).unwrap()), "{mode:?}");
        }
        assert_eq!((service.peak() > 0, other.peak() > 0), (true, true));
    }
}

/// A client without a TCP stack: it sends any segment, and its host does not reset its connections.
struct Forger {
    socket: OwnedFd,
    port: u16,
}

impl Forger {
    const SEQUENCE: u32 = 1_000;
    /// Tells its resets from those of the host.
    const TTL: u32 = 7;

    fn new(node: &Node, port: u16) -> Self {
        let remote = &node.pair.remote;
        remote.enter(|| {
            for line in [
                "add table inet forger",
                "add chain inet forger output { type filter hook output priority 0; }",
                "add rule inet forger output ip ttl != 7 tcp flags & rst == rst drop",
            ] {
                ok(std::process::Command::new("nft").args(line.split(' ')));
            }
            let socket = raw_socket(AddressFamily::INET, ipproto::TCP);
            sockopt::set_ip_ttl(&socket, Self::TTL).unwrap();
            sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(PATIENCE)).unwrap();
            Self { socket, port }
        })
    }

    fn say(&self, acknowledged: Option<u32>, flag: impl FnOnce(&mut TcpHeader)) {
        let (IpAddr::V4(from), IpAddr::V4(to)) = (REMOTE4, NODE4) else {
            panic!("the remote is IPv4")
        };
        let sequence = Self::SEQUENCE + u32::from(acknowledged.is_some());
        let mut header = TcpHeader::new(self.port, TCP_PORT, sequence, 60_000);
        if let Some(number) = acknowledged {
            (header.ack, header.acknowledgment_number) = (true, number);
        }
        flag(&mut header);
        let (from, to_octets) = (from.octets(), to.octets());
        header.checksum = header.calc_checksum_ipv4_raw(from, to_octets, &[]).unwrap();
        let bytes = header.to_bytes();
        let to = SocketAddr::from((to, 0));
        rustix::net::sendto(&self.socket, &bytes, SendFlags::empty(), &to).unwrap();
    }

    /// Sequence number of the SYN-ACK that answers us.
    fn hears_cookie(&self) -> u32 {
        loop {
            let mut bytes = [0; 256];
            let (length, _) =
                rustix::net::recv(&self.socket, &mut bytes, RecvFlags::empty()).unwrap();
            let (_, packet) = Ipv4Header::from_slice(&bytes[..length]).unwrap();
            let (header, _) = TcpHeader::from_slice(packet).unwrap();
            if header.syn && header.ack && header.destination_port == self.port {
                return header.sequence_number;
            }
        }
    }
}

// Protects rate and cap: a cookie that a client fetched once opens connections without a SYN, as
// often as the client shows it.
#[test]
fn a_cookie_is_taken_up_within_the_limits() {
    const BURST: u64 = 3;
    const SHOWN: u64 = 50;
    if !privileged("a_cookie_is_taken_up_within_the_limits") {
        return;
    }
    let limits = Limits {
        source_tcp: Limit::per(1, Duration::from_secs(3_600), BURST),
        syn: Limit::NONE,
        ..Limits::default()
    };
    let node = Node::new("tcp", AttachMode::Native, limits, NO_CAP);
    // The kernel answers every SYN by a cookie; the program has seen one.
    node.set_syncookies(2);
    let echo = Echo::serve(node.listen(ANY4, TCP_PORT), TcpCap::new(0));
    let established = node.connect(NODE4, TCP_PORT).unwrap();
    assert!(echoes(&established));
    let taken = node.netstat("SyncookiesRecv");

    let forger = Forger::new(&node, 61_000);
    forger.say(None, |header| header.syn = true);
    let cookie = forger.hears_cookie().wrapping_add(1);
    let seen = || {
        let of = |reason| node.packets(reason);
        of(Reason::PassTcp) + of(Reason::TcpSourceRate)
    };
    for _ in 0..SHOWN {
        let before = seen();
        forger.say(Some(cookie), |_| ());
        // Resets the connection, if there is one, so that the next can take its place.
        forger.say(Some(cookie), |header| header.rst = true);
        until("both were seen", || seen() >= before + 2);
    }
    let taken = node.netstat("SyncookiesRecv") - taken;
    // The rest of the burst, and one more, which shows that a source exceeds it.
    assert!(taken <= BURST, "taken up {taken} times");
    assert!(taken > 1, "the cookie was right");
    assert!(node.packets(Reason::TcpSourceRate) >= SHOWN - BURST);
    assert!(echoes(&established), "what is open stays open");
    assert!(echo.peak() > 0);
}
