//! The commands that need no running node: what they print, and how they exit.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use common::{json, millrace, ok, stderr, stdout, text};

const KEY: &str = "aa11111111111111111111111111111111111111111111111111111111111111";

/// Five different mistakes are five lines, each with position, reason and fix; the exit code says
/// bad config.
#[test]
fn check_reports_all_mistakes_of_a_config_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("node.toml");
    std::fs::write(
        &config,
        format!(
            "[registry]\npublic_key = \"{KEY}\"\n\n[transport]\nkeep_alve = \"1s\"\nlanes = \"many\"\n\
             idle_timeout = \"3 parsecs\"\nstreams_max = 3\nstream_window_bytes = \"64MiB\"\n"
        ),
    )
    .unwrap();
    let output = millrace(&["check", "--config", text(&config), "--no-environment"]);
    assert_eq!(output.status.code(), Some(78));
    let report = stderr(&output);
    let file = text(&config);
    for line in [
        format!(
            "{file}:5:1: unknown key \"keep_alve\" in [transport]; fix: did you mean \"keep_alive\"?"
        ),
        format!(
            "{file}:6:9: lanes has the wrong type: expected a whole number, found text; fix: write `lanes = 4`"
        ),
        format!(
            "{file}:7:16: idle_timeout: \"parsecs\" is not a unit (known: ns, us, ms, s, m, h); fix: "
        ),
        format!("{file}:8:15: streams_max = 3 is out of range (8 to 65536); fix: use 8, "),
        format!("{file}:9:1: stream_window_bytes 64MiB is more than connection_window_bytes 4MiB"),
    ] {
        assert!(report.contains(&line), "{line}\nnot in\n{report}");
    }
    assert!(report.contains("5 mistakes"), "{report}");

    let output = millrace(&["check", "--config", file, "--no-environment", "--json"]);
    assert_eq!(output.status.code(), Some(78));
    let report: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
    let kinds: Vec<_> = report["problems"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| p["kind"].as_str().unwrap())
        .collect();
    assert_eq!(
        kinds,
        [
            "unknown_key",
            "wrong_type",
            "bad_unit",
            "out_of_range",
            "contradiction"
        ]
    );
}

/// A good config passes without a look at the host; with it, what is missing there is exit 3 and
/// names its fix.
#[test]
fn check_tells_mistakes_from_obstacles_of_the_host() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("node.toml");
    std::fs::write(
        &config,
        format!("[node]\nstate_dir = \".\"\n[registry]\npublic_key = \"{KEY}\"\n"),
    )
    .unwrap();
    let output = millrace(&["check", "--config", text(&config), "--no-environment"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(
        stdout(&output).contains("total"),
        "the memory budget is printed"
    );

    let output = millrace(&["check", "--config", text(&config)]);
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    let report = stderr(&output);
    assert!(
        report.contains("key file node.key") && report.contains("millrace keygen"),
        "{report}"
    );
    assert!(report.contains("registry folder registry"), "{report}");
}

/// What `millrace xdp apply` would refuse is a mistake here already; an interface that is missing
/// may be there elsewhere.
#[test]
fn check_refuses_of_the_edge_what_apply_would() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("node.toml");
    let check = |edge: &str, arguments: &[&str]| {
        let head = format!("[node]\nstate_dir = \".\"\n[registry]\npublic_key = \"{KEY}\"\n");
        std::fs::write(&config, format!("{head}[edge]\n{edge}\n")).unwrap();
        millrace(&[&["check", "--config", text(&config)], arguments].concat())
    };
    for of in ["quic", "tcp"] {
        let edge = format!("{of}_per_minute = 1\n{of}_burst = 1_000_000");
        let output = check(&edge, &["--no-environment"]);
        let report = stderr(&output);
        assert_eq!(output.status.code(), Some(78), "{report}");
        assert!(
            report.contains("7:1: the edge refuses this")
                && report.contains(&format!("source_{of}")),
            "{report}"
        );
    }
    let output = check("interfaces = [\"lo\", \"nowhere0\"]", &[]);
    let report = stderr(&output);
    let warnings: Vec<_> = report
        .lines()
        .filter(|line| line.contains("there is no interface"))
        .collect();
    assert_eq!(warnings.len(), 1, "{report}");
    assert!(
        warnings[0].contains("warning") && warnings[0].contains("nowhere0"),
        "{report}"
    );
    let output = check("interfaces = [\"nowhere0\"]", &["--no-environment"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stdout(&output).contains("edge: helper process"));
}

#[test]
fn a_missing_config_is_a_bad_config() {
    for command in ["check", "node"] {
        let output = millrace(&[command, "--config", "/nonexistent/node.toml"]);
        assert_eq!(output.status.code(), Some(78), "{command}");
        assert!(
            stderr(&output).contains("config default"),
            "{}",
            stderr(&output)
        );
    }
}

#[test]
fn the_default_config_is_commented_and_valid_apart_from_the_registry_key() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("node.toml");
    let default = ok(&["config", "default"]);
    std::fs::write(
        &config,
        default.replace("# public_key = \"<", &format!("public_key = \"{KEY}\" # <")),
    )
    .unwrap();
    ok(&["check", "--no-environment", "--config", text(&config)]);

    let shown = ok(&["config", "show", "--config", text(&config)]);
    let line = shown
        .lines()
        .find(|line| line.starts_with("transport.keep_alive"))
        .unwrap();
    assert!(
        line.contains("\"1s\"") && line.contains("node.toml:"),
        "{line}"
    );
    let values = json(&["config", "default", "--json"]);
    assert_eq!(values["transport.keep_alive"], "1s");
}

