//! What the service interface promises, over real sockets: the scenarios that the simulator runs
//! too, on the shard that owns a peer and on the others, and what only threads and mailboxes have.
#![allow(clippy::unwrap_used)]

mod common;
mod scenarios;

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::net::{SocketAddr, UdpSocket};
use std::ops::RangeInclusive;
use std::pin::Pin;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};
use std::time::Duration;

use common::{PATIENCE, free_addr, key, member, shard_config, topology};
use millrace_protocol::frame::{Class, Method};
use millrace_protocol::id::NodeId;
use millrace_protocol::identity::SigningKey;
use millrace_protocol::topology::Topology;
use millrace_shards::Queue;
use millrace_shards::chunk::{Body, CHUNK_BYTES};
use millrace_shards::socket::UdpGroupConfig;
use millrace_transport::counters::{Counter, Family};
use millrace_transport::{
    EdgeStart, Messenger, Payload, Request, Router, RouterError, RpcError, ShardMessenger,
    StartError, Transport, TransportConfig, TransportStart,
};
use scenarios::{ECHO, HANG, Log, TELL, request};

type Task = Pin<Box<dyn Future<Output = ()>>>;
type Job = Box<dyn FnOnce(ShardMessenger) -> Task + Send>;

/// What a test has a shard run.
#[derive(Default)]
struct Jobs(Mutex<(VecDeque<Job>, Option<Waker>)>);

