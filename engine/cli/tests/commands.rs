//! The commands that need no running node: what they print, and how they exit.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::Output;

use common::{
    TestNode, TestRegistry, json, keygen, millrace, ok, own_addresses, stderr, stdout, text,
};
use tempfile::TempDir;

const KEY: &str = "aa11111111111111111111111111111111111111111111111111111111111111";

/// A config file, in a folder that goes with it.
struct Config {
    _folder: TempDir,
    file: PathBuf,
}

impl Config {
    fn of(content: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("node.toml");
        std::fs::write(&file, content).unwrap();
        Self {
            _folder: folder,
            file,
        }
    }

    /// With a state folder and a registry key, and this behind.
    fn usable(rest: &str) -> Self {
        Self::of(&format!(
            "[node]\nstate_dir = \".\"\n[registry]\npublic_key = \"{KEY}\"\n{rest}"
        ))
    }

    fn path(&self) -> &str {
        text(&self.file)
    }

    fn check(&self, arguments: &[&str]) -> Output {
        millrace(&[&["check", "--config", self.path()], arguments].concat())
    }
}

/// How a command must end.
#[track_caller]
fn has_code(output: &Output, code: i32) {
    assert_eq!(output.status.code(), Some(code), "{}", stderr(output));
}

/// Five different mistakes are five lines, each with position, reason and fix; the exit code says
/// bad config.
#[test]
fn check_reports_all_mistakes_of_a_config_at_once() {
    let config = Config::of(&format!(
        "[registry]\npublic_key = \"{KEY}\"\n\n[transport]\nkeep_alve = \"1s\"\nlanes = \"many\"\n\
         idle_timeout = \"3 parsecs\"\nstreams_max = 3\nlan_stream_window_bytes = \"64MiB\"\n"
    ));
    let output = config.check(&["--no-environment"]);
    has_code(&output, 78);
    let report = stderr(&output);
    let file = config.path();
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
        format!(
            "{file}:9:1: lan_stream_window_bytes 64MiB is more than lan_connection_window_bytes 4MiB"
        ),
    ] {
        assert!(report.contains(&line), "{line}\nnot in\n{report}");
    }
    assert!(report.contains("5 mistakes"), "{report}");

    let output = config.check(&["--no-environment", "--json"]);
    has_code(&output, 78);
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

/// The memory budget is printed as it was computed: each line is its items' bytes times their
/// number, and the last one is the sum: the bytes that are taken at the start, and at most.
fn assert_budget(config: &Config, printed: &str) {
    let output = config.check(&["--no-environment", "--json"]);
    let report: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let shown = |name: &str| {
        let of_line = |line: &str| {
            let rest = line.trim_start().strip_prefix(name)?;
            let rest = rest.strip_prefix(' ')?;
            Some(rest.split_whitespace().collect::<Vec<_>>().join(" "))
        };
        printed.lines().find_map(of_line).expect(name)
    };
    let [mut start_sum, mut sum] = [0; 2];
    for line in report["memory"].as_array().unwrap() {
        let name = line["name"].as_str().unwrap();
        let [start, each, count] =
            ["at_start_bytes", "each_bytes", "count"].map(|key| line[key].as_u64().unwrap());
        start_sum += start;
        sum += each * count;
        let (start, each, all) = (mib(start), mib(each), mib(each * count));
        let expected = format!("{start:.1} {count} x {each:.2} = {all:.1}");
        assert_eq!(shown(name), expected, "{name}");
    }
    assert_eq!(report["memory_budget_bytes"], sum);
    assert_eq!(report["memory_at_start_bytes"], start_sum);
    let (start_sum, sum) = (mib(start_sum), mib(sum));
    assert_eq!(shown("total"), format!("{start_sum:.1} {sum:.1}"));
    assert!(
        printed
            .lines()
            .last()
            .unwrap()
            .trim_start()
            .starts_with("total")
    );
}

/// A good config passes without a look at the host; with it, what is missing there is exit 3 and
/// names its fix.
#[test]
fn check_tells_mistakes_from_obstacles_of_the_host() {
    let config = Config::usable("");
    let output = config.check(&["--no-environment"]);
    has_code(&output, 0);
    assert_budget(&config, &stdout(&output));

    let output = config.check(&[]);
    has_code(&output, 3);
    let report = stderr(&output);
    assert!(
        report.contains("key file node.key") && report.contains("millrace keygen"),
        "{report}"
    );
    assert!(report.contains("registry folder registry"), "{report}");
}