#[test]
fn show_tells_defaults_from_what_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("node.toml");
    std::fs::write(
        &config,
        format!("[registry]\npublic_key = \"{KEY}\"\n[transport]\nlanes = 2\n"),
    )
    .unwrap();
    let shown = json(&["config", "show", "--config", text(&config), "--json"]);
    let find = |key: &str| {
        shown
            .as_array()
            .unwrap()
            .iter()
            .find(|v| v["key"] == key)
            .unwrap()
            .clone()
    };
    assert_eq!(find("transport.lanes")["value"], "2");
    assert!(
        find("transport.lanes")["origin"]
            .as_str()
            .unwrap()
            .ends_with("node.toml:4")
    );
    assert_eq!(find("transport.keep_alive")["origin"], "default");
}

#[test]
fn keygen_makes_a_private_key_once() {
    let dir = tempfile::tempdir().unwrap();
    let key = dir.path().join("node.key");
    let made = json(&["keygen", text(&key), "--json"]);
    assert_eq!(std::fs::metadata(&key).unwrap().mode() & 0o7777, 0o600);
    assert_eq!(made["public_key"].as_str().unwrap().len(), 64);
    assert!(made["node_id"].as_str().unwrap().contains('-'));

    let before = std::fs::read(&key).unwrap();
    let again = millrace(&["keygen", text(&key)]);
    assert_eq!(again.status.code(), Some(1));
    assert!(stderr(&again).contains("never overwritten"));
    assert_eq!(std::fs::read(&key).unwrap(), before);
}