impl Jobs {
    fn push(&self, job: Job) {
        let waker = {
            let mut jobs = self.0.lock().unwrap();
            jobs.0.push_back(job);
            jobs.1.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    async fn next(&self) -> Job {
        poll_fn(|context| {
            let mut jobs = self.0.lock().unwrap();
            match jobs.0.pop_front() {
                Some(job) => Poll::Ready(job),
                None => {
                    jobs.1 = Some(context.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await
    }
}

/// A node whose shards run what a test gives them.
struct Node {
    transport: Transport,
    log: Arc<Log>,
    jobs: Vec<Arc<Jobs>>,
}

impl Node {
    fn start(
        key: &SigningKey,
        address: SocketAddr,
        topology: &Arc<Topology>,
        config: &TransportConfig,
        shards: usize,
    ) -> Self {
        let jobs: Vec<Arc<Jobs>> = (0..shards).map(|_| Arc::default()).collect();
        let log = Arc::new(Log::default());
        let (of_shards, of_node) = (jobs.clone(), Arc::clone(&log));
        let services = move |messenger: ShardMessenger| {
            let jobs = Arc::clone(&of_shards[messenger.shard()]);
            let runner = messenger.clone();
            messenger.spawn(Queue::Latency, async move {
                loop {
                    let job = jobs.next().await;
                    job(runner.clone()).await;
                }
            });
            scenarios::router(messenger, Arc::clone(&of_node))
        };
        let transport = Transport::start(start(key, address, topology, config, shards), services);
        Self {
            transport: transport.unwrap(),
            log,
            jobs,
        }
    }

    fn id(&self) -> NodeId {
        self.transport.node_id()
    }

    /// Runs `job` on a shard and returns what it gave.
    fn on_shard<T: Send + 'static, F: Future<Output = T> + 'static>(
        &self,
        shard: usize,
        job: impl FnOnce(ShardMessenger) -> F + Send + 'static,
    ) -> T {
        let (sender, result) = sync_channel(1);
        self.jobs[shard].push(Box::new(move |messenger| {
            Box::pin(async move { sender.send(job(messenger).await).unwrap() })
        }));
        result
            .recv_timeout(4 * PATIENCE)
            .expect("the scenario ends, and does not panic")
    }

    /// Keeps a shard's thread from its loop, until what this returns is dropped.
    fn block(&self, shard: usize) -> SyncSender<()> {
        let (release, released) = sync_channel::<()>(0);
        let (sender, is_blocked) = sync_channel(1);
        self.jobs[shard].push(Box::new(move |_| {
            Box::pin(async move {
                sender.send(()).unwrap();
                // Ends with an error, when the other end is dropped.
                released.recv().ok();
            })
        }));
        is_blocked.recv_timeout(PATIENCE).unwrap();
        release
    }

    fn counted(&self, family: Family, reason: &str) -> u64 {
        let counters = self.transport.counters().iter();
        counters
            .map(|of_shard| of_shard.reason(family, reason))
            .sum()
    }

    fn wait_for_connections(&self, connections: usize) {
        let up = self
            .transport
            .status()
            .wait(PATIENCE, |up| up.len() == connections);
        assert!(up, "{:?}", self.transport.status().peers());
    }
}

fn start(
    key: &SigningKey,
    address: SocketAddr,
    topology: &Arc<Topology>,
    config: &TransportConfig,
    shards: usize,
) -> TransportStart {
    TransportStart {
        identity: SigningKey::from_seed(*key.seed()),
        tls: None,
        config: config.clone(),
        shards: vec![shard_config(16 << 20); shards],
        udp: UdpGroupConfig {
            local: address,
            ..Default::default()
        },
        topology: Arc::clone(topology),
        paths: Vec::new(),
        edge: EdgeStart::default(),
    }
}

/// A node of `shards` shards and its `peers` of one each, all connected; the peers by their ids.
fn star(config: &TransportConfig, shards: usize, peers: u8) -> (Node, Vec<Node>) {
    connect(config, shards, peers, 1)
}

/// As [`star`], with as many connections between two nodes as the peers have shards.
fn connect(
    config: &TransportConfig,
    shards: usize,
    peers: u8,
    connections: u8,
) -> (Node, Vec<Node>) {
    let config = TransportConfig {
        connections_per_peer: connections,
        // A machine that is busy with other things is no reason to give up a peer, or a body: each
        // test says itself how long it waits.
        idle_timeout: PATIENCE,
        connect_timeout: PATIENCE,
        probe_failures_max: 1_000,
        stream_progress_interval: PATIENCE,
        ..config.clone()
    };
    let of_peers = usize::from(connections);
    let keys: Vec<_> = (1..=peers + 1).map(key).collect();
    let addresses: Vec<_> = keys.iter().map(|_| free_addr()).collect();
    let members = keys.iter().zip(&addresses);
    let all = topology(members.map(|(key, address)| member(key, *address)), 1);
    let node = |at: usize, shards| Node::start(&keys[at], addresses[at], &all, &config, shards);
    let center = node(0, shards);
    let mut others: Vec<_> = (1..keys.len()).map(|at| node(at, of_peers)).collect();
    others.sort_by_key(Node::id);
    for node in others.iter().chain([&center]) {
        node.wait_for_connections(of_peers * others.len());
    }
    (center, others)
}

/// Runs a scenario on one of two nodes; it gets what the other saw.
fn on_pair<F: Future<Output = ()> + 'static>(
    config: &TransportConfig,
    scenario: impl FnOnce(ShardMessenger, NodeId, Arc<Log>) -> F + Send + 'static,
) {
    let (a, others) = star(config, 1, 1);
    let (b, log) = (others[0].id(), Arc::clone(&others[0].log));
    a.on_shard(0, move |messenger| scenario(messenger, b, log));
}

#[test]
fn two_hundred_thousand_messages_of_class_latency_keep_their_order() {
    on_pair(&TransportConfig::default(), |a, b, log| {
        scenarios::latency_keeps_its_order(a, b, log, 200_000)
    });
}

#[test]
fn two_hundred_thousand_messages_of_class_normal_arrive_once() {
    on_pair(&TransportConfig::default(), |a, b, log| {
        scenarios::normal_arrives_once(a, b, log, 200_000)
    });
}

// From another shard, and from a thread, a message may be lost after the mailbox took it; what
// arrives keeps the order.
#[test]
fn messages_by_way_of_a_mailbox_keep_their_order() {
    const COUNT: u64 = 20_000;
    let (a, others) = star(&TransportConfig::default(), 3, 1);
    let b = &others[0];
    let owner = usize::from(b.id().owner_shard(0, 3));
    let (peer, at) = (b.id(), Class::Latency.index());
    let accepted = a.on_shard((owner + 1) % 3, move |messenger| async move {
        let mut accepted = 0;
        for number in 0..COUNT {
            let body = number.to_le_bytes().to_vec();
            match messenger.send(peer, Class::Latency, TELL, body.into()) {
                Ok(()) => accepted += 1,
                Err(RpcError::LocalBusy(_)) => {
                    messenger.on_writable(peer, Class::Latency).await.unwrap();
                }
                Err(error) => panic!("{error}"),
            }
        }
        accepted
    });
    let refused = || a.counted(Family::Failed, "local_busy") as usize;
    let all = |sent: usize| b.log.told(Class::Latency) + refused() == sent;
    millrace_testkit::until("messages of another shard", || all(accepted));
    let mut sent = accepted;
    for number in COUNT..2 * COUNT {
        let body: Payload = number.to_le_bytes().to_vec().into();
        let told = a.transport.send(peer, Class::Latency, TELL, body);
        sent += usize::from(told.is_ok());
    }
    millrace_testkit::until("messages of a thread", || all(sent));
    let seen = b.log.lock();
    assert_eq!((seen.overtaken[at], seen.repeated[at]), (0, 0));
    assert!(seen.told[at].last() > Some(&COUNT), "both kinds arrived");
}

#[test]
fn a_full_queue_says_when_it_has_room() {
    on_pair(&scenarios::short_queues(), |a, b, _| {
        scenarios::a_full_queue_says_when_it_has_room(a, b)
    });
}

#[test]
fn a_bound_of_requests_says_when_it_has_room() {
    on_pair(&scenarios::few_in_flight(), |a, b, _| {
        scenarios::a_bound_of_requests_says_when_it_has_room(a, b)
    });
}

#[test]
fn a_peer_that_fills_its_share_is_busy() {
    on_pair(&scenarios::small_budget(), |a, b, log| {
        scenarios::a_peer_that_fills_its_share_is_busy(a, b, log)
    });
}

#[test]
fn a_sink_gets_a_body_chunk_by_chunk() {
    on_pair(&TransportConfig::default(), |a, b, log| {
        scenarios::a_sink_gets_a_body_chunk_by_chunk(a, b, log)
    });
}

#[test]
fn a_wait_for_room_ends_with_its_connection_and_crosses_shards() {
    let (a, mut others) = star(&scenarios::short_queues(), 2, 1);
    let b = others[0].id();
    for shard in 0..2 {
        let waited = a.on_shard(shard, move |messenger| async move {
            for _ in 0..1_000 {
                // Full in between, here or at the owner.
                let body = vec![0; 1_000].into();
                messenger.send(b, Class::Normal, TELL, body).ok();
            }
            messenger.on_writable(b, Class::Normal).await
        });
        assert_eq!(waited, Ok(()), "shard {shard}");
    }
    assert!(
        a.counted(Family::Failed, "local_busy") > 0,
        "a queue refused"
    );
    let owner = usize::from(b.owner_shard(0, 2));
    let other = others.remove(0);
    let (full, is_full) = sync_channel(1);
    let waiting = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            a.on_shard(owner, move |messenger| async move {
                let body: Payload = vec![0; 1_000].into();
                let send = || messenger.send(b, Class::Normal, TELL, body.clone());
                // As fast as the path takes them, until the connection is gone.
                loop {
                    while send().is_ok() {}
                    full.try_send(()).ok();
                    match messenger.on_writable(b, Class::Normal).await {
                        Ok(()) => {}
                        Err(error) => return error,
                    }
                }
            })
        });
        is_full.recv_timeout(PATIENCE).unwrap();
        other.transport.shutdown();
        waiting.join().unwrap()
    });
    let ends = [RpcError::ConnectionLost, RpcError::NotConnected];
    assert!(ends.contains(&waiting), "{waiting}");
}

/// With several connections to a peer, on a shard that has none of them and on one that has.
#[test]
fn a_bound_of_requests_says_when_it_has_room_on_several_connections() {
    let (a, others) = connect(&scenarios::few_in_flight(), 3, 1, 2);
    let b = others[0].id();
    let [owner, second] = [0, 1].map(|index| usize::from(b.owner_shard(index, 3)));
    assert_ne!(owner, second);
    // Bodies of the owner take its own connection.
    let scenario = scenarios::a_bound_of_requests_says_when_it_has_room::<ShardMessenger>;
    a.on_shard(owner, move |messenger| scenario(messenger, b));
    for class in Class::ALL {
        let connections = if class == Class::Bulk { 2 } else { 1 };
        let log = Arc::clone(&others[0].log);
        let scenario = scenarios::a_bound_at_another_shard_says_when_it_has_room::<ShardMessenger>;
        a.on_shard(3 - owner - second, move |messenger| {
            scenario(messenger, b, log, class, connections)
        });
    }
}

#[test]
fn bodies_take_all_connections_of_a_peer() {
    const COUNT: usize = 20;
    let (a, others) = connect(&TransportConfig::default(), 3, 1, 2);
    let b = others[0].id();
    let owners = [0, 1].map(|index| usize::from(b.owner_shard(index, 3)));
    let sent = |shard: usize| a.transport.counters()[shard].get(Counter::SentBulk);
    // From a thread, and from a shard that has no connection.
    let ask = || {
        let body = Body::copy_from_slice(a.transport.pool(0).unwrap(), &vec![1; 100_000]).unwrap();
        a.transport.request(b, request(ECHO, Class::Bulk, body))
    };
    for answer in [(); COUNT].map(|()| ask()) {
        assert_eq!(answer.wait(PATIENCE).unwrap().len(), 100_000);
    }
    assert_eq!(owners.map(sent), [COUNT as u64 / 2; 2]);
    a.on_shard(3 - owners[0] - owners[1], move |messenger| async move {
        for _ in 0..COUNT {
            let body = Body::copy_from_slice(messenger.pool(), &vec![1; 100_000]).unwrap();
            let answer = messenger.request(b, request(ECHO, Class::Bulk, body));
            assert_eq!(answer.await.unwrap().len(), 100_000);
        }
    });
    assert_eq!(owners.map(sent), [COUNT as u64; 2]);
    // Small messages keep to one of them, in their order.
    let (log, scenario) = (
        Arc::clone(&others[0].log),
        scenarios::latency_keeps_its_order::<ShardMessenger>,
    );
    a.on_shard(owners[0], move |messenger| {
        scenario(messenger, b, log, 20_000)
    });
}

// Protects an embedder whose last handle is held by a task of a shard: the drop waits for no
// thread, and so not for its own.
#[test]
fn the_last_handle_may_be_dropped_on_a_shard_of_its_own() {
    for shards in [1, 2] {
        let (a, others) = star(&TransportConfig::default(), shards, 1);
        let address = a.transport.local_addr();
        let Node {
            transport, jobs, ..
        } = a;
        let (sender, is_dropped) = sync_channel(1);
        jobs[0].push(Box::new(move |_| {
            Box::pin(async move {
                drop(transport);
                sender.send(()).unwrap();
            })
        }));
        is_dropped.recv_timeout(PATIENCE).expect("the drop returns");
        let can_bind = || UdpSocket::bind(address).is_ok();
        millrace_testkit::until("the address can be bound", can_bind);
        others[0].wait_for_connections(0);
    }
}

#[test]
fn a_full_answer_queue_says_busy() {
    on_pair(&scenarios::short_queues(), |a, b, _| {
        scenarios::a_full_answer_queue_says_busy(a, b)
    });
}

#[test]
fn answers_that_wait_are_bounded_in_bytes() {
    on_pair(&scenarios::few_answer_bytes(), |a, b, _| {
        scenarios::answers_that_wait_are_bounded_in_bytes(a, b)
    });
}

#[test]
fn a_dropped_answer_is_seen_by_the_peer() {
    let (a, others) = star(&TransportConfig::default(), 3, 1);
    let b = &others[0];
    let peer = b.id();
    for shard in 0..3 {
        let log = Arc::clone(&b.log);
        let scenario = scenarios::a_dropped_answer_is_seen_by_the_peer::<ShardMessenger>;
        a.on_shard(shard, move |messenger| scenario(messenger, peer, log));
    }
    let (hanging, cancelled) = {
        let seen = b.log.lock();
        (seen.hanging, seen.cancelled)
    };
    assert_eq!(hanging, cancelled);
    // And of a thread outside the shards.
    let hang = || {
        a.transport
            .request(peer, request(HANG, Class::Normal, vec![1]))
    };
    let (dropped, kept) = (hang(), hang());
    let seen = || b.log.lock().hanging == hanging + 2;
    millrace_testkit::until("both requests hang", seen);
    drop(dropped);
    let seen = || b.log.lock().cancelled == cancelled + 1;
    millrace_testkit::until("the peer sees the cancellation", seen);
    drop(kept);
    let seen = || b.log.lock().cancelled == cancelled + 2;
    millrace_testkit::until("the peer sees the other one", seen);
}

// Protects the peer's service from work without an asker: a mailbox that has no room for a
// cancellation makes it late, and does not lose it.
#[test]
fn a_full_mailbox_delays_a_cancellation_and_counts_it() {
    let (a, others) = star(&TransportConfig::default(), 2, 1);
    let (b, log) = (others[0].id(), &others[0].log);
    // Longer than any test waits: it is not the deadline that ends them.
    let hang = || Request {
        deadline: Duration::from_secs(3_600).into(),
        ..request(HANG, Class::Normal, vec![1])
    };
    let (dropped, kept) = (
        a.transport.request(b, hang()),
        a.transport.request(b, hang()),
    );
    millrace_testkit::until("both requests hang", || log.lock().hanging == 2);
    let blocked = a.block(usize::from(b.owner_shard(0, 2)));
    let tell = || a.transport.send(b, Class::Normal, TELL, vec![0; 8].into());
    while tell().is_ok() {}
    assert_eq!(tell(), Err(RpcError::LocalBusy(Class::Normal)));
    drop(dropped);
    assert_eq!(a.counted(Family::Failed, "local_cancel_late"), 1);
    drop(blocked);
    let seen = || log.lock().cancelled == 1;
    millrace_testkit::until("the peer sees the cancellation", seen);
    drop(kept);
    let seen = || log.lock().cancelled == 2;
    millrace_testkit::until("the peer sees the other one", seen);
    assert_eq!(a.counted(Family::Failed, "local_cancel_late"), 1);
}

#[test]
fn an_unknown_method_is_refused_and_counted() {
    let (a, others) = star(&TransportConfig::default(), 1, 1);
    let b = &others[0];
    let peer = b.id();
    let scenario = scenarios::an_unknown_method_is_refused::<ShardMessenger>;
    a.on_shard(0, move |messenger| scenario(messenger, peer));
    let counted = || b.counted(Family::Rejected, "unknown_method") == 2;
    millrace_testkit::until("a request and a message are counted", counted);
}

#[test]
fn every_shard_reaches_every_peer() {
    let (a, others) = star(&TransportConfig::default(), 3, 4);
    let me = a.id();
    let peers: Vec<_> = others.iter().map(Node::id).collect();
    for shard in 0..3 {
        let peers = peers.clone();
        let scenario = scenarios::a_messenger_knows_its_node::<ShardMessenger>;
        a.on_shard(shard, move |messenger| scenario(messenger, me, peers));
    }
}

#[test]
fn one_message_reaches_all() {
    for shards in [1, 2] {
        let (a, others) = star(&TransportConfig::default(), shards, 4);
        let logs: Vec<_> = others.iter().map(|other| Arc::clone(&other.log)).collect();
        let is_own = move |peer: &NodeId| peer.owner_shard(0, shards as u8) == 0;
        a.on_shard(0, move |messenger| {
            scenarios::one_message_reaches_all(messenger, logs, is_own)
        });
    }
}

// Protects the cost of a fan-out: a mailbox message for each shard, and no copy of the body.
#[test]
fn a_fan_out_is_one_mailbox_message_for_each_shard_and_one_buffer() {
    const LEN: usize = 3 << 20;
    let (a, others) = star(&TransportConfig::default(), 2, 5);
    let peers: Vec<_> = others.iter().map(Node::id).collect();
    let owners = peers.iter().map(|peer| usize::from(peer.owner_shard(0, 2)));
    let mut wanted = [0; 2];
    owners.for_each(|shard| wanted[shard] = 1);
    let pool = a.transport.pool(0).unwrap();
    let body = Body::copy_from_slice(pool, &vec![1; LEN]).unwrap();
    let free = pool.free_chunks();
    let messages = || -> Vec<u64> {
        let stats = a.transport.shard_stats().iter();
        stats.map(|shard| shard.snapshot().messages).collect()
    };
    let before = messages();
    let refused = a
        .transport
        .send_to_all(&peers, Class::Bulk, TELL, body.into());
    assert_eq!(refused, []);
    let has_body = |other: &Node| other.log.told(Class::Bulk) == 1;
    millrace_testkit::until("each peer has the body", || {
        let free_now = pool.free_chunks();
        let all_have = others.iter().all(has_body);
        // Read before: as long as a peer lacks the body, some of it is still held here.
        let is_held = free_now < free + LEN / CHUNK_BYTES;
        assert!(
            all_have || is_held,
            "{free_now} chunks are free, {free} before"
        );
        all_have
    });
    let after = messages();
    let counts: Vec<_> = after
        .iter()
        .zip(&before)
        .map(|(now, then)| now - then)
        .collect();
    assert_eq!(counts, wanted);
}

#[test]
fn services_that_claim_the_same_methods_do_not_start() {
    let me = key(1);
    let address = free_addr();
    let alone = topology([member(&me, address)], 1);
    let methods: RangeInclusive<Method> = ECHO..=ECHO;
    let services = move |messenger: ShardMessenger| -> Result<Router, RouterError> {
        let log = Arc::new(Log::default());
        let router = scenarios::router(messenger.clone(), Arc::clone(&log))?;
        router.serve(methods.clone(), scenarios::responding(messenger, log))
    };
    let config = TransportConfig::default();
    let error = Transport::start(start(&me, address, &alone, &config, 2), services).unwrap_err();
    let StartError::Services(error) = error else {
        panic!("{error}");
    };
    assert!(
        error
            .to_string()
            .contains("methods 0x0040..=0x0040 overlap methods 0x0040..=0x0045"),
        "{error}"
    );
}
