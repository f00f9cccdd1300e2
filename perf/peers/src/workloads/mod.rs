//! The workloads, written once over [`Stack`]: each has a serving and a driving half.

pub(crate) mod bulk;
mod fanout;
mod handshakes;
mod mixed;
mod oneway;
mod rpc;

use std::io::{Write, stdout};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;

use crate::Result;
use crate::measure::Measurement;
use crate::plan::{OnewayShape, Workload};
use crate::settings::Settings;
use crate::stack::Stack;

/// Share of the measured time that runs first, unmeasured.
const WARM_UP_SHARE: f64 = 0.25;

/// What a `drive` process was asked for.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) workload: Workload,
    pub(crate) server_pid: u32,
    pub(crate) addresses: Vec<SocketAddr>,
    pub(crate) duration: Duration,
    pub(crate) transfers: usize,
}

impl Job {
    pub(crate) fn warm_up(&self) -> Duration {
        self.duration.mul_f64(WARM_UP_SHARE)
    }
}

/// Tells the parent where the servers listen.
pub(crate) fn announce(addresses: &[SocketAddr]) -> Result<()> {
    let list: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    let mut out = stdout().lock();
    writeln!(out, "ready {}", list.join(" "))?;
    Ok(out.flush()?)
}

/// Serves until the parent goes away.
pub(crate) async fn serve<S: Stack>(workload: Workload, settings: Settings) -> Result<()> {
    let mut addresses = Vec::new();
    for _ in 0..workload.servers() {
        addresses.push(match workload {
            Workload::Bulk1452 | Workload::Bulk8972 => bulk::serve::<S>(&settings)?,
            Workload::Rpc1
            | Workload::Rpc64
            | Workload::Rpc400
            | Workload::Rpc64Held
            | Workload::Rpc400Held => rpc::serve::<S>(workload, &settings)?,
            Workload::OnewayDatagram | Workload::OnewayUni | Workload::OnewayLane => {
                oneway::serve::<S>(&settings)?
            }
            Workload::Handshakes => handshakes::serve::<S>(&settings)?,
            Workload::Fanout12 => fanout::serve::<S>(&settings)?,
            Workload::RpcUnderBulk => mixed::serve::<S>(&settings)?,
        });
    }
    announce(&addresses)?;
    std::future::pending().await
}

pub(crate) async fn drive<S: Stack>(job: Job, settings: Settings) -> Result<Measurement> {
    let client = S::client(&settings)?;
    let mut measurement = match job.workload {
        Workload::Bulk1452 | Workload::Bulk8972 => bulk::drive::<S>(&client, &job, &settings).await,
        Workload::Rpc1
        | Workload::Rpc64
        | Workload::Rpc400
        | Workload::Rpc64Held
        | Workload::Rpc400Held => rpc::drive::<S>(&client, &job).await,
        Workload::OnewayDatagram => oneway::drive::<S>(&client, &job, OnewayShape::Datagram).await,
        Workload::OnewayUni => oneway::drive::<S>(&client, &job, OnewayShape::Uni).await,
        Workload::OnewayLane => oneway::drive::<S>(&client, &job, OnewayShape::Lane).await,
        Workload::Handshakes => handshakes::drive::<S>(Arc::new(client), &job).await,
        Workload::Fanout12 => fanout::drive::<S>(&client, &job).await,
        Workload::RpcUnderBulk => mixed::drive::<S>(&client, &job, &settings).await,
    }?;
    measurement.rss_bytes = crate::measure::peak_rss_bytes(job.server_pid)?;
    Ok(measurement)
}

/// A body that is in memory already, for its sender.
pub(crate) fn static_body(bytes: usize) -> Bytes {
    Bytes::from((0..bytes).map(pattern).collect::<Vec<u8>>())
}

/// Memory that every transfer is received into; touched here so that no transfer pays for it.
pub(crate) fn reusable_memory(bytes: usize) -> Vec<u8> {
    vec![0xa5; bytes]
}

/// Byte of a body at an offset. A prime period: pieces out of place do not look right.
pub(crate) fn pattern(offset: usize) -> u8 {
    (offset % 251) as u8
}

/// Looks at a byte in every page and at the last one.
pub(crate) fn check_body(body: &[u8]) -> Result<()> {
    let last = body.len().saturating_sub(1);
    let wrong = (0..body.len())
        .step_by(4096)
        .chain([last])
        .find(|&at| body[at] != pattern(at));
    wrong.map_or(Ok(()), |at| Err(format!("body differs at {at}").into()))
}

/// Shared by the tasks of a timed phase.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stop(Arc<AtomicBool>);

impl Stop {
    pub(crate) fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    pub(crate) fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Sets itself when the time is over.
    pub(crate) fn after(duration: Duration) -> Self {
        let stop = Self::default();
        let timer = stop.clone();
        tokio::spawn(async move {
            tokio::time::sleep(duration).await;
            timer.set();
        });
        stop
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_out_of_place_is_seen() {
        let mut body = static_body(64 << 10).to_vec();
        assert!(check_body(&body).is_ok());
        body.copy_within(4096..8192, 8192);
        assert!(check_body(&body).is_err());
    }
}
