//! 200-byte messages one way, as many as go through, in the three shapes QUIC offers.
//!
//! The rate is what the receiver counted in the measured time, so that a lost DATAGRAM is not a
//! message.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::{BufMut, Bytes, BytesMut};

use super::{Job, Stop};
use crate::Result;
use crate::measure::{Measurement, Meter};
use crate::plan::{ONEWAY_BYTES, OnewayShape};
use crate::settings::Settings;
use crate::stack::{Connection, Stack};

static MESSAGE: [u8; ONEWAY_BYTES] = [9; ONEWAY_BYTES];

/// Messages handed over between two looks at the clock.
const BATCH: usize = 64;
/// Tasks that open streams, so that a full stream window does not stop all sending.
const UNI_SENDERS: usize = 64;
/// What the length-prefixed lane gathers before it writes, like a buffered writer.
const LANE_BUFFER_BYTES: usize = 16 << 10;
const LENGTH_BYTES: usize = 4;

pub(super) fn serve<S: Stack>(settings: &Settings) -> Result<SocketAddr> {
    S::listen(settings, |connection| {
        let Connection { handle, bi, uni } = connection;
        let counted = Arc::new(AtomicU64::new(0));
        tokio::spawn(count_datagrams::<S>(handle, Arc::clone(&counted)));
        tokio::spawn(count_streams::<S>(uni, Arc::clone(&counted)));
        tokio::spawn(answer_counts::<S>(bi, counted));
    })
}

pub(super) async fn drive<S: Stack>(
    client: &S::Client,
    job: &Job,
    shape: OnewayShape,
) -> Result<Measurement> {
    let connection = S::connect(client, job.addresses[0]).await?;
    let handle = &connection.handle;
    send_until::<S>(handle, shape, &Stop::after(job.warm_up())).await?;
    let before = ask_count::<S>(handle).await?;
    let meter = Meter::start(job.server_pid)?;
    send_until::<S>(handle, shape, &Stop::after(job.duration)).await?;
    // The question travels behind the messages, so what is still queued counts in both.
    let after = ask_count::<S>(handle).await?;
    let reading = meter.stop()?;
    S::close(handle);
    let count = after - before;
    Ok(Measurement {
        rps: Some(count as f64 / reading.wall.as_secs_f64()),
        gbit_per_s: Some(crate::measure::gbit_per_s(
            count as usize * ONEWAY_BYTES,
            reading.wall,
        )),
        cores_used: Some(reading.cores_used()),
        ..Measurement::default()
    })
}

async fn send_until<S: Stack>(handle: &S::Handle, shape: OnewayShape, stop: &Stop) -> Result<()> {
    match shape {
        OnewayShape::Datagram => {
            let message = Bytes::from_static(&MESSAGE);
            while !stop.is_set() {
                S::send_datagrams(handle, &message, BATCH).await?;
                // tokio's timer needs a turn when there was always room.
                tokio::task::yield_now().await;
            }
        }
        OnewayShape::Uni => {
            let mut senders = Vec::new();
            for _ in 0..UNI_SENDERS {
                senders.push(tokio::spawn(send_streams::<S>(
                    handle.clone(),
                    stop.clone(),
                )));
            }
            for sender in senders {
                sender.await??;
            }
        }
        OnewayShape::Lane => {
            let mut stream = S::open_uni(handle).await?;
            while !stop.is_set() {
                let mut buffer = BytesMut::with_capacity(LANE_BUFFER_BYTES);
                while buffer.len() + LENGTH_BYTES + ONEWAY_BYTES <= LANE_BUFFER_BYTES {
                    buffer.put_u32(ONEWAY_BYTES as u32);
                    buffer.put_slice(&MESSAGE);
                }
                S::write(&mut stream, buffer.freeze()).await?;
                tokio::task::yield_now().await;
            }
            S::finish(&mut stream)?;
        }
    }
    Ok(())
}

async fn send_streams<S: Stack>(handle: S::Handle, stop: Stop) -> Result<()> {
    while !stop.is_set() {
        let mut stream = S::open_uni(&handle).await?;
        S::write(&mut stream, Bytes::from_static(&MESSAGE)).await?;
        S::finish(&mut stream)?;
        tokio::task::yield_now().await;
    }
    Ok(())
}

