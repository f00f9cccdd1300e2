//! Restarts and identity, on processes: what a node knows after it was killed, and what a second
//! process of the same node, or another node at its address, does to the one that runs.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;
#[path = "restarts/mesh.rs"]
mod mesh;

use std::path::{Path, PathBuf};
use std::process::Output;

use millrace_node::{Node, NodeId};
use rustix::fs::{CWD, FileType, Mode, mknodat};

use common::load::{self, Load};
use common::{TestNode, TestRegistry, eventually, millrace, own_addresses, stderr, text};

/// A registry folder and nodes `0..count` that listen on addresses of their own, all listed, none
/// started; `extra` follows `[registry]` in the config of each.
fn subnet(folder: &Path, count: u8, extra: &str) -> (TestRegistry, Vec<TestNode>) {
    let (registry, ip) = (TestRegistry::init(folder), own_addresses());
    let mut nodes = Vec::new();
    for n in 1..=count {
        let (folder, ip) = (folder.join(format!("node-{n}")), format!("{ip}{n}"));
        nodes.push(TestNode::new(&folder, &registry, &ip, extra));
        registry.add(&nodes[nodes.len() - 1], &format!("{ip}:4100"));
    }
    (registry, nodes)
}

fn connected(a: &TestNode, b: &TestNode) -> u64 {
    eventually("connected", || {
        b.connection_to(a).and_then(|_| a.connection_to(b))
    })
}

fn folder_of(node: &TestNode) -> &Path {
    node.config.parent().unwrap()
}

/// Where a node listens, and dials from.
fn address_of(node: &TestNode) -> String {
    let config = std::fs::read_to_string(&node.config).unwrap();
    let config: toml::Table = config.parse().unwrap();
    config["listen"]["address"].as_str().unwrap().to_owned()
}

/// Lines that a node wrote since its start with these words in them.
fn lines_with(node: &TestNode, words: &str) -> Vec<String> {
    let says = node.says.lock().unwrap();
    says.iter()
        .filter(|line| line.contains(words))
        .cloned()
        .collect()
}

/// Gives a node a registry folder of its own, with the versions that `registry` has now.
fn copy_registry(registry: &TestRegistry, node: &TestNode) {
    let own = folder_of(node).join("registry");
    std::fs::create_dir(&own).unwrap();
    for entry in std::fs::read_dir(&registry.dir).unwrap() {
        let file = entry.unwrap().path();
        std::fs::copy(&file, own.join(file.file_name().unwrap())).unwrap();
    }
}

/// Has the node follow the shared folder.
fn share_registry(registry: &TestRegistry, node: &TestNode) {
    let dir = format!("[registry]\ndir = {:?}\n", registry.dir);
    node.edit("[registry]\n", &dir);
}

fn newest_version(node: &TestNode) -> u64 {
    node.status()["registry"]["newest_version"]
        .as_u64()
        .unwrap()
}

