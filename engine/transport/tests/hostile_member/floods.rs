//! Each kind of flood ends the connection that it comes on, by its reason. Meanwhile the honest
//! peer is served, and nothing is refused to it.
//!
//! Nothing is forgiven with time here, so that a slow host judges as a fast one: what counts is how
//! much came.

use std::time::Duration;

use millrace_protocol::flood::Flood;
use millrace_protocol::frame::{Header, Kind, Method};
use millrace_transport::Payload;

use super::attacker::{Lane, header, open_and_reset, retire_one};
use super::attacks::*;
use super::*;

// Protects a connection's streams and the time of its shard: each stream that stops is cut, and a
// peer that goes on with that loses its connection.
#[test]
fn streams_that_stop_within_their_header_end_the_connection() {
    let testbed = Testbed::new(&flood_config());
    let mut raw = testbed.connect(0);
    let mut head = vec![2];
    head.extend(header(Kind::Request, LENGTH, 1, 20_000).encode());
    let stalled = || testbed.victim.reason(Family::Rejected, "peer_stalled");
    let mut standing = Standing::new();
    testbed.flood(&mut raw, Flood::Stalled, |raw| {
        // After the first byte, in the middle, before the last one.
        let begin = |n| head[..1 + n as usize % (head.len() - 1)].to_vec();
        standing.turn(raw, stalled(), false, begin);
    });
    assert!(stalled() > 2 * STREAMS_MAX, "{} were cut", stalled());
}

// Protects them from bodies that come a byte at a time.
#[test]
fn streams_that_drip_end_the_connection() {
    let testbed = Testbed::new(&flood_config());
    let mut raw = testbed.connect(0);
    let stalled = || testbed.victim.reason(Family::Rejected, "peer_stalled");
    let mut standing = Standing::new();
    testbed.flood(&mut raw, Flood::Stalled, |raw| {
        let begin = |n| {
            let header = header(Kind::Request, LENGTH, n as u32, 20_000);
            [&[2][..], &header.encode()].concat()
        };
        standing.turn(raw, stalled(), true, begin);
    });
    assert!(stalled() > 2 * STREAMS_MAX, "{} were cut", stalled());
}

// Protects the shard from streams that are opened and reset as fast as credit comes back: in the
// middle of a message, and before their first byte.
#[test]
fn streams_that_are_opened_and_reset_end_the_connection() {
    let testbed = Testbed::new(&flood_config());
    let mut raw = testbed.connect(0);
    let mut next = 0;
    testbed.flood(&mut raw, Flood::Unfinished, |raw| {
        open_and_reset(raw, LENGTH, &mut next);
    });
    assert!(testbed.victim.reason(Family::Rejected, "peer_reset") > 0);
}

// Protects the shard from packets that say nothing and want an acknowledgement.
#[test]
fn ping_packets_without_end_end_the_connection() {
    let testbed = Testbed::new(&flood_config());
    let mut raw = testbed.connect(0);
    testbed.flood(&mut raw, Flood::Packets, |raw| {
        for _ in 0..PACKETS_IN_A_ROUND {
            raw.quic.send_ack_eliciting().unwrap();
            for (packet, to) in raw.outgoing() {
                raw.send_datagram(&packet, to);
            }
        }
    });
}

// Protects the way out from packets of full size that a small one asks for.
#[test]
fn path_challenges_without_end_end_the_connection() {
    let testbed = Testbed::new(&flood_config());
    let mut raw = testbed.connect(0);
    let path = raw.quic.path_stats().next().unwrap();
    testbed.flood(&mut raw, Flood::PathChallenges, |raw| {
        for _ in 0..PACKETS_IN_A_ROUND {
            raw.quic.probe_path(path.local_addr, path.peer_addr).ok();
            for (packet, to) in raw.outgoing() {
                raw.send_datagram(&packet, to);
            }
        }
    });
}

// Protects the numbers of connection IDs, of which each one is used once.
#[test]
fn connection_ids_given_up_without_end_end_the_connection() {
    let testbed = Testbed::new(&flood_config());
    let mut raw = testbed.connect(0);
    let mut oldest = 0;
    testbed.flood(&mut raw, Flood::RetiredIds, |raw| {
        retire_one(raw, &mut oldest);
    });
}

// Protects the shard from a peer that is cut and dials again at once.
#[test]
fn a_peer_that_flooded_is_refused_for_a_while() {
    let testbed = Testbed::new(&flood_config());
    let refused = || testbed.victim.reason(Family::Refused, "flooded_before");
    // Longer each time: a slow host dials again in time in the end.
    let mut floods = 0;
    while refused() == 0 {
        assert!(floods < 7, "it is never refused");
        floods += 1;
        let (mut raw, mut oldest) = (testbed.connect(0), 0);
        testbed.flood(&mut raw, Flood::RetiredIds, |raw| {
            retire_one(raw, &mut oldest);
        });
        let mut again = Raw::dial(
            testbed.victim.transport.local_addr(),
            &RawOptions::of(&testbed.hostile[0]),
        );
        again.drive(PATIENCE, |quic| {
            quic.peer_error().is_some() || refused() == 0 && quic.is_established()
        });
        again.drive(PROGRESS_INTERVAL, |_| refused() > 0);
    }
    // The other member is not.
    let mut other = testbed.connect(1);
    other.send(Raw::stream(0), &[1], false);
    testbed.check();
    assert!(other.quic.peer_error().is_none());
}

