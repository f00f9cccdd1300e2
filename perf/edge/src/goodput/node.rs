//! The node under attack: a transport that answers RPCs, and a TCP echo.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use millrace_edge_policy::admission::{Admission, AdmissionConfig};
use millrace_protocol::frame::{FailureCode, Method};
use millrace_protocol::identity::SigningKey;
use millrace_protocol::topology::{Member, Topology};
use millrace_shards::config::ShardConfig;
use millrace_shards::socket::UdpGroupConfig;
use millrace_transport::{
    Answer, Clock, Defer, EdgeStart, Inbound, PathProfile, Payload, Router, Service,
    ShardMessenger, Transport, TransportConfig, TransportStart,
};

use super::RoleArgs;
use super::load::{BYTES, PATIENCE};
use crate::edge::known_bytes;
use crate::frames::{OPEN_PORT, TCP_PORT};
use crate::testbed::{CLIENT, NODE};
use crate::{Result, cpu};

pub(super) const RPC: Method = Method(1);
pub(super) static BODY: [u8; BYTES] = [7; BYTES];
/// Port of the client's transport, which no node dials.
const CLIENT_PORT: u16 = 4200;

/// Probes of each protocol.
pub(super) const PROBES: u8 = 16;
/// Addresses of all probes; those over QUIC first.
pub(crate) fn probe_addresses() -> impl Iterator<Item = Ipv4Addr> {
    (0..PROBES).flat_map(|probe| [by_quic(probe), by_tcp(probe)])
}

pub(super) fn by_quic(probe: u8) -> Ipv4Addr {
    Ipv4Addr::new(198, 18, 1 + probe, 1)
}

pub(super) fn by_tcp(probe: u8) -> Ipv4Addr {
    Ipv4Addr::new(198, 19, 1 + probe, 1)
}

/// The keys of client, probes and node. The node has the highest ID, because the lower ID dials.
pub(super) struct Identities {
    pub(super) client: SigningKey,
    pub(super) probes: Vec<SigningKey>,
    pub(super) node: SigningKey,
}

impl Identities {
    pub(super) fn new() -> Self {
        let mut keys: [_; PROBES as usize + 2] =
            std::array::from_fn(|seed| SigningKey::from_seed([seed as u8 + 1; 32]));
        keys.sort_by_key(SigningKey::node_id);
        let [client, probes @ .., node] = keys;
        Self {
            client,
            probes: probes.into(),
            node,
        }
    }

    fn topology(&self) -> Arc<Topology> {
        let member = |key: &SigningKey, address: (Ipv4Addr, u16)| {
            Member::new(key.public_key(), vec![address.into()])
        };
        let probes = self.probes.iter().zip(probe_addresses());
        let members = [
            member(&self.client, (CLIENT, CLIENT_PORT)),
            member(&self.node, (NODE, OPEN_PORT)),
        ];
        let probes = probes.map(|(key, address)| member(key, (address, CLIENT_PORT)));
        Arc::new(Topology::from_members(members.into_iter().chain(probes), 1))
    }

    /// The topology of the client's transport, without the probes: it dials every member that it
    /// knows.
    pub(super) fn of_client() -> Arc<Topology> {
        Self {
            probes: Vec::new(),
            ..Self::new()
        }
        .topology()
    }
}

/// The node's admission. Its keys are those of the edge in the kernel.
fn admission(clock: &Clock, kernel_charges: bool) -> Admission {
    let admission = Admission::new(
        AdmissionConfig::default(),
        clock.ns(Instant::now()),
        known_bytes(),
    );
    admission.set_kernel_charges(kernel_charges);
    admission
}

/// Starts one side's transport on one shard of the core that the process is pinned to.
pub(super) fn start<S: Service>(
    key: &SigningKey,
    local: (Ipv4Addr, u16),
    topology: Arc<Topology>,
    edge: EdgeStart,
    service: impl Fn(ShardMessenger) -> S + Send + Clone + 'static,
) -> Result<Transport> {
    let mut config = TransportConfig::default();
    // The load of the host must not make loopback look like a long path.
    config.paths.profile = Some(PathProfile::Lan);
    let start = TransportStart {
        identity: SigningKey::from_seed(*key.seed()),
        tls: None,
        config,
        // Client and node share the core, so neither may spin on the other's time.
        shards: vec![ShardConfig {
            spin: Duration::ZERO,
            ..ShardConfig::default()
        }],
        udp: UdpGroupConfig {
            local: local.into(),
            ..UdpGroupConfig::default()
        },
        topology,
        paths: Vec::new(),
        edge,
    };
    let services = move |messenger| Router::new().serve(RPC..=RPC, service(messenger));
    Ok(Transport::start(start, services)?)
}

/// The address of the client's transport.
pub(super) fn client_address() -> (Ipv4Addr, u16) {
    (CLIENT, CLIENT_PORT)
}

/// Serves until the parent ends.
pub(crate) fn serve(role: RoleArgs) -> Result<()> {
    cpu::pin_to(role.cpu)?;
    let node = start_node(role.kernel_charges)?;
    let listener = TcpListener::bind(SocketAddr::from((NODE, TCP_PORT)))?;
    thread::spawn(move || {
        for connection in listener.incoming().flatten() {
            thread::spawn(move || echo(connection));
        }
    });
    println!("ready");
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
    node.shutdown();
    Ok(())
}

/// Starts the transport. The node before may still hold the port: the kernel closes the sockets of
/// an io_uring only after its process is gone.
fn start_node(kernel_charges: bool) -> Result<Transport> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let clock = Clock::new();
        let admission = Some(Arc::new(admission(&clock, kernel_charges)));
        let edge = EdgeStart {
            admission,
            clock,
            ..EdgeStart::default()
        };
        let identities = Identities::new();
        let (address, topology) = ((NODE, OPEN_PORT), identities.topology());
        match start(&identities.node, address, topology, edge, |_messenger| {
            Server
        }) {
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => thread::yield_now(),
            Ok(node) => return Ok(node),
        }
    }
}

/// Echoes until the client closes.
fn echo(mut connection: TcpStream) -> std::io::Result<()> {
    connection.set_nodelay(true)?;
    let mut request = [0; BYTES];
    loop {
        connection.read_exact(&mut request)?;
        connection.write_all(&request)?;
    }
}

struct Server;

impl Service for Server {
    fn on_request(&mut self, request: Inbound<'_>, _defer: Defer<'_>) -> Answer {
        if request.method == RPC {
            Answer::Reply(Payload::Bytes(BODY.as_slice().into()))
        } else {
            Answer::Failure(FailureCode::Malformed)
        }
    }

    fn on_send(&mut self, _message: Inbound<'_>) {}
}
