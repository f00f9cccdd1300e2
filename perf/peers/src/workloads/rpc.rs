//! RPC of 1 KiB each way, N outstanding: a bidirectional stream each, or one for each caller.

use std::net::SocketAddr;
use std::time::Instant;

use bytes::Bytes;

use super::{Job, Stop};
use crate::Result;
use crate::measure::{Latencies, Measurement, Meter};
use crate::plan::{RPC_BYTES, Workload};
use crate::settings::Settings;
use crate::stack::Stack;

static MESSAGE: [u8; RPC_BYTES] = [7; RPC_BYTES];

pub(super) fn serve<S: Stack>(workload: Workload, settings: &Settings) -> Result<SocketAddr> {
    let (task_per_request, held) = (settings.task_per_request, workload.holds_streams());
    S::listen(settings, move |mut connection| {
        tokio::spawn(async move {
            while let Some((send, recv)) = S::accept_bi(&mut connection.bi).await {
                if held {
                    tokio::spawn(answer_all::<S>(send, recv));
                } else if task_per_request {
                    tokio::spawn(answer::<S>(send, recv));
                } else {
                    answer::<S>(send, recv).await?;
                }
            }
            Result::Ok(())
        });
    })
}

pub(super) async fn drive<S: Stack>(client: &S::Client, job: &Job) -> Result<Measurement> {
    let connection = S::connect(client, job.addresses[0]).await?;
    phase::<S>(&connection.handle, job, &Stop::after(job.warm_up())).await?;
    let meter = Meter::start(job.server_pid)?;
    let stop = Stop::after(job.duration);
    let latencies = phase::<S>(&connection.handle, job, &stop).await?;
    let reading = meter.stop()?;
    S::close(&connection.handle);
    let rps = latencies.len() as f64 / reading.wall.as_secs_f64();
    let [p50_us, p99_us] = latencies.quantiles_us([0.5, 0.99]);
    Ok(Measurement {
        p50_us,
        p99_us,
        rps: Some(rps),
        cores_used: Some(reading.cores_used()),
        ..Measurement::default()
    })
}

async fn phase<S: Stack>(handle: &S::Handle, job: &Job, stop: &Stop) -> Result<Latencies> {
    let mut callers = Vec::new();
    for _ in 0..job.workload.outstanding() {
        let (handle, stop) = (handle.clone(), stop.clone());
        callers.push(if job.workload.holds_streams() {
            tokio::spawn(holding_caller::<S>(handle, stop))
        } else {
            tokio::spawn(caller::<S>(handle, stop))
        });
    }
    let mut all = Latencies::default();
    for caller in callers {
        all.merge(caller.await??);
    }
    Ok(all)
}

/// One outstanding RPC after the other.
pub(super) async fn caller<S: Stack>(handle: S::Handle, stop: Stop) -> Result<Latencies> {
    let mut latencies = Latencies::default();
    let mut response = [0; RPC_BYTES];
    while !stop.is_set() {
        let started = Instant::now();
        let (mut send, mut recv) = S::open_bi(&handle).await?;
        S::prioritise(&send);
        S::write(&mut send, Bytes::from_static(&MESSAGE)).await?;
        S::finish(&mut send)?;
        if S::read_to_end(&mut recv, &mut response).await? != RPC_BYTES {
            return Err("short response".into());
        }
        latencies.record(started.elapsed());
    }
    Ok(latencies)
}

/// As [`caller`], on one stream for all its RPCs.
async fn holding_caller<S: Stack>(handle: S::Handle, stop: Stop) -> Result<Latencies> {
    let mut latencies = Latencies::default();
    let mut response = [0; RPC_BYTES];
    let (mut send, mut recv) = S::open_bi(&handle).await?;
    while !stop.is_set() {
        let started = Instant::now();
        S::write(&mut send, Bytes::from_static(&MESSAGE)).await?;
        if !S::read_exact(&mut recv, &mut response).await? {
            return Err("no response".into());
        }
        latencies.record(started.elapsed());
    }
    S::finish(&mut send)?;
    Ok(latencies)
}

async fn answer_all<S: Stack>(mut send: S::Send, mut recv: S::Recv) -> Result<()> {
    let mut request = [0; RPC_BYTES];
    while S::read_exact(&mut recv, &mut request).await? {
        S::write(&mut send, Bytes::from_static(&MESSAGE)).await?;
    }
    S::finish(&mut send)
}

async fn answer<S: Stack>(mut send: S::Send, mut recv: S::Recv) -> Result<()> {
    let mut request = [0; RPC_BYTES];
    if S::read_to_end(&mut recv, &mut request).await? != RPC_BYTES {
        return Err("short request".into());
    }
    respond::<S>(&mut send).await
}

pub(super) async fn respond<S: Stack>(send: &mut S::Send) -> Result<()> {
    S::prioritise(send);
    S::write(send, Bytes::from_static(&MESSAGE)).await?;
    S::finish(send)
}