/// Frames that ask for nothing, on a lane, and what they are cut for.
fn frames_end_the_connection(frame: Header, flood: Flood) {
    let testbed = Testbed::new(&flood_config());
    let mut raw = testbed.connect(0);
    let mut lane = Lane::of(frame);
    testbed.flood(&mut raw, flood, |raw| lane.send(raw));
    assert_eq!(testbed.honest_holds(), 0);
}

#[test]
fn answers_without_a_request_end_the_connection() {
    let frame = header(Kind::Response, Method(0), 77, 0);
    frames_end_the_connection(frame, Flood::Answers);
}

#[test]
fn refusals_without_a_request_end_the_connection() {
    let frame = header(Kind::Failure, Method(0), 77, 0);
    frames_end_the_connection(frame, Flood::Answers);
}

#[test]
fn cancellations_without_a_request_end_the_connection() {
    let frame = header(Kind::Cancel, Method(0), 77, 0);
    frames_end_the_connection(frame, Flood::Cancellations);
}

#[test]
fn probes_without_end_end_the_connection() {
    let frame = header(Kind::Probe, Method(0), 0, 0);
    frames_end_the_connection(frame, Flood::Probes);
}

// Protects a peer whose answers come late: it was asked for each of them.
#[test]
fn late_answers_to_requests_are_no_flood() {
    let testbed = Testbed::new(&flood_config());
    let mut raw = testbed.connect(0);
    let status = testbed.victim.transport.status();
    assert!(
        raw.drive(PATIENCE, |_| status.peers().len() == 2),
        "it is up"
    );
    let late = || testbed.victim.count(Counter::AnswersLate);
    let mut lane = vec![1];
    let mut asked = 0;
    // More than is borne of answers that no one asked for.
    while asked < 4_400 {
        let requests = (0..200).map(|_| {
            let request = millrace_transport::Request {
                deadline: Duration::from_millis(1).into(),
                ..request(ECHO, Class::Normal, Payload::Empty)
            };
            testbed
                .victim
                .transport
                .request(testbed.hostile_id(), request)
        });
        let requests: Vec<_> = requests.collect();
        for request in requests {
            assert!(request.wait(PATIENCE).is_err(), "it is not answered");
        }
        for _ in 0..200 {
            // One that was never sent, because its time was over, is not answered either.
            let Some((id, _)) = raw.request(PROGRESS_INTERVAL) else {
                break;
            };
            lane.extend(header(Kind::Response, Method(0), id, 0).encode());
            asked += 1;
        }
    }
    assert!(raw.send(Raw::stream(0), &lane, false));
    raw.drive(PATIENCE, |_| late() >= asked);
    assert_eq!(late(), asked);
    let mut lane = Lane::of(header(Kind::Response, Method(0), 77, 0));
    lane.stream = Raw::stream(1);
    testbed.flood(&mut raw, Flood::Answers, |raw| lane.send(raw));
}

/// One-way messages, a thousand times as many as are borne in a second.
const TELLS: u64 = 6_000;

/// Reading that was held back goes on by its own timer, and not by another one.
fn slow_config() -> TransportConfig {
    TransportConfig {
        frames_per_second_max: 2_000,
        probe_interval: PATIENCE,
        keep_alive: PATIENCE,
        stream_progress_interval: PATIENCE,
        ..flood_config()
    }
}

// Protects a peer that sends a little too fast: what it sends is read later, and nothing is lost.
#[test]
fn frames_above_the_rate_are_read_later_and_all_of_them() {
    let testbed = Testbed::new(&slow_config());
    let mut raw = testbed.connect(0);
    let frame = header(Kind::Send, TELL, 0, 0);
    let mut lane = vec![1];
    lane.extend(frame.encode().repeat(TELLS as usize));
    assert!(raw.send(Raw::stream(0), &lane, false));
    let held = || testbed.victim.count(Counter::FramesHeld);
    assert!(raw.drive(PATIENCE, |_| held() > 0), "they are held back");
    testbed.check();
    // Behind what is held back, on another lane.
    let last = Header {
        body_bytes: 3,
        ..frame
    };
    let last = [&[1][..], &last.encode(), b"end"].concat();
    assert!(raw.send(Raw::stream(1), &last, false));
    // All of it has arrived. From now on no packet of the client wakes the victim.
    let is_quiet = |quic: &mut quiche::Connection| quic.timeout() > Some(Duration::from_secs(1));
    assert!(
        raw.drive(PATIENCE, is_quiet),
        "a packet is not acknowledged"
    );
    let from = testbed.hostile_id();
    let mut told = 0;
    let until = Instant::now() + PATIENCE;
    while told < TELLS + 1 {
        assert!(Instant::now() < until, "{told} messages came");
        std::thread::yield_now();
        while let Ok(event) = testbed.victim.events.try_recv() {
            told += u64::from(matches!(event, Event::Message(peer, _) if peer == from));
        }
    }
    assert!(raw.quic.peer_error().is_none());
    let status = testbed.victim.transport.status();
    assert!(status.wait(PATIENCE, |peers| {
        let hostile = peers.iter().find(|peer| peer.node_id == from);
        hostile.is_some_and(|peer| peer.frames_held > 0)
    }));
    assert_eq!(testbed.honest_holds(), 0);
    testbed.check();
}

// Protects the shard from a peer that goes on.
#[test]
fn frames_far_above_the_rate_end_the_connection() {
    let testbed = Testbed::new(&slow_config());
    let mut raw = testbed.connect(0);
    let mut lane = Lane::of(header(Kind::Send, TELL, 0, 0));
    testbed.flood(&mut raw, Flood::Frames, |raw| lane.send(raw));
    assert_eq!(testbed.honest_holds(), 0);
}
