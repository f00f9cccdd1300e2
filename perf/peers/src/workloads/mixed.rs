//! RPC of 1 KiB, one outstanding, while bodies of 128 MiB follow one another on the same
//! connection.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::Mutex;

use super::{Job, Stop, bulk, reusable_memory, rpc, static_body};
use crate::Result;
use crate::measure::{Measurement, Meter, gbit_per_s};
use crate::plan::{BULK_BYTES, RPC_BYTES};
use crate::settings::Settings;
use crate::stack::Stack;

pub(super) fn serve<S: Stack>(settings: &Settings) -> Result<SocketAddr> {
    let memory = Arc::new(Mutex::new(reusable_memory(BULK_BYTES)));
    S::listen(settings, move |mut connection| {
        let memory = Arc::clone(&memory);
        tokio::spawn(async move {
            while let Some((send, recv)) = S::accept_bi(&mut connection.bi).await {
                tokio::spawn(receive::<S>(send, recv, Arc::clone(&memory)));
            }
        });
    })
}

pub(super) async fn drive<S: Stack>(
    client: &S::Client,
    job: &Job,
    settings: &Settings,
) -> Result<Measurement> {
    let body = static_body(BULK_BYTES);
    let connection = S::connect(client, job.addresses[0]).await?;
    bulk::transfer::<S>(&connection.handle, &body, settings.slice_bytes).await?;
    let stop = Stop::default();
    let meter = Meter::start(job.server_pid)?;
    let caller = tokio::spawn(rpc::caller::<S>(connection.handle.clone(), stop.clone()));
    for _ in 0..job.transfers {
        bulk::transfer::<S>(&connection.handle, &body, settings.slice_bytes).await?;
    }
    let reading = meter.stop()?;
    stop.set();
    let latencies = caller.await??;
    S::close(&connection.handle);
    let bytes = BULK_BYTES * job.transfers;
    let rps = latencies.len() as f64 / reading.wall.as_secs_f64();
    let [p50_us, p99_us] = latencies.quantiles_us([0.5, 0.99]);
    Ok(Measurement {
        gbit_per_s: Some(gbit_per_s(bytes, reading.wall)),
        cpu_s_per_gb: Some(reading.cpu_s_per_gb(bytes)),
        p50_us,
        p99_us,
        rps: Some(rps),
        cores_used: Some(reading.cores_used()),
        ..Measurement::default()
    })
}

/// A stream that ends within 1 KiB is an RPC; what goes on is a body.
async fn receive<S: Stack>(
    mut send: S::Send,
    mut recv: S::Recv,
    memory: Arc<Mutex<Vec<u8>>>,
) -> Result<()> {
    let mut head = [0; RPC_BYTES];
    let mut length = 0;
    while let Some(chunk) = S::next_chunk(&mut recv).await? {
        if let Some(place) = head.get_mut(length..length + chunk.len()) {
            place.copy_from_slice(&chunk);
            length += chunk.len();
            continue;
        }
        let mut body = memory.lock().await;
        body[..length].copy_from_slice(&head[..length]);
        body[length..length + chunk.len()].copy_from_slice(&chunk);
        length += chunk.len();
        length += S::read_to_end(&mut recv, &mut body[length..]).await?;
        if length != BULK_BYTES {
            return Err("short body".into());
        }
        S::write(&mut send, Bytes::from_static(b"k")).await?;
        return S::finish(&mut send);
    }
    if length != RPC_BYTES {
        return Err("short request".into());
    }
    rpc::respond::<S>(&mut send).await
}
