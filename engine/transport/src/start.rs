//! Starting a node's transport.

use std::rc::Rc;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use millrace_edge_policy::admission::{Admission, AdmissionConfig};
use millrace_edge_policy::limiter::Limit;
use millrace_edge_policy::settings::{Caps, Limits};
use millrace_protocol::id::NodeId;
use millrace_protocol::identity::SigningKey;
use millrace_protocol::path::{PathConfig, PathMemory, RememberedPath};
use millrace_protocol::peers::Peers;
use millrace_protocol::time_grid::TimeGrid;
use millrace_protocol::tls_keys::Validity;
use millrace_protocol::topology::Topology;
use millrace_shards::config::ShardConfig;
use millrace_shards::mailbox::mailbox;
use millrace_shards::runtime;
use millrace_shards::socket::{ShardSocket, SocketError, UdpGroupConfig, bind_group};

use crate::admission::{AdmissionControl, ConnectionCounts};
use crate::allocator::BodyAllocator;
use crate::clock::{Clock, wall_ms};
use crate::config::TransportConfig;
use crate::counters::Counters;
use crate::driver::peers_config;
use crate::endpoint::{Endpoint, EndpointParts};
use crate::pair_keys::PairKeys;
use crate::quic::ShardTls;
use crate::random::random_bytes;
use crate::service::handle::ShardState;
use crate::service::router::{Router, RouterError};
use crate::service::routes::Routes;
use crate::service::shard_messenger::ShardMessenger;
use crate::status::StatusBoard;
use crate::stop::StopMode;
use crate::tls::{Credentials, Members, TlsError};
use crate::transport::{Inner, Shards, Transport};

/// What a transport is started with.
#[derive(Debug)]
pub struct TransportStart {
    /// The node's identity key.
    pub identity: SigningKey,
    /// The node's TLS key, as its registry record names it, and a certificate; none: the identity
    /// key, with a certificate of 30 days that is made now.
    pub tls: Option<Credentials>,
    /// Limits, windows and times.
    pub config: TransportConfig,
    /// One entry for each shard.
    pub shards: Vec<ShardConfig>,
    /// UDP sockets; `shards` in it is set from the list above.
    pub udp: UdpGroupConfig,
    /// The members now.
    pub topology: Arc<Topology>,
    /// What an earlier run of the node knew of the paths to its peers: it showed that in
    /// [`PeerStatus::remembered`](crate::PeerStatus::remembered).
    pub paths: Vec<(NodeId, RememberedPath)>,
    /// What the transport shares with the edge; `Default` for a node without one.
    pub edge: EdgeStart,
}