/// A subnet does not fall apart without a word: who lacks room for all members hears which number
/// to set, by `check` and by the node, which does not start.
#[test]
fn members_without_room_are_an_obstacle() {
    let dir = tempfile::tempdir().unwrap();
    let registry = TestRegistry::init(dir.path());
    let node = TestNode::new(
        &dir.path().join("n"),
        &registry,
        &format!("{}1", own_addresses()),
        "dir = \"../registry\"\n",
    );
    node.edit(
        "[transport]\n",
        "[transport]\nconnections_max = 21\nhandshakes_max = 8\n",
    );
    let config = text(&node.config);
    let run = |command: &str| {
        let output = millrace(&[command, "--config", config]);
        (output.status.code(), stderr(&output))
    };
    // Three connections for a peer, and 16 for clients without a proof: one peer has room.
    registry.add(&node, "127.0.0.1:4100");
    let [second, third] = ["a", "b"].map(|name| keygen(&dir.path().join(name)).1);
    has_code(&registry.add_key(&second, "127.0.0.1:4101"), 0);
    let (code, report) = run("check");
    assert!(!report.contains("too small for"), "{code:?} {report}");
    has_code(&registry.add_key(&third, "127.0.0.1:4102"), 0);
    for (command, code) in [("check", 3), ("node", 78)] {
        let (ended, report) = run(command);
        assert_eq!(ended, Some(code), "{command}: {report}");
        let parts = [
            "connections_max 21 is too small for 3 members",
            "write connections_max = 22",
        ];
        assert!(
            parts.iter().all(|part| report.contains(part)),
            "{command}: {report}"
        );
    }
}

