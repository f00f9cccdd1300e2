//! An edge on two interfaces: one set for both, and programs that change on both or on neither.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::collections::BTreeMap;
use std::net::UdpSocket;
use std::path::PathBuf;

use common::edge::{Home, PORT, counters, denied, options, set_of};
use common::{PATIENCE, Pair, privileged, until};
use libbpf_rs::{Link, ProgramHandle};
use millrace_edge::edge::{AttachOptions, Edge, EdgeError};
use millrace_edge::interface::AttachMode;
use millrace_edge::pins::Kind;
use millrace_edge::privileges::drop_capabilities;
use millrace_edge_policy::reason::Reason;
use millrace_edge_policy::rules::{Compiled, RuleAction};
use millrace_edge_policy::settings::Mode;

/// The addresses of the node and the remote host on each cable.
const CABLES: [(&str, &str); 2] = [("10.77.0.1", "10.77.0.2"), ("10.78.0.1", "10.78.0.2")];

/// An edge on `mr0` and `mr2` of a node, with a sender and a receiver on each.
struct Testbed {
    edge: Edge,
    ends: [Ends; 2],
    home: Home,
    pair: Pair,
}

struct Ends {
    server: UdpSocket,
    client: UdpSocket,
}

impl Ends {
    fn new(pair: &Pair, (node, remote): (&str, &str)) -> Self {
        let server = pair.node.enter(|| UdpSocket::bind((node, PORT)).unwrap());
        let client = pair.remote.enter(|| UdpSocket::bind((remote, 0)).unwrap());
        client.connect((node, PORT)).unwrap();
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        let ends = Self { server, client };
        assert!(ends.arrives());
        ends
    }

    fn send(&self) {
        self.client.send(b"hello").unwrap();
    }

    fn arrives(&self) -> bool {
        self.send();
        self.server.recv(&mut [0; 64]).is_ok()
    }

    fn is_empty(&self) -> bool {
        self.server.set_nonblocking(true).unwrap();
        let empty = self.server.recv(&mut [0; 64]).is_err();
        self.server.set_nonblocking(false).unwrap();
        empty
    }
}

impl Testbed {
    /// None, said aloud, without the rights.
    fn new(test: &str) -> Option<Self> {
        if !privileged(test) {
            return None;
        }
        let (pair, home) = (Pair::new("two"), Home::new());
        let remote = &pair.remote.name;
        pair.node.ip(&format!(
            "link add mr2 type veth peer name mr3 netns {remote}"
        ));
        for (namespace, interface, host) in [(&pair.node, "mr2", 1), (&pair.remote, "mr3", 2)] {
            namespace.ip(&format!("addr add 10.78.0.{host}/24 dev {interface}"));
            namespace.ip(&format!("link set {interface} up"));
        }
        let ends = CABLES.map(|cable| Ends::new(&pair, cable));
        let options = AttachOptions {
            interfaces: vec!["mr0".into(), "mr2".into()],
            ..options(AttachMode::Native)
        };
        let edge = pair.node.enter(|| Edge::attach(&home.pins, &options));
        let edge = edge.unwrap_or_else(|error| panic!("{error}"));
        Some(Self {
            edge,
            ends,
            home,
            pair,
        })
    }

    /// One more packet over each cable is denied, and gets nowhere.
    fn assert_denies(&self) {
        for ends in &self.ends {
            let before = denied(&self.edge);
            ends.send();
            until("the packet is denied", || denied(&self.edge) == before + 1);
            assert!(ends.is_empty());
        }
    }

    /// Identity of every running program, by its link, and of every pinned program, by its name.
    fn programs(&self) -> BTreeMap<String, u32> {
        let pins = &self.home.pins;
        let mut programs = BTreeMap::new();
        for name in pins.names(Kind::Link).unwrap() {
            let link = Link::open(pins.path(Kind::Link, &name)).unwrap();
            programs.insert(format!("link {name}"), link.info().unwrap().prog_id);
        }
        for name in pins.names(Kind::Program).unwrap() {
            let program = ProgramHandle::from_pinned_path(pins.path(Kind::Program, &name));
            programs.insert(format!("program {name}"), program.unwrap().id());
        }
        programs
    }

    fn state(&self) -> String {
        std::fs::read_to_string(self.home.pins.journal_path()).unwrap()
    }

