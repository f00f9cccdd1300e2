//! `millrace dev`: a whole subnet in one process.

mod common;

use common::namespace::{privileged, tool};
use common::{json, millrace, stderr, stdout};

/// The object that scripts read: exactly these keys, and everything arrived.
#[test]
fn one_artifact_reaches_every_node_and_is_checked_there() {
    let outcome = json(&[
        "dev",
        "--nodes",
        "4",
        "--payload",
        "3MiB",
        "--once",
        "--json",
    ]);
    let keys: Vec<&str> = outcome
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    let mut expected = [
        "nodes",
        "payload_bytes",
        "delivered",
        "hash_ok",
        "seconds_to_all",
        "gbit_per_s",
        "rss_bytes_max",
    ];
    expected.sort_unstable();
    assert_eq!(keys, expected);
    assert_eq!(outcome["nodes"], 4);
    assert_eq!(outcome["payload_bytes"], 3 << 20);
    assert_eq!(outcome["delivered"], 3);
    assert_eq!(outcome["hash_ok"], true);
    assert!(outcome["rss_bytes_max"].as_u64().unwrap() > (4 * 3) << 20);
}

/// Many more shards than cores, and bodies of the awkward sizes: none, small, one byte over a
/// chunk.
#[test]
fn awkward_sizes_and_many_nodes_work() {
    for (nodes, payload) in [
        ("2", "0"),
        ("2", "1B"),
        ("3", "65537B"),
        ("3", "1048577B"),
        ("13", "1MiB"),
    ] {
        let outcome = json(&[
            "dev",
            "--nodes",
            nodes,
            "--payload",
            payload,
            "--once",
            "--json",
        ]);
        let others = nodes.parse::<u64>().unwrap() - 1;
        assert_eq!(outcome["delivered"], others, "{nodes} nodes, {payload}");
        assert_eq!(outcome["hash_ok"], true, "{nodes} nodes, {payload}");
    }
}

/// With several connections to a peer, an announcement and its body arrive on different shards.
#[test]
fn shards_of_a_node_share_what_was_announced() {
    for (nodes, shards) in [("3", "2"), ("4", "3")] {
        let outcome = json(&[
            "dev",
            "--nodes",
            nodes,
            "--shards",
            shards,
            "--payload",
            "3MiB",
            "--once",
            "--json",
        ]);
        let others = nodes.parse::<u64>().unwrap() - 1;
        assert_eq!(
            outcome["delivered"], others,
            "{nodes} nodes, {shards} shards"
        );
        assert_eq!(outcome["hash_ok"], true);
    }
}

#[test]
fn the_table_names_every_node() {
    let output = millrace(&["dev", "--nodes", "3", "--payload", "64KiB", "--once"]);
    assert_eq!(output.status.code(), Some(0));
    let table = stdout(&output);
    assert_eq!(
        table.matches("delivered").count(),
        3,
        "two nodes and the last line: {table}"
    );
    assert!(
        table.contains("published") && table.contains("hash checked"),
        "{table}"
    );
}

/// The first thing that a newcomer sees of the edge: a subnet that works under a flood, counts of
/// one end of the cable, and nothing left behind.
#[test]
fn a_subnet_behind_the_edge_works_under_a_flood() {
    if !privileged("a_subnet_behind_the_edge_works_under_a_flood") {
        return;
    }
    let output = millrace(&[
        "dev",
        "--edge",
        "--nodes",
        "3",
        "--payload",
        "1MiB",
        "--once",
    ]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let table = stdout(&output);
    assert_eq!(table.matches("delivered").count(), 3, "{table}");
    let (_, edge) = table.split_once("the edge in front of node 0, ").unwrap();
    let (sent, rows) = edge.split_once(" hostile packets").unwrap();
    let sent: u64 = sent.parse().unwrap();
    let packets = |reason: &str| -> u64 {
        let row = rows.lines().find(|line| line.starts_with(reason));
        row.map_or(0, |row| {
            row.split_whitespace().nth(2).unwrap().parse().unwrap()
        })
    };
    // Half of them each: those of a non_member, and forged ones from an address of members.
    assert!(packets("firewall_default") > 0, "{rows}");
    let forged = packets("quic_unknown_id");
    assert!(
        forged > 0 && forged <= sent / 2,
        "{forged} of {sent}: {rows}"
    );
    // What the node sends goes to ports that are none of its edge's business: seen by the far end
    // alone.
    assert!(packets("pass_other") < 1_000, "{rows}");
    let left = tool("ip", &["netns", "list"]);
    assert!(!left.contains("millrace-dev-"), "{left}");
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains("/run/millrace/dev-"), "{mounts}");
}
