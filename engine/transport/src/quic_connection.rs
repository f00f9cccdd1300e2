//! A quiche connection, and the account of the heap bytes that it holds.
//!
//! A peer can make quiche hold much more than flow control says: each STREAM frame that leaves a
//! gap before it is a block of its own, of 146 bytes for one byte of data. quiche shows nothing of
//! it. So each call that changes the connection is made here, between two looks at what the thread
//! has taken from the heap ([`heap`]).
//!
//! Invariants
//! 1. Nothing outside this module calls a method of quiche that takes or gives back memory.
//! 2. What comes in or goes out with a call, already taken or not yet given back, is added or
//!    subtracted: so the account of a connection does not drift, however long it lives.
//! 3. What BoringSSL holds is not in it: it does not use this allocator. Its messages are bounded.

use std::ops::Deref;

use boring::ssl::SslRef;
use millrace_protocol::flood::PacketCounts;
use millrace_shards::heap;

use crate::buffers::{Buffers, StreamBuffer};
use crate::heap_excess::HeapExcess;
use crate::ids::IdBytes;
use crate::pacing::RateSample;
use crate::path::{PathStats, StreamError, StreamPath};

/// quiche with our buffers. What only looks is quiche's own, by [`Deref`].
pub(crate) struct QuicConnection {
    quic: quiche::Connection<Buffers>,
    heap_bytes: i64,
    heap_excess: HeapExcess,
    /// Bytes that were read from streams, or thrown away.
    read_bytes: u64,
    /// What was counted until the last [`Self::take_packet_counts`].
    counted: PacketCounts,
}

impl Deref for QuicConnection {
    type Target = quiche::Connection<Buffers>;

    #[inline]
    fn deref(&self) -> &Self::Target {
        &self.quic
    }
}

impl AsMut<SslRef> for QuicConnection {
    fn as_mut(&mut self) -> &mut SslRef {
        self.quic.as_mut()
    }
}

impl QuicConnection {
    /// `open` makes the connection.
    ///
    /// # Errors
    /// Those of `open`.
    pub(crate) fn new(
        open: impl FnOnce() -> quiche::Result<quiche::Connection<Buffers>>,
    ) -> quiche::Result<Self> {
        let before = heap::taken_bytes();
        let quic = open()?;
        Ok(Self {
            quic,
            heap_bytes: heap::taken_bytes() - before,
            heap_excess: HeapExcess::default(),
            read_bytes: 0,
            counted: PacketCounts::default(),
        })
    }

    /// What the path is like now; `None` before there is one.
    pub(crate) fn rate_sample(&self) -> Option<RateSample> {
        let path = self.quic.path_stats().find(|path| path.active)?;
        Some(RateSample {
            smoothed_rtt: path.rtt,
            min_rtt: path.min_rtt.unwrap_or(path.rtt),
            // `path.lost_bytes` stays 0 with BBR: quiche counts there with CUBIC and Reno only.
            lost_bytes: self.quic.stats().lost_bytes,
            window_bytes: path.cwnd as u64,
            bandwidth_bytes_per_s: path.max_bandwidth.unwrap_or_default(),
            is_starting_up: path.startup_exit.is_none(),
        })
    }

    /// Heap bytes that quiche holds for this connection; 0 where the allocator does not count.
    pub(crate) fn heap_bytes(&self) -> u64 {
        self.heap_bytes.try_into().unwrap_or_default()
    }

    /// Of them, what the peer's packets made quiche hold beyond what they pay for.
    pub(crate) fn heap_excess_bytes(&self) -> u64 {
        // What was given back otherwise than by reading is in the account alone.
        self.heap_excess.bytes().min(self.heap_bytes())
    }

    /// Packets and what they brought since the last call, without frames and connection IDs. Not
    /// for every packet: quiche gathers its numbers for it.
    pub(crate) fn take_packet_counts(&mut self) -> PacketCounts {
        let stats = self.quic.stats();
        let now = PacketCounts {
            received: stats.recv as u64,
            sent: stats.sent as u64,
            acked_bytes: stats.acked_bytes,
            read_bytes: self.read_bytes,
            path_challenges: stats.path_challenge_rx_count,
            frames: 0,
            retired_ids: 0,
        };
        let before = std::mem::replace(&mut self.counted, now);
        PacketCounts {
            received: now.received - before.received,
            sent: now.sent - before.sent,
            acked_bytes: now.acked_bytes - before.acked_bytes,
            read_bytes: now.read_bytes - before.read_bytes,
            path_challenges: now.path_challenges - before.path_challenges,
            ..PacketCounts::default()
        }
    }

    #[inline]
    fn account<T>(&mut self, call: impl FnOnce(&mut quiche::Connection<Buffers>) -> T) -> T {
        let before = heap::taken_bytes();
        let result = call(&mut self.quic);
        self.heap_bytes += heap::taken_bytes() - before;
        result
    }

    #[inline]
    pub(crate) fn recv(
        &mut self,
        datagram: &mut [u8],
        info: quiche::RecvInfo,
    ) -> quiche::Result<usize> {
        let (before, packet_bytes) = (self.heap_bytes, datagram.len());
        let received = self.account(|quic| quic.recv(datagram, info));
        let held_bytes = self.heap_bytes - before;
        self.heap_excess.on_packet(packet_bytes, held_bytes);
        received
    }

