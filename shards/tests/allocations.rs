//! A busy shard allocates nothing per packet, message or turn.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]
#![allow(
    unsafe_code,
    reason = "an allocator that counts can only be written with it"
)]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::net::SocketAddr;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use millrace_shards::{
    Datagrams, Datapath, MailSender, Trains, Transmit, mailbox, spawn_with_mailbox,
};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // Counts nothing while the thread ends.
        let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const WARM: u64 = 2_000;
const MEASURED: u64 = 20_000;

/// Echoes packets, and a message to the other shard with each.
struct Echo {
    peer: SocketAddr,
    other: MailSender<u64>,
    due: usize,
    packets: u64,
    at_start: u64,
    result: Option<mpsc::Sender<u64>>,
}

impl Datapath for Echo {
    type Message = u64;

    fn on_message(&mut self, kick: u64, _: Instant) {
        self.due += kick as usize;
    }

    fn on_datagrams(&mut self, mut datagrams: Datagrams<'_>, _: Instant) {
        for _ in datagrams.segments() {
            self.due += 1;
            self.packets += 1;
            // Full when the other is behind, closed when it is done.
            let _ = self.other.try_send(0);
            if self.packets == WARM {
                self.at_start = ALLOCATIONS.get();
            }
            if self.packets == WARM + MEASURED {
                let allocations = ALLOCATIONS.get() - self.at_start;
                if let Some(result) = self.result.take() {
                    result.send(allocations).unwrap();
                }
            }
        }
    }

    fn transmit(&mut self, trains: &mut Trains<'_>, _: Instant) -> Transmit {
        while self.due > 0 {
            let Some(buffer) = trains.packet(1200) else {
                return Transmit::More;
            };
            buffer.fill(1);
            trains.push(1200, self.peer);
            self.due -= 1;
        }
        Transmit::Done
    }

    fn has_pending(&self) -> bool {
        self.due > 0
    }
}

/// Two shards echo each other's trains and wake each other by messages; after a warm-up neither
/// thread allocates.
#[test]
fn steady_state_allocates_nothing() {
    let config = common::config();
    let sockets: Vec<_> = (0..2).map(|_| common::socket("127.0.0.1:0")).collect();
    let addrs: Vec<_> = sockets.iter().map(|socket| socket.local_addr()).collect();
    let mails: Vec<_> = (0..2)
        .map(|_| mailbox(config.mailbox_capacity).unwrap())
        .collect();
    let senders: Vec<_> = mails.iter().map(|mail| mail.0.clone()).collect();
    let (sender, results) = mpsc::channel();
    let handles: Vec<_> = sockets
        .into_iter()
        .zip(mails)
        .enumerate()
        .map(|(index, (socket, (_, mail)))| {
            let (peer, other) = (addrs[1 - index], senders[1 - index].clone());
            let result = Some(sender.clone());
            spawn_with_mailbox(config.clone(), index, 2, Some(socket), mail, move |_| {
                Echo {
                    peer,
                    other,
                    due: 0,
                    packets: 0,
                    at_start: 0,
                    result,
                }
            })
            .unwrap()
        })
        .collect();
    senders[0].try_send(90).unwrap();
    for _ in 0..2 {
        assert_eq!(results.recv_timeout(Duration::from_secs(30)).unwrap(), 0);
    }
    for handle in handles {
        handle.stop();
        handle.join().unwrap();
    }
}
