//! Starting a node's transport, and the handle that any thread may hold.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use millrace_edge_policy::admission::{Admission, AdmissionConfig};
use millrace_edge_policy::limiter::Limit;
use millrace_edge_policy::settings::{Caps, Limits};
use millrace_edge_policy::siphash::Key;
use millrace_protocol::budget::{BudgetConfig, ReceiveBudget};
use millrace_protocol::frame::{Class, Method};
use millrace_protocol::id::NodeId;
use millrace_protocol::identity::SigningKey;
use millrace_protocol::peers::Peers;
use millrace_protocol::rpc::RpcError;
use millrace_protocol::topology::Topology;
use millrace_shards::chunk::ChunkPool;
use millrace_shards::config::ShardConfig;
use millrace_shards::mailbox::MailSender;
use millrace_shards::runtime::{self, ShardHandle};
use millrace_shards::socket::{ShardSocket, SocketError, UdpGroupConfig, bind_group};
use millrace_shards::stats::ShardStats;

use crate::admission::{AdmissionControl, ConnectionCounts};
use crate::clock::Clock;
use crate::config::TransportConfig;
use crate::counters::{Counters, Family};
use crate::driver::peers_config;
use crate::endpoint::{Endpoint, EndpointParts};
use crate::pair_keys::{DialKeys, PairKeys};
use crate::quic::quic_config;
use crate::random::random_bytes;
use crate::service::handle::{Completion, ShardState};
use crate::service::message::{Handler, Payload, Request};
use crate::service::remote::{RemoteAnswer, RemoteCompletion};
use crate::service::shard_messenger::ShardMessenger;
use crate::status::StatusBoard;
use crate::tls::{Credentials, Members, TlsError};

/// Something to be done on a shard, with its handles.
type Run = Box<dyn FnOnce(&Rc<ShardState>) + Send>;

/// What crosses into a shard.
pub(crate) enum Message {
    Topology(Arc<Topology>, DialKeys),
    Run(Run),
}

impl std::fmt::Debug for Message {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Topology(..) => "Topology",
            Self::Run(_) => "Run",
        })
    }
}

/// What a transport is started with.
#[derive(Debug)]
pub struct TransportStart {
    /// The node's key.
    pub identity: SigningKey,
    /// Limits, windows and times.
    pub config: TransportConfig,
    /// One entry for each shard.
    pub shards: Vec<ShardConfig>,
    /// UDP sockets; `shards` in it is set from the list above.
    pub udp: UdpGroupConfig,
    /// The members now.
    pub topology: Arc<Topology>,
    /// What the transport shares with the edge; `Default` for a node without one.
    pub edge: EdgeStart,
}

/// What a transport shares with the edge in front of it.
#[derive(Debug, Default)]
pub struct EdgeStart {
    /// Who may open connections. Whoever gives it also calls its [`tick`](Admission::tick); without one, the transport makes one that knows
    /// no rates and no caps, and ticks it.
    pub admission: Option<Arc<Admission>>,
    /// Hears of every counted connection.
    pub counts: Option<Arc<dyn ConnectionCounts>>,
    /// Sockets that were bound and steered before, one for each shard; otherwise they are bound as `udp` says.
    pub sockets: Option<Vec<ShardSocket>>,
    /// The time of connection IDs, tokens and limits.
    pub clock: Clock,
}

/// Why a transport did not start. All causes are local.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The socket could not be had.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// A shard could not be started.
    #[error("shard {shard}: {source}")]
    Shard {
        /// Which one.
        shard: usize,
        /// Why.
        source: runtime::StartError,
    },
    /// Key or certificate could not be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Not as many sockets as shards were given.
    #[error("{shards} shards were given {sockets} sockets; fix: bind one for each")]
    Sockets {
        /// Shards configured.
        shards: usize,
        /// Sockets given.
        sockets: usize,
    },
    /// There must be a shard.
    #[error(
        "no shard is configured; fix: give at least one [[shards.core]], or leave the section out"
    )]
    NoShards,
}