    fn link(&self, program: &str, interface: usize) -> PathBuf {
        let index = self.edge.interfaces().unwrap()[interface].index;
        self.home
            .pins
            .path(Kind::Link, &format!("{program}-{index}"))
    }
}

fn from_both(action: RuleAction) -> Compiled {
    set_of(Mode::Enforce, &["10.77.0.0/24", "10.78.0.0/24"], action)
}

// Protects a node with several interfaces: rules hold on each, whatever changes on one, and
// detaching leaves none.
#[test]
fn rules_hold_on_every_interface() {
    let Some(mut testbed) = Testbed::new("rules_hold_on_every_interface") else {
        return;
    };
    testbed
        .edge
        .publish(&from_both(RuleAction::Deny), 1, None)
        .unwrap();
    testbed.assert_denies();
    let second = set_of(Mode::Enforce, &["10.78.0.0/24"], RuleAction::Allow);
    testbed.edge.publish(&second, 2, None).unwrap();
    testbed.ends[0].send();
    until("no rule names the other end", || {
        counters(&testbed.edge).acted_on(Reason::FirewallDefault) == 1
    });
    assert!(testbed.ends[0].is_empty() && testbed.ends[1].arrives());

    testbed
        .edge
        .publish(&from_both(RuleAction::Deny), 3, None)
        .unwrap();
    testbed.edge.detach_interface("mr0").unwrap();
    assert!(!testbed.pair.node.ip("link show mr0").contains(" xdp"));
    assert!(testbed.ends[0].arrives());
    let before = denied(&testbed.edge);
    testbed.ends[1].send();
    until("the other goes on", || denied(&testbed.edge) == before + 1);
    let attach = || testbed.edge.attach_interface("mr0", AttachMode::Native);
    testbed.pair.node.enter(attach).unwrap();
    testbed.assert_denies();

    Edge::detach(&testbed.home.pins).unwrap();
    for (interface, ends) in ["mr0", "mr2"].iter().zip(&testbed.ends) {
        let shown = testbed.pair.node.ip(&format!("link show {interface}"));
        assert!(!shown.contains(" xdp"), "{shown}");
        assert!(ends.arrives());
    }
}

// Protects an edge whose new program a link refuses: all links have the old one again, whichever
// refuses.
#[test]
fn a_link_that_refuses_leaves_every_program_as_it_was() {
    let Some(mut testbed) = Testbed::new("a_link_that_refuses_leaves_every_program_as_it_was")
    else {
        return;
    };
    testbed
        .edge
        .publish(&from_both(RuleAction::Deny), 1, None)
        .unwrap();
    let (programs, state) = (testbed.programs(), testbed.state());
    let loaded = testbed.edge.load_beside().unwrap();
    // A link of XDP under the name of another program's: the kernel refuses that program there. In
    // the order of names, one comes after the first links, one after all.
    for name in ["learn-0", "stamp-a"] {
        let planted = testbed.home.pins.path(Kind::Link, name);
        std::fs::hard_link(testbed.link("edge", 0), &planted).unwrap();
        let error = testbed.edge.replace(&loaded).unwrap_err();
        std::fs::remove_file(&planted).unwrap();
        let EdgeError::Update { path, .. } = &error else {
            panic!("{error}")
        };
        assert_eq!(*path, planted, "{error}");
        assert_eq!(
            (testbed.programs(), testbed.state()),
            (programs.clone(), state.clone())
        );
        testbed.assert_denies();
    }

    testbed.edge.replace(&loaded).unwrap();
    let new = testbed.programs();
    assert!(
        programs.iter().all(|(name, id)| new[name] != *id),
        "{new:?}"
    );
    assert_eq!(testbed.state(), state);
    testbed.assert_denies();
}

