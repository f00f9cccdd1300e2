//! What the machine can do without a protocol: the figures no engine can pass.

use std::hint::black_box;
use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use quinn_udp::{RecvMeta, Transmit, UdpSocketState};
use ring::aead::{AES_128_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use ring::digest::{SHA256, digest};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Serialize;

use crate::Result;
use crate::plan::BULK_BYTES;
use crate::socket;

/// Most segments of one GSO train in quinn-udp.
const MAX_SEGMENTS: usize = 64;
/// Most payload of one GSO train: 65,535 less the headers.
const MAX_TRAIN_BYTES: usize = 65_507;
const SOCKET_BUFFER_BYTES: usize = 8 << 20;

/// Gigabits per second, one core, unless the name says two.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Limits {
    /// GSO trains out, GRO in, one way, sender and receiver on a core each.
    udp_1452_two_cores_gbit_per_s: f64,
    udp_8972_two_cores_gbit_per_s: f64,
    /// AES-128-GCM in place; the better of ring and aws-lc.
    aead_seal_1452_gbit_per_s: f64,
    aead_open_1452_gbit_per_s: f64,
    aead_seal_8972_gbit_per_s: f64,
    aead_open_8972_gbit_per_s: f64,
    /// 128 MiB to 128 MiB, both touched before.
    memcpy_128mib_gbit_per_s: f64,
    /// 64 KiB to 64 KiB, in the cache.
    memcpy_64kib_gbit_per_s: f64,
    /// 128 MiB; the better of ring and aws-lc.
    sha256_gbit_per_s: f64,
}

/// Takes about `seconds_each` for each limit.
pub(crate) fn measure(seconds_each: Duration, send_cpu: usize, recv_cpu: usize) -> Result<Limits> {
    let udp = |payload| raw_udp(payload, seconds_each, send_cpu, recv_cpu);
    let (udp_1452, udp_8972) = (udp(1452)?, udp(8972)?);
    let each = seconds_each;
    on_core(recv_cpu, move || {
        Ok(Limits {
            udp_1452_two_cores_gbit_per_s: udp_1452,
            udp_8972_two_cores_gbit_per_s: udp_8972,
            aead_seal_1452_gbit_per_s: seal(1452, each)?,
            aead_open_1452_gbit_per_s: open(1452, each)?,
            aead_seal_8972_gbit_per_s: seal(8972, each)?,
            aead_open_8972_gbit_per_s: open(8972, each)?,
            memcpy_128mib_gbit_per_s: memcpy(BULK_BYTES, each),
            memcpy_64kib_gbit_per_s: memcpy(64 << 10, each),
            sha256_gbit_per_s: sha256(each),
        })
    })
}

fn on_core<T: Send>(cpu: usize, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| {
        scope
            .spawn(move || {
                socket::pin_to(cpu)?;
                work()
            })
            .join()
            .map_err(|_| "a limit's thread panicked")?
    })
}

fn raw_udp(payload: usize, lasts: Duration, send_cpu: usize, recv_cpu: usize) -> Result<f64> {
    let receiver = socket::bind_loopback(SOCKET_BUFFER_BYTES)?;
    let to = receiver.local_addr()?;
    let stop = Arc::new(AtomicBool::new(false));
    let received = Arc::new(AtomicU64::new(0));
    thread::scope(|scope| {
        let (stop_seen, counter) = (Arc::clone(&stop), Arc::clone(&received));
        let sink = scope.spawn(move || {
            socket::pin_to(recv_cpu)?;
            receive_until(&receiver, &stop_seen, &counter)
        });
        let stop_seen = Arc::clone(&stop);
        let source = scope.spawn(move || {
            socket::pin_to(send_cpu)?;
            let sender = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
            let state = UdpSocketState::new((&sender).into())?;
            let segments = (MAX_TRAIN_BYTES / payload).min(MAX_SEGMENTS);
            let contents = vec![3; segments * payload];
            let transmit = Transmit {
                destination: to,
                ecn: None,
                contents: &contents,
                segment_size: Some(payload),
                src_ip: None,
            };
            while !stop_seen.load(Ordering::Relaxed) {
                match state.try_send((&sender).into(), &transmit) {
                    Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
                    _ => {}
                }
            }
            Ok(())
        });
        thread::sleep(lasts / 4);
        let (before, started) = (received.load(Ordering::Relaxed), Instant::now());
        thread::sleep(lasts);
        let bytes = received.load(Ordering::Relaxed) - before;
        let took = started.elapsed();
        stop.store(true, Ordering::Relaxed);
        source.join().map_err(|_| "the sending thread panicked")??;
        sink.join().map_err(|_| "the receiving thread panicked")??;
        Ok(crate::measure::gbit_per_s(bytes as usize, took))
    })
}