#[derive(Debug)]
struct Inner {
    me: NodeId,
    local: SocketAddr,
    connections_per_peer: u8,
    next_connection: AtomicUsize,
    senders: OnceLock<Vec<MailSender<Message>>>,
    handles: Mutex<Vec<ShardHandle<Message>>>,
    pools: OnceLock<Vec<ChunkPool>>,
    stats: OnceLock<Vec<Arc<ShardStats>>>,
    counters: Vec<Arc<Counters>>,
    board: Arc<StatusBoard>,
    admission: Arc<Admission>,
    pair_keys: Mutex<PairKeys>,
}

/// A running transport: a handle that any thread may hold and clone.
#[derive(Clone, Debug)]
pub struct Transport {
    inner: Arc<Inner>,
}

impl Transport {
    /// Binds the sockets, starts the shards and begins to dial. `handler` is called once on each shard.
    pub fn start<H, F>(start: TransportStart, handler: F) -> Result<Self, StartError>
    where
        H: Handler,
        F: Fn(ShardMessenger) -> H + Send + Clone + 'static,
    {
        let TransportStart {
            identity,
            config,
            shards,
            mut udp,
            topology,
            edge,
        } = start;
        let count = shards.len();
        if count == 0 {
            return Err(StartError::NoShards);
        }
        udp.shards = count;
        let sockets = match edge.sockets {
            Some(sockets) if sockets.len() == count => sockets,
            Some(sockets) => {
                return Err(StartError::Sockets {
                    shards: count,
                    sockets: sockets.len(),
                });
            }
            None => bind_group(&udp)?,
        };
        let local = sockets
            .first()
            .map_or(udp.local, |socket| socket.local_addr());
        let me = identity.node_id();
        let connections_per_peer = config.connections_per_peer.clamp(1, count.min(8) as u8);
        let board = Arc::new(StatusBoard::new(count));
        let counters: Vec<_> = (0..count).map(|_| Arc::new(Counters::default())).collect();
        let clock = edge.clock;
        let ticks_admission = edge.admission.is_none();
        let make_admission = || Arc::new(default_admission(&config, &clock));
        let admission = edge.admission.unwrap_or_else(make_admission);
        let mut pair_keys = PairKeys::new(identity.clone());
        let dial_keys = pair_keys.update(&topology);
        admission.set_peers(pair_keys.by_tag());
        let control = AdmissionControl {
            policy: Arc::clone(&admission),
            counts: edge.counts,
        };
        let transport = Self {
            inner: Arc::new(Inner {
                me,
                local,
                connections_per_peer,
                next_connection: AtomicUsize::new(0),
                senders: OnceLock::new(),
                handles: Mutex::new(Vec::new()),
                pools: OnceLock::new(),
                stats: OnceLock::new(),
                counters: counters.clone(),
                board: Arc::clone(&board),
                admission,
                pair_keys: Mutex::new(pair_keys),
            }),
        };
        let credentials = Credentials::new(&identity)?;
        // Only a label that tells this run's packets from an earlier run's.
        let [generation] = random_bytes();
        let mut handles = Vec::with_capacity(count);
        for (index, (shard, socket)) in shards.into_iter().zip(sockets).enumerate() {
            let members = Members::new(Arc::clone(&topology));
            let counters = Arc::clone(&counters[index]);
            let server = quic_config(&config, credentials.server(&members, &counters)?)?;
            let client = quic_config(&config, credentials.client()?)?;
            let (config, board, topology) =
                (config.clone(), Arc::clone(&board), Arc::clone(&topology));
            let (handler, transport) = (handler.clone(), transport.clone());
            let (control, clock, dial_keys) =
                (control.clone(), clock.clone(), Arc::clone(&dial_keys));
            let handle = runtime::spawn(shard, index, count, Some(socket), move |context| {
                let now = Instant::now();
                let seed = u64::from_le_bytes(random_bytes());
                let machine = |pair| {
                    Peers::new(
                        me,
                        peers_config(&config, pair, index as u8, count as u8),
                        0,
                        seed ^ u64::from(pair),
                        now,
                    )
                };
                let peers = (0..connections_per_peer).map(machine).collect();
                let budget = ReceiveBudget::new(BudgetConfig {
                    total_bytes: config.receive_budget_bytes,
                    peer_bytes_max: config.receive_budget_peer_bytes,
                });
                let state = Rc::new(ShardState::new(config, counters, now));
                let local_transport =
                    ShardMessenger::new(Rc::clone(&state), context.clone(), transport);
                let parts = EndpointParts {
                    me,
                    local,
                    shard: index,
                    shards: count,
                    generation,
                    server,
                    client,
                    members,
                    peers,
                    budget,
                    pool: context.pool.clone(),
                    state,
                    board,
                    admission: control,
                    ticks_admission: ticks_admission && index == 0,
                    clock,
                    dial_keys,
                    now,
                };
                Endpoint::new(parts, topology, handler(local_transport))
            })
            .map_err(|source| StartError::Shard {
                shard: index,
                source,
            });
            match handle {
                Ok(handle) => handles.push(handle),
                Err(error) => {
                    stop_all(handles);
                    return Err(error);
                }
            }
        }
        // Set once, here: nothing reads them before `start` returns but tasks of the handlers, which see the transport as not started.
        transport
            .inner
            .senders
            .set(handles.iter().map(ShardHandle::sender).collect())
            .ok();
        transport
            .inner
            .pools
            .set(handles.iter().map(ShardHandle::pool).collect())
            .ok();
        transport
            .inner
            .stats
            .set(handles.iter().map(ShardHandle::stats).collect())
            .ok();
        *transport
            .inner
            .handles
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = handles;
        Ok(transport)
    }