// Protects a process that adopts an edge after a failed reload: running programs and pinned names
// are of one version.
#[test]
fn a_name_that_cannot_be_given_leaves_every_program_as_it_was() {
    let Some(mut testbed) =
        Testbed::new("a_name_that_cannot_be_given_leaves_every_program_as_it_was")
    else {
        return;
    };
    testbed
        .edge
        .publish(&from_both(RuleAction::Deny), 1, None)
        .unwrap();
    let (programs, state) = (testbed.programs(), testbed.state());
    let loaded = testbed.edge.load_beside().unwrap();
    let pins = testbed.home.pins.clone();
    let names = pins.names(Kind::Program).unwrap();
    let names = names.iter().map(|name| (Kind::Program, name.as_str()));
    for (kind, name) in names.chain([(Kind::Link, "conn_state")]) {
        // A folder in the place of the pin that is made first and renamed later.
        let in_the_way = pins.path(kind, &format!("{name}-new"));
        std::fs::create_dir(&in_the_way).unwrap();
        let error = testbed.edge.replace(&loaded).unwrap_err();
        std::fs::remove_dir(&in_the_way).unwrap();
        assert!(matches!(error, EdgeError::Pins(_)), "{error}");
        assert_eq!(
            (testbed.programs(), testbed.state()),
            (programs.clone(), state.clone()),
            "{name}"
        );
    }
    testbed.assert_denies();
    drop(Edge::adopt(&pins).unwrap());
}

// Protects a node that loses one of its interfaces: the others get the new program, and the edge
// goes on.
#[test]
fn an_interface_that_is_gone_does_not_keep_the_others_back() {
    let Some(mut testbed) = Testbed::new("an_interface_that_is_gone_does_not_keep_the_others_back")
    else {
        return;
    };
    testbed
        .edge
        .publish(&from_both(RuleAction::Deny), 1, None)
        .unwrap();
    let path = testbed.link("edge", 0);
    let running = || Link::open(&path).unwrap().info().unwrap();
    let before = running();
    testbed.pair.node.ip("link del mr2");
    testbed.edge.reload().unwrap();
    let after = running();
    assert_eq!(before.id, after.id);
    assert_ne!(before.prog_id, after.prog_id);
    let seen = denied(&testbed.edge);
    testbed.ends[0].send();
    until("the new program denies", || {
        denied(&testbed.edge) == seen + 1
    });
    testbed.pair.node.ip("link del mr0");
    testbed.edge.reload().unwrap();
}

// Protects running programs: the self-test comes first, and where it fails nothing is touched.
#[test]
fn without_a_self_test_nothing_is_replaced() {
    let Some(mut testbed) = Testbed::new("without_a_self_test_nothing_is_replaced") else {
        return;
    };
    testbed
        .edge
        .publish(&from_both(RuleAction::Deny), 1, None)
        .unwrap();
    let (programs, state) = (testbed.programs(), testbed.state());
    // Capabilities belong to a thread; without them it cannot load programs, for a test or
    // otherwise.
    let error = std::thread::scope(|scope| {
        let powerless = scope.spawn(|| {
            drop_capabilities(&[]).unwrap();
            testbed.edge.reload().unwrap_err()
        });
        powerless.join().unwrap()
    });
    assert!(matches!(error, EdgeError::SelfTest(_)), "{error}");
    assert_eq!((testbed.programs(), testbed.state()), (programs, state));
    testbed.assert_denies();
}

// Protects a node that lost a companion program: without the stamp, its table drops what the
// program passes. Such an interface is not live, whichever program is missing, and attaching again
// gives it all three.
#[test]
fn an_interface_that_lost_one_program_is_attached_again() {
    let Some(mut testbed) = Testbed::new("an_interface_that_lost_one_program_is_attached_again")
    else {
        return;
    };
    testbed
        .edge
        .publish(&from_both(RuleAction::Deny), 1, None)
        .unwrap();
    for program in ["stamp", "learn", "edge"] {
        let [first, second] = testbed.edge.interfaces().unwrap().try_into().unwrap();
        assert!(testbed.edge.is_live(&first) && testbed.edge.is_live(&second));
        let lost = Link::open(testbed.link(program, 0)).unwrap();
        lost.detach().unwrap();
        assert!(!testbed.edge.is_live(&first), "without {program}");
        assert!(testbed.edge.is_live(&second), "without {program}");
        let attach = || {
            testbed
                .edge
                .attach_interface(&first.name, AttachMode::Native)
        };
        testbed.pair.node.enter(attach).unwrap();
        let again = testbed.edge.interfaces().unwrap();
        assert!(
            again.len() == 2 && again.iter().all(|i| testbed.edge.is_live(i)),
            "{again:?}"
        );
        // By its own index: it is the last in the list now.
        let of_link = Link::open(
            testbed
                .home
                .pins
                .path(Kind::Link, &format!("{program}-{}", first.index)),
        );
        assert_ne!(of_link.unwrap().info().unwrap().id, lost.info().unwrap().id);
        testbed.assert_denies();
    }
}