    #[inline]
    fn account_read<T>(&mut self, read: impl FnOnce(&mut quiche::Connection<Buffers>) -> T) -> T {
        let before = self.heap_bytes;
        let result = self.account(read);
        self.heap_excess.on_read(self.heap_bytes - before);
        result
    }

    #[inline]
    pub(crate) fn send(&mut self, out: &mut [u8]) -> quiche::Result<(usize, quiche::SendInfo)> {
        self.account(|quic| quic.send(out))
    }

    pub(crate) fn on_timeout(&mut self) {
        self.account(quiche::Connection::on_timeout);
    }

    /// Closes the connection by the application; the first reason stands.
    pub(crate) fn close(&mut self, code: u64, reason: &[u8]) {
        // Already closing or closed.
        self.account(|quic| quic.close(true, code, reason).ok());
    }

    /// Gives the peer one more of our connection IDs; whether it was taken.
    pub(crate) fn issue_id(&mut self, id: &IdBytes, reset_token: u128) -> bool {
        let id = quiche::ConnectionId::from_ref(id);
        self.account(|quic| quic.new_scid(&id, reset_token, true).is_ok())
    }

    /// The next of our connection IDs that the peer has retired; one of another length is none of
    /// ours.
    pub(crate) fn retired_id_next(&mut self) -> Option<IdBytes> {
        self.account(|quic| {
            let id = quic.retired_scid_next()?;
            id.as_ref().try_into().ok()
        })
    }

    /// Throws away what quiche says of paths: it is in their statistics too.
    pub(crate) fn drop_path_events(&mut self) {
        self.account(|quic| while quic.path_event_next().is_some() {});
    }

    /// Drops the datagrams that have not left.
    pub(crate) fn drop_datagrams(&mut self) {
        self.account(|quic| quic.dgram_purge_outgoing(|_| true));
    }

    /// Sends a PING, unless the connection is closing; whether it will.
    pub(crate) fn ping(&mut self) -> bool {
        self.account(|quic| quic.send_ack_eliciting().is_ok())
    }

    /// Sends a datagram; whether there was room for it.
    pub(crate) fn send_datagram(&mut self, datagram: Vec<u8>) -> bool {
        self.heap_bytes += datagram.capacity() as i64;
        self.account(|quic| quic.dgram_send_buf(datagram).is_ok())
    }
}

impl StreamPath for QuicConnection {
    #[inline]
    fn stream_priority(&mut self, stream: u64, urgency: u8) -> Result<(), StreamError> {
        let set = self.account(|quic| quic.stream_priority(stream, urgency, false));
        set.map_err(StreamError::from)
    }

    #[inline]
    fn stream_send(&mut self, stream: u64, bytes: &[u8], fin: bool) -> Result<usize, StreamError> {
        let sent = self.account(|quic| quic.stream_send(stream, bytes, fin));
        sent.map_err(StreamError::from)
    }

    #[inline]
    fn stream_send_buffer(
        &mut self,
        stream: u64,
        buffer: StreamBuffer,
        fin: bool,
    ) -> Result<usize, StreamError> {
        match self.account(|quic| quic.stream_send_zc(stream, buffer, fin)) {
            Ok((taken, _)) => Ok(taken),
            Err(error) => Err(error.into()),
        }
    }

    #[inline]
    fn stream_capacity(&mut self, stream: u64) -> Result<usize, StreamError> {
        let capacity = self.account(|quic| quic.stream_capacity(stream));
        capacity.map_err(StreamError::from)
    }

    #[inline]
    fn stream_reset(&mut self, stream: u64, code: u64) {
        // Already reset or stopped is as good.
        self.account(|quic| {
            quic.stream_shutdown(stream, quiche::Shutdown::Write, code)
                .ok()
        });
    }

    #[inline]
    fn stream_recv(&mut self, stream: u64, out: &mut [u8]) -> Result<(usize, bool), StreamError> {
        let received = self.account_read(|quic| quic.stream_recv(stream, out));
        self.read_bytes += received.as_ref().map_or(0, |(read, _)| *read as u64);
        received.map_err(StreamError::from)
    }

    #[inline]
    fn stream_discard(&mut self, stream: u64, len: usize) -> Result<(usize, bool), StreamError> {
        let discarded = self.account_read(|quic| quic.stream_discard(stream, len));
        self.read_bytes += discarded.as_ref().map_or(0, |(read, _)| *read as u64);
        discarded.map_err(StreamError::from)
    }

    #[inline]
    fn stream_readable_next(&mut self) -> Option<u64> {
        self.account(quiche::Connection::stream_readable_next)
    }

    #[inline]
    fn stream_writable_next(&mut self) -> Option<u64> {
        self.account(quiche::Connection::stream_writable_next)
    }

    #[inline]
    fn streams_left(&self) -> u64 {
        self.quic.peer_streams_left_uni()
    }

