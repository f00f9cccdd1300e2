//! The config's side of the edge: its keys, and what a set says of them.
#![allow(clippy::unwrap_used, reason = "test code")]

use std::time::Duration;

use millrace_edge_control::policy::{EdgePolicy, NodePolicy, ProgramPolicy};
use millrace_edge_policy::limiter::Limit;
use millrace_edge_policy::settings::{self, Caps, Kind, Limits, Mode, Scope};
use millrace_tuning::config::EdgeSection;
use millrace_tuning::{NodeConfig, schema};

fn edge(text: &str) -> EdgeSection {
    let key = "ab".repeat(32);
    let text = format!("[registry]\npublic_key = \"{key}\"\n[edge]\n{text}");
    let parsed = millrace_tuning::parse(&text);
    assert!(parsed.is_usable(), "{:?}", parsed.problems);
    parsed.config.edge
}

// Protects invariant 1: a new key says to which part it belongs.
#[test]
fn every_key_is_in_one_part() {
    let section = schema::section("edge").unwrap();
    let mut named: Vec<_> = section.fields.iter().map(|field| field.name).collect();
    let place = ["interfaces", "mode", "pins"];
    let parts = [
        EdgePolicy::KEYS,
        ProgramPolicy::KEYS,
        NodePolicy::KEYS,
        &place,
    ];
    let mut listed = parts.concat();
    named.sort_unstable();
    listed.sort_unstable();
    assert_eq!(named, listed);
}

#[test]
fn every_key_arrives() {
    let policy = EdgePolicy::of(&edge(
        "scope = \"host\"\ntcp_ports = [443, 8080]\nudp_ports = [53]\ndefault_action = \"allow\"\n\
         quic_connections_max = 7\ntcp_connections_max = 8\nquic_per_minute = 60\nquic_burst = 3\n",
    ));
    let settings = policy.settings(4100, Mode::Enforce);
    settings.validate().unwrap();
    let services: Vec<_> = settings.services.iter().map(|s| (s.port, s.kind)).collect();
    assert_eq!(
        services,
        [
            (4100, Kind::Quic),
            (443, Kind::Tcp),
            (8080, Kind::Tcp),
            (53, Kind::Udp)
        ]
    );
    assert_eq!(
        (settings.mode, settings.scope),
        (Mode::Enforce, Scope::Host)
    );
    assert_eq!((settings.caps.quic, settings.caps.tcp), (7, 8));
    assert_eq!(
        settings.limits.source_quic,
        Limit::per(1, Duration::from_secs(1), 3)
    );
    assert_eq!(settings.host_default, settings::DefaultAction::Allow);
}

#[test]
fn the_defaults_of_the_config_are_those_of_the_policy() {
    let policy = EdgePolicy::of(&NodeConfig::default().edge);
    let settings = policy.settings(4100, Mode::Count);
    assert_eq!(
        settings.limits,
        Limits {
            id: settings.limits.id,
            ..Limits::default()
        }
    );
    assert_eq!(settings.caps, Caps::default());
}

// Protects an operator's words: a policy is read again as it was written, whatever its values
// hold.
#[test]
fn a_policy_outlives_its_config() {
    let one = EdgePolicy::of(&edge(
        "roles = [\"a\\\"b\", \"c\"]\ntcp_ports = [80, 443]\nquic_burst = 7\n",
    ));
    let two = EdgePolicy::of(&edge("tcp_ports = [22]\n"));
    let text = serde_json::to_string(&one).unwrap();
    assert_eq!(serde_json::from_str::<EdgePolicy>(&text).unwrap(), one);
    let differing = one.differing_keys(&two);
    assert_eq!(differing, ["roles", "tcp_ports", "quic_burst"]);
}
