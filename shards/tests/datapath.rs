//! A datapath runs over plain memory: no ring, no socket, no thread.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

#[path = "common/train_memory.rs"]
mod train_memory;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Instant;

use millrace_shards::datapath::{SEGMENTS_MAX, TRAIN_BYTES_MAX};
use millrace_shards::{Datagrams, Datapath, SocketId, Trains, Transmit};
use proptest::prelude::{
    ProptestConfig, Strategy, any, prop, prop_assert, prop_assert_eq, proptest,
};
use train_memory::{Sent, TrainMemory};

/// Answers each datagram with its bytes reversed, from the socket that it came to.
#[derive(Default)]
struct Mirror {
    answers: VecDeque<Sent>,
}

impl Datapath for Mirror {
    type Message = Sent;

    fn on_message(&mut self, message: Sent, _: Instant) {
        self.answers.push_back(message);
    }

    fn on_datagrams(&mut self, datagrams: Datagrams<'_>, _: Instant) {
        let (socket, to) = (datagrams.socket(), datagrams.from());
        for segment in datagrams.into_segments() {
            segment.reverse();
            let bytes = segment.to_vec();
            self.answers.push_back(Sent { socket, to, bytes });
        }
    }

    fn transmit(&mut self, trains: &mut Trains<'_>, _: Instant) -> Transmit {
        while let Some(answer) = self.answers.front() {
            trains.select(answer.socket);
            let Some(buffer) = trains.packet(1452) else {
                return Transmit::More;
            };
            buffer[..answer.bytes.len()].copy_from_slice(&answer.bytes);
            trains.push(answer.bytes.len(), answer.to);
            self.answers.pop_front();
        }
        Transmit::Done
    }

    fn has_pending(&self) -> bool {
        !self.answers.is_empty()
    }
}

fn peer(port: u16) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, 1], port))
}

/// What comes in on two sockets is answered from the socket that was asked, in trains.
#[test]
fn answers_leave_by_the_socket_that_was_asked() {
    let now = Instant::now();
    let mut mirror = Mirror::default();
    for (index, text) in [(0, *b"abcdef"), (1, *b"ghijkl")] {
        let mut payload = text;
        let datagrams = Datagrams::new(SocketId::new(index), peer(7), peer(1), 4, &mut payload);
        assert_eq!((datagrams.count(), datagrams.bytes()), (2, 6));
        mirror.on_datagrams(datagrams, now);
    }
    let turn = TrainMemory::default().transmit(&mut mirror, now);
    assert_eq!(turn.result, Transmit::Done);
    assert!(!mirror.has_pending());
    let told: Vec<_> = turn
        .packets
        .iter()
        .map(|sent| (sent.socket.index(), sent.to, sent.bytes.as_slice()))
        .collect();
    let expected: [(usize, _, &[u8]); 4] = [
        (0, peer(7), b"dcba"),
        (0, peer(7), b"fe"),
        (1, peer(7), b"jihg"),
        (1, peer(7), b"lk"),
    ];
    assert_eq!(told, expected);
    // One train for each socket, although all go to one peer.
    assert_eq!(turn.trains.len(), 2);
}

/// When a turn's slots are used up, the rest leaves in the next turn, in order.
#[test]
fn the_rest_waits_for_the_next_turn() {
    let now = Instant::now();
    let mut mirror = Mirror::default();
    let answers: Vec<_> = (0..10u8)
        .map(|tag| Sent {
            socket: SocketId::FIRST,
            to: peer(7),
            bytes: vec![tag; 1000],
        })
        .collect();
    for answer in &answers {
        mirror.on_message(answer.clone(), now);
    }
    // Two slots of two packets each.
    let memory = TrainMemory {
        slots: 2,
        slot_bytes: 2500,
        ..TrainMemory::default()
    };
    let mut sent = Vec::new();
    for expected in [4, 4, 2] {
        let turn = memory.transmit(&mut mirror, now);
        assert_eq!(turn.packets.len(), expected);
        assert_eq!(turn.result == Transmit::More, mirror.has_pending());
        sent.extend(turn.packets);
    }
    assert_eq!(sent, answers);
}

