//! An edge between the two namespaces of a [`Pair`], with one service of plain UDP.

use std::net::UdpSocket;

use millrace_edge::edge::{AttachOptions, Edge};
use millrace_edge::load::LoadOptions;
use millrace_edge::metrics::Counters;
use millrace_edge::pins::Pins;
use millrace_edge::state::AttachMode;
use millrace_edge_policy::reason::Reason;
use millrace_edge_policy::rules::{Bounds, Compiled, Rule, RuleAction, Temporary, compile};
use millrace_edge_policy::settings::{DefaultAction, Kind, Mode, Service, Settings};

use super::{NODE, PATIENCE, Pair, REMOTE};

/// Where the service of UDP listens.
pub const PORT: u16 = 4200;
/// Where the service of TCP listens, open to all whom no rule names.
pub const TCP_PORT: u16 = 8080;

pub fn sizes() -> LoadOptions {
    LoadOptions {
        trie_nodes4: 128,
        trie_nodes6: 128,
        limiter_buckets: 256,
        rules_max: 64,
        peers_max: 16,
        sources_max: 64,
        replies_max: 64,
        ..LoadOptions::default()
    }
}

pub fn options(mode: AttachMode) -> AttachOptions {
    AttachOptions {
        interfaces: vec!["mr0".into()],
        mode,
        sizes: sizes(),
    }
}

/// UDP to [`PORT`] is allowed or denied from every remote address, by a rule.
pub fn set(mode: Mode, action: RuleAction) -> Compiled {
    set_of(mode, &["10.77.0.0/24"], action)
}

pub fn set_of(mode: Mode, prefixes: &[&str], action: RuleAction) -> Compiled {
    let settings = Settings {
        mode,
        services: vec![
            Service {
                port: PORT,
                kind: Kind::Udp,
                default_action: DefaultAction::Deny,
            },
            Service {
                port: TCP_PORT,
                kind: Kind::Tcp,
                default_action: DefaultAction::Allow,
            },
        ],
        ..Settings::default()
    };
    let rule = |prefix: &&str| {
        let prefix = prefix.parse().unwrap();
        Rule::temporary(&Temporary {
            prefix,
            action,
            until_unix_seconds: u64::MAX,
        })
    };
    let rules: Vec<Rule> = prefixes.iter().map(rule).collect();
    let bounds = Bounds {
        rules_max: 1_000,
        nodes4_max: 10_000,
        nodes6_max: 10_000,
    };
    compile(&settings, &rules, bounds).unwrap()
}

/// A folder for pins; everything pinned there is detached when it is dropped.
#[derive(Debug)]
pub struct Home {
    pub pins: Pins,
    _folder: tempfile::TempDir,
}

impl Home {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self {
            pins: Pins::at(folder.path().join("edge")),
            _folder: folder,
        }
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let _ = Edge::detach(&self.pins);
    }
}

/// A socket of the node on [`PORT`], and one of the remote host that sends there.
pub struct Ends {
    pub server: UdpSocket,
    pub client: UdpSocket,
}

impl Ends {
    pub fn new(pair: &Pair) -> Self {
        let server = pair.node.enter(|| UdpSocket::bind((NODE, PORT)).unwrap());
        let client = pair.remote.enter(|| UdpSocket::bind((REMOTE, 0)).unwrap());
        client.connect((NODE, PORT)).unwrap();
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        let ends = Self { server, client };
        // Neighbours are resolved before anything is counted.
        assert!(ends.arrives());
        ends
    }

    pub fn send(&self) {
        self.client.send(b"hello").unwrap();
    }

    pub fn arrives(&self) -> bool {
        self.send();
        self.server.recv(&mut [0; 64]).is_ok()
    }

    /// Datagrams that are in the socket, which is empty afterwards.
    pub fn arrived(&self) -> usize {
        self.server.set_nonblocking(true).unwrap();
        let received = std::iter::repeat_with(|| self.server.recv(&mut [0; 64]));
        let count = received.take_while(Result::is_ok).count();
        self.server.set_nonblocking(false).unwrap();
        count
    }
}

pub fn counters(edge: &Edge) -> Counters {
    Counters::read(edge.maps().counters()).unwrap()
}

pub fn denied(edge: &Edge) -> u64 {
    counters(edge).acted_on(Reason::FirewallDeny)
}

/// Attaches to the node's interface. Nothing is in force yet.
pub fn attached(pair: &Pair, home: &Home, mode: AttachMode) -> Edge {
    pair.node
        .enter(|| Edge::attach(&home.pins, &options(mode)).unwrap())
}