/// What `millrace xdp apply` would refuse is a mistake here already; an interface that is missing
/// may be there elsewhere.
#[test]
fn check_refuses_of_the_edge_what_apply_would() {
    let check = |edge: &str, arguments: &[&str]| {
        Config::usable(&format!("[edge]\n{edge}\n")).check(arguments)
    };
    for of in ["quic", "tcp"] {
        let edge = format!("{of}_per_minute = 1\n{of}_burst = 1_000_000");
        let output = check(&edge, &["--no-environment"]);
        has_code(&output, 78);
        let report = stderr(&output);
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
    has_code(&output, 0);
    assert!(stdout(&output).contains("edge: helper process"));
}

#[test]
fn a_missing_config_is_a_bad_config() {
    for command in ["check", "node"] {
        let output = millrace(&[command, "--config", "/nonexistent/node.toml"]);
        has_code(&output, 78);
        assert!(
            stderr(&output).contains("config default"),
            "{}",
            stderr(&output)
        );
    }
}

#[test]
fn the_default_config_is_commented_and_valid_apart_from_the_registry_key() {
    let default = ok(&["config", "default"]);
    let key = format!("public_key = \"{KEY}\" # <");
    let config = Config::of(&default.replace("# public_key = \"<", &key));
    has_code(&config.check(&["--no-environment"]), 0);

    let shown = ok(&["config", "show", "--config", config.path()]);
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
    let config = Config::of(&format!(
        "[registry]\npublic_key = \"{KEY}\"\n[transport]\nlanes = 2\n"
    ));
    let shown = json(&["config", "show", "--config", config.path(), "--json"]);
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
    has_code(&again, 1);
    assert!(stderr(&again).contains("never overwritten"));
    assert_eq!(std::fs::read(&key).unwrap(), before);
}

/// The walk of an operator: init, two nodes in, one moved, one out; every version stays and
/// verifies.
#[test]
fn registry_versions_are_added_signed_and_checked() {
    let dir = tempfile::tempdir().unwrap();
    let registry = TestRegistry::init(dir.path());
    let show = |public_key: &str| {
        let dir = text(&registry.dir);
        millrace(&[
            "registry",
            "show",
            dir,
            "--public-key",
            public_key,
            "--json",
        ])
    };
    // The newest version, and the addresses of its nodes.
    let newest = || {
        let output = show(&registry.public_key);
        has_code(&output, 0);
        let shown: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
        let nodes = shown["nodes"].as_array().unwrap().iter();
        let addresses = nodes.map(|node| node["addresses"][0].as_str().unwrap().to_owned());
        let mut addresses: Vec<_> = addresses.collect();
        addresses.sort();
        (shown["version"].as_u64().unwrap(), addresses)
    };
    assert_eq!(newest(), (1, vec![]));

    let nodes = ["a", "b"].map(|name| keygen(&dir.path().join(name)));
    let [a, b] = &nodes;
    for ((_, key), address) in [
        (a, "127.0.0.1:4101"),
        (b, "127.0.0.1:4102"),
        (a, "127.0.0.1:4109"),
    ] {
        has_code(&registry.add_key(key, address), 0);
    }
    let both = ["127.0.0.1:4102", "127.0.0.1:4109"].map(str::to_owned);
    assert_eq!(newest(), (4, both.to_vec()));

    registry.run_ok("remove-node", &[&b.0]);
    assert_eq!(newest(), (5, both[1..].to_vec()));

    has_code(&registry.run("remove-node", &[&b.0]), 1);
    let (_, wrong) = keygen(&dir.path().join("other"));
    // Nothing verifies under another key.
    has_code(&show(&wrong), 3);

    // One flipped byte: that version is refused with a reason, the others still show.
    let document = registry.dir.join("000000000003.toml");
    let changed = std::fs::read_to_string(&document)
        .unwrap()
        .replace("4102", "4103");
    std::fs::write(&document, changed).unwrap();
    let shown = show(&registry.public_key);
    has_code(&shown, 3);
    let report = stderr(&shown);
    assert!(report.contains("registry_bad_signature"), "{report}");
}

/// The walk of an operator who rotates: each step is one version, and a step out of order is none.
#[test]
fn a_tls_key_is_rotated_step_by_step() {
    let dir = tempfile::tempdir().unwrap();
    let registry = TestRegistry::init(dir.path());
    let identity = dir.path().join("node.key");
    let (id, public_key) = keygen(&identity);
    let (other_id, other) = keygen(&dir.path().join("other.key"));
    has_code(&registry.add_key(&public_key, "127.0.0.1:4101"), 0);
    has_code(&registry.add_key(&other, "127.0.0.1:4102"), 0);
    let make = || {
        let made = json(&["keygen", "--tls", text(&identity), "--json"]);
        assert!(std::path::Path::new(made["key_file"].as_str().unwrap()).exists());
        made["tls_key"].as_str().unwrap().to_owned()
    };
    let [one, two] = [make(), make()];
    let keys = || {
        let arguments = ["--public-key", &registry.public_key, "--json"];
        let shown = json(&[&["registry", "show", text(&registry.dir)], &arguments[..]].concat());
        let nodes = shown["nodes"].as_array().unwrap();
        let node = nodes.iter().find(|node| node["id"] == *id).unwrap();
        node["tls_keys"].clone()
    };
    let refused = |arguments: &[&str], code, why: &str| {
        let output = registry.run("rotate", arguments);
        has_code(&output, code);
        assert!(stderr(&output).contains(why), "{}", stderr(&output));
    };
    assert_eq!(keys(), serde_json::json!([public_key]));
    refused(&[&id, "--finish"], 1, "no rotation is under way");
    refused(&[&id, "--tls-key", &public_key], 1, "TLS key already");
    refused(&[&id, "--tls-key", &other], 1, &other_id);
    refused(&[&id], 2, "--finish");
    refused(&[&id, "--finish", "--abandon"], 2, "cannot be used with");

    registry.run_ok("rotate", &[&id, "--tls-key", &one]);
    assert_eq!(keys(), serde_json::json!([public_key, one]));
    refused(&[&id, "--tls-key", &two], 1, "is under way");
    // Another address does not end the rotation.
    has_code(&registry.add_key(&public_key, "127.0.0.1:4103"), 0);
    registry.run_ok("rotate", &[&id, "--abandon"]);
    assert_eq!(keys(), serde_json::json!([public_key]));
    registry.run_ok("rotate", &[&id, "--tls-key", &two]);
    registry.run_ok("rotate", &[&id, "--finish"]);
    assert_eq!(keys(), serde_json::json!([two]));
}

#[test]
fn what_nodes_would_skip_is_not_signed() {
    let dir = tempfile::tempdir().unwrap();
    let registry = TestRegistry::init(dir.path());
    let (_, public_key) = keygen(&dir.path().join("n"));
    for (address, reason) in [
        ("0.0.0.0:4100", "is unspecified"),
        ("[fe80::1%eth0]:4100", "has a scope"),
        ("[fe80::1]:4100", "is link-local"),
    ] {
        let output = registry.add_key(&public_key, address);
        has_code(&output, 2);
        let report = stderr(&output);
        assert!(report.contains(reason), "{report}");
    }

    let document = dir.path().join("next.toml");
    has_code(&registry.add_key(&public_key, "192.0.2.1:4100"), 0);
    let by_hand = std::fs::read_to_string(registry.dir.join("000000000002.toml")).unwrap();
    let by_hand = by_hand.replace("number = 2", "number = 3");
    std::fs::write(&document, by_hand.replace("192.0.2.1", "[fe80::1%2]")).unwrap();
    let refused = registry.run("sign", &[text(&document)]);
    has_code(&refused, 1);
    let report = stderr(&refused);
    assert!(
        report.contains("record_address") && report.contains("has a scope"),
        "{report}"
    );

    std::fs::write(&document, "number = 7\n").unwrap();
    let refused = registry.run("sign", &[text(&document)]);
    assert!(stderr(&refused).contains("the next one is 3"));
    std::fs::write(&document, "number = 3\n").unwrap();
    registry.run_ok("sign", &[text(&document)]);
}

#[test]
fn usage_and_absence_have_their_codes() {
    const SOCKET: &str = "/nonexistent/admin.sock";
    has_code(&millrace(&["frobnicate"]), 2);
    // Neither --socket nor --config.
    has_code(&millrace(&["status"]), 2);
    has_code(&millrace(&["--help"]), 0);
    has_code(&millrace(&["status", "--socket", SOCKET]), 69);
    // An id that is none.
    let get = ["get", "zz", "-o", "/tmp/x", "--socket", SOCKET];
    has_code(&millrace(&get), 2);
    has_code(&millrace(&["dev", "--payload", "129MiB", "--once"]), 2);
}
