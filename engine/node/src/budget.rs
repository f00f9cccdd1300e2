//! The memory a config allows: the sum that `check` prints and a node prints at its start.

use millrace_protocol::registry::RegistryConfig;
use millrace_registry::follow::ANSWERS_MAX;
use millrace_registry::wire::ANSWER_BYTES_MAX;
use millrace_transport::INLINE_BYTES_MAX;
use millrace_tuning::{ByteSize, MemoryBudget, NodeConfig};

use crate::mapping;

/// What BoringSSL keeps of a handshake: a peer cannot enlarge it, its messages are bounded. An
/// allowance, not a measurement.
const HANDSHAKE_BYTES: ByteSize = ByteSize::kib(128);

/// Code, stacks and allocator of the process itself, before any shard. An allowance: 44 MiB were
/// measured where the kernel gives the allocator pages of 2 MiB.
const PROCESS_BYTES: ByteSize = ByteSize::mib(48);

/// Long answers of the registry exchange beside the pools at once: the one that peers get; of one
/// that a peer sent, the bytes in one piece and its versions. In the pools lie long ones that wait,
/// and up to two copies of the one that peers get on each shard.
const REGISTRY_ANSWERS: u64 = 3;

/// An admin client: hyper's buffers and the socket's.
const ADMIN_BYTES: ByteSize = ByteSize::kib(768);

/// A bucket of the limiter: eight sources.
const BUCKET_BYTES: ByteSize = ByteSize(64);

/// A dense node of a trie, and the four sparse ones (64 bytes each) that there is room for with it.
const TRIE_NODE_BYTES: ByteSize = ByteSize(1_024 + 4 * 64);

/// An entry of a hash table with its overhead, in the kernel or here; measured at 84 to 117 bytes.
const SOURCE_BYTES: ByteSize = ByteSize(120);

/// Maps whose size no key sets: the ring of events, the table of ports, counters and scratch of
/// each core. An allowance.
const EDGE_FIXED_BYTES: ByteSize = ByteSize::mib(1);

/// Code and stacks of the helper, and the longest message that it takes. An allowance.
const HELPER_BYTES: ByteSize =
    ByteSize(millrace_edge::helper::MESSAGE_BYTES_MAX as u64 + (16 << 20));

/// `LoadOptions::replies_max`, which no key sets.
const FLOWS: u64 = 65_536;

/// The sum that the config allows on a host with these cores.
pub fn of(config: &NodeConfig, cpus: &[u64]) -> MemoryBudget {
    let transport = mapping::transport(config);
    let shards = mapping::shards(config, cpus);
    let count = shards.len() as u64;
    let mut budget = MemoryBudget::default();
    budget.add_growing("process", PROCESS_BYTES, PROCESS_BYTES, 1);
    for (index, shard) in shards.iter().enumerate() {
        let cpu = shard
            .cpu
            .map_or_else(String::new, |cpu| format!(" on core {cpu}"));
        let at_start = ByteSize(shard.memory_at_start_bytes());
        let bytes = ByteSize(shard.memory_budget_bytes());
        let name = format!("shard {index}{cpu}: pool, slots, rings");
        budget.add_growing(name, at_start, bytes, 1);
    }
    let handshakes = config.transport.handshakes_max;
    let connections = config.transport.connections_max.saturating_sub(handshakes);
    let connection = ByteSize(transport.connection_budget_bytes());
    budget.add("connections", connection, connections * count);
    let queues = config.transport.queue_bytes_max;
    budget.add("connections: queues", queues, count);
    let inline = config.transport.inline_bytes_max;
    budget.add("connections: small bodies", inline, count);
    let heap = config.transport.quic_heap_bytes_max;
    budget.add("connections: unread packets and QUIC state", heap, count);
    budget.add("handshakes", HANDSHAKE_BYTES, handshakes * count);
    budget.add("socket buffers of the kernel", socket_bytes(config), count);
    let document = RegistryConfig::default().document_bytes_max as u64;
    budget.add(
        "registry versions",
        ByteSize(document),
        config.registry.versions_max,
    );
    budget.add(
        "registry answers: one for peers, one that is read",
        ByteSize(ANSWER_BYTES_MAX as u64),
        REGISTRY_ANSWERS,
    );
    budget.add(
        "registry answers: small ones that wait",
        ByteSize(INLINE_BYTES_MAX as u64),
        ANSWERS_MAX as u64,
    );
    budget.add("admin clients", ADMIN_BYTES, config.admin.connections_max);
    edge(config, &mut budget);
    budget
}

