//! Subnets of many nodes, each a process: all find room for each other, in little memory.

use std::path::Path;
use std::time::Duration;

use millrace_testkit::seeds;
use millrace_testkit::wait::within;

use crate::common::{TestNode, TestRegistry, own_addresses};

/// How long a subnet may take until each of its nodes is connected to all others. Generous: 200
/// nodes make 19,900 handshakes on the cores of one host.
const MESH_PATIENCE: Duration = Duration::from_secs(600);

/// A subnet of `count` nodes in one registry version, none started. `sections` is the config of
/// each but for its address and the registry.
fn mesh(folder: &Path, count: u8, sections: &str) -> Vec<TestNode> {
    let (registry, ip) = (TestRegistry::init(folder), own_addresses());
    let made = (1..=count).map(|n| {
        let address = format!("{ip}{n}:4100");
        let folder = folder.join(format!("node-{n}"));
        let node = TestNode::with_sections(&folder, &registry, &address, sections);
        (node, address)
    });
    let made: Vec<(TestNode, String)> = made.collect();
    registry.add_all(&made);
    made.into_iter().map(|(node, _)| node).collect()
}

/// Starts all, and waits until each is connected to all others.
fn assert_meshes(nodes: &mut [TestNode]) {
    for node in nodes.iter_mut() {
        node.start();
    }
    let others = nodes.len() - 1;
    for node in nodes.iter() {
        let peers = || node.status()["peers"].as_array().unwrap().len();
        let all = within(MESH_PATIENCE, || (peers() == others).then_some(()));
        assert!(all.is_some(), "{} of {others} peers", peers());
    }
}

/// `VmRSS` of a process, bytes.
fn resident_bytes(node: &TestNode) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", node.pid())).unwrap();
    let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = kib.unwrap().trim().trim_end_matches(" kB");
    kib.parse::<u64>().unwrap() * 1_024
}

// Protects an operator of a small machine: pools start small, and `check` says what a node takes at
// its start; 60 nodes with the config as it comes run beside each other.
#[test]
fn sixty_nodes_mesh_with_the_default_config() {
    let folder = tempfile::tempdir().unwrap();
    let mut nodes = mesh(folder.path(), 60, "");
    nodes[0].start();
    let at_start = nodes[0].check_json()["memory_at_start_bytes"]
        .as_u64()
        .unwrap();
    let resident = resident_bytes(&nodes[0]);
    assert!(resident <= at_start, "{resident} bytes, {at_start} printed");
    nodes[0].kill();
    assert_meshes(&mut nodes);
}

/// The smallest that `check` accepts, but for [`CONNECTIONS_MAX`].
const SMALL: &str = "[artifacts]\nstore_bytes = \"1MiB\"\n[shards]\ncores = [0]\nspin = \"0s\"\n\
    chunk_pool_bytes = \"3MiB\"\nchunk_pool_ahead_bytes = \"1MiB\"\nrx_slots = 2\ntx_slots = 4\n\
    [transport]\nbody_bytes_max = \"1MiB\"\nreceive_budget_bytes = \"2MiB\"\n\
    receive_budget_peer_bytes = \"1MiB\"\nqueue_bytes_max = \"4MiB\"\n\
    inline_bytes_max = \"1MiB\"\nhandshakes_max = 32\n";
/// Too few for any subnet.
const CONNECTIONS_MAX: &str = "connections_max = 33\n";

/// Nodes with [`SMALL`] and `others`, and as many connections as `check` says they need.
fn small_mesh(folder: &Path, count: u8, others: &str) -> Vec<TestNode> {
    let nodes = mesh(folder, count, &format!("{SMALL}{CONNECTIONS_MAX}{others}"));
    // It names the least number for these members.
    let problems = &nodes[0].check_json()["problems"];
    let fix = problems[0]["fix"].as_str().unwrap();
    let numbers = fix.split([' ', ',']);
    let number = numbers.filter_map(|word| word.parse::<u64>().ok()).next();
    let number = number.unwrap_or_else(|| panic!("{problems}"));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    for (n, node) in nodes.iter().enumerate() {
        node.edit(CONNECTIONS_MAX, &format!("connections_max = {number}\n"));
        node.edit("cores = [0]", &format!("cores = [{}]", n % cores));
    }
    let accepted = &nodes[0].check_json()["problems"];
    assert_eq!(accepted.as_array().unwrap().len(), 0, "{accepted}");
    nodes
}

// Protects a subnet on few resources: the smallest numbers that `check` accepts leave no member
// without its peers.
#[test]
fn sixty_nodes_mesh_with_the_smallest_config() {
    let folder = tempfile::tempdir().unwrap();
    assert_meshes(&mut small_mesh(folder.path(), 60, ""));
}

// Protects a large subnet: 200 nodes make 19,900 handshakes on the cores of one host, and keep as
// many connections alive. They dial and probe at the pace that such a host can bear.
#[test]
fn many_nodes_mesh_with_the_smallest_config() {
    let count = if seeds::is_full() { 200 } else { 80 };
    let folder = tempfile::tempdir().unwrap();
    let slow = "dials_max = 4\nprobes_per_second_max = 4\nidle_timeout = \"4m\"\n";
    assert_meshes(&mut small_mesh(folder.path(), count, slow));
}