/// Runs `millrace node` where it must end by itself: with a failure, and no other code.
fn fails_to_start(config: &Path) -> Output {
    let output = millrace(&["node", "--config", text(config)]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    output
}

// Protects the removal of a member: a node that heard of it from a peer alone, and whose own folder
// still lists the member, does not let it in again after a kill -9, with no peer there to ask.
#[test]
fn a_removed_member_stays_out_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let (registry, mut nodes) = subnet(dir.path(), 3, "");
    // The lower id dials: the removed member does, and is heard to be refused.
    nodes.sort_by_key(|node| node.node_id.parse::<NodeId>().unwrap());
    let [removed, restarted, informed] = &mut nodes[..] else {
        panic!("three nodes");
    };
    copy_registry(&registry, removed);
    copy_registry(&registry, restarted);
    share_registry(&registry, informed);
    for node in [&mut *removed, &mut *restarted, &mut *informed] {
        node.start();
    }
    connected(removed, restarted);
    connected(restarted, informed);
    let before = newest_version(restarted);

    registry.remove(removed);
    eventually("the removal comes from the peer", || {
        (newest_version(restarted) == before + 1).then_some(())
    });
    informed.kill();
    restarted.kill();
    restarted.start();
    assert_eq!(newest_version(restarted), before + 1);
    let status = restarted.status();
    assert_eq!(status["registry"]["members"], 2, "{status}");
    assert!(status["registry"]["age_seconds"].as_f64().unwrap() >= 0.0);
    let refused = "millrace_transport_connections_refused_total{reason=\"not_in_registry\"}";
    eventually("the removed member is refused", || {
        let (_, metrics) = restarted.get("/metrics");
        metrics.contains(refused).then_some(())
    });
    assert_eq!(restarted.connection_to(removed), None);
    let told = eventually("the log says who", || {
        let told = lines_with(restarted, "a connection is refused");
        told.first().cloned()
    });
    assert!(told.contains("not_in_registry"), "{told}");
    assert!(told.contains(&address_of(removed)), "{told}");
    let printed = common::ok(&["status", "--config", text(&restarted.config)]);
    assert!(printed.contains("no peer can tell"), "{printed}");
}

// Protects the same from a full or broken disk: what is not written down is not in force, which the
// operator sees; it is in force when it can be written.
#[test]
fn a_version_is_in_force_when_it_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let (registry, mut nodes) = subnet(dir.path(), 1, "");
    share_registry(&registry, &nodes[0]);
    nodes[0].start();
    let node = &nodes[0];
    let before = newest_version(node);
    let kept = folder_of(node).join("registry-kept");
    assert_eq!(std::fs::read_dir(&kept).unwrap().count(), 1);
    std::fs::remove_dir_all(&kept).unwrap();
    registry.set_firewall("");
    let why = eventually("the failure is told", || {
        let status = node.status();
        status["registry"]["kept_failure"]
            .as_str()
            .map(str::to_owned)
    });
    assert!(why.contains(&format!("version {}", before + 1)), "{why}");
    assert_eq!(newest_version(node), before);
    let (_, metrics) = node.get("/metrics");
    assert!(
        !metrics.contains("millrace_registry_writes_failed_total 0"),
        "{metrics}"
    );

    std::fs::create_dir(&kept).unwrap();
    eventually("written and in force", || {
        let status = node.status();
        let registry = &status["registry"];
        let is_well = registry["kept_failure"].is_null();
        (is_well && registry["newest_version"] == before + 1).then_some(())
    });
    assert_eq!(std::fs::read_dir(&kept).unwrap().count(), 1);
}

/// Two connected nodes with as many shards as this host has cores for, two at most: only a group of
/// several sockets shares its address.
fn two_with_shards(folder: &Path) -> Vec<TestNode> {
    let (registry, mut nodes) = subnet(folder, 2, "");
    for node in &mut nodes {
        share_registry(&registry, node);
        if std::thread::available_parallelism().unwrap().get() > 1 {
            node.edit("cores = [0]", "cores = [0, 1]");
        }
        node.start();
    }
    connected(&nodes[0], &nodes[1]);
    nodes
}

/// The connection and what is received on it go on.
fn assert_still_serves(nodes: &[TestNode], connection: u64) {
    assert_eq!(nodes[0].connection_to(&nodes[1]), Some(connection));
    let received = || {
        let status = nodes[0].status();
        status["peers"][0]["bytes_received"].as_u64().unwrap()
    };
    let file = folder_of(&nodes[1]).join("in");
    std::fs::write(&file, format!("{} {}", received(), "x".repeat(100_000))).unwrap();
    let put = common::json(&[
        "put",
        text(&file),
        "--config",
        text(&nodes[1].config),
        "--json",
    ]);
    assert_eq!(put["peers"][0]["outcome"], "delivered", "{put}");
    assert_eq!(nodes[0].connection_to(&nodes[1]), Some(connection));
}