/// Two generations of each; the maps of the kernel only where there is a program.
fn edge(config: &NodeConfig, budget: &mut MemoryBudget) {
    let edge = &config.edge;
    let buckets = edge.limiter_buckets * 2;
    budget.add_growing(
        "admission: limiter buckets",
        ByteSize(BUCKET_BYTES.0 * buckets),
        BUCKET_BYTES,
        buckets,
    );
    budget.add("admission: sources", SOURCE_BYTES, edge.sources_max);
    if edge.interfaces.is_empty() {
        return;
    }
    // IPv4 and IPv6.
    budget.add("edge: trie nodes", TRIE_NODE_BYTES, edge.trie_nodes_max * 4);
    budget.add(
        "edge: limiter buckets",
        BUCKET_BYTES,
        edge.limiter_buckets * 2,
    );
    // QUIC and TCP, and the answers that scope `host` waits for.
    budget.add(
        "edge: sources and flows",
        SOURCE_BYTES,
        edge.sources_max * 2 + FLOWS,
    );
    budget.add("edge: peers", SOURCE_BYTES, edge.peers_max);
    // Every core that the kernel may ever have counts for itself.
    let cores = libbpf_rs::num_possible_cpus().map_or(1, |cores| cores as u64);
    budget.add(
        "edge: hits of rules, on each core",
        ByteSize(8),
        edge.rules_max * 2 * cores,
    );
    budget.add("edge: events, ports and counters", EDGE_FIXED_BYTES, 1);
    budget.add(
        "edge: a set while it is compiled",
        TRIE_NODE_BYTES,
        edge.trie_nodes_max * 4,
    );
    budget.add("edge: helper process", HELPER_BYTES, 1);
}

fn socket_bytes(config: &NodeConfig) -> ByteSize {
    ByteSize(config.listen.receive_buffer_bytes.0 + config.listen.send_buffer_bytes.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Protects the operator who sizes a host by the sum: what peers may make the node hold is what
    /// the keys say, no more and no less. The figures are written out, not computed as the code
    /// does.
    #[test]
    fn what_peers_may_make_a_node_hold_is_what_its_keys_allow() {
        let mut config = NodeConfig::default();
        let transport = &mut config.transport;
        transport.connections_max = 100;
        transport.handshakes_max = 60;
        transport.lane_body_bytes_max = ByteSize(4_096);
        for requests in [
            &mut transport.requests_out_latency_max,
            &mut transport.requests_out_normal_max,
            &mut transport.requests_out_bulk_max,
            &mut transport.requests_in_latency_max,
            &mut transport.requests_in_normal_max,
            &mut transport.requests_in_bulk_max,
        ] {
            *requests = 100;
        }
        transport.queue_bytes_max = ByteSize::mib(300);
        transport.inline_bytes_max = ByteSize::mib(20);
        transport.quic_heap_bytes_max = ByteSize::mib(77);
        // Two frames over the bounds of lanes, and a header for each of 600 requests.
        const HEADROOM: u64 = 2 * (16 + 4_096) + 600 * 16;
        let budget = of(&config, &[0, 1]);
        for (name, bytes, count) in [
            // Those that are no handshakes, on two shards.
            ("connections", HEADROOM + ByteSize::kib(512).0, 80),
            ("connections: queues", ByteSize::mib(300).0, 2),
            ("connections: small bodies", ByteSize::mib(20).0, 2),
            (
                "connections: unread packets and QUIC state",
                ByteSize::mib(77).0,
                2,
            ),
            ("handshakes", ByteSize::kib(128).0, 120),
        ] {
            let mut lines = budget.lines().iter();
            let line = lines.find(|line| line.name == name).expect(name);
            assert_eq!((line.each.0, line.count), (bytes, count), "{name}");
        }
    }

    /// Protects small machines: one with two cores and 4 GiB, of which the system takes 0.4, runs a
    /// node as it comes.
    #[test]
    fn the_default_fits_a_machine_with_4_gib() {
        let budget = of(&NodeConfig::default(), &[0, 1]);
        assert!(
            budget.total() < ByteSize::mib(3_600),
            "{:?}",
            budget.total()
        );
        assert!(
            budget.at_start() < ByteSize::mib(128),
            "{:?}",
            budget.at_start()
        );
    }
}
