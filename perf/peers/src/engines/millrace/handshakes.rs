//! Handshakes: a node keeps one connection to each peer, so each of the 16 in flight has a node.
//!
//! A dialler takes the server into its topology, counts a handshake when the server's hello arrives,
//! drops the server from its topology, and begins again when the connection is gone. All diallers
//! share the driving core; the server is one node.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use millrace_protocol::id::{ConnectionNumber, NodeId};
use millrace_protocol::topology::Topology;
use millrace_transport::{Answer, Defer, Handler, Inbound, Local, Payload};

use super::{Identities, drivers, member, nowhere, shard, start, topology};
use crate::Result;
use crate::measure::{Latencies, Measurement, Meter};
use crate::plan::Engine;
use crate::settings::Settings;
use crate::workloads::Job;

pub(super) fn drive(engine: Engine, job: &Job, settings: &Settings) -> Result<Measurement> {
    let identities = Identities::new();
    let count = drivers(job.workload);
    let (sender, finished) = channel();
    let is_over = Arc::new(AtomicBool::new(false));
    let mut nodes = Vec::new();
    for index in 0..count {
        let me = identities.driver(index);
        let alone = topology([member(me, nowhere())], 1);
        let server = member(identities.server(0), job.addresses[0]);
        let paired = topology([member(me, nowhere()), server], 1);
        let dialler = Seed {
            alone: Arc::clone(&alone),
            paired: Arc::clone(&paired),
            finished: sender.clone(),
            is_over: Arc::clone(&is_over),
        };
        let shard = shard(engine, job.workload, count);
        let node = start(me, &alone, shard, settings, move |local| {
            Dialler::new(&dialler, local)
        })?;
        nodes.push((node, paired));
    }
    for (node, paired) in &nodes {
        if !node.update_topology(paired) {
            return Err("a fresh mailbox is full".into());
        }
    }
    thread::sleep(job.warm_up());
    // Everything before is warm-up.
    let warm: usize = finished.try_iter().count();
    if warm == 0 {
        return Err("no handshake in the warm-up".into());
    }
    let meter = Meter::start(job.server_pid)?;
    let until = Instant::now() + job.duration;
    let mut latencies = Latencies::default();
    while let Some(left) = until.checked_duration_since(Instant::now()) {
        match finished.recv_timeout(left) {
            Ok(latency) => latencies.record(latency),
            Err(_) => break,
        }
    }
    let reading = meter.stop()?;
    is_over.store(true, Ordering::Relaxed);
    let rps = latencies.len() as f64 / reading.wall.as_secs_f64();
    let [p50_us, p99_us] = latencies.quantiles_us([0.5, 0.99]);
    Ok(Measurement {
        p50_us,
        p99_us,
        rps: Some(rps),
        cores_used: Some(reading.cores_used()),
        ..Measurement::default()
    })
}

/// What a dialler is made from on its shard.
#[derive(Clone)]
struct Seed {
    alone: Arc<Topology>,
    paired: Arc<Topology>,
    finished: Sender<Duration>,
    is_over: Arc<AtomicBool>,
}

struct Dialler {
    seed: Seed,
    local: Local,
    started: Instant,
}

impl Dialler {
    fn new(seed: &Seed, local: Local) -> Self {
        Self {
            seed: seed.clone(),
            local,
            started: Instant::now(),
        }
    }

    fn take(&self, topology: &Arc<Topology>) {
        // Its own mailbox, used by nothing else, never fills.
        let taken = self.local.transport().update_topology(topology);
        debug_assert!(taken, "a mailbox with one message at a time is full");
    }
}

impl Handler for Dialler {
    fn on_request(&mut self, _request: Inbound<'_>, _defer: Defer<'_>) -> Answer {
        Answer::Reply(Payload::Empty)
    }

    fn on_send(&mut self, _message: Inbound<'_>) {}

    fn on_up(&mut self, _peer: NodeId, _connection: ConnectionNumber) {
        // Fails once the measurement is over.
        self.seed.finished.send(self.started.elapsed()).ok();
        self.take(&self.seed.alone);
    }

    fn on_down(&mut self, _peer: NodeId, _connection: ConnectionNumber) {
        if !self.seed.is_over.load(Ordering::Relaxed) {
            self.started = Instant::now();
            self.take(&self.seed.paired);
        }
    }
}