fn receive_until(socket: &UdpSocket, stop: &AtomicBool, received: &AtomicU64) -> io::Result<()> {
    let state = UdpSocketState::new(socket.into())?;
    let mut memory = vec![0; 1 << 16];
    while !stop.load(Ordering::Relaxed) {
        let mut meta = [RecvMeta::default()];
        let mut slices = [io::IoSliceMut::new(&mut memory)];
        match state.recv(socket.into(), &mut slices, &mut meta) {
            Ok(_) => {
                received.fetch_add(meta[0].len as u64, Ordering::Relaxed);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let mut waits = [PollFd::new(socket, PollFlags::IN)];
                poll(
                    &mut waits,
                    Some(&Timespec {
                        tv_sec: 0,
                        tv_nsec: 10_000_000,
                    }),
                )?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Repeats until the time is over; `bytes` each.
fn rate(bytes: usize, lasts: Duration, mut once: impl FnMut()) -> f64 {
    once();
    let repeats_between_looks = (1 << 20) / bytes.min(1 << 20);
    let started = Instant::now();
    let mut done = 0;
    while started.elapsed() < lasts {
        for _ in 0..repeats_between_looks {
            once();
        }
        done += repeats_between_looks * bytes;
    }
    crate::measure::gbit_per_s(done, started.elapsed())
}

fn seal(payload: usize, lasts: Duration) -> Result<f64> {
    let key = LessSafeKey::new(UnboundKey::new(&AES_128_GCM, &[1; 16]).map_err(|_| "aes key")?);
    let mut packet = vec![5; payload - AES_128_GCM.tag_len()];
    let by_ring = rate(payload, lasts / 2, || {
        let nonce = Nonce::assume_unique_for_key([2; 12]);
        let tag = key.seal_in_place_separate_tag(nonce, Aad::from([0; 20]), &mut packet);
        let _tag = black_box(tag);
    });
    let key = aws_lc_key()?;
    let by_aws_lc = rate(payload, lasts / 2, || {
        let nonce = aws_lc_rs::aead::Nonce::assume_unique_for_key([2; 12]);
        let aad = aws_lc_rs::aead::Aad::from([0; 20]);
        let _tag = black_box(key.seal_in_place_separate_tag(nonce, aad, &mut packet));
    });
    Ok(by_ring.max(by_aws_lc))
}

/// Opening destroys the packet, so each repeat first restores it; the copy is part of the figure.
fn open(payload: usize, lasts: Duration) -> Result<f64> {
    let key = LessSafeKey::new(UnboundKey::new(&AES_128_GCM, &[1; 16]).map_err(|_| "aes key")?);
    let mut sealed = vec![5; payload - AES_128_GCM.tag_len()];
    let nonce = Nonce::assume_unique_for_key([2; 12]);
    key.seal_in_place_append_tag(nonce, Aad::from([0; 20]), &mut sealed)
        .map_err(|_| "seal")?;
    let mut packet = sealed.clone();
    let mut opened = true;
    let by_ring = rate(payload, lasts / 2, || {
        packet.copy_from_slice(&sealed);
        let nonce = Nonce::assume_unique_for_key([2; 12]);
        opened &= key
            .open_in_place(nonce, Aad::from([0; 20]), &mut packet)
            .is_ok();
    });
    let key = aws_lc_key()?;
    let by_aws_lc = rate(payload, lasts / 2, || {
        packet.copy_from_slice(&sealed);
        let nonce = aws_lc_rs::aead::Nonce::assume_unique_for_key([2; 12]);
        let aad = aws_lc_rs::aead::Aad::from([0; 20]);
        opened &= key.open_in_place(nonce, aad, &mut packet).is_ok();
    });
    if opened {
        Ok(by_ring.max(by_aws_lc))
    } else {
        Err("a sealed packet did not open".into())
    }
}

fn aws_lc_key() -> Result<aws_lc_rs::aead::LessSafeKey> {
    let key = aws_lc_rs::aead::UnboundKey::new(&aws_lc_rs::aead::AES_128_GCM, &[1; 16])?;
    Ok(aws_lc_rs::aead::LessSafeKey::new(key))
}

fn memcpy(bytes: usize, lasts: Duration) -> f64 {
    let from = vec![1u8; bytes];
    let mut to = vec![2u8; bytes];
    rate(bytes, lasts, || {
        to.copy_from_slice(black_box(&from));
        black_box(&mut to);
    })
}

fn sha256(lasts: Duration) -> f64 {
    let body = vec![1u8; 16 << 20];
    let by_ring = rate(body.len(), lasts / 2, || {
        black_box(digest(&SHA256, &body));
    });
    let by_aws_lc = rate(body.len(), lasts / 2, || {
        black_box(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &body));
    });
    by_ring.max(by_aws_lc)
}