    /// This node.
    pub fn node_id(&self) -> NodeId {
        self.inner.me
    }

    /// The address that the sockets are bound to.
    pub fn local_addr(&self) -> SocketAddr {
        self.inner.local
    }

    /// Number of shards.
    pub fn shards(&self) -> usize {
        self.inner.counters.len()
    }

    /// The chunk pool of a shard.
    pub fn pool(&self, shard: usize) -> Option<&ChunkPool> {
        self.inner.pools.get()?.get(shard)
    }

    /// What the transport counted, for each shard.
    pub fn counters(&self) -> &[Arc<Counters>] {
        &self.inner.counters
    }

    /// What the runtime counted, for each shard.
    pub fn shard_stats(&self) -> &[Arc<ShardStats>] {
        self.inner.stats.get().map_or(&[], Vec::as_slice)
    }

    /// What the shards published of their connections.
    pub fn status(&self) -> &StatusBoard {
        &self.inner.board
    }

    /// Replaces the members: removed peers are cut, added ones dialled. False when a shard's mailbox was full; call again then.
    #[must_use]
    pub fn update_topology(&self, topology: &Arc<Topology>) -> bool {
        let dial_keys = {
            let mut pair_keys = self.pair_keys();
            let dial_keys = pair_keys.update(topology);
            self.inner.admission.set_peers(pair_keys.by_tag());
            dial_keys
        };
        let send = |sender: &MailSender<Message>| {
            let message = Message::Topology(Arc::clone(topology), Arc::clone(&dial_keys));
            sender.try_send(message).is_ok()
        };
        self.inner
            .senders
            .get()
            .is_some_and(|senders| senders.iter().map(send).fold(true, |all, one| all & one))
    }

    /// The keys that we share with the members, by the tag that stands for a node in its proofs: for whoever checks proofs before they
    /// come here.
    pub fn peer_keys(&self) -> BTreeMap<u32, Key> {
        self.pair_keys().by_tag()
    }

    /// Who may open connections.
    pub fn admission(&self) -> &Arc<Admission> {
        &self.inner.admission
    }

