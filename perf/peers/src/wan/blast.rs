//! The link itself as a contender: datagrams a little faster than the link takes them, counted
//! where they arrive. What it shows is what the relay and the sockets can carry.

use std::io::{self, IoSliceMut};
use std::time::Duration;

use quinn_udp::{BATCH_SIZE, RecvMeta, Transmit, UdpSocketState};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::child::{Arrivals, BodyOutcome, End, Job, Outcome};
use super::clock;
use crate::{Result, socket, workloads};

const PAYLOAD_BYTES: usize = 1_452;
/// Datagrams of one train.
const TRAIN: usize = 8;
/// Offered load by the link's rate.
const OVERLOAD: f64 = 1.05;
const SOCKET_BUFFER_BYTES: usize = 8 << 20;

/// Counts what arrives until the parent goes away.
pub(super) fn serve(arrivals: &Arrivals) -> Result<()> {
    let socket = socket::bind_loopback(SOCKET_BUFFER_BYTES)?;
    let state = UdpSocketState::new((&socket).into())?;
    workloads::announce(&[socket.local_addr()?])?;
    let mut buffers = vec![vec![0; 1 << 16]; BATCH_SIZE];
    let mut metas = [RecvMeta::default(); BATCH_SIZE];
    loop {
        let wait = Timespec {
            tv_sec: 1,
            tv_nsec: 0,
        };
        poll(&mut [PollFd::new(&socket, PollFlags::IN)], Some(&wait))?;
        let mut slices: Vec<_> = buffers.iter_mut().map(|b| IoSliceMut::new(b)).collect();
        match state.recv((&socket).into(), &mut slices, &mut metas) {
            Ok(count) => metas[..count]
                .iter()
                .for_each(|meta| arrivals.add(meta.len)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Sends for `cut_s`, and waits until the last datagram is there.
pub(super) fn drive(job: &Job) -> Result<Outcome> {
    let socket = socket::bind_loopback(SOCKET_BUFFER_BYTES)?;
    let state = UdpSocketState::new((&socket).into())?;
    let train = vec![7; PAYLOAD_BYTES * TRAIN];
    let transmit = Transmit {
        destination: job.to,
        ecn: None,
        contents: &train,
        segment_size: Some(PAYLOAD_BYTES),
        src_ip: None,
    };
    let bytes_per_s = job.link_bits_per_s as f64 / 8.0 * OVERLOAD;
    let every = Duration::from_secs_f64(train.len() as f64 / bytes_per_s);
    let started_ns = clock::now_ns();
    let over = clock::now() + Duration::from_secs_f64(job.cut_s);
    let mut next = clock::now();
    while next < over {
        std::thread::sleep(next.saturating_sub(clock::now()));
        state.send((&socket).into(), &transmit)?;
        next += every;
    }
    let ended_ns = clock::now_ns();
    std::thread::sleep(job.before.lasts());
    Ok(Outcome {
        connected_s: Some(0.0),
        bodies: vec![BodyOutcome {
            started_ns,
            ended_ns,
            end: End::Cut,
        }],
        ..Outcome::default()
    })
}
