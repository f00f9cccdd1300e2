//! A member with a valid key, by a bare quiche client, makes the QUIC of its victim hold memory, or
//! floods it with work (`hostile_member/floods.rs`): its connection is ended, and no other one. Or
//! it asks for bodies and does not read them (`hostile_member/unread.rs`): they are cut. A node as
//! a process with the default config is attacked in `engine/cli/tests/hostile_member.rs`.
#![allow(clippy::unwrap_used)]

#[path = "common/attacker.rs"]
mod attacker;
#[path = "hostile_member/attacks.rs"]
mod attacks;
mod common;
#[path = "hostile_member/floods.rs"]
mod floods;
#[path = "common/packets.rs"]
mod packets;
#[path = "common/raw.rs"]
mod raw;
#[path = "hostile_member/unread.rs"]
mod unread;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use common::*;
use millrace_protocol::frame::Class;
use millrace_protocol::identity::SigningKey;
use millrace_shards::CountingAllocator;
use millrace_testkit::{PATIENCE, until};
use millrace_transport::counters::{Counter, Family};
use millrace_transport::{ProfileConfig, TransportConfig};
use raw::{Raw, RawOptions};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator::new(std::alloc::System);

const MIB: u64 = 1 << 20;
const POOL_BYTES: u64 = 16 * MIB;
/// Of a connection: twice its window and 1 MiB.
const CONNECTION_MAX_BYTES: u64 = 3 * MIB;
/// What quiche holds of one byte that cannot be read yet, at least. It keeps its own packets of
/// acknowledgements too, until the client acknowledges them: on a busy machine one of them answers
/// many datagrams, so the sum is no constant.
const FRAGMENT_BYTES: u64 = 140;

fn config() -> TransportConfig {
    TransportConfig {
        lan: ProfileConfig {
            connection_window_bytes: MIB,
            stream_window_bytes: MIB / 4,
            ..ProfileConfig::lan()
        },
        ..TransportConfig::default()
    }
}

/// One test runs at a time: how many bytes QUIC holds depends on how often a shard has its turn.
static ALONE: Mutex<()> = Mutex::new(());

struct Testbed {
    hostile: Vec<SigningKey>,
    honest: Node,
    victim: Node,
    // Given back when the nodes are gone.
    _alone: MutexGuard<'static, ()>,
}

impl Testbed {
    /// Of four members, the two with the lowest ids are hostile: they may dial both others.
    fn new(config: &TransportConfig) -> Self {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let mut keys: Vec<_> = (1..=4).map(key).collect();
        keys.sort_by_key(SigningKey::node_id);
        let addrs: Vec<_> = keys.iter().map(|_| free_addr()).collect();
        let members = keys
            .iter()
            .zip(&addrs)
            .map(|(key, addr)| member(key, *addr));
        let topology = topology(members, 1);
        let mut start = |index| {
            let key = keys.remove(index);
            Node::start(key, addrs[index], &topology, config.clone(), POOL_BYTES)
        };
        let (victim, honest) = (start(3), start(2));
        honest.wait_for_peers(&[victim.id()]);
        Self {
            hostile: keys,
            honest,
            victim,
            _alone: alone,
        }
    }

    fn connect(&self, hostile: usize) -> Raw {
        let options = RawOptions {
            // No fragment waits for an acknowledgement, and the client hears of no loss.
            window_packets: 100_000,
            ..RawOptions::of(&self.hostile[hostile])
        };
        let mut raw = Raw::dial(self.victim.transport.local_addr(), &options);
        raw.introduce();
        raw
    }

    fn ended(&self) -> u64 {
        self.victim.reason(Family::Closed, "excessive_load")
    }

    fn held_bytes(&self) -> u64 {
        let shards = self.victim.transport.status().shards();
        shards.iter().map(|shard| shard.quic_heap_bytes).sum()
    }

    /// The shard says what it holds once in a while.
    fn wait_for_held(&self, wanted: impl Fn(u64) -> bool) {
        let until = Instant::now() + PATIENCE;
        while !wanted(self.held_bytes()) {
            assert!(Instant::now() < until, "{} bytes held", self.held_bytes());
            std::thread::yield_now();
        }
    }

    /// The honest peer is served, on the connection that it had.
    fn check(&self) {
        let request = request(ECHO, Class::Normal, vec![5; 1_024]);
        let answer = self.honest.transport.request(self.victim.id(), request);
        assert_eq!(bytes_of(&answer.wait(PATIENCE).unwrap()), vec![5; 1_024]);
        let ends = self.honest.reason(Family::Closed, "peer_closed");
        assert_eq!(ends, 0, "the honest peer keeps its connection");
    }
}

/// Bytes of a stream that are sent with one stream.
const FRAGMENTS: u64 = 500;

