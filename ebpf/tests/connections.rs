//! The kernel counts TCP connections exactly, with real sockets.
#![allow(clippy::unwrap_used, reason = "test code")]

use std::net::{IpAddr, Shutdown, TcpListener, TcpStream};
use std::thread;

use libbpf_rs::{MapCore as _, MapFlags};
use millrace_edge::abi::{self, EdgeConfig, EdgeControl, EdgeService};
use millrace_edge::load::{LoadOptions, Loaded};
use millrace_edge::privileges::missing;
use millrace_edge_policy::source::Source;
use millrace_testkit::{skip, until};

const KIND_TCP: u8 = 2;

/// The programs, with one service: ports become its own as the tests bind them. None without the
/// privileges.
fn load() -> Option<Loaded> {
    if !skip::has_all("connections", &missing()) {
        return None;
    }
    let loaded = Loaded::load(&LoadOptions::default()).unwrap_or_else(|error| panic!("{error}"));
    let mut config = EdgeConfig {
        mode: abi::MODE_ENFORCE,
        services: 1,
        ..Default::default()
    };
    config.service[0] = EdgeService {
        protocol: 6,
        kind: KIND_TCP,
        ..Default::default()
    };
    let control = EdgeControl {
        layout: abi::LAYOUT,
        config: [config; 2],
        ..Default::default()
    };
    loaded.maps().control.store(0, &control);
    Some(loaded)
}

/// Connections of a source as the kernel counts them.
fn connections(loaded: &Loaded, source: IpAddr) -> u64 {
    let key = Source::of(source).cap_key();
    let found = loaded
        .maps()
        .tcp_sources()
        .lookup(key.bytes(), MapFlags::ANY)
        .unwrap();
    let word = found.map_or(0, |word| u64::from_ne_bytes(word.try_into().unwrap()));
    if word & abi::TCP_DEAD == 0 {
        word & abi::TCP_CONNECTIONS
    } else {
        0
    }
}

#[test]
fn connections_are_counted_by_source_and_given_back() {
    let Some(loaded) = load() else { return };
    let _link = loaded.count_connections().unwrap();
    // The unspecified IPv6 address exists also where the host has none of its own.
    if TcpListener::bind("[::1]:0").is_err() {
        skip::skip("connections_are_counted_by_source_and_given_back", "IPv6");
        return;
    }
    let listener = TcpListener::bind("[::]:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    loaded.maps().set_port(0, true, port, Some(0));
    let four: IpAddr = "127.0.0.1".parse().unwrap();
    let six: IpAddr = "::1".parse().unwrap();
    let open = |to: IpAddr| {
        let dialled = TcpStream::connect((to, port)).unwrap();
        (dialled, listener.accept().unwrap().0)
    };
    let mut fours: Vec<_> = (0..5).map(|_| open(four)).collect();
    let sixes: Vec<_> = (0..3).map(|_| open(six)).collect();
    assert_eq!(
        (connections(&loaded, four), connections(&loaded, six)),
        (5, 3)
    );

    let (dialled, accepted) = fours.pop().unwrap();
    drop(accepted);
    drop(dialled);
    until("one closed by us", || connections(&loaded, four) == 4);
    let (dialled, accepted) = fours.pop().unwrap();
    dialled.shutdown(Shutdown::Both).unwrap();
    assert_eq!(
        connections(&loaded, four),
        4,
        "half closed, the socket is still there"
    );
    drop((dialled, accepted));
    until("one closed by them", || connections(&loaded, four) == 3);
    drop((fours, sixes));
    until("none left", || {
        connections(&loaded, four) + connections(&loaded, six) == 0
    });
}

#[test]
fn counts_stay_exact_while_two_threads_open_and_close() {
    const ROUNDS: usize = 300;
    let Some(loaded) = load() else { return };
    let _link = loaded.count_connections().unwrap();
    let address: IpAddr = "127.0.0.1".parse().unwrap();
    let listeners = [(); 2].map(|()| TcpListener::bind((address, 0)).unwrap());
    for listener in &listeners {
        loaded
            .maps()
            .set_port(0, true, listener.local_addr().unwrap().port(), Some(0));
    }
    // The count falls to zero and rises again all the time: then one CPU deletes an entry while
    // another reads it.
    thread::scope(|scope| {
        for listener in &listeners {
            scope.spawn(|| {
                for _ in 0..ROUNDS {
                    let dialled = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
                    let accepted = listener.accept().unwrap().0;
                    drop((dialled, accepted));
                }
            });
        }
    });
    until("none left", || connections(&loaded, address) == 0);
    let pairs: Vec<_> = (0..7)
        .map(|_| {
            let dialled = TcpStream::connect(listeners[0].local_addr().unwrap()).unwrap();
            (dialled, listeners[0].accept().unwrap().0)
        })
        .collect();
    assert_eq!(connections(&loaded, address), 7);
    drop(pairs);
    until("none left at the end", || {
        connections(&loaded, address) == 0
    });
}
