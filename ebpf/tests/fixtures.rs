//! Packets with a name: specification, model and kernel decide the same on each.
#![allow(clippy::unwrap_used, reason = "test code")]

#[path = "fixtures/ethernet.rs"]
mod ethernet;
#[path = "fixtures/firewall.rs"]
mod firewall;
#[path = "common/frames.rs"]
mod frames;
#[path = "fixtures/ids.rs"]
mod ids;
#[path = "fixtures/ipv4.rs"]
mod ipv4;
#[path = "fixtures/ipv6.rs"]
mod ipv6;
#[path = "common/lockstep.rs"]
mod lockstep;
#[path = "fixtures/martians.rs"]
mod martians;
#[path = "fixtures/opening.rs"]
mod opening;
#[path = "fixtures/packets.rs"]
mod packets;
#[path = "fixtures/proofs.rs"]
mod proofs;
#[path = "fixtures/quic.rs"]
mod quic;
#[path = "fixtures/tcp.rs"]
mod tcp;
#[path = "fixtures/testbed.rs"]
mod testbed;
#[path = "fixtures/tokens.rs"]
mod tokens;
#[path = "fixtures/transport.rs"]
mod transport;

use lockstep::Lockstep;
use std::collections::BTreeSet;
use testbed::{Fixture, Set};

fn fixtures() -> Vec<Fixture> {
    [
        ethernet::fixtures(),
        martians::fixtures(),
        ipv4::fixtures(),
        ipv6::fixtures(),
        transport::fixtures(),
        tcp::fixtures(),
        firewall::fixtures(),
        quic::fixtures(),
        ids::fixtures(),
        opening::fixtures(),
        tokens::fixtures(),
        proofs::fixtures(),
        packets::fixtures(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

#[test]
fn every_fixture_has_a_name_of_its_own() {
    let fixtures = fixtures();
    let mut names = BTreeSet::new();
    for fixture in &fixtures {
        assert!(
            names.insert(fixture.name),
            "{} is there twice",
            fixture.name
        );
        assert!(!fixture.prose.is_empty(), "{} says nothing", fixture.name);
    }
    assert!(fixtures.len() >= 200, "only {} fixtures", fixtures.len());
}

// Protects the specification: each of its sentences stands here as a packet.
#[test]
fn kernel_model_and_specification_agree() {
    let Some(mut both) = Lockstep::load("kernel_model_and_specification_agree") else {
        return;
    };
    let fixtures = fixtures();
    let mut failures = Vec::new();
    for set in Set::ALL {
        both.publish(set.compiled());
        for fixture in fixtures.iter().filter(|fixture| fixture.set == set) {
            if let Err(difference) = fixture.check(&mut both) {
                failures.push(format!("{}: {}: {difference}", fixture.name, fixture.prose));
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
