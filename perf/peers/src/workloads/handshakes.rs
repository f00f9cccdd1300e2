//! Full mutual TLS handshakes, 16 at once.
//!
//! A client sees "established" one flight before the server has judged its certificate, so a
//! handshake counts when the server's first bytes arrive: it sends one byte on its own stream.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;

use super::{Job, Stop};
use crate::Result;
use crate::measure::{Latencies, Measurement, Meter};
use crate::settings::Settings;
use crate::stack::Stack;

pub(super) fn serve<S: Stack>(settings: &Settings) -> Result<SocketAddr> {
    S::listen(settings, |mut connection| {
        tokio::spawn(async move {
            let mut hello = S::open_uni(&connection.handle).await?;
            S::write(&mut hello, Bytes::from_static(b"h")).await?;
            S::finish(&mut hello)?;
            // Held until the client closes.
            while S::accept_bi(&mut connection.bi).await.is_some() {}
            Result::Ok(())
        });
    })
}

pub(super) async fn drive<S: Stack>(client: Arc<S::Client>, job: &Job) -> Result<Measurement> {
    phase::<S>(&client, job, &Stop::after(job.warm_up())).await?;
    let meter = Meter::start(job.server_pid)?;
    let latencies = phase::<S>(&client, job, &Stop::after(job.duration)).await?;
    let reading = meter.stop()?;
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

async fn phase<S: Stack>(client: &Arc<S::Client>, job: &Job, stop: &Stop) -> Result<Latencies> {
    let mut dialers = Vec::new();
    for _ in 0..job.workload.outstanding() {
        let (client, stop, to) = (Arc::clone(client), stop.clone(), job.addresses[0]);
        dialers.push(tokio::spawn(async move {
            let mut latencies = Latencies::default();
            while !stop.is_set() {
                let started = Instant::now();
                let mut connection = S::connect(&client, to).await?;
                let mut hello = S::accept_uni(&mut connection.uni).await.ok_or("no hello")?;
                S::next_chunk(&mut hello).await?.ok_or("empty hello")?;
                latencies.record(started.elapsed());
                S::close(&connection.handle);
            }
            Result::Ok(latencies)
        }));
    }
    let mut all = Latencies::default();
    for dialer in dialers {
        all.merge(dialer.await??);
    }
    Ok(all)
}
