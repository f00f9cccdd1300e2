//! Both halves of a cell of `peers wan`: a node with one shard each, on the defaults of the
//! transport but for what `README.md` names.

use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use millrace_protocol::frame::{Class, FailureCode, Method};
use millrace_protocol::id::{ConnectionNumber, NodeId};
use millrace_protocol::identity::SigningKey;
use millrace_protocol::rpc::RpcError;
use millrace_protocol::topology::Member;
use millrace_shards::chunk::{Body, Chunk};
use millrace_shards::config::ShardConfig;
use millrace_shards::socket::UdpGroupConfig;
use millrace_transport::{
    Answer, BodyHead, BodyMode, BodySink, Defer, EdgeStart, Inbound, InboundBody, Payload,
    PeerStatus, RememberedPath, Request, Router, Service, Transport, TransportStart,
};

use super::{
    BODY, Identities, METHODS, MIB, ONEWAY, RPC, member, nowhere, pattern_body, rpc_body, topology,
    transport_config,
};
use crate::Result;
use crate::plan::{BULK_BYTES, ONEWAY_BYTES, RPC_BYTES};
use crate::settings::{Congestion, Settings};
use crate::wan::child::{Arrivals, Before, BodyOutcome, End, Job, LAST_RPC, Outcome, RpcLog};
use crate::wan::clock;
use crate::workloads::{self, pattern};

/// The file of the paths, in the folder of a node.
const PATHS: &str = "paths.json";
/// Node, RTT, bytes in a second.
type PathEntry = (String, Duration, Option<u64>);

static ONEWAY_MESSAGE: [u8; ONEWAY_BYTES] = [9; ONEWAY_BYTES];
/// Between two small messages.
const SMALL_EVERY: Duration = Duration::from_millis(10);
/// Of every request: no cell lasts as long, so what is cut is cut by the bench.
const DEADLINE: Duration = Duration::from_secs(600);

/// Serves until the parent goes away.
pub(crate) fn serve(arrivals: &Arrivals, remembered_paths: Option<&Path>) -> Result<()> {
    let identities = Identities::new();
    let me = identities.server(0);
    let members = [
        member(identities.driver(0), nowhere()),
        member(me, nowhere()),
    ];
    let shard = shard(Some(rustix::thread::sched_getcpu()));
    let arrivals = arrivals.clone();
    let node = start(me, members, shard, remembered_paths, move || Receiver {
        arrivals: arrivals.clone(),
        ..Receiver::default()
    })?;
    workloads::announce(&[node.local_addr()])?;
    loop {
        std::thread::park();
    }
}

pub(crate) fn drive(job: &Job) -> Result<Outcome> {
    let identities = Identities::new();
    let (me, server) = (identities.driver(0), identities.server(0));
    let members = [member(me, nowhere()), member(server, job.to)];
    let shard = shard(Some(rustix::thread::sched_getcpu()));
    let remembered = job.remembered_paths.as_deref();
    let dialled = clock::now();
    let node = start(me, members, shard, remembered, Receiver::default)?;
    let driver = Driver {
        body: body(&node, job.body_bytes)?,
        peer: server.node_id(),
        node,
    };
    let mut outcome = Outcome::default();
    let within = Duration::from_secs_f64(job.connect_within_s);
    if !driver.node.status().wait(within, |peers| !peers.is_empty()) {
        return Ok(outcome);
    }
    outcome.connected_s = Some((clock::now() - dialled).as_secs_f64());
    driver.wait_before(job);
    let rpcs = RpcLog::default();
    std::thread::scope(|scope| {
        let caller = job
            .has_rpcs
            .then(|| scope.spawn(|| driver.call(job, &rpcs)));
        driver.send_bodies(job, &rpcs, &mut outcome);
        let until = clock::now() + LAST_RPC;
        while caller.as_ref().is_some_and(|caller| !caller.is_finished()) && clock::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
        rpcs.fill(&mut outcome);
        let peers = driver.node.status().peers();
        outcome.packets = peers
            .first()
            .map(|path| (path.packets_sent, path.packets_lost));
        if let Some(folder) = remembered
            && let Err(error) = write_paths(folder, &driver.node)
        {
            eprintln!("the paths are not remembered: {error}");
        }
        let is_whole = |body: &BodyOutcome| body.end == End::Whole;
        if outcome.bodies.iter().all(is_whole) && !rpcs.is_waiting() {
            driver.node.shutdown();
        } else {
            // It also ends the wait for an RPC that is not back.
            driver.node.close();
        }
    });
    Ok(outcome)
}

/// Starts a node with one shard.
pub(super) fn start<S, F>(
    key: &SigningKey,
    members: impl IntoIterator<Item = Member>,
    shard: ShardConfig,
    remembered_paths: Option<&Path>,
    service: F,
) -> Result<Transport>
where
    S: Service,
    F: Fn() -> S + Send + Clone + 'static,
{
    let settings = Settings::wan(Congestion::Bbr);
    let start = TransportStart {
        identity: SigningKey::from_seed(*key.seed()),
        tls: None,
        config: transport_config(&settings),
        shards: vec![shard],
        udp: UdpGroupConfig {
            local: (Ipv4Addr::LOCALHOST, 0).into(),
            recv_buffer_bytes: settings.socket_buffer_bytes,
            send_buffer_bytes: settings.socket_buffer_bytes,
            ..UdpGroupConfig::default()
        },
        topology: topology(members, 1),
        paths: remembered_paths.map_or_else(Vec::new, read_paths),
        edge: EdgeStart::default(),
    };
    let services = move |_messenger| Router::new().serve(METHODS, service());
    Ok(Transport::start(start, services)?)
}

