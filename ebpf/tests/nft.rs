//! The table `inet millrace` in real namespaces: the packets that it passes and refuses, and what
//! it does not touch.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::collections::BTreeSet;
use std::io;
use std::net::UdpSocket;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{NODE, Namespace, PATIENCE, Pair, REMOTE, ok, privileged, until};
use millrace_edge::nft::{Nft, NftError, Table};
use millrace_edge::pins::Pins;
use millrace_edge::ruleset::Watch;
use millrace_edge_policy::packet::Protocol;
use millrace_edge_policy::rules::{Direction, Provenance, Rule, RuleAction, Sources, User};

const PORT: u16 = 4100;

fn table(enforce: bool) -> Table {
    Table {
        enforce,
        udp: BTreeSet::from([PORT, 4200]),
        tcp: BTreeSet::from([8080]),
        rejects_per_second: 100,
        outbound: Vec::new(),
    }
}

fn outbound(number: usize, action: RuleAction) -> Rule {
    Rule {
        sources: Sources::Any,
        ports: None,
        protocol: None,
        action,
        direction: Direction::Outbound,
        user: None,
        comment: Some("\" drop".into()),
        provenance: Provenance::Registry { version: 5, number },
    }
}

fn user(text: &str) -> Option<User> {
    Some(User::try_from(text.to_owned()).unwrap())
}

/// The ruleset of the calling thread's namespace, without the values of counters.
fn ruleset(table: &str) -> String {
    let output = Command::new("nft")
        .args(["-s", "list", "ruleset"])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let mut tables = text.split("table ").filter(|text| text.starts_with(table));
    tables.next().unwrap_or_default().to_owned()
}

/// Packets that the rule with this comment has counted.
fn counted(comment: &str) -> u64 {
    let text = ok(Command::new("nft").args(["list", "table", "inet", "millrace"]));
    let lines = text
        .lines()
        .filter(|line| line.contains(&format!("comment \"{comment}\"")));
    lines
        .map(|line| {
            let packets = line.split("counter packets ").nth(1).unwrap();
            packets.split(' ').next().unwrap().parse::<u64>().unwrap()
        })
        .sum()
}

