//! A steady bulk transfer allocates nothing per packet in our own code.
//!
//! Every allocation during the transfer is attributed to the innermost frame that is ours or
//! quiche's; what quiche allocates is its own affair and is printed beside (docs/decisions lists
//! it).
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;

use common::*;
use millrace_protocol::frame::Class;
use millrace_transport::TransportConfig;
use millrace_transport::counters::Counter;

#[global_allocator]
static ALLOCATOR: dhat::Alloc = dhat::Alloc;

const LEN: usize = 32 << 20;

type Sites = BTreeMap<String, u64>;

/// Blocks allocated by our code and by quiche, by site, from a heap profile.
fn attribute(profile: &str) -> (Sites, Sites) {
    let profile: serde_json::Value = serde_json::from_str(profile).unwrap();
    let frames = profile["ftbl"].as_array().unwrap();
    let (mut ours, mut theirs) = (Sites::new(), Sites::new());
    for point in profile["pps"].as_array().unwrap() {
        let blocks = point["tbk"].as_u64().unwrap();
        let names = point["fs"].as_array().unwrap().iter();
        let mut names = names.map(|f| frames[f.as_u64().unwrap() as usize].as_str().unwrap());
        let is_owned = |name: &&str| {
            ["millrace_", "quiche::", "boring", "_bssl"]
                .iter()
                .any(|owner| name.contains(owner))
        };
        // The test's own thread prepares and checks the bodies.
        if names.clone().any(|name| name.contains("allocations::")) {
            continue;
        }
        if let Some(name) = names.find(is_owned) {
            let site = name
                .split_once(": ")
                .map_or(name, |(_, site)| site)
                .to_string();
            *if name.contains("millrace_") {
                &mut ours
            } else {
                &mut theirs
            }
            .entry(site)
            .or_default() += blocks;
        }
    }
    (ours, theirs)
}

fn print(owner: &str, sites: &Sites) -> u64 {
    let total = sites.values().sum();
    println!("{total} blocks allocated by {owner}");
    let mut sites: Vec<_> = sites.iter().collect();
    sites.sort_by_key(|site| std::cmp::Reverse(site.1));
    for (site, blocks) in sites.iter().take(12) {
        println!("{blocks:>8} {site}");
    }
    total
}

#[test]
fn a_bulk_transfer_allocates_nothing_per_packet() {
    let (a, b) = pair(&TransportConfig::default(), 128 << 20);
    let body = a.body(LEN);
    let transfer = || {
        let answer = a
            .transport
            .request(b.id(), request(LENGTH, Class::Bulk, body.clone()))
            .wait(PATIENCE * 4);
        assert_eq!(bytes_of(&answer.unwrap()), (LEN as u64).to_le_bytes());
    };
    transfer();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("heap.json");
    let packets_before = a.transport.counters()[0].get(Counter::PacketsSent);
    let profiler = dhat::Profiler::builder()
        .file_name(&file)
        .trim_backtraces(None)
        .build();
    transfer();
    drop(profiler);
    let packets = a.transport.counters()[0].get(Counter::PacketsSent) - packets_before;
    let (ours, theirs) = attribute(&std::fs::read_to_string(&file).unwrap());
    println!("{packets} packets");
    let (ours, theirs) = (print("us", &ours), print("quiche and BoringSSL", &theirs));
    assert!(packets > LEN as u64 / 1_452);
    assert!(
        theirs > packets / 2,
        "the attribution works: quiche allocates for each packet it receives"
    );
    // One per message, per housekeeping turn and per slice of 256 KiB is allowed; one per packet,
    // or per train of 45, is not.
    assert!(
        ours < packets / 45,
        "{ours} allocations for {packets} packets"
    );
}
