//! The tables of a shard, per connection, request and peer: timers, waiters, budgets.

use std::collections::VecDeque;
use std::hint::black_box;
use std::time::Duration;

use millrace_protocol::budget::{BudgetConfig, ReceiveBudget};
use millrace_protocol::frame::Class;
use millrace_protocol::id::NodeId;
use millrace_protocol::rng::Rng;
use millrace_protocol::rpc::{InFlight, RpcLimits, RpcTable};
use millrace_protocol::timer::Wheel;

use super::{Piece, rng, shuffled, whole_second};

const TIMERS: usize = 1024;
const CONNECTIONS: usize = 64;
const REARMS: usize = 4096;
const REQUESTS: usize = 1024;
/// Requests in flight while more come.
const OUTSTANDING: usize = 64;
const PEERS: u8 = 13;
const BODIES: usize = 512;
/// Time between passes, so that the rest of one pass is far in the past of the next.
const PASS: Duration = Duration::from_secs(60);

pub(super) const WHEEL_SCHEDULE_CANCEL: Piece = Piece {
    name: "wheel_schedule_cancel",
    operations: TIMERS as u64,
    prepare: || {
        let mut rng = rng();
        let delays = delays(&mut rng, TIMERS);
        let order = shuffled(TIMERS, &mut rng);
        let mut now = whole_second();
        let mut wheel = Wheel::new(now);
        let mut ids = Vec::with_capacity(TIMERS);
        Box::new(move || {
            now += PASS;
            wheel.poll(now, &mut |key: u32| {
                black_box(key);
            });
            for (key, delay) in black_box(&delays).iter().enumerate() {
                ids.push(wheel.schedule(key as u32, now + *delay));
            }
            for index in &order {
                black_box(wheel.cancel(ids[*index]));
            }
            ids.clear();
            assert!(wheel.is_empty());
        })
    },
};

pub(super) const WHEEL_REARM: Piece = Piece {
    name: "wheel_rearm",
    operations: REARMS as u64,
    prepare: || {
        let mut rng = rng();
        let delays = delays(&mut rng, REARMS);
        let mut now = whole_second();
        let mut wheel = Wheel::new(now);
        let mut ids = [None; CONNECTIONS];
        Box::new(move || {
            now += PASS;
            let mut fired = 0u32;
            for (step, delay) in black_box(&delays).iter().enumerate() {
                let connection = step % CONNECTIONS;
                let id = wheel.replace(ids[connection], connection, now + *delay);
                ids[connection] = Some(id);
                // A turn of the shard's loop: a batch of 16 packets.
                if step % 16 == 0 {
                    now += Duration::from_micros(60);
                    wheel.poll(now, &mut |_| fired += 1);
                    black_box(wheel.next());
                }
            }
            for id in ids.iter_mut().filter_map(Option::take) {
                wheel.cancel(id);
            }
            black_box(fired);
        })
    },
};

pub(super) const WHEEL_EXPIRE: Piece = Piece {
    name: "wheel_expire",
    operations: TIMERS as u64,
    prepare: || {
        let delays = delays(&mut rng(), TIMERS);
        let mut now = whole_second();
        let mut wheel = Wheel::new(now);
        Box::new(move || {
            now += PASS;
            wheel.poll(now, &mut |_| {});
            for (key, delay) in black_box(&delays).iter().enumerate() {
                wheel.schedule(key, now + *delay);
            }
            let mut fired = 0;
            while let Some(at) = wheel.next() {
                wheel.poll(at, &mut |key| fired += usize::from(key < TIMERS));
            }
            assert_eq!(fired, TIMERS);
        })
    },
};

pub(super) const RPC_TABLE: Piece = Piece {
    name: "rpc_table",
    operations: REQUESTS as u64,
    prepare: || {
        let mut rng = rng();
        let deadlines = delays(&mut rng, REQUESTS);
        let picks = picks(&mut rng, REQUESTS);
        let mut now = whole_second();
        let mut table = RpcTable::new(RpcLimits::default(), now);
        let mut ids = Vec::with_capacity(OUTSTANDING);
        Box::new(move || {
            now += PASS;
            table.expire(now, &mut |_, waiter: u64| {
                black_box(waiter);
            });
            for (deadline, pick) in black_box(&deadlines).iter().zip(&picks) {
                if ids.len() == OUTSTANDING {
                    black_box(table.complete(ids.swap_remove(*pick)));
                }
                let id = table
                    .insert(Class::Latency, now + *deadline, 7)
                    .expect("far below the limit");
                ids.push(id);
                black_box(table.poll_timeout());
            }
            for id in ids.drain(..) {
                black_box(table.complete(id));
            }
            assert!(table.is_empty() && table.late() == 0);
        })
    },
};

pub(super) const RPC_IN_FLIGHT: Piece = Piece {
    name: "rpc_in_flight",
    operations: REQUESTS as u64,
    prepare: || {
        let picks = picks(&mut rng(), REQUESTS);
        let mut served = InFlight::new(RpcLimits::default());
        let mut ids = Vec::with_capacity(OUTSTANDING);
        Box::new(move || {
            for (id, pick) in black_box(&picks).iter().enumerate() {
                if ids.len() == OUTSTANDING {
                    black_box(served.end(ids.swap_remove(*pick)));
                }
                let id = id as u32;
                served
                    .begin(id, Class::Normal, u64::from(id))
                    .expect("far below the limit");
                ids.push(id);
            }
            for id in ids.drain(..) {
                black_box(served.end(id));
            }
            assert_eq!(served.in_flight(Class::Normal), 0);
        })
    },
};

pub(super) const BUDGET: Piece = Piece {
    name: "budget",
    operations: BODIES as u64,
    prepare: || {
        let mut rng = rng();
        let bodies: Vec<_> = (0..BODIES)
            .map(|_| {
                let peer = NodeId::from_bytes([rng.below(u64::from(PEERS)) as u8; 29]);
                (peer, (64 << 10) + rng.below(32 << 20))
            })
            .collect();
        let mut budget = ReceiveBudget::new(BudgetConfig::default());
        let mut held = VecDeque::with_capacity(BODIES);
        Box::new(move || {
            for (peer, bytes) in black_box(&bodies) {
                match budget.reserve(*peer, *bytes) {
                    Ok(()) => held.push_back((*peer, *bytes)),
                    // Refused: the oldest body is done, as bodies are while others wait.
                    Err(_) => {
                        if let Some((peer, bytes)) = held.pop_front() {
                            budget.release(&peer, bytes);
                        }
                    }
                }
            }
            for (peer, bytes) in held.drain(..) {
                budget.release(&peer, bytes);
            }
            assert_eq!(budget.used_bytes(), 0);
        })
    },
};

/// Delays as a shard has them: probe timeouts, pacing, idle timeouts, deadlines.
fn delays(rng: &mut Rng, count: usize) -> Vec<Duration> {
    (0..count)
        .map(|_| {
            let micros = match rng.below(4) {
                0 => 50 + rng.below(1_000),
                1 => 1_000 + rng.below(30_000),
                2 => 3_000_000,
                _ => 100_000 + rng.below(10_000_000),
            };
            Duration::from_micros(micros)
        })
        .collect()
}

fn picks(rng: &mut Rng, count: usize) -> Vec<usize> {
    (0..count)
        .map(|_| rng.below(OUTSTANDING as u64) as usize)
        .collect()
}