/// A push of more bytes than were offered, or of bytes that were not offered, panics: it is a bug
/// of the datapath.
#[test]
fn only_what_was_offered_is_pushed() {
    let cases: [fn(&mut Trains<'_>); 4] = [
        |trains| trains.push(0, peer(1)),
        |trains| {
            trains.packet(10).unwrap();
            trains.push(11, peer(1));
        },
        |trains| {
            trains.packet(10).unwrap();
            trains.push(4, peer(1));
            trains.push(4, peer(1));
        },
        |trains| {
            let _ = trains.packet(TRAIN_BYTES_MAX + 1);
        },
    ];
    for (number, case) in cases.into_iter().enumerate() {
        let pushed = std::panic::catch_unwind(|| {
            TrainMemory::default().build(|trains| {
                case(trains);
                Transmit::Done
            })
        });
        assert!(pushed.is_err(), "case {number} went through");
    }
}

#[derive(Debug, Clone)]
struct Push {
    bytes: usize,
    port: u16,
    socket: u8,
    finish: bool,
}

fn pushes() -> impl Strategy<Value = Vec<Push>> {
    // Runs of equal packets, as bulk makes them, between packets of any size.
    let size = proptest::prop_oneof![1usize..1453, proptest::strategy::Just(1452)];
    let run = (size, 1usize..80, 1u16..3, 0u8..3, any::<bool>());
    prop::collection::vec(run, 1..10).prop_map(|runs| {
        let expand = |(bytes, count, port, socket, finish)| {
            let push = Push {
                bytes,
                port,
                socket,
                finish,
            };
            vec![push; count]
        };
        runs.into_iter().flat_map(expand).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Trains hold exactly the packets that were pushed, in order, within every bound that the
    /// buffer set.
    #[test]
    fn trains_are_what_was_pushed(
        pushes in pushes(),
        slot_bytes in proptest::prop_oneof![1452usize..65_508, 65_508usize..80_000],
        trains_max in 1usize..20,
        unsegmented in 0u16..8,
    ) {
        let memory = TrainMemory { slots: 1000, slot_bytes, trains_max, unsegmented };
        let contents = |at: usize, bytes: usize| vec![at as u8; bytes];
        let turn = memory.build(|trains| {
            for (at, push) in pushes.iter().enumerate() {
                trains.select(SocketId::new(push.socket));
                let buffer = trains.packet(1452).unwrap();
                buffer[..push.bytes].copy_from_slice(&contents(at, push.bytes));
                trains.push(push.bytes, peer(push.port));
                if push.finish {
                    trains.finish();
                }
            }
            Transmit::Done
        });
        let expected: Vec<_> = pushes.iter().enumerate().map(|(at, push)| Sent {
            socket: SocketId::new(push.socket),
            to: peer(push.port),
            bytes: contents(at, push.bytes),
        }).collect();
        prop_assert_eq!(&turn.packets, &expected);
        for train in &turn.trains {
            prop_assert!(train.segments >= 1 && train.segments <= SEGMENTS_MAX);
            prop_assert!(train.start_bytes + train.len_bytes <= TRAIN_BYTES_MAX.min(slot_bytes));
            let packets = train.len_bytes.div_ceil(train.segment_bytes);
            prop_assert_eq!(packets, usize::from(train.segments));
            let segments = unsegmented >> train.socket.index() & 1 == 0;
            prop_assert!(segments || train.segments == 1);
            let together = turn.trains.iter().filter(|other| other.slot == train.slot).count();
            prop_assert!(together <= trains_max);
        }
        for pair in turn.trains.windows(2) {
            let behind = pair[1].start_bytes >= pair[0].start_bytes + pair[0].len_bytes;
            prop_assert!(pair[1].slot > pair[0].slot || behind, "overlap: {:?}", pair);
        }
    }
}
