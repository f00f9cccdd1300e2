//! A steady bulk transfer allocates nothing per packet in our own code.
//!
//! Every allocation during the transfer is attributed to the innermost frame that is ours or quiche's; what quiche allocates is its own
//! affair and is printed beside (docs/decisions lists it).

mod common;

use common::*;
use millrace_protocol::frame::Class;
use millrace_transport::TransportConfig;
use millrace_transport::counters::Counter;

#[global_allocator]
static ALLOCATOR: dhat::Alloc = dhat::Alloc;

const LEN: usize = 32 << 20;

/// Blocks allocated by our code and by quiche, from a heap profile.
fn attribute(profile: &str) -> (u64, u64, Vec<(u64, String)>) {
    let profile: serde_json::Value = serde_json::from_str(profile).unwrap();
    let frames = profile["ftbl"].as_array().unwrap();
    let (mut ours, mut theirs, mut sites) = (0, 0, Vec::new());
    for point in profile["pps"].as_array().unwrap() {
        let blocks = point["tbk"].as_u64().unwrap();
        let names = point["fs"].as_array().unwrap().iter().map(|f| frames[f.as_u64().unwrap() as usize].as_str().unwrap());
        let owner = names.clone().find(|name| name.contains("millrace_") || name.contains("quiche::") || name.contains("boring"));
        match owner {
            // The test's own thread prepares and checks the bodies.
            Some(_) if names.clone().any(|name| name.contains("allocations::")) => {}
            Some(name) if name.contains("millrace_") => {
                ours += blocks;
                sites.push((blocks, name.to_string()));
            }
            Some(_) => theirs += blocks,
            None => {}
        }
    }
    sites.sort_by_key(|site| std::cmp::Reverse(site.0));
    (ours, theirs, sites)
}

#[test]
fn a_bulk_transfer_allocates_nothing_per_packet() {
    let (a, b) = pair(&TransportConfig::default(), 128 << 20);
    let body = a.body(LEN);
    let transfer = || {
        let answer = a.transport.request(b.id(), request(LENGTH, Class::Bulk, body.clone())).wait(PATIENCE * 4);
        assert_eq!(bytes_of(&answer.unwrap()), (LEN as u64).to_le_bytes());
    };
    transfer();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("heap.json");
    let packets_before = a.transport.counters()[0].get(Counter::PacketsSent);
    let profiler = dhat::Profiler::builder().file_name(&file).trim_backtraces(None).build();
    transfer();
    drop(profiler);
    let packets = a.transport.counters()[0].get(Counter::PacketsSent) - packets_before;
    let (ours, theirs, sites) = attribute(&std::fs::read_to_string(&file).unwrap());
    println!("{packets} packets; {ours} blocks allocated by us, {theirs} by quiche and BoringSSL");
    for (blocks, name) in sites.iter().take(10) {
        println!("{blocks:>8} {name}");
    }
    assert!(packets > LEN as u64 / 1_452);
    assert!(theirs > packets / 2, "the attribution works: quiche allocates for each packet it receives");
    // One per message, per housekeeping turn and per slice of 256 KiB is allowed; one per packet, or per train of 45, is not.
    assert!(ours < packets / 45, "{ours} allocations for {packets} packets: {sites:?}");
}
