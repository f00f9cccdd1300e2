//! millrace through its own public API: a node on one shard for each side.
//!
//! Callers run as tasks on the shard and requests go out through
//! [`ShardMessenger`], as the layers above the transport do it.
//! Three profiles differ only in how long an idle shard polls before it parks.

mod drive;
mod handshakes;
pub(crate) mod mesh;
mod serve;
pub(crate) mod wan;

use std::net::{Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use millrace_protocol::frame::Method;
use millrace_protocol::identity::SigningKey;
use millrace_protocol::topology::{Member, Topology};
use millrace_shards::chunk::{Body, BodyMut, ChunkPool};
use millrace_shards::config::ShardConfig;
use millrace_shards::socket::UdpGroupConfig;
use millrace_transport::{
    EdgeStart, PathProfile, ProfileConfig, Router, Service, ShardMessenger, Transport,
    TransportConfig, TransportStart,
};

pub(super) use drive::drive;
pub(super) use serve::serve;

use crate::plan::{BULK_BYTES, Engine, FANOUT_BYTES, HANDSHAKES_AT_ONCE, RPC_BYTES, Workload};
use crate::settings::Settings;
use crate::{Result, workloads};

/// 1 KiB there, 1 KiB back.
const RPC: Method = Method(1);
/// A body; answered when all of it is in chunks.
const BODY: Method = Method(2);
/// How many one-way messages have arrived.
const COUNT: Method = Method(3);
/// A one-way message.
const ONEWAY: Method = Method(4);

/// All of them.
const METHODS: RangeInclusive<Method> = RPC..=ONEWAY;

/// Nodes that may drive; the lowest ids, because the lower id dials.
const DRIVERS: usize = HANDSHAKES_AT_ONCE;
const MIB: u64 = 1 << 20;

static RPC_BODY: [u8; RPC_BYTES] = [7; RPC_BYTES];

fn rpc_body() -> Bytes {
    Bytes::from_static(&RPC_BODY)
}

/// Identities that both processes know, in the order of their node ids.
struct Identities(Vec<SigningKey>);

impl Identities {
    fn new() -> Self {
        let mut keys: Vec<_> = (1..=64)
            .map(|seed| SigningKey::from_seed([seed; 32]))
            .collect();
        keys.sort_by_key(SigningKey::node_id);
        Self(keys)
    }

    fn driver(&self, index: usize) -> &SigningKey {
        &self.0[index]
    }

    fn server(&self, index: usize) -> &SigningKey {
        &self.0[DRIVERS + index]
    }
}

/// How many nodes drive a workload: handshakes need a dialler for each that is in flight.
fn drivers(workload: Workload) -> usize {
    if workload == Workload::Handshakes {
        DRIVERS
    } else {
        1
    }
}

fn member(key: &SigningKey, address: SocketAddr) -> Member {
    Member::new(key.public_key(), vec![address])
}

/// An address for members that dial us and are never dialled.
fn nowhere() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 9).into()
}

fn topology(members: impl IntoIterator<Item = Member>, version: u64) -> Arc<Topology> {
    Arc::new(Topology::from_members(members, version))
}

/// Starts a node on one shard, on the core this process is pinned to.
fn start<S, F>(
    key: &SigningKey,
    topology: &Arc<Topology>,
    shard: ShardConfig,
    settings: &Settings,
    service: F,
) -> Result<Transport>
where
    S: Service,
    F: Fn(ShardMessenger) -> S + Send + Clone + 'static,
{
    let mut config = transport_config(settings);
    // A node finds this out by itself, within a second; the clock starts sooner.
    config.paths.profile = Some(PathProfile::Lan);
    let start = TransportStart {
        identity: SigningKey::from_seed(*key.seed()),
        tls: None,
        config,
        shards: vec![shard],
        udp: UdpGroupConfig {
            local: (Ipv4Addr::LOCALHOST, 0).into(),
            recv_buffer_bytes: settings.socket_buffer_bytes,
            send_buffer_bytes: settings.socket_buffer_bytes,
            ..UdpGroupConfig::default()
        },
        topology: Arc::clone(topology),
        paths: Vec::new(),
        edge: EdgeStart::default(),
    };
    let services = move |messenger| Router::new().serve(METHODS, service(messenger));
    Ok(Transport::start(start, services)?)
}

/// The defaults, and what `TransportConfig` says of jumbo frames.
fn transport_config(settings: &Settings) -> TransportConfig {
    let ethernet = TransportConfig {
        udp_payload_bytes_max: settings.udp_payload_bytes.into(),
        ..TransportConfig::default()
    };
    if settings.udp_payload_bytes < 4_000 {
        return ethernet;
    }
    TransportConfig {
        lan: ProfileConfig {
            stream_window_bytes: 4 << 20,
            connection_window_bytes: 8 << 20,
            ..ProfileConfig::lan()
        },
        ..ethernet
    }
}

/// The shard of a profile. Nodes that share a core may not spin on each other's time.
fn shard(engine: Engine, workload: Workload, nodes_on_core: usize) -> ShardConfig {
    let defaults = ShardConfig::default();
    let spin = match engine {
        Engine::MillracePark => Duration::ZERO,
        _ if nodes_on_core > 1 => Duration::ZERO,
        Engine::MillraceSpin => Duration::from_secs(3600),
        _ => defaults.spin,
    };
    ShardConfig {
        cpu: Some(rustix::thread::sched_getcpu()),
        spin,
        chunk_pool_bytes: pool_bytes(workload),
        ..defaults
    }
}

/// One body and some room, as the peers hold one body.
fn pool_bytes(workload: Workload) -> u64 {
    match workload {
        Workload::Bulk1452 | Workload::Bulk8972 | Workload::RpcUnderBulk => {
            BULK_BYTES as u64 + 16 * MIB
        }
        Workload::Fanout12 => 16 * MIB,
        _ => 2 * MIB,
    }
}

/// Length of the body of a workload.
fn body_bytes(workload: Workload) -> usize {
    if workload == Workload::Fanout12 {
        FANOUT_BYTES
    } else {
        BULK_BYTES
    }
}

/// A body of the pattern that the receiving side looks for.
fn pattern_body(pool: &ChunkPool, length: usize) -> Result<Body> {
    let mut body = BodyMut::with_len(pool, length).ok_or("the pool is too small")?;
    let mut offset = 0;
    while !body.is_full() {
        let spare = body.spare();
        for (at, byte) in spare.iter_mut().enumerate() {
            *byte = workloads::pattern(offset + at);
        }
        let filled = spare.len();
        body.advance(filled);
        offset += filled;
    }
    Ok(body.freeze())
}

/// Looks at a byte in every page, as for the peers.
fn check_body(body: &Body) -> Result<()> {
    let mut offset = 0;
    for chunk in body.chunks() {
        let wrong = (0..chunk.len())
            .step_by(4096)
            .find(|&at| chunk[at] != workloads::pattern(offset + at));
        if let Some(at) = wrong {
            return Err(format!("body differs at {}", offset + at).into());
        }
        offset += chunk.len();
    }
    Ok(())
}