    fn pair_keys(&self) -> MutexGuard<'_, PairKeys> {
        let pair_keys = self.inner.pair_keys.lock();
        pair_keys.unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks `peer`, from any thread.
    pub fn request(&self, peer: NodeId, request: Request) -> RemoteAnswer {
        let (remote, answer) = RemoteCompletion::new();
        let class = request.class;
        let body = class == Class::Bulk;
        let shard = self.owner_of(&peer, body);
        let run = move |state: &Rc<ShardState>| {
            if state.stopping.get() {
                return remote.complete(Err(RpcError::LocalShuttingDown));
            }
            let Some(handle) = state.handle_to(&peer, body) else {
                return remote.complete(Err(RpcError::NotConnected));
            };
            let completion = Completion::Call(Box::new(move |result| remote.complete(result)));
            if let Err((error, completion)) = handle.request(request, completion) {
                completion.complete(Err(error));
            }
        };
        if !self.run_on(shard, run) && !self.is_stopped(shard) {
            answer.fail(RpcError::LocalBusy(class));
        }
        answer
    }

    /// Tells `peer`, from any thread. An error later than the mailbox is counted only.
    pub fn send(
        &self,
        peer: NodeId,
        class: Class,
        method: Method,
        body: Payload,
    ) -> Result<(), RpcError> {
        let bulk = class == Class::Bulk;
        let sent = self.run_on(self.owner_of(&peer, bulk), move |state| {
            if let Some(handle) = state.handle_to(&peer, bulk) {
                // ConnectionPermit by the handle.
                handle.send(class, method, body).ok();
            } else {
                let reason = RpcError::NotConnected.reason();
                state.counters.count(Family::Failed, reason);
            }
        });
        if sent {
            Ok(())
        } else {
            Err(RpcError::LocalBusy(class))
        }
    }

    /// The shard that sends the next message to `peer`: small ones always the same, so that they keep their order; bodies take turns
    /// over the connections that are up.
    fn owner_of(&self, peer: &NodeId, body: bool) -> usize {
        if body && self.inner.connections_per_peer > 1 {
            let up = self.inner.board.shards_of(peer);
            let turn = self.inner.next_connection.fetch_add(1, Ordering::Relaxed);
            if let Some(shard) = turn.checked_rem(up.len()).and_then(|at| up.get(at)) {
                return *shard;
            }
        }
        usize::from(peer.owner_shard(0, self.shards() as u8))
    }

    fn is_stopped(&self, shard: usize) -> bool {
        let senders = self.inner.senders.get();
        senders.is_none_or(|senders| senders.get(shard).is_none_or(MailSender::is_closed))
    }

    fn run_on(&self, shard: usize, run: impl FnOnce(&Rc<ShardState>) + Send + 'static) -> bool {
        let sender = self
            .inner
            .senders
            .get()
            .and_then(|senders| senders.get(shard));
        sender.is_some_and(|sender| sender.try_send(Message::Run(Box::new(run))).is_ok())
    }

    /// Closes all connections cleanly and stops the shards. Returns when their threads have ended.
    pub fn shutdown(&self) {
        let handles = std::mem::take(
            &mut *self
                .inner
                .handles
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        );
        stop_all(handles);
    }
}

/// Stops all shards, then waits for their threads.
fn stop_all(handles: Vec<ShardHandle<Message>>) {
    for handle in &handles {
        handle.stop();
    }
    for handle in handles {
        // A shard that panicked has said so; the others still end.
        handle.join().ok();
    }
}

/// Admits whoever comes, without a rate, a cap or a bound of handshakes for a source; beyond half of the handshakes that may be open,
/// strangers show their address first, and the last of them are for peers.
fn default_admission(config: &TransportConfig, clock: &Clock) -> Admission {
    let admission = AdmissionConfig {
        limits: Limits {
            unvalidated: Limit::NONE,
            source_quic: Limit::NONE,
            peer: Limit::NONE,
            ..Limits::default()
        },
        caps: Caps { quic: 0, tcp: 0 },
        half_open_source_max: 0,
        half_open_peer_max: 0,
        sketch_buckets: 1 << 12,
        ..AdmissionConfig::default()
    }
    .with_handshakes(config.handshakes_max);
    Admission::new(admission, clock.ns(Instant::now()), random_bytes)
}