/// Asks what has arrived until two answers agree.
async fn ask_count<S: Stack>(handle: &S::Handle) -> Result<u64> {
    let mut last = None;
    loop {
        let (mut send, mut recv) = S::open_bi(handle).await?;
        S::write(&mut send, Bytes::from_static(b"?")).await?;
        S::finish(&mut send)?;
        let mut answer = [0; 8];
        if S::read_to_end(&mut recv, &mut answer).await? != answer.len() {
            return Err("short count".into());
        }
        let count = u64::from_le_bytes(answer);
        if last.replace(count) == Some(count) {
            return Ok(count);
        }
    }
}

async fn count_datagrams<S: Stack>(handle: S::Handle, counted: Arc<AtomicU64>) {
    while let Ok((count, bytes)) = S::recv_datagrams(&handle).await {
        if bytes == count * ONEWAY_BYTES as u64 {
            counted.fetch_add(count, Ordering::Relaxed);
        }
    }
}

async fn count_streams<S: Stack>(mut acceptor: S::UniAcceptor, counted: Arc<AtomicU64>) {
    while let Some(mut stream) = S::accept_uni(&mut acceptor).await {
        // A stream of exactly one message is one message; a longer one is a lane of prefixed ones.
        let Ok(Some(first)) = S::next_chunk(&mut stream).await else {
            continue;
        };
        if first.len() == ONEWAY_BYTES {
            counted.fetch_add(1, Ordering::Relaxed);
        } else {
            tokio::spawn(count_lane::<S>(stream, first, Arc::clone(&counted)));
        }
    }
}

async fn count_lane<S: Stack>(
    mut stream: S::Recv,
    first: Bytes,
    counted: Arc<AtomicU64>,
) -> Result<()> {
    let mut lane = Lane::default();
    counted.fetch_add(lane.feed(&first), Ordering::Relaxed);
    while let Some(chunk) = S::next_chunk(&mut stream).await? {
        counted.fetch_add(lane.feed(&chunk), Ordering::Relaxed);
    }
    Ok(())
}

async fn answer_counts<S: Stack>(
    mut acceptor: S::BiAcceptor,
    counted: Arc<AtomicU64>,
) -> Result<()> {
    while let Some((mut send, mut recv)) = S::accept_bi(&mut acceptor).await {
        let mut question = [0; 1];
        S::read_to_end(&mut recv, &mut question).await?;
        let count = counted.load(Ordering::Relaxed).to_le_bytes();
        S::write(&mut send, Bytes::copy_from_slice(&count)).await?;
        S::finish(&mut send)?;
    }
    Ok(())
}

/// Cuts a stream of length-prefixed messages.
#[derive(Debug, Default)]
struct Lane {
    /// Bytes of the current message still to come.
    body_left: usize,
    /// Its length prefix so far.
    prefix: u32,
    prefix_bytes: usize,
}

impl Lane {
    /// Returns how many messages ended in this piece.
    fn feed(&mut self, mut piece: &[u8]) -> u64 {
        let mut ended = 0;
        while !piece.is_empty() {
            if self.body_left > 0 {
                let taken = self.body_left.min(piece.len());
                piece = &piece[taken..];
                self.body_left -= taken;
                ended += u64::from(self.body_left == 0);
            } else if self.prefix_bytes == 0 && piece.len() >= LENGTH_BYTES {
                let (length, rest) = piece.split_at(LENGTH_BYTES);
                self.body_left = length.iter().fold(0, |sum, &b| sum << 8 | usize::from(b));
                piece = rest;
            } else {
                self.prefix = self.prefix << 8 | u32::from(piece[0]);
                self.prefix_bytes += 1;
                piece = &piece[1..];
                if self.prefix_bytes == LENGTH_BYTES {
                    self.body_left = self.prefix as usize;
                    (self.prefix, self.prefix_bytes) = (0, 0);
                }
            }
        }
        ended
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lane_counts_the_same_however_it_is_cut() {
        let mut stream = Vec::new();
        for _ in 0..20 {
            stream.extend_from_slice(&(ONEWAY_BYTES as u32).to_be_bytes());
            stream.extend_from_slice(&MESSAGE);
        }
        for piece in [1, 2, 3, 5, 203, 204, 205, 1400, stream.len()] {
            let mut lane = Lane::default();
            let ended: u64 = stream.chunks(piece).map(|chunk| lane.feed(chunk)).sum();
            assert_eq!(ended, 20, "cut into {piece}");
        }
    }
}