/// What a transport shares with the edge in front of it.
#[derive(Debug, Default)]
pub struct EdgeStart {
    /// Who may open connections. The caller that gives it also calls its [`tick`](Admission::tick);
    /// without one, the transport makes one that knows no rates and no caps, and ticks it.
    pub admission: Option<Arc<Admission>>,
    /// Hears of every counted connection.
    pub counts: Option<Arc<dyn ConnectionCounts>>,
    /// Sockets that were bound and steered before, one for each shard; otherwise they are bound as
    /// `udp` says.
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
    #[error("no shard is configured; fix: name a core at least")]
    NoShards,
    /// Two services claim the same methods: the program is at fault.
    #[error(transparent)]
    Services(#[from] RouterError),
}

impl Transport {
    /// Binds the sockets, starts the shards and begins to dial. `services` is called once on each
    /// shard, before its first packet.
    ///
    /// # Errors
    /// When the sockets, a shard or the node's certificate cannot be had, or `services` refused its
    /// own methods. Nothing runs then.
    pub fn start<F>(start: TransportStart, services: F) -> Result<Self, StartError>
    where
        F: Fn(ShardMessenger) -> Result<Router, RouterError> + Send + Clone + 'static,
    {
        let TransportStart {
            identity,
            tls,
            config,
            shards,
            mut udp,
            topology,
            paths,
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
        let connections_per_peer = config.pair_connections(count);
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
        let registry_version = Arc::new(AtomicU64::new(topology.newest_version()));
        let credentials = match tls {
            Some(credentials) => credentials,
            None => {
                let validity = Validity::starting(wall_ms() / 1_000, Validity::LIFETIME_DEFAULT);
                Credentials::new(&identity, validity)?
            }
        };
        // All that may fail comes before the first thread.
        let members: Vec<_> = (0..count)
            .map(|_| Members::new(Arc::clone(&topology)))
            .collect();
        let tls = members.iter();
        let tls = tls
            .map(|members| ShardTls::new(&config, &credentials, members))
            .collect::<Result<Vec<_>, _>>()?;
        let (mut senders, mut receivers) = (Vec::new(), Vec::new());
        for (shard, config) in shards.iter().enumerate() {
            let (sender, receiver) = mailbox(config.mailbox_capacity).map_err(|source| {
                let source = runtime::StartError::Files { source };
                StartError::Shard { shard, source }
            })?;
            senders.push(sender);
            receivers.push(receiver);
        }
        let routes = Arc::new(Routes::new(
            senders,
            counters.clone(),
            Arc::clone(&board),
            connections_per_peer,
        ));
        // Only a label that tells this run's packets from an earlier run's.
        let [generation] = random_bytes();
        let stop_mode = Arc::new(StopMode::default());
        let running = Shards::new(Arc::clone(&stop_mode));
        let (mut pools, mut stats) = (Vec::new(), Vec::new());
        let refused = Arc::new(Mutex::new(None));
        let (kept_config, tls) = (config.clone(), tls.into_iter().zip(members.clone()));
        let parts = shards.into_iter().zip(sockets).zip(receivers).zip(tls);
        for (index, (((shard, socket), receiver), (tls, members))) in parts.enumerate() {
            let counters = Arc::clone(&counters[index]);
            let (config, board, topology) =
                (config.clone(), Arc::clone(&board), Arc::clone(&topology));
            let (services, routes) = (services.clone(), Arc::clone(&routes));
            let registry_version = Arc::clone(&registry_version);
            let paths = paths.clone();
            let (control, clock, dial_keys) =
                (control.clone(), clock.clone(), Arc::clone(&dial_keys));
            let (stop_mode, refusal) = (Arc::clone(&stop_mode), Arc::clone(&refused));
            let make = move |context: &millrace_shards::ShardContext| {
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
                let is_ours = |id: &NodeId| {
                    let owner = |pair| id.owner_shard(pair, count as u8);
                    (0..connections_per_peer).any(|pair| owner(pair) == index as u8)
                };
                let paths = paths.into_iter().filter(|(id, _)| is_ours(id));
                let paths_config = PathConfig {
                    peers_max: config.connections_max,
                    ..config.paths.clone()
                };
                let paths = PathMemory::new(paths_config, paths);
                let bodies = BodyAllocator::new(config.receive_budget(), context.pool.clone());
                let grid = TimeGrid::through(whole_minute(now));
                let state = Rc::new(ShardState::new(config, counters, grid, now));
                let of_shard = Arc::clone(&routes);
                let messenger =
                    ShardMessenger::new(me, Rc::clone(&state), context.clone(), of_shard);
                let router = services(messenger).unwrap_or_else(|error| {
                    *refusal.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                    Router::new()
                });
                let parts = EndpointParts {
                    me,
                    local,
                    shard: index,
                    shards: count,
                    registry_version,
                    generation,
                    tls,
                    paths,
                    members,
                    peers,
                    bodies,
                    state,
                    board,
                    routes,
                    admission: control,
                    ticks_admission: ticks_admission && index == 0,
                    clock,
                    dial_keys,
                    stop_mode,
                    now,
                };
                Endpoint::new(parts, topology, router)
            };
            let started =
                runtime::spawn_with_mailbox(shard, index, count, Some(socket), receiver, make);
            let failed = match started {
                Ok(handle) => {
                    pools.push(handle.pool());
                    stats.push(handle.stats());
                    running.push(handle);
                    let refused = refused
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .take();
                    refused.map(StartError::Services)
                }
                Err(source) => Some(StartError::Shard {
                    shard: index,
                    source,
                }),
            };
            if let Some(error) = failed {
                running.close();
                return Err(error);
            }
        }
        Ok(Self::new(Inner {
            me,
            local,
            routes,
            shards: running,
            pools,
            stats,
            counters,
            admission,
            pair_keys: Mutex::new(pair_keys),
            registry_version,
            config: kept_config,
            members,
        }))
    }
}

/// Admits every source, without a rate, a cap or a bound of handshakes for it. Beyond half of the
/// handshakes that may be open, non-members show their address first; the last of them are for
/// peers.
/// A whole minute of the wall clock, near `now`: nodes whose clocks agree probe each other at the
/// same times, so that the probes and replies of many peers wake a shard once.
fn whole_minute(now: Instant) -> Instant {
    const MINUTE: Duration = Duration::from_secs(60);
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let past_ns = since.unwrap_or_default().as_nanos() % MINUTE.as_nanos();
    now + (MINUTE - Duration::from_nanos(past_ns as u64))
}

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
