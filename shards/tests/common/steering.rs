//! What every steering program owes a reuseport group. Other crates include this file to put theirs
//! to the same test.

use std::net::UdpSocket;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use millrace_shards::{
    Datagrams, Datapath, HugePages, ShardConfig, ShardSocket, Trains, Transmit, UdpGroupConfig,
    bind_unsteered, spawn,
};

/// Binds a group of `shards`, lets `attach` steer it, and checks for both headers that datagrams
/// reach the shard that the first byte of their connection ID names, and shard 0 when they have
/// none.
pub(crate) fn assert_steers_by_connection_id(shards: usize, attach: impl FnOnce(&[ShardSocket])) {
    let sockets = bind_unsteered(&UdpGroupConfig {
        local: "127.0.0.1:0".parse().unwrap(),
        shards,
        ..UdpGroupConfig::default()
    })
    .unwrap();
    attach(&sockets);
    let to = sockets[0].local_addr();
    let (sender, seen) = mpsc::channel();
    let handles: Vec<_> = sockets
        .into_iter()
        .enumerate()
        .map(|(index, socket)| {
            let seen = sender.clone();
            let config = ShardConfig {
                chunk_pool_bytes: 0,
                huge_pages: HugePages::Never,
                ..ShardConfig::default()
            };
            spawn(config, index, shards, Some(socket), move |context| {
                Steered {
                    index: context.index,
                    seen,
                }
            })
            .unwrap()
        })
        .collect();
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    for (bytes, shard) in cases(shards) {
        client.send_to(&bytes, to).unwrap();
        let wait = Duration::from_secs(20);
        assert_eq!(seen.recv_timeout(wait).unwrap(), (shard, bytes));
    }
    for handle in handles {
        handle.stop();
        handle.join().unwrap();
    }
}

fn cases(shards: usize) -> Vec<(Vec<u8>, usize)> {
    let mut cases = Vec::new();
    for id in [0u8, 1, 2, 3, 77, 254, 255] {
        let owner = usize::from(id) % shards;
        let mut short = vec![9; 40];
        short[..2].copy_from_slice(&[0x40, id]);
        cases.push((short, owner));
        let mut long = vec![9; 40];
        long[..7].copy_from_slice(&[0xc0, 0, 0, 0, 1, 8, id]);
        cases.push((long.clone(), owner));
        // A client's first packet has an ID that it made up.
        long.resize(1_200, 9);
        cases.push((long, owner));
        // Whatever bits stand around it, and however long it says that it is.
        cases.push((vec![0x00, id, 0xff], owner));
        cases.push((vec![0xff, 0xff, 0xff, 0xff, 0xff, 0xff, id], owner));
    }
    // No connection ID, or a datagram that ends before it.
    cases.push((vec![0xc0, 0, 0, 0, 1, 0, 2, 9, 9, 9], 0));
    cases.push((vec![0x40], 0));
    cases.push((vec![0xff], 0));
    cases.push((vec![0xc0, 0, 0, 0, 1, 8], 0));
    cases.push((vec![0xc0, 0, 0, 0, 1], 0));
    cases
}

/// Says which shard got a datagram.
struct Steered {
    index: usize,
    seen: mpsc::Sender<(usize, Vec<u8>)>,
}

impl Datapath for Steered {
    type Message = ();

    fn on_message(&mut self, (): (), _: Instant) {}

    fn on_datagrams(&mut self, mut datagrams: Datagrams<'_>, _: Instant) {
        for segment in datagrams.segments() {
            self.seen.send((self.index, segment.to_vec())).unwrap();
        }
    }

    fn transmit(&mut self, _: &mut Trains<'_>, _: Instant) -> Transmit {
        Transmit::Done
    }

    fn has_pending(&self) -> bool {
        false
    }
}
