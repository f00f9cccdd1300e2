//! A listener behind an edge of the test's making, and the keys of members that may dial it.
#![allow(dead_code, clippy::unwrap_used, reason = "test code")]

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use millrace_edge_policy::admission::{Admission, AdmissionConfig};
use millrace_edge_policy::source::Source;
use millrace_protocol::frame::Class;
use millrace_protocol::identity::SigningKey;
use millrace_protocol::rng::Rng;
use millrace_transport::counters::Family;
use millrace_transport::{Clock, ConnectionCounts, EdgeStart, TransportConfig};

use crate::common::*;
use crate::raw::{Raw, RawOptions};

pub(crate) const LIMIT: Duration = Duration::from_secs(10);
pub(crate) const POOL_BYTES: u64 = 16 << 20;

/// Hears what the edge would.
#[derive(Debug, Default)]
pub(crate) struct Heard {
    open: Mutex<BTreeMap<Source, i64>>,
    pub(crate) opened: AtomicU64,
    validated: AtomicU64,
}

impl ConnectionCounts for Heard {
    fn opened(&self, source: Source) {
        *self.open.lock().unwrap().entry(source).or_default() += 1;
        self.opened.fetch_add(1, Ordering::Relaxed);
    }

    fn closed(&self, source: Source) {
        *self.open.lock().unwrap().entry(source).or_default() -= 1;
    }

    fn validated(&self, _: Source) {
        self.validated.fetch_add(1, Ordering::Relaxed);
    }
}

impl Heard {
    pub(crate) fn validated_so_far(&self) -> u64 {
        self.validated.load(Ordering::Relaxed)
    }

    pub(crate) fn open(&self, source: Source) -> i64 {
        self.open.lock().unwrap().get(&source).copied().unwrap_or(0)
    }
}

/// A listener, and the keys of two members with lower ids, which may dial it.
pub(crate) struct Testbed {
    pub(crate) listener: Node,
    pub(crate) diallers: [SigningKey; 2],
    pub(crate) admission: Arc<Admission>,
    pub(crate) heard: Arc<Heard>,
    pub(crate) clock: Clock,
}

impl Testbed {
    pub(crate) fn new(admission: AdmissionConfig, config: TransportConfig) -> Self {
        Self::on_shards(1, admission, config)
    }

    pub(crate) fn on_shards(
        shards: usize,
        admission: AdmissionConfig,
        config: TransportConfig,
    ) -> Self {
        let mut keys = [key(1), key(2), key(3)];
        keys.sort_by_key(SigningKey::node_id);
        let [a, b, c] = keys;
        let addr = free_addr();
        let topology = topology(
            [
                member(&a, free_addr()),
                member(&b, free_addr()),
                member(&c, addr),
            ],
            1,
        );
        let clock = Clock::new();
        let mut rng = Rng::new(42);
        let random = || {
            let mut bytes = [0; 16];
            rng.fill(&mut bytes);
            bytes
        };
        let admission = Arc::new(Admission::new(admission, clock.ns(Instant::now()), random));
        let heard = Arc::new(Heard::default());
        let edge = EdgeStart {
            admission: Some(Arc::clone(&admission)),
            counts: Some(Arc::clone(&heard) as Arc<dyn ConnectionCounts>),
            sockets: None,
            clock: clock.clone(),
        };
        let shards = vec![shard_config(POOL_BYTES); shards];
        let listener = Node::start_behind(c, addr, &topology, config, shards, edge);
        Self {
            listener,
            diallers: [a, b],
            admission,
            heard,
            clock,
        }
    }

    pub(crate) fn dial(&self, options: &RawOptions) -> Raw {
        Raw::dial(self.listener.transport.local_addr(), options)
    }

    /// The first packet of a client after its Retry: the one with the token.
    pub(crate) fn packet_with_token(&self, raw: &mut Raw) -> Vec<u8> {
        let until = Instant::now() + LIMIT;
        while Instant::now() < until {
            for (mut packet, to) in raw.outgoing() {
                let header = quiche::Header::from_slice(&mut packet, 16).unwrap();
                if header.token.is_some_and(|token| !token.is_empty()) {
                    return packet;
                }
                raw.send_datagram(&packet, to);
            }
            raw.receive();
        }
        panic!("no Retry came");
    }

    pub(crate) fn refused(&self, reason: &str, n: u64) {
        self.listener.wait_for_reason(Family::Refused, reason, n);
    }

    /// The real thing: a node that runs the first dialler's key, from the same source as [`here`].
    pub(crate) fn start_dialler(&self) -> Node {
        let own = (Ipv4Addr::LOCALHOST, 0).into();
        let to = self.listener.transport.local_addr();
        let topology = topology(
            [
                member(&self.diallers[0], own),
                member(&self.listener.key, to),
            ],
            1,
        );
        let config = TransportConfig::default();
        Node::start(self.diallers[0].clone(), own, &topology, config, POOL_BYTES)
    }
}

pub(crate) fn assert_serves(asker: &Node, answerer: &Node) {
    for len in [100, 1 << 20] {
        let class = if len > 1_000 {
            Class::Bulk
        } else {
            Class::Normal
        };
        let answer = asker
            .transport
            .request(answerer.id(), request(ECHO, class, asker.body(len)));
        assert_eq!(bytes_of(&answer.wait(PATIENCE).unwrap()).len(), len);
    }
}

pub(crate) fn here() -> Source {
    Source::of("127.0.0.1".parse().unwrap())
}