/// The walk of an operator: init, two nodes in, one moved, one out; every version stays and
/// verifies.
#[test]
fn registry_versions_are_added_signed_and_checked() {
    let dir = tempfile::tempdir().unwrap();
    let (registry, key) = (dir.path().join("registry"), dir.path().join("registry.key"));
    let (registry, key) = (text(&registry), text(&key));
    let made = json(&["registry", "init", registry, "--key", key, "--json"]);
    assert_eq!(made["version"], 1);
    let public_key = made["public_key"].as_str().unwrap();

    let mut ids = Vec::new();
    for (name, address) in [("a", "127.0.0.1:4101"), ("b", "127.0.0.1:4102")] {
        let node = json(&["keygen", text(&dir.path().join(name)), "--json"]);
        let public_key = node["public_key"].as_str().unwrap();
        let add = [
            "registry",
            "add-node",
            registry,
            "--key",
            key,
            "--public-key",
            public_key,
        ];
        ok(&[&add[..], &["--address", address]].concat());
        ids.push((
            node["node_id"].as_str().unwrap().to_owned(),
            public_key.to_owned(),
        ));
    }
    let moved = [
        "registry",
        "add-node",
        registry,
        "--key",
        key,
        "--public-key",
        &ids[0].1,
    ];
    ok(&[&moved[..], &["--address", "127.0.0.1:4109"]].concat());
    let shown = json(&[
        "registry",
        "show",
        registry,
        "--public-key",
        public_key,
        "--json",
    ]);
    assert_eq!(shown["version"], 4);
    assert_eq!(shown["nodes"].as_array().unwrap().len(), 2);
    let addresses: Vec<_> = shown["nodes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|n| &n["addresses"][0])
        .collect();
    assert!(
        addresses.iter().any(|a| *a == "127.0.0.1:4109"),
        "{addresses:?}"
    );

    ok(&["registry", "remove-node", registry, "--key", key, &ids[1].0]);
    let shown = json(&[
        "registry",
        "show",
        registry,
        "--public-key",
        public_key,
        "--json",
    ]);
    assert_eq!(shown["version"], 5);
    assert_eq!(shown["nodes"].as_array().unwrap().len(), 1);

    let unknown = millrace(&["registry", "remove-node", registry, "--key", key, &ids[1].0]);
    assert_eq!(unknown.status.code(), Some(1));
    let other = json(&["keygen", text(&dir.path().join("other")), "--json"]);
    let wrong = other["public_key"].as_str().unwrap();
    let show = millrace(&["registry", "show", registry, "--public-key", wrong]);
    assert_eq!(
        show.status.code(),
        Some(3),
        "nothing verifies under another key"
    );

    // One flipped byte: that version is refused with a reason, the others still show.
    let document = Path::new(registry).join("000000000003.toml");
    let changed = std::fs::read_to_string(&document)
        .unwrap()
        .replace("4102", "4103");
    std::fs::write(&document, changed).unwrap();
    let show = millrace(&["registry", "show", registry, "--public-key", public_key]);
    assert_eq!(show.status.code(), Some(3));
    assert!(
        stderr(&show).contains("registry_bad_signature"),
        "{}",
        stderr(&show)
    );
}

#[test]
fn what_nodes_would_skip_is_not_signed() {
    let dir = tempfile::tempdir().unwrap();
    let (registry, key) = (dir.path().join("registry"), dir.path().join("registry.key"));
    let (registry, key) = (text(&registry), text(&key));
    ok(&["registry", "init", registry, "--key", key]);
    let node = json(&["keygen", text(&dir.path().join("n")), "--json"]);
    let public_key = node["public_key"].as_str().unwrap();
    let add = [
        "registry",
        "add-node",
        registry,
        "--key",
        key,
        "--public-key",
        public_key,
    ];
    let output = millrace(&[&add[..], &["--address", "0.0.0.0:4100"]].concat());
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("record_address"),
        "{}",
        stderr(&output)
    );

    let document = dir.path().join("next.toml");
    std::fs::write(&document, "number = 7\n").unwrap();
    let sign = ["registry", "sign", registry, "--key", key, text(&document)];
    assert!(stderr(&millrace(&sign)).contains("the next one is 2"));
    std::fs::write(&document, "number = 2\n").unwrap();
    ok(&sign);
}

#[test]
fn usage_and_absence_have_their_codes() {
    assert_eq!(millrace(&["frobnicate"]).status.code(), Some(2));
    assert_eq!(
        millrace(&["status"]).status.code(),
        Some(2),
        "neither --socket nor --config"
    );
    assert_eq!(millrace(&["--help"]).status.code(), Some(0));
    let status = millrace(&["status", "--socket", "/nonexistent/admin.sock"]);
    assert_eq!(status.status.code(), Some(69), "{}", stderr(&status));
    let get = millrace(&[
        "get",
        "zz",
        "-o",
        "/tmp/x",
        "--socket",
        "/nonexistent/admin.sock",
    ]);
    assert_eq!(get.status.code(), Some(2), "an id that is none");
    let dev = millrace(&["dev", "--payload", "129MiB", "--once"]);
    assert_eq!(dev.status.code(), Some(2), "{}", stderr(&dev));
}
