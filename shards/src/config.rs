//! What a shard may use: cores, slots, queues, memory. Every bound of the crate stands here.
//!
//! Invariants:
//!
//! 1. Nothing a shard holds grows beyond a field of [`ShardConfig`].
//! 2. [`ShardConfig::memory_budget_bytes`] is the sum of all of it at full growth.

use std::time::Duration;

use crate::memory::CHUNK_BYTES;
pub use crate::memory::HugePages;

/// The most shards of a node: their number fits the byte of a connection ID that steers a packet.
pub const SHARDS_MAX: usize = 255;

/// Bytes of one receive slot: the largest GRO message (65,535) behind the kernel's header, the
/// peer's address and the control data, rounded up to a page.
pub(crate) const RX_SLOT_BYTES: usize = 68 * 1024;

/// Bytes of one transmit slot: one GSO train of the largest size.
pub(crate) const TX_SLOT_BYTES: usize = 64 * 1024;

/// Bytes glommio registers with its rings for file buffers, and takes from the heap beyond: its
/// least, because it locks them three times over and an ordinary user may lock 8 MiB.
pub(crate) const GLOMMIO_IO_BYTES: usize = 64 * 1024;

/// The configuration of one shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardConfig {
    /// The core that the shard's thread is pinned to, by the kernel's number; `None` leaves it to
    /// the scheduler.
    pub cpu: Option<usize>,
    /// How long an idle shard polls before it parks; zero parks at once.
    pub spin: Duration,
    /// Receive slots at start, 68 KiB each, shared by all UDP sockets of the shard.
    pub rx_slots: u16,
    /// Receive slots at most, after growth on starvation by small messages. The kernel takes 32,768
    /// (io_uring_register_buf_ring(3)).
    pub rx_slots_max: u16,
    /// Transmit slots at start, 64 KiB each.
    pub tx_slots: u16,
    /// Transmit slots at most, after growth on starvation.
    pub tx_slots_max: u16,
    /// Transmit slots one turn may fill, so that one sender cannot keep the loop from receiving.
    pub tx_slots_per_turn: u16,
    /// Whether large trains may be sent without a copy, once the first one showed that the kernel
    /// does not copy in spite of it.
    pub zero_copy: bool,
    /// Submission entries of the ring, and trains in flight at most: rounded up to a power of two,
    /// 64 at least; the kernel takes 32,768 (io_uring_setup(2)).
    pub ring_entries: u32,
    /// Messages that the shard's mailbox holds before it refuses more.
    pub mailbox_capacity: usize,
    /// Mailbox messages handled per turn.
    pub mailbox_batch: usize,
    /// Receive completions handled per turn.
    pub receive_batch: usize,
    /// Bytes of the shard's chunk pool at most, rounded up to whole chunks.
    pub chunk_pool_bytes: u64,
    /// Bytes of the pool that are free and present from the start on, while it grows: see
    /// [`ChunkPool::growing`](crate::chunk::ChunkPool::growing).
    pub chunk_pool_ahead_bytes: u64,
    /// Where the chunk pool's pages come from.
    pub huge_pages: HugePages,
    /// The longest park in the shard's own ring: the fallback when a wake-up was lost.
    pub direct_park_max: Duration,
    /// glommio's preempt timer. Long on purpose: see `runtime` for what a short one loses.
    pub preempt_timer: Duration,
    /// How often a busy shard gives glommio a turn while work is outstanding there.
    pub glommio_turn: Duration,
    /// How long a heartbeat may stand still before the watchdog looks at the shard; zero switches
    /// the watchdog off for it.
    pub watchdog: Duration,
    /// How often `Datapath::on_housekeeping` is called.
    pub housekeeping: Duration,
}

impl Default for ShardConfig {
    fn default() -> Self {
        Self {
            cpu: None,
            // 20 us caught nearly every reply of a peer on the same host at the CPU cost of
            // parking.
            spin: Duration::from_micros(20),
            // 4 to 16 receive slots measured alike; more only leave the cache.
            rx_slots: 8,
            rx_slots_max: 256,
            tx_slots: 32,
            tx_slots_max: 256,
            tx_slots_per_turn: 16,
            zero_copy: true,
            ring_entries: 512,
            mailbox_capacity: 4096,
            mailbox_batch: 256,
            // One completion per turn cost 12 % of bulk throughput against several.
            receive_batch: 8,
            chunk_pool_bytes: 256 << 20,
            chunk_pool_ahead_bytes: 32 << 20,
            huge_pages: HugePages::Auto,
            direct_park_max: Duration::from_millis(50),
            preempt_timer: Duration::from_secs(1),
            glommio_turn: Duration::from_micros(500),
            watchdog: Duration::from_millis(10),
            housekeeping: Duration::from_millis(100),
        }
    }
}

impl ShardConfig {
    /// Bytes this shard preallocates or may grow to: slots, rings, mailbox cells, chunk pool,
    /// and glommio's file buffers.
    #[must_use]
    pub fn memory_budget_bytes(&self) -> u64 {
        let (rx_slots, tx_slots) = (self.rx_slots_max, self.tx_slots_max);
        let chunks = self.chunk_pool_bytes;
        self.bytes_with(rx_slots, tx_slots, chunks)
    }

    /// Of [`Self::memory_budget_bytes`], what this shard takes from the system at its start.
    #[must_use]
    pub fn memory_at_start_bytes(&self) -> u64 {
        let chunks = self.chunk_pool_ahead_bytes.min(self.chunk_pool_bytes);
        self.bytes_with(0, 0, chunks)
    }

    /// With so many slots, or those of the start, and so many bytes of chunks.
    fn bytes_with(&self, rx_slots: u16, tx_slots: u16, chunks: u64) -> u64 {
        let rx = u64::from(rx_slots.max(self.rx_slots)) * RX_SLOT_BYTES as u64;
        let tx = u64::from(tx_slots.max(self.tx_slots)) * TX_SLOT_BYTES as u64;
        // 64 B per submission entry, four completions of 16 B each, and of a train a record of 192
        // B and a description of 64 B.
        let ring = u64::from(self.ring_entries) * (64 + 4 * 16 + 192 + 64);
        let mailbox = self.mailbox_capacity as u64 * 64;
        // 64 B for each unit of 64 KiB that there may be.
        let headers = self.chunk_pool_bytes.next_multiple_of(CHUNK_BYTES as u64) / 1024;
        let chunks = chunks.next_multiple_of(CHUNK_BYTES as u64);
        rx + tx + ring + mailbox + headers + chunks + GLOMMIO_IO_BYTES as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The printed budget must contain the pool and the slots at full growth.
    #[test]
    fn budget_sums_the_parts() {
        let config = ShardConfig {
            chunk_pool_bytes: 1,
            ..ShardConfig::default()
        };
        let slots = 256 * (RX_SLOT_BYTES + TX_SLOT_BYTES) as u64;
        assert!(config.memory_budget_bytes() >= slots + CHUNK_BYTES as u64);
        assert!(config.memory_budget_bytes() < slots + 4 * CHUNK_BYTES as u64);
        assert!(config.memory_at_start_bytes() < 8 * CHUNK_BYTES as u64);
    }
}