/// What a node knew of paths before it was restarted, from its folder: a whole node keeps the same
/// in its state folder.
fn read_paths(folder: &Path) -> Vec<(NodeId, RememberedPath)> {
    let text = std::fs::read(folder.join(PATHS)).unwrap_or_default();
    let entries: Vec<PathEntry> = serde_json::from_slice(&text).unwrap_or_default();
    let path = |(node, rtt, bandwidth_bytes_per_s): PathEntry| {
        let path = RememberedPath {
            rtt,
            bandwidth_bytes_per_s,
        };
        Some((node.parse().ok()?, path))
    };
    entries.into_iter().filter_map(path).collect()
}

fn write_paths(folder: &Path, node: &Transport) -> Result<()> {
    let entry = |peer: PeerStatus| {
        let path = peer.remembered?;
        Some((
            peer.node_id.to_string(),
            path.rtt,
            path.bandwidth_bytes_per_s,
        ))
    };
    let entries: Vec<PathEntry> = node
        .status()
        .peers()
        .into_iter()
        .filter_map(entry)
        .collect();
    std::fs::create_dir_all(folder)?;
    Ok(std::fs::write(
        folder.join(PATHS),
        serde_json::to_vec(&entries)?,
    )?)
}

/// As it ships, with space for a body.
pub(super) fn shard(cpu: Option<usize>) -> ShardConfig {
    ShardConfig {
        cpu,
        chunk_pool_bytes: BULK_BYTES as u64 + 16 * MIB,
        ..ShardConfig::default()
    }
}

fn body(node: &Transport, bytes: usize) -> Result<Body> {
    pattern_body(node.pool(0).ok_or("no shard")?, bytes)
}

/// The driving node, from the main thread.
struct Driver {
    node: Transport,
    peer: NodeId,
    body: Body,
}

impl Driver {
    fn wait_before(&self, job: &Job) {
        let over = clock::now() + job.before.lasts();
        let over = over.max(Duration::from_nanos(job.starts_at_ns.unwrap_or_default()));
        if let Before::SmallMessages { .. } = job.before {
            while clock::now() < over {
                let message = Bytes::from_static(&ONEWAY_MESSAGE).into();
                // What a full queue refuses is not sent; the next one is.
                self.node
                    .send(self.peer, Class::Normal, ONEWAY, message)
                    .ok();
                std::thread::sleep(SMALL_EVERY);
            }
        }
        std::thread::sleep(over.saturating_sub(clock::now()));
    }

    fn send_bodies(&self, job: &Job, rpcs: &RpcLog, outcome: &mut Outcome) {
        for _ in 0..job.bodies {
            let started_ns = clock::now_ns();
            let body = self.body.clone().into();
            let end = match self.ask(Class::Bulk, BODY, body, job.cut_in()) {
                Ok(_) => End::Whole,
                Err(RpcError::Timeout) => End::Cut,
                Err(error) => End::Lost(error.to_string()),
            };
            let is_last = end != End::Whole;
            outcome.bodies.push(BodyOutcome {
                started_ns,
                ended_ns: clock::now_ns(),
                end,
            });
            rpcs.stop();
            if is_last {
                break;
            }
        }
    }

    /// One RPC after the other, until the log wants no more.
    fn call(&self, job: &Job, log: &RpcLog) {
        while log.ask() {
            let within = job.cut_in() + LAST_RPC;
            match self.ask(Class::Latency, RPC, rpc_body().into(), within) {
                Ok(answer) if answer.len() == RPC_BYTES as u64 => log.answered(),
                _ => return,
            }
        }
    }

    fn ask(
        &self,
        class: Class,
        method: Method,
        body: Payload,
        within: Duration,
    ) -> std::result::Result<Payload, RpcError> {
        let request = Request {
            class,
            method,
            body,
            deadline: DEADLINE.into(),
        };
        self.node.request(self.peer, request).wait(within)
    }
}

/// Answers RPCs; looks at bodies chunk by chunk and throws them away.
#[derive(Default)]
pub(super) struct Receiver {
    pub(super) arrivals: Arrivals,
    /// Connections that were up and ended.
    pub(super) ended: Arc<AtomicU64>,
}

struct Sink {
    arrivals: Arrivals,
    is_right: bool,
}

impl BodySink for Sink {
    fn on_chunk(&mut self, offset: u64, chunk: Chunk) {
        self.is_right &= chunk.first() == Some(&pattern(offset as usize));
        self.arrivals.add(chunk.len());
    }
}

impl Service for Receiver {
    fn on_request(&mut self, request: Inbound<'_>, _defer: Defer<'_>) -> Answer {
        match (request.method, request.body) {
            (RPC, body) if body.len() == RPC_BYTES as u64 => Answer::Reply(rpc_body().into()),
            (BODY, InboundBody::Streamed(body)) => match body.into_sink::<Sink>() {
                Some(sink) if sink.is_right => Answer::Reply(Payload::Empty),
                _ => Answer::Failure(FailureCode::Malformed),
            },
            _ => Answer::Failure(FailureCode::Malformed),
        }
    }

    fn on_send(&mut self, _message: Inbound<'_>) {}

    fn on_down(&mut self, _peer: NodeId, _connection: ConnectionNumber) {
        self.ended.fetch_add(1, Ordering::Relaxed);
    }

    fn on_body(&mut self, _head: &BodyHead) -> BodyMode {
        BodyMode::Stream(Box::new(Sink {
            arrivals: self.arrivals.clone(),
            is_right: true,
        }))
    }
}