// Protects the node that runs: a second process of its config ends at once, names the first, and
// takes no socket and no datagram from it.
#[test]
fn a_second_process_of_a_node_ends_and_the_first_feels_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut nodes = two_with_shards(dir.path());
    let connection = nodes[0].connection_to(&nodes[1]).unwrap();
    let pid = nodes[0].pid();
    for _ in 0..3 {
        let output = fails_to_start(&nodes[0].config);
        let said = stderr(&output);
        assert!(
            said.contains(&format!("process {pid} runs a node in")),
            "{said}"
        );
        assert_still_serves(&nodes, connection);
    }
    // Another config with the same state folder: that is the same node.
    let second = folder_of(&nodes[0]).join("second.toml");
    let config = std::fs::read_to_string(&nodes[0].config).unwrap();
    std::fs::write(&second, config.replace(":4100\"", ":4101\"")).unwrap();
    let said = stderr(&fails_to_start(&second));
    assert!(
        said.contains(&format!("process {pid} runs a node in")),
        "{said}"
    );
    assert_still_serves(&nodes, connection);

    // After a kill -9 neither the lock nor the socket's file is an obstacle.
    nodes[0].kill();
    assert!(nodes[0].socket.exists());
    nodes[0].start();
    assert_eq!(nodes[0].get("/healthz").0, 200);
}

/// A config like that of `node`, in a state folder of its own.
fn other_node(node: &TestNode, folder: &Path) -> PathBuf {
    std::fs::create_dir(folder).unwrap();
    common::keygen(&folder.join("node.key"));
    let config = folder.join("node.toml");
    std::fs::copy(&node.config, &config).unwrap();
    config
}

// Protects the node that runs: another one at its address ends before it has a socket there.
#[test]
fn another_node_at_the_address_ends_and_the_first_feels_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let nodes = two_with_shards(dir.path());
    let connection = nodes[0].connection_to(&nodes[1]).unwrap();
    let config = other_node(&nodes[0], &dir.path().join("other"));
    for _ in 0..3 {
        let said = stderr(&fails_to_start(&config));
        let pid = nodes[0].pid();
        assert!(
            said.contains(&format!("process {pid} has the UDP address")),
            "{said}"
        );
        assert_still_serves(&nodes, connection);
    }
}

// Protects operators: nothing in the registry folder holds up what a node answers, nor its end; and
// a folder that cannot be read makes the node not ready.
#[test]
fn a_registry_folder_out_of_order_is_told_and_holds_up_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (registry, mut nodes) = subnet(dir.path(), 1, "");
    share_registry(&registry, &nodes[0]);
    nodes[0].start();
    let before = newest_version(&nodes[0]);
    let next = before + 1;
    for ending in ["toml", "sig"] {
        let fifo = registry.dir.join(format!("{next:012}.{ending}"));
        mknodat(CWD, &fifo, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    }
    eventually("the FIFO is refused", || {
        let status = nodes[0].status();
        let refused = &status["registry"]["refused_versions"]["registry_unreadable"];
        (refused == 1).then_some(())
    });
    assert_eq!(nodes[0].get("/readyz").0, 200);
    let gauge = |node: &TestNode, value: u8| {
        let (_, metrics) = node.get("/metrics");
        metrics.contains(&format!("millrace_registry_folder_readable {value}.0\n"))
    };
    assert!(gauge(&nodes[0], 1));

    let away = dir.path().join("away");
    std::fs::rename(&registry.dir, &away).unwrap();
    std::fs::write(&registry.dir, "no folder").unwrap();
    eventually("not ready", || {
        let (code, why) = nodes[0].get("/readyz");
        (code == 503 && why.contains("registry folder")).then_some(())
    });
    assert!(gauge(&nodes[0], 0));
    assert_eq!(newest_version(&nodes[0]), before);
    std::fs::remove_file(&registry.dir).unwrap();
    std::fs::rename(&away, &registry.dir).unwrap();
    eventually("ready again", || {
        (nodes[0].get("/readyz").0 == 200).then_some(())
    });
    let says = nodes[0].says.lock().unwrap().join("\n");
    assert_eq!(
        says.matches("registry folder cannot be read").count(),
        1,
        "{says}"
    );
    assert_eq!(nodes[0].stop(), Some(0));
}