    #[inline]
    fn datagram_send(&mut self, datagram: Vec<u8>) {
        // A full queue, or a peer that takes none.
        self.send_datagram(datagram);
    }

    #[inline]
    fn datagram_recv(&mut self) -> Option<Vec<u8>> {
        let datagram = self.account(|quic| quic.dgram_recv_buf()).ok()?;
        self.heap_bytes -= datagram.capacity() as i64;
        Some(datagram)
    }

    #[inline]
    fn send_ping(&mut self) -> bool {
        self.ping()
    }

    #[inline]
    fn stats(&self) -> PathStats {
        let stats = self.quic.stats();
        // Others are where the peer was before.
        let active = self.quic.path_stats().find(|path| path.active);
        PathStats {
            sent: stats.sent,
            received: stats.recv,
            lost: stats.lost,
            rtt: active.map(|path| path.rtt),
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use millrace_shards::CountingAllocator;

    use super::*;
    use crate::quic_pair::{paced_pair, pair, say};

    // For all unit tests of this crate.
    #[global_allocator]
    static ALLOCATOR: CountingAllocator = CountingAllocator::new(std::alloc::System);

    const STREAM_BYTES: usize = 3_000;
    const DRIFT_BYTES_MAX: u64 = 8 << 10;

    /// Both send a stream, a datagram, and an ID that takes the place of another.
    fn exchange([client, server]: &mut [QuicConnection; 2], round: u32) {
        let streams = [2, 3].map(|kind| u64::from(round) * 4 + kind);
        for (speaker, stream) in [&mut *client, &mut *server].into_iter().zip(streams) {
            let bytes = Bytes::from(vec![1; STREAM_BYTES]);
            let sent = speaker.stream_send_buffer(stream, StreamBuffer::small(bytes), true);
            assert_eq!(sent, Ok(STREAM_BYTES));
            speaker.datagram_send(vec![2; 200]);
            let mut id = [speaker.is_server() as u8; 16];
            id[..4].copy_from_slice(&round.to_le_bytes());
            speaker.issue_id(&id, u128::from(round));
        }
        for _ in 0..4 {
            say(client, Some(server));
            say(server, Some(client));
        }
        let mut out = [0; STREAM_BYTES];
        for (reader, stream) in [&mut *server, &mut *client].into_iter().zip(streams) {
            assert_eq!(
                reader.stream_recv(stream, &mut out),
                Ok((STREAM_BYTES, true))
            );
            assert_eq!(reader.datagram_recv(), Some(vec![2; 200]));
            while reader.retired_id_next().is_some() {}
            reader.drop_path_events();
        }
    }

    fn shake_hands([client, server]: &mut [QuicConnection; 2]) {
        for _ in 0..4 {
            say(client, Some(server));
            say(server, Some(client));
        }
    }

    // Protects what is yielded to others on a path: quiche says what a paced connection loses.
    #[test]
    fn a_sample_of_the_path_counts_what_was_lost() {
        let mut pair = paced_pair();
        shake_hands(&mut pair);
        let [client, server] = &mut pair;
        let mut lost_bytes = |stream, listener: Option<&mut QuicConnection>| {
            let bytes = Bytes::from(vec![1; STREAM_BYTES]);
            let sent = client.stream_send_buffer(stream, StreamBuffer::small(bytes), true);
            assert_eq!(sent, Ok(STREAM_BYTES));
            say(client, listener);
            client.rate_sample().unwrap().lost_bytes
        };
        assert_eq!(lost_bytes(2, None), 0, "it is not known yet");
        // Three packets and more that arrive say that those before them are lost.
        for stream in [6, 10] {
            lost_bytes(stream, Some(server));
        }
        say(server, Some(client));
        let sample = client.rate_sample().unwrap();
        assert!(sample.lost_bytes >= STREAM_BYTES as u64, "{sample:?}");
        assert!(sample.window_bytes > 0 && sample.bandwidth_bytes_per_s > 0);
    }

    // Protects a long connection from its end, and the account from a peer that makes it smaller:
    // what is handed in and out of quiche is on it once.
    #[test]
    fn the_account_does_not_drift() {
        let mut pair = pair();
        shake_hands(&mut pair);
        for round in 0..100 {
            exchange(&mut pair, round);
        }
        let before = pair.each_ref().map(QuicConnection::heap_bytes);
        for round in 100..1_100 {
            exchange(&mut pair, round);
        }
        let after = pair.each_ref().map(QuicConnection::heap_bytes);
        for (before, after) in before.into_iter().zip(after) {
            assert!(before > 0, "the allocator counts");
            assert!(
                before.abs_diff(after) < DRIFT_BYTES_MAX,
                "{before} bytes became {after}"
            );
        }
    }

    // What the bound before the handshake is several times of.
    #[test]
    fn a_handshake_takes_less_than_a_quarter_of_its_bound() {
        let mut pair = pair();
        let mut most = 0;
        for _ in 0..4 {
            let [client, server] = &mut pair;
            say(client, Some(server));
            most = most.max(server.heap_bytes());
            say(server, Some(client));
        }
        assert!(most < 64 << 10, "{most}");
    }
}