/// Marks what arrives, as the program's companion does.
fn mark(mark: &str) {
    let script = format!(
        "table inet stamps {{ chain stamp {{ type filter hook prerouting priority raw; meta mark set {mark}; }}; }}"
    );
    let mut child = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    io::Write::write_all(&mut child.stdin.take().unwrap(), script.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
}

struct Ends {
    server: UdpSocket,
    client: UdpSocket,
}

impl Ends {
    fn new(pair: &Pair) -> Self {
        let server = pair.node.enter(|| UdpSocket::bind((NODE, PORT)).unwrap());
        let client = pair.remote.enter(|| UdpSocket::bind((REMOTE, 0)).unwrap());
        client.connect((NODE, PORT)).unwrap();
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { server, client }
    }

    fn arrives(&self, text: &[u8]) -> bool {
        self.client.send(text).unwrap();
        let mut buffer = [0; 64];
        let length = self.server.recv(&mut buffer).unwrap();
        &buffer[..length] == text
    }

    fn nothing_arrived(&self) -> bool {
        self.server.set_nonblocking(true).unwrap();
        let received = self.server.recv(&mut [0; 64]);
        self.server.set_nonblocking(false).unwrap();
        received.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
    }
}

// Protects a table that other programs change: the edge notices changes, and does not take packets
// for changes.
#[test]
fn changes_of_the_table_are_noticed_and_packets_are_none() {
    if !privileged("changes_of_the_table_are_noticed_and_packets_are_none") {
        return;
    }
    let nft = |words: &str| drop(ok(Command::new("nft").args(words.split(' '))));
    let pair = Pair::new("nft");
    let ends = Ends::new(&pair);
    let look = || pair.node.enter(|| Nft::default().fingerprint().unwrap());
    let watch = pair.node.enter(|| Watch::open().unwrap());
    assert_eq!((look(), watch.has_changed()), (None, false));
    pair.node
        .enter(|| Nft::default().apply(&table(false)).unwrap());
    assert!(watch.has_changed() && !watch.has_changed());
    let applied = look();
    assert!(applied.is_some());

    assert!(ends.arrives(b"counted"));
    pair.node.enter(|| assert_eq!(counted("unstamped"), 1));
    pair.node.enter(|| nft("add table inet other"));
    assert!(watch.has_changed());
    assert_eq!(look(), applied, "neither a packet nor another table");

    pair.node.enter(|| nft("flush chain inet millrace input"));
    assert!(watch.has_changed());
    assert_ne!(look(), applied);
    assert!(look().is_some());
    pair.node
        .enter(|| Nft::default().apply(&table(false)).unwrap());
    assert_eq!(look(), applied, "the same table");
    pair.node.enter(|| nft("flush ruleset"));
    assert!(watch.has_changed());
    assert_eq!(look(), None);
    // More of them than fit into the socket's buffer are one.
    for _ in 0..40 {
        pair.node
            .enter(|| Nft::default().apply(&table(true)).unwrap());
    }
    until("all is read", || {
        watch.has_changed() && !watch.has_changed()
    });
}

// Protects a node whose program was detached: the table lets no packet in without a stamp.
#[test]
fn unstamped_packets_are_dropped_only_where_enforced() {
    if !privileged("unstamped_packets_are_dropped_only_where_enforced") {
        return;
    }
    let pair = Pair::new("nft");
    let ends = Ends::new(&pair);
    pair.node
        .enter(|| Nft::default().apply(&table(false)).unwrap());
    assert!(ends.arrives(b"counted"));
    pair.node.enter(|| assert_eq!(counted("unstamped"), 1));

    pair.node
        .enter(|| Nft::default().apply(&table(true)).unwrap());
    ends.client.send(b"dropped").unwrap();
    until("the packet is counted", || {
        pair.node.enter(|| counted("unstamped")) == 1
    });
    assert!(ends.nothing_arrived());

    pair.node.enter(|| mark("0x4d000007"));
    assert!(ends.arrives(b"stamped"));

    pair.node.enter(|| Nft::default().remove().unwrap());
    pair.node.enter(|| assert_eq!(ruleset("inet millrace"), ""));
    pair.node.enter(|| Nft::default().remove().unwrap());
}

// Protects rule `reject`: the sender gets an answer, and nothing gets in. That holds also while the
// table is that of an earlier set, which only counted or had other ports, and for undeclared ports,
// which the program marks with scope `host`.
#[test]
fn packets_marked_reject_are_answered() {
    if !privileged("packets_marked_reject_are_answered") {
        return;
    }
    let pair = Pair::new("nft");
    let ends = Ends::new(&pair);
    pair.node.enter(|| {
        Nft::default().apply(&table(false)).unwrap();
        mark("0x4e000000");
    });
    let other_ports = Table {
        udp: BTreeSet::from([4200]),
        ..table(true)
    };
    for table in [table(false), table(true), other_ports] {
        pair.node.enter(|| Nft::default().apply(&table).unwrap());
        ends.client.send(b"refused").unwrap();
        let error = ends.client.recv(&mut [0; 64]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        assert!(ends.nothing_arrived());

        let refused = pair
            .remote
            .enter(|| std::net::TcpStream::connect((NODE, 8080)).unwrap_err());
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        pair.node.enter(|| assert_eq!(counted("refused"), 2));
    }
}

// Protects the host's own rules, and the loopback interface.
#[test]
fn other_tables_and_loopback_are_left_alone() {
    if !privileged("other_tables_and_loopback_are_left_alone") {
        return;
    }
    Namespace::new("nft").enter(|| {
        mark("0x00000001");
        let before = ruleset("inet stamps");
        Nft::default().apply(&table(true)).unwrap();
        let server = UdpSocket::bind(("127.0.0.1", PORT)).unwrap();
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        let client = UdpSocket::bind(("127.0.0.1", 0)).unwrap();
        client.send_to(b"hello", ("127.0.0.1", PORT)).unwrap();
        assert_eq!(server.recv(&mut [0; 64]).unwrap(), 5);
        Nft::default().remove().unwrap();
        assert_eq!(ruleset("inet stamps"), before);
        assert!(before.contains("prerouting"));
    });
}

// Protects the order of outbound rules, both families, ranges and users.
#[test]
fn the_first_outbound_rule_decides() {
    if !privileged("the_first_outbound_rule_decides") {
        return;
    }
    Namespace::new("nft").enter(|| {
        ok(Command::new("ip").args(["addr", "add", "10.88.0.1/24", "dev", "lo"]));
        ok(Command::new("ip").args(["addr", "add", "fd88::1/64", "dev", "lo"]));
        let rules = vec![
            Rule {
                ports: Some(vec![5000..=5009, 5005..=5020, 5021..=5030]),
                protocol: Some(Protocol::Udp),
                ..outbound(1, RuleAction::Allow)
            },
            Rule {
                // Nested prefixes and host bits: an interval set refuses both.
                sources: Sources::Prefixes(
                    ["10.88.0.0/16", "10.88.0.1/24", "fd88::/16", "fd88::1/64"]
                        .map(|prefix| prefix.parse().unwrap())
                        .to_vec(),
                ),
                user: user("root"),
                ..outbound(2, RuleAction::Deny)
            },
            Rule {
                user: user("4321"),
                ..outbound(3, RuleAction::Deny)
            },
            Rule {
                ports: Some(vec![6000..=6000]),
                ..outbound(4, RuleAction::Reject)
            },
            Rule {
                sources: Sources::Prefixes(Vec::new()),
                ..outbound(5, RuleAction::Deny)
            },
        ];
        let table = Table {
            outbound: rules,
            ..table(true)
        };
        Nft::default().apply(&table).unwrap();
        let v4 = UdpSocket::bind(("10.88.0.1", 0)).unwrap();
        let v6 = UdpSocket::bind(("fd88::1", 0)).unwrap();
        for port in [5000, 5010, 5030] {
            v4.send_to(b"allowed", ("10.88.0.1", port)).unwrap();
            v6.send_to(b"allowed", ("fd88::1", port)).unwrap();
        }
        for port in [4999, 5031] {
            let error = v4.send_to(b"denied", ("10.88.0.1", port)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
            let error = v6.send_to(b"denied", ("fd88::1", port)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        }
        let loopback = UdpSocket::bind(("127.0.0.1", 0)).unwrap();
        loopback.send_to(b"no rule", ("127.0.0.1", 4999)).unwrap();
        assert!(loopback.send_to(b"rejected", ("127.0.0.1", 6000)).is_err());
        let counts = [1, 2, 3, 4].map(|rule| counted(&format!("rule {rule}")));
        assert_eq!(counts, [6, 4, 0, 1]);
    });
}

// Protects the last good table, and tells the operator which rule it is.
#[test]
fn a_refused_table_names_the_rule_and_changes_nothing() {
    if !privileged("a_refused_table_names_the_rule_and_changes_nothing") {
        return;
    }
    Namespace::new("nft").enter(|| {
        Nft::default().apply(&table(true)).unwrap();
        let before = ruleset("inet millrace");
        let rules = vec![
            outbound(11, RuleAction::Allow),
            Rule {
                user: user("no-such-user"),
                ..outbound(17, RuleAction::Deny)
            },
        ];
        let error = Nft::default()
            .apply(&Table {
                outbound: rules,
                ..table(true)
            })
            .unwrap_err();
        let NftError::Refused {
            rule: Some(rule),
            message,
        } = &error
        else {
            panic!("{error}")
        };
        assert_eq!(
            *rule,
            Provenance::Registry {
                version: 5,
                number: 17
            }
        );
        assert!(message.contains("User does not exist"), "{message}");
        assert!(
            error
                .to_string()
                .starts_with("registry version 5, rule 17:"),
            "{error}"
        );
        assert_eq!(ruleset("inet millrace"), before);
    });
}

// Protects processes that wait for the lock of one that waits for `nft`: `nft` is killed, and
// leaves nothing.
#[test]
fn an_nft_that_hangs_is_killed() {
    type Call = fn(&Nft) -> Result<(), NftError>;
    let folder = tempfile::tempdir().unwrap();
    let (program, pid) = (folder.path().join("nft"), folder.path().join("pid"));
    let script =
        "printf '#!/bin/sh\\necho $$ > %s\\nexec sleep 60\\n' \"$2\" > \"$1\" && chmod +x \"$1\"";
    // Another process writes it: a file that is open for writing here cannot be run.
    ok(Command::new("sh")
        .args(["-c", script, "sh"])
        .args([&program, &pid]));
    let calls: [Call; 4] = [
        |nft| nft.check(&table(true)),
        |nft| nft.apply(&table(true)),
        |nft| nft.remove(),
        |nft| nft.fingerprint().map(drop),
    ];
    for call in calls {
        let mut within = Duration::from_millis(50);
        let _ = std::fs::remove_file(&pid);
        let pid = loop {
            let nft = Nft {
                program: program.clone(),
                within,
                ..Nft::default()
            };
            let error = call(&nft).unwrap_err();
            let NftError::Talk(talk) = &error else {
                panic!("{error}")
            };
            assert_eq!(talk.kind(), io::ErrorKind::TimedOut, "{error}");
            let written = std::fs::read_to_string(&pid).unwrap_or_default();
            if written.ends_with('\n') {
                break written;
            }
            // It was killed before it could write its process number.
            within *= 2;
        };
        let process = format!("/proc/{}", pid.trim());
        assert!(!std::path::Path::new(&process).exists(), "{process}");
    }
}

#[test]
fn a_missing_nft_is_named() {
    let nft = Nft {
        program: "/nonexistent/nft".into(),
        ..Nft::default()
    };
    let error = nft.apply(&table(true)).unwrap_err();
    assert_eq!(error.reason(), "nft_run");
    assert!(error.to_string().contains("/nonexistent/nft"), "{error}");
}

// Protects the table of an edge from its neighbours: each has its own, found again by every name of
// its pins.
#[test]
fn every_edge_has_a_table_of_its_own() {
    if !privileged("every_edge_has_a_table_of_its_own") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let other = Pins::at(folder.path().join("edge"));
    std::os::unix::fs::symlink(folder.path(), folder.path().join("link")).unwrap();
    for path in ["./edge", "link/edge", "link/link/edge/"] {
        let same = Pins::at(folder.path().join(path));
        assert_eq!(Nft::of(&same), Nft::of(&other), "{path}");
    }
    let third = Pins::at(folder.path().join("edge3"));
    assert_ne!(Nft::of(&third), Nft::of(&other));
    assert_eq!(Nft::of(&Pins::at("/run/millrace/edge/")), Nft::default());
    let pair = Pair::new("nft");
    pair.node.enter(|| {
        Nft::default().apply(&table(true)).unwrap();
        let first = ruleset("inet millrace");
        Nft::of(&other).apply(&table(false)).unwrap();
        assert_eq!(ruleset("inet millrace"), first);
        assert!(Nft::of(&other).fingerprint().unwrap().is_some());
        assert_eq!(Nft::of(&third).fingerprint().unwrap(), None);
        Nft::of(&third).remove().unwrap();
        Nft::of(&other).remove().unwrap();
        assert_eq!(Nft::of(&other).fingerprint().unwrap(), None);
        assert_eq!(ruleset("inet millrace"), first);
    });
}

// Protects invariant 1: no text reaches nft.
#[test]
fn a_user_name_cannot_carry_rules() {
    for name in ["", "a b", "a\"", "a\n", "-a", "a;b", "a{"] {
        assert!(User::try_from(name.to_owned()).is_err(), "{name:?}");
    }
}