/// Another node with the key of `node`, at this host of the subnet's addresses, as a copied state
/// folder makes one.
fn double_of(node: &TestNode, registry: &TestRegistry, folder: &Path, ip: &str) -> TestNode {
    let mut double = TestNode::new(folder, registry, ip, "");
    std::fs::copy(folder_of(node).join("node.key"), folder.join("node.key")).unwrap();
    (double.node_id, double.public_key) = (node.node_id.clone(), node.public_key.clone());
    double
}

// Protects operators: of two nodes with one key the peer that refuses one tells once, however many
// connections a pair has on however many shards, and names both; the refused one tells too.
#[test]
fn two_nodes_with_one_key_are_told_of_once() {
    const REFUSED: u64 = 3;
    let dir = tempfile::tempdir().unwrap();
    let (registry, mut nodes) = subnet(dir.path(), 2, "");
    // The lower id dials.
    nodes.sort_by_key(|node| node.node_id.parse::<NodeId>().unwrap());
    let ip = own_addresses() + "3";
    nodes.push(double_of(
        &nodes[0],
        &registry,
        &dir.path().join("double"),
        &ip,
    ));
    for node in &mut nodes {
        share_registry(&registry, node);
        node.edit("[transport]\n", "[transport]\nconnections_per_peer = 2\n");
        if std::thread::available_parallelism().unwrap().get() > 1 {
            node.edit("cores = [0]", "cores = [0, 1]");
        }
    }
    let [first, listener, double] = &mut nodes[..] else {
        panic!("three nodes");
    };
    first.start();
    listener.start();
    connected(first, listener);
    double.start();
    eventually("both connections are contested", || {
        let status = listener.status();
        let peers = status["peers"].as_array().unwrap();
        let refused = |peer: &serde_json::Value| peer["duplicates_refused"].as_u64().unwrap();
        let is_contested = peers.iter().all(|peer| refused(peer) >= REFUSED);
        (peers.len() == 2 && is_contested).then_some(())
    });
    let told = eventually("the listener tells", || {
        let told = lines_with(listener, "two nodes have the key of this peer");
        (!told.is_empty()).then_some(told)
    });
    assert_eq!(told.len(), 1, "{told:?}");
    for named in [&first.node_id, &address_of(first), &address_of(double)] {
        assert!(told[0].contains(named), "{told:?}");
    }
    let others = lines_with(listener, "a connection is refused");
    assert_eq!(others, Vec::<String>::new());
    for node in [first, double] {
        eventually("the refused node tells", || {
            let told = lines_with(node, "a peer refuses this node: another node");
            (!told.is_empty()).then_some(())
        });
    }
    let printed = common::ok(&["status", "--config", text(&listener.config)]);
    assert!(
        printed.contains("another node has the key of this peer"),
        "{printed}"
    );
}

/// The numbers of all connections between the processes and the node of this one.
fn connections(processes: [&TestNode; 2], here: &Node) -> [u64; 3] {
    let [a, b] = processes.map(|node| node.node_id.parse::<NodeId>().unwrap());
    eventually("all are connected", || {
        let peers = here.transport().status().peers();
        let number = |id| peers.iter().find(|peer| peer.node_id == id);
        let between = processes[0].connection_to(processes[1])?;
        Some([number(a)?.connection.0, number(b)?.connection.0, between])
    })
}