/// Sends bytes of a stream in a packet each, and loses the first: the victim can read none.
fn send_fragments(victim: &Node, raw: &mut Raw, stream: u64) {
    let before = victim.count(Counter::DatagramsReceived);
    let stream = Raw::stream(stream);
    for n in 0..=FRAGMENTS {
        assert_eq!(raw.quic.stream_send(stream, &[7], false).unwrap(), 1);
        for (packet, to) in raw.outgoing() {
            if n > 0 {
                raw.send_datagram(&packet, to);
            }
        }
    }
    // No more than fits into a socket's buffer is on the way.
    let until = Instant::now() + PATIENCE;
    while victim.count(Counter::DatagramsReceived) < before + FRAGMENTS {
        assert!(Instant::now() < until, "fragments were lost");
        std::thread::yield_now();
    }
}

// Protects the node's memory from a member: flow control allows a window of single bytes, and
// quiche needs 146 bytes for each.
#[test]
fn a_member_that_sends_single_bytes_with_a_gap_loses_its_connection() {
    let testbed = Testbed::new(&config());
    let mut raw = testbed.connect(0);
    let needed = CONNECTION_MAX_BYTES / FRAGMENT_BYTES;
    let mut streams = 0..;
    let mut sent = 0;
    while testbed.ended() == 0 {
        assert!(sent < 4 * needed, "{sent} fragments were taken");
        send_fragments(&testbed.victim, &mut raw, streams.next().unwrap());
        sent += FRAGMENTS;
    }
    assert_eq!(testbed.ended(), 1);
    testbed.check();
    testbed.wait_for_held(|bytes| bytes < MIB);
}

// Protects the time of its shard from one that puts 200 of them in each packet: it is ended long
// before the bound of its connection, and refused for a while. One in each packet is what an honest
// peer may send (the test above goes on until the bound).
#[test]
fn a_member_that_sends_many_single_bytes_in_a_packet_is_cut_early_and_refused() {
    /// Less than the bound of a connection: twice its window of 4 MiB and 1 MiB.
    const SENT_BYTES_MAX: u64 = 6 * MIB / FRAGMENT_BYTES;
    let testbed = Testbed::new(&TransportConfig::default());
    let refused = || testbed.victim.reason(Family::Refused, "flooded_before");
    // The penalty is longer each time: a slow host dials again in time in the end.
    let mut ends = 0;
    while refused() == 0 {
        assert!(ends < 7, "it is never refused");
        let raw = testbed.connect(0);
        let mut fragments = packets::Fragments::new(&raw, 900, 1, usize::MAX);
        while testbed.ended() == ends {
            let sent = fragments.sent_bytes;
            assert!(sent < SENT_BYTES_MAX, "{sent} fragments were taken");
            let before = testbed.victim.count(Counter::DatagramsReceived);
            raw.send_datagram(&fragments.packet(), testbed.victim.transport.local_addr());
            until("it came", || {
                testbed.victim.count(Counter::DatagramsReceived) > before
            });
        }
        ends += 1;
        let mut again = Raw::dial(
            testbed.victim.transport.local_addr(),
            &RawOptions::of(&testbed.hostile[0]),
        );
        again.drive(PATIENCE, |quic| {
            quic.peer_error().is_some() || quic.readable().next().is_some()
        });
    }
    testbed.check();
    testbed.wait_for_held(|bytes| bytes < MIB);
}

// Protects the shard from members that stay below the limit of a connection each: the one that
// holds most is ended, and the honest peer never.
#[test]
fn members_that_hold_too_much_together_lose_the_greatest() {
    let config = TransportConfig {
        // With a quarter for the allocator.
        quic_heap_bytes_max: 5 * MIB / 2 / 4 * 5,
        ..config()
    };
    let testbed = Testbed::new(&config);
    let [mut first, mut second] = [0, 1].map(|hostile| testbed.connect(hostile));
    let before = testbed.held_bytes();
    // More than half of the allowance of the shard, in steps that are seen one by one.
    let mut held = before;
    for stream in 0.. {
        send_fragments(&testbed.victim, &mut first, stream);
        testbed.wait_for_held(|bytes| bytes >= held + FRAGMENTS * FRAGMENT_BYTES);
        held = testbed.held_bytes();
        if held - before > 3 * MIB / 2 {
            break;
        }
    }
    assert_eq!(testbed.ended(), 0);
    let mut streams = 0..3 * MIB / 2 / (FRAGMENTS * FRAGMENT_BYTES);
    while testbed.ended() == 0 {
        let stream = streams.next().expect("the shard ends one in time");
        send_fragments(&testbed.victim, &mut second, stream);
        held += FRAGMENTS * FRAGMENT_BYTES;
        testbed.wait_for_held(|bytes| bytes >= held || testbed.ended() > 0);
    }
    testbed.check();
    // The smaller one is still there, and what it sent.
    let sent = streams.start * FRAGMENTS * FRAGMENT_BYTES;
    testbed.wait_for_held(|bytes| (before + sent..before + 3 * MIB / 2).contains(&bytes));
    assert_eq!(testbed.ended(), 1);
}
