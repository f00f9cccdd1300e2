//! `millrace dev`: a whole subnet in one process.

mod common;

use common::{json, millrace, stdout};

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

/// Many more shards than cores, and bodies of the awkward sizes: none, small, one byte over a chunk.
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