/// Rotates the TLS key of the first process, in the steps of an operator, while requests go on.
fn rotate(registry: &TestRegistry, processes: [&TestNode; 2], here: &Node, load: &Load) {
    let (rotated, before) = (processes[0], connections(processes, here));
    let key = rotated.make_tls_key();
    registry.run_ok("rotate", &[&rotated.node_id, "--tls-key", &key]);
    eventually(
        "the new key is in use, and no connection is by the old one",
        || {
            let tls = &rotated.status()["tls"];
            let is_new = tls["key"] == *key && tls["standing"] == "newest";
            (is_new && tls["connections_by_older_key"] == 0).then_some(())
        },
    );
    let replaced = connections(processes, here);
    // All but the one between the others, if the rotated node has no part in it.
    for (old, new) in [0, 2].map(|n| (before[n], replaced[n])) {
        assert!(new > old, "{before:?} {replaced:?}");
    }

    registry.run_ok("rotate", &[&rotated.node_id, "--finish"]);
    let number = std::fs::read_dir(&registry.dir).unwrap().count() as u64 / 2;
    eventually("all know that it is the only one", || {
        let told = processes.iter().all(|node| newest_version(node) == number);
        (told && here.versions().newest() == number).then_some(())
    });
    load.go_on_for(1_000);
    assert_eq!(connections(processes, here), replaced, "one was cut");
}

// Protects a subnet whose operator rotates keys: no request fails, none of its connections is cut,
// and certificates are renewed meanwhile. A node that comes back with an older key is refused,
// until the new one's file is there again.
#[test]
fn a_key_rotates_under_load_and_the_older_one_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (registry, mut nodes) = subnet(dir.path(), 3, "");
    // The lower id dials: the node in the middle is dialled by one process, and dials the other.
    nodes.sort_by_key(|node| node.node_id.parse::<NodeId>().unwrap());
    let [low, middle, high] = &mut nodes[..] else {
        panic!("three nodes");
    };
    for node in [&*low, &*middle, &*high] {
        share_registry(&registry, node);
    }
    high.edit("[node]\n", "[node]\ncertificate_lifetime = \"3s\"\n");
    low.start();
    high.start();
    let here = load::start_here(middle);
    let identity = low.public_key.clone();
    assert_eq!(low.status()["tls"]["key"], *identity);
    connections([low, high], &here);

    let peers = [&*low, &*high].map(|node| node.node_id.parse().unwrap());
    let load = Load::start(&here, &peers);
    rotate(&registry, [low, high], &here, &load);
    rotate(&registry, [high, low], &here, &load);
    // From one TLS key to another.
    rotate(&registry, [low, high], &here, &load);
    eventually("one was made for the new key, and two are renewals", || {
        let status = high.status();
        let made = status["tls"]["certificates_made"].as_u64().unwrap();
        (made >= 4).then_some(())
    });
    let outcome = load.end();
    println!("{outcome:?}");
    assert_eq!(outcome.failures, []);
    // A thousand a second on an idle host; a tenth of it where others build.
    let rate = outcome.answered as f64 / outcome.time.as_secs_f64();
    assert!(rate >= 100.0, "{rate} answers a second");

    let key = low.status()["tls"]["key"].as_str().unwrap().to_owned();
    let file = folder_of(low).join(format!("tls-{}.key", &key[..16]));
    let away = dir.path().join("away.key");
    low.kill();
    std::fs::rename(&file, &away).unwrap();
    low.start();
    eventually("the older key is refused", || {
        let (_, metrics) = high.get("/metrics");
        let refused = "millrace_transport_connections_refused_total{reason=\"not_in_registry\"}";
        metrics.contains(refused).then_some(())
    });
    let tls = &low.status()["tls"];
    assert_eq!(
        (&tls["standing"], &tls["missing"]),
        (&"refused".into(), &(*key).into())
    );
    assert_eq!(tls["key"], *identity);
    assert_eq!(low.get("/readyz").0, 503);
    assert_eq!(low.status()["peers"], serde_json::json!([]));
    let check = millrace(&["check", "--config", text(&low.config)]);
    let found = stderr(&check) + &common::stdout(&check);
    assert!(found.contains(text(&file)), "{found}");

    std::fs::rename(&away, &file).unwrap();
    eventually("the new one is accepted, without a restart", || {
        (low.get("/readyz").0 == 200).then_some(())
    });
    assert_eq!(low.status()["tls"]["key"], *key);
}
