//! All nodes of a mesh in one process, a shard each: how long until every pair is up, and what
//! closes afterwards.

use std::collections::BTreeMap;
use std::io::{BufRead, stdin};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use millrace_protocol::topology::Topology;
use millrace_shards::config::ShardConfig;
use millrace_transport::Transport;
use millrace_transport::counters::{Counter, Family};

use super::wan::{Receiver, shard, start};
use super::{Identities, MIB, member, nowhere, topology};
use crate::wan::child::MeshOutcome;
use crate::wan::clock;
use crate::{Result, socket, workloads};

/// How long the mesh may take; beyond it the run says that it did not come up.
const UP_WITHIN: Duration = Duration::from_secs(60);

/// `reached_at[a][b]` is where node `a` finds node `b`. The nodes start with themselves as the only
/// member; the parent says when they hear of each other.
pub(crate) fn run(reached_at: &[Vec<SocketAddr>], idle: Duration) -> Result<MeshOutcome> {
    let identities = Identities::new();
    let ended = Arc::new(AtomicU64::new(0));
    let nodes: Vec<_> = (0..reached_at.len())
        .map(|index| {
            let me = identities.driver(index);
            let shard = ShardConfig {
                // More nodes than cores may not spin on each other's time.
                spin: Duration::ZERO,
                chunk_pool_bytes: 2 * MIB,
                ..shard(None)
            };
            let ended = Arc::clone(&ended);
            start(me, [member(me, nowhere())], shard, None, move || Receiver {
                ended: Arc::clone(&ended),
                ..Receiver::default()
            })
        })
        .collect::<Result<_>>()?;
    let addresses: Vec<_> = nodes.iter().map(Transport::local_addr).collect();
    workloads::announce(&addresses)?;
    stdin().lock().read_line(&mut String::new())?;
    socket::exit_with_parent();

    let started = clock::now();
    // The lower node dials, so the higher one hears first and refuses no dial.
    for (index, node) in nodes.iter().enumerate().rev() {
        let others = reached_at[index].iter().enumerate();
        let members = others.map(|(other, &at)| member(identities.driver(other), at));
        apply(node, &topology(members, 2))?;
    }
    let full_mesh_s = wait_for_mesh(&nodes).then(|| (clock::now() - started).as_secs_f64());
    let before = closed(&nodes);
    let count = || (ended.load(Ordering::Relaxed), dials(&nodes));
    let counts = count();
    std::thread::sleep(idle);
    let (ended, dials) = count();
    let mut closed = closed(&nodes);
    for (reason, count) in before {
        *closed.entry(reason).or_default() -= count;
    }
    closed.retain(|_, count| *count > 0);
    let pairs_up_at_end = nodes.iter().map(|node| node.status().peer_ids().len());
    let pairs_up_at_end = pairs_up_at_end.sum::<usize>() / 2;
    nodes.iter().for_each(Transport::close);
    Ok(MeshOutcome {
        full_mesh_s,
        ended: ended - counts.0,
        closed,
        dials: dials - counts.1,
        pairs_up_at_end,
    })
}

fn apply(node: &Transport, topology: &Arc<Topology>) -> Result<()> {
    if node.update_topology(topology) {
        Ok(())
    } else {
        Err("a node's mailbox was full".into())
    }
}

/// Whether every node has every other within the time, all at once.
fn wait_for_mesh(nodes: &[Transport]) -> bool {
    let until = clock::now() + UP_WITHIN;
    let is_up = |node: &Transport| node.status().peer_ids().len() + 1 == nodes.len();
    while clock::now() < until {
        if nodes.iter().all(is_up) {
            return true;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    false
}

/// Connections that ended, by reason: those that were up, at each of their ends, and those that
/// never came up.
fn closed(nodes: &[Transport]) -> BTreeMap<String, u64> {
    let mut closed = BTreeMap::new();
    for counters in nodes.iter().flat_map(Transport::counters) {
        for (family, reason, count) in counters.reasons() {
            if family == Family::Closed {
                *closed.entry(reason.to_owned()).or_default() += count;
            }
        }
    }
    closed
}

fn dials(nodes: &[Transport]) -> u64 {
    let counters = nodes.iter().flat_map(Transport::counters);
    counters.map(|counters| counters.get(Counter::Dials)).sum()
}
