//! One body of 128 MiB at a time over one connection, received into one place in memory.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use millrace_perf::report::median;
use tokio::sync::Mutex;

use super::{Job, check_body, reusable_memory, static_body};
use crate::Result;
use crate::measure::{Measurement, Meter, gbit_per_s};
use crate::plan::BULK_BYTES;
use crate::settings::Settings;
use crate::stack::Stack;

pub(super) fn serve<S: Stack>(settings: &Settings) -> Result<SocketAddr> {
    let memory = Arc::new(Mutex::new(reusable_memory(BULK_BYTES)));
    S::listen(settings, move |mut connection| {
        let memory = Arc::clone(&memory);
        tokio::spawn(async move {
            let mut body = memory.lock().await;
            let mut checked = false;
            while let Some((mut send, mut recv)) = S::accept_bi(&mut connection.bi).await {
                let length = S::read_to_end(&mut recv, &mut body).await?;
                if length != BULK_BYTES {
                    return Err(format!("received {length} bytes").into());
                }
                if !checked {
                    check_body(&body)?;
                    checked = true;
                }
                S::write(&mut send, Bytes::from_static(b"k")).await?;
                S::finish(&mut send)?;
            }
            Result::Ok(())
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
    // Two first: the congestion window opens, memory is touched, the content is checked.
    for _ in 0..2 {
        transfer::<S>(&connection.handle, &body, settings.slice_bytes).await?;
    }
    let meter = Meter::start(job.server_pid)?;
    let mut rates = Vec::with_capacity(job.transfers);
    for _ in 0..job.transfers {
        let started = Instant::now();
        transfer::<S>(&connection.handle, &body, settings.slice_bytes).await?;
        rates.push(gbit_per_s(BULK_BYTES, started.elapsed()));
    }
    let reading = meter.stop()?;
    S::close(&connection.handle);
    Ok(Measurement {
        gbit_per_s: median(rates),
        cpu_s_per_gb: Some(reading.cpu_s_per_gb(BULK_BYTES * job.transfers)),
        cores_used: Some(reading.cores_used()),
        ..Measurement::default()
    })
}

/// Sends the body and waits until the receiver has all of it.
pub(crate) async fn transfer<S: Stack>(
    handle: &S::Handle,
    body: &Bytes,
    slice_bytes: usize,
) -> Result<()> {
    let (mut send, mut recv) = S::open_bi(handle).await?;
    let mut at = 0;
    while at < body.len() {
        let end = (at + slice_bytes).min(body.len());
        S::write(&mut send, body.slice(at..end)).await?;
        at = end;
    }
    S::finish(&mut send)?;
    let mut answer = [0; 1];
    match S::read_to_end(&mut recv, &mut answer).await? {
        1 => Ok(()),
        _ => Err("the receiver did not confirm".into()),
    }
}
