//! An edge between the two namespaces of a [`Pair`], with one service of plain UDP.

use std::net::UdpSocket;

use millrace_edge::edge::Edge;
use millrace_edge::interface::AttachMode;
use millrace_edge::metrics::Counters;
use millrace_edge::pins::Pins;
use millrace_edge_policy::reason::Reason;

pub use super::sets::{PORT, TCP_PORT, options, set, set_of, sizes};

use super::{NODE, PATIENCE, Pair, REMOTE};

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

    /// Number of datagrams in the socket, which is empty afterwards.
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
