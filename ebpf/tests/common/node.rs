//! A node with real sockets behind the edge, and remote hosts in front of it.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use libbpf_rs::{MapCore as _, MapFlags};
use millrace_edge::abi::TCP_CONNECTIONS;
use millrace_edge::counts::TcpCap;
use millrace_edge::edge::{AttachOptions, Edge};
use millrace_edge::interface::AttachMode;
use millrace_edge::lease::NodeLease;
use millrace_edge::load::LoadOptions;
use millrace_edge_policy::cid::Keys;
use millrace_edge_policy::rules::Compiled;
use millrace_edge_policy::settings::{Caps, Limits};
use millrace_edge_policy::siphash::Key;
use millrace_edge_policy::source::Source;
use rustix::net::sockopt;

use super::edge::{Home, counters};
use super::flood::FarEnd;
use super::{PATIENCE, Pair};

pub use super::sets::{
    BURST, DUAL_PORT, QUIC_PORT, REMOTE4, SILENT_PORT, TCP_PORT, limited, services,
};

/// No service.
pub const OTHER_PORT: u16 = 9999;
pub const NODE4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 1));
pub const NODE6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 1));
pub const REMOTE6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 2));

/// How long a client waits for a connection that the edge refuses.
pub const REFUSED: Duration = Duration::from_millis(300);

/// The edge in force on the node's interface, and the far end of its wire. Fields are dropped in
/// this order.
#[derive(Debug)]
pub struct Node {
    pub edge: Edge,
    pub far: Option<FarEnd>,
    pub home: Home,
    pub set: Compiled,
    pub pair: Pair,
}

impl Node {
    /// A node whose services every source may use, within limits and caps.
    pub fn new(label: &str, mode: AttachMode, limits: Limits, caps: Caps) -> Self {
        let pair = Pair::new(label);
        // The program in generic mode transmits through the stack, which needs nothing at the other
        // end.
        let far = (mode == AttachMode::Native).then(|| FarEnd::attach(&pair, QUIC_PORT, TCP_PORT));
        let home = Home::new();
        let options = AttachOptions {
            interfaces: vec!["mr0".into()],
            mode,
            sizes: LoadOptions::default(),
        };
        let edge = pair.node.enter(|| Edge::attach(&home.pins, &options));
        let edge = edge.unwrap_or_else(|error| panic!("{error}"));
        let set = services(limits, caps);
        edge.publish(&set, 1, None).unwrap();
        Self {
            edge,
            far,
            home,
            set,
            pair,
        }
    }

    /// A node that lives as long as any test.
    pub fn lease(&self) -> NodeLease<'_> {
        let keys = Keys {
            keys: [1, 2, 3, 4].map(|number| Key {
                k0: number,
                k1: !number,
            }),
            active: 1,
        };
        let limits = &self.set.settings.limits;
        NodeLease::begin(
            self.edge.maps(),
            1,
            Duration::from_secs(3_600),
            limits,
            &keys,
        )
    }

    /// Connections of a source, as the kernel counts them.
    pub fn kernel_count(&self, source: IpAddr) -> u64 {
        let key = Source::of(source).cap_key();
        let map = self.edge.maps().tcp_sources();
        let value = map.lookup(key.bytes(), MapFlags::ANY).unwrap();
        value.map_or(0, |value| {
            u64::from_ne_bytes(value.try_into().unwrap()) & TCP_CONNECTIONS
        })
    }

    /// Sources that the kernel has a count for.
    pub fn kernel_sources(&self) -> usize {
        self.edge.maps().tcp_sources().keys().count()
    }

    /// Packets that the program acted on for this reason.
    pub fn packets(&self, reason: millrace_edge_policy::reason::Reason) -> u64 {
        counters(&self.edge).acted_on(reason)
    }

    pub fn listen(&self, address: IpAddr, port: u16) -> TcpListener {
        self.pair
            .node
            .enter(|| TcpListener::bind((address, port)).unwrap())
    }

    /// A connection from the remote host.
    pub fn connect(&self, address: IpAddr, port: u16) -> std::io::Result<TcpStream> {
        self.pair.remote.enter(|| connect((address, port).into()))
    }

    /// Whether the edge refuses a connection of the remote host.
    pub fn refuses(&self, address: IpAddr, port: u16) -> bool {
        let to = SocketAddr::from((address, port));
        self.pair
            .remote
            .enter(|| TcpStream::connect_timeout(&to, REFUSED))
            .is_err()
    }

    /// Sets `net.ipv4.tcp_syncookies` of the node, which is for both families.
    pub fn set_syncookies(&self, value: u8) {
        let set = || fs::write("/proc/sys/net/ipv4/tcp_syncookies", value.to_string());
        self.pair.node.enter(set).unwrap();
    }

    /// A counter of the node's `/proc/net/netstat`, group `TcpExt`.
    pub fn netstat(&self, name: &str) -> u64 {
        let text = self
            .pair
            .node
            .enter(|| fs::read_to_string("/proc/thread-self/net/netstat").unwrap());
        let lines = text.lines().filter(|line| line.starts_with("TcpExt:"));
        let lines: Vec<Vec<&str>> = lines.map(|line| line.split(' ').collect()).collect();
        let at = lines[0].iter().position(|known| *known == name).unwrap();
        lines[1][at].parse().unwrap()
    }
}

/// From the calling thread's namespace; lost packets are sent again, as by any client.
pub fn connect(to: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Closes a connection by a reset.
pub fn reset(stream: TcpStream) {
    sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
    drop(stream);
}

/// Whether what is sent comes back.
pub fn echoes(mut stream: &TcpStream) -> bool {
    let mut back = [0; 4];
    stream.write_all(b"ping").is_ok() && stream.read_exact(&mut back).is_ok() && &back == b"ping"
}

/// An application: it accepts a connection if the cap gives a guard for it, and echoes. It keeps
/// its own count.
#[derive(Debug, Default)]
pub struct Echo {
    held: AtomicUsize,
    peak: AtomicUsize,
}

impl Echo {
    /// Serves until the process ends; no test joins its threads.
    pub fn serve(listener: TcpListener, cap: Arc<TcpCap>) -> Arc<Self> {
        let echo = Arc::new(Self::default());
        let serving = Arc::clone(&echo);
        thread::spawn(move || {
            while let Ok((stream, peer)) = listener.accept() {
                let Some(guard) = cap.admit(peer.ip()) else {
                    continue;
                };
                serving.count();
                let serving = Arc::clone(&serving);
                thread::spawn(move || {
                    echo_all(stream);
                    serving.held.fetch_sub(1, Ordering::SeqCst);
                    drop(guard);
                });
            }
        });
        echo
    }

    fn count(&self) {
        let held = self.held.fetch_add(1, Ordering::SeqCst) + 1;
        self.peak.fetch_max(held, Ordering::SeqCst);
    }

    /// Connections that it holds.
    pub fn held(&self) -> usize {
        self.held.load(Ordering::SeqCst)
    }

    /// The most that it ever held.
    pub fn peak(&self) -> usize {
        self.peak.load(Ordering::SeqCst)
    }
}

/// Until the client ends it, in whatever way.
fn echo_all(mut stream: TcpStream) {
    let mut buffer = [0; 64];
    while let Ok(length @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&buffer[..length]).is_err() {
            return;
        }
    }
}
