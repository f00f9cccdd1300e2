//! Counters of one shard: written by its thread only, read by any.
//!
//! Cost: an addition is a load, an add and a store, all relaxed: no locked instruction, because
//! there is one writer.

use std::sync::atomic::{AtomicU64, Ordering};

/// A counter with one writer.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, by: u64) {
        self.0.store(
            self.0.load(Ordering::Relaxed).wrapping_add(by),
            Ordering::Relaxed,
        );
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Adds from any thread; for counts that are not the shard's own.
    pub(crate) fn add_shared(&self, by: u64) {
        self.0.fetch_add(by, Ordering::Relaxed);
    }
}

macro_rules! shard_stats {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// The counters of one shard. See [`ShardStatsSnapshot`] for their meaning.
        #[derive(Debug, Default)]
        #[repr(align(128))]
        pub struct ShardStats {
            $(pub(crate) $name: Counter,)*
        }

        /// The counters of one shard at one moment.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        pub struct ShardStatsSnapshot {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl ShardStats {
            /// The counters now. Each is exact; together they are not one instant's.
            #[must_use]
            pub fn snapshot(&self) -> ShardStatsSnapshot {
                ShardStatsSnapshot { $($name: self.$name.get(),)* }
            }
        }

        impl ShardStatsSnapshot {
            /// Every counter with its name, for metrics.
            pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name),)*].into_iter()
            }
        }
    };
}

shard_stats! {
    /// Turns of the loop.
    turns,
    /// Nanoseconds of turns that did something.
    busy_ns,
    /// Calls of `io_uring_enter`, parks included.
    enters,
    /// Receive completions: GRO messages.
    receives,
    /// Datagrams in them.
    datagrams_received,
    /// Payload bytes in them.
    bytes_received,
    /// Received messages dropped: truncated, or from an address that is none.
    receives_dropped,
    /// Receive requests armed again after the kernel found no free slot.
    enobufs_rearms,
    /// Receive slots added by growth.
    rx_slots_grown,
    /// GSO trains sent.
    trains_sent,
    /// Packets in them.
    packets_sent,
    /// Bytes in them.
    bytes_sent,
    /// Trains that were not sent: the kernel refused, or the shard owns no such socket.
    send_errors,
    /// Trains sent without a copy.
    trains_sent_zc,
    /// Times no transmit slot was free even after a reap.
    tx_starved,
    /// Transmit slots added by growth.
    tx_slots_grown,
    /// Times the completion queue was found overflown.
    cq_overflows,
    /// Mailbox messages handled.
    messages,
    /// Parks in the shard's own ring.
    direct_parks,
    /// Parks in glommio on the ring's eventfd.
    eventfd_parks,
    /// Turns given to glommio while busy.
    glommio_turns,
    /// Idle phases that found work before the spin budget was over.
    spins_won,
    /// Wake-ups by a message of another shard.
    wakes_message,
    /// Wake-ups by a thread without a ring.
    wakes_pipe,
    /// Wake-ups by a timer or the longest park.
    wakes_timeout,
    /// Local tasks started.
    tasks_spawned,
    /// Sleeps with work to do that the watchdog ended.
    watchdog_wakes,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counters read back what was added, under their own names.
    #[test]
    fn snapshot_reads_what_was_added() {
        let stats = ShardStats::default();
        stats.turns.add(2);
        stats.turns.add(3);
        stats.busy_ns.add_shared(7);
        let snapshot = stats.snapshot();
        assert_eq!(
            (snapshot.turns, snapshot.busy_ns, snapshot.messages),
            (5, 7, 0)
        );
        assert!(snapshot.iter().any(|pair| pair == ("turns", 5)));
    }
}
