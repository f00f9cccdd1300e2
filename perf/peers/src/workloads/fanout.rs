//! One node sends messages of 1 MB to 12 peers, one outstanding at each; a peer answers 10 bytes.

use std::net::SocketAddr;
use std::time::Instant;

use bytes::Bytes;

use super::{Job, Stop, check_body, reusable_memory, static_body};
use crate::Result;
use crate::measure::{Latencies, Measurement, Meter, gbit_per_s};
use crate::plan::{FANOUT_BYTES, FANOUT_REPLY_BYTES};
use crate::settings::Settings;
use crate::stack::Stack;

pub(super) fn serve<S: Stack>(settings: &Settings) -> Result<SocketAddr> {
    S::listen(settings, |mut connection| {
        tokio::spawn(async move {
            let mut body = reusable_memory(FANOUT_BYTES);
            let mut checked = false;
            while let Some((mut send, mut recv)) = S::accept_bi(&mut connection.bi).await {
                if S::read_to_end(&mut recv, &mut body).await? != FANOUT_BYTES {
                    return Err("short message".into());
                }
                if !checked {
                    check_body(&body)?;
                    checked = true;
                }
                S::write(&mut send, Bytes::from_static(&[1; FANOUT_REPLY_BYTES])).await?;
                S::finish(&mut send)?;
            }
            Result::Ok(())
        });
    })
}

pub(super) async fn drive<S: Stack>(client: &S::Client, job: &Job) -> Result<Measurement> {
    let mut connections = Vec::new();
    for &address in &job.addresses {
        connections.push(S::connect(client, address).await?);
    }
    let handles: Vec<_> = connections
        .iter()
        .map(|connection| connection.handle.clone())
        .collect();
    let body = static_body(FANOUT_BYTES);
    phase::<S>(&handles, &body, &Stop::after(job.warm_up())).await?;
    let meter = Meter::start(job.server_pid)?;
    let latencies = phase::<S>(&handles, &body, &Stop::after(job.duration)).await?;
    let reading = meter.stop()?;
    handles.iter().for_each(S::close);
    let bytes = latencies.len() * FANOUT_BYTES;
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

async fn phase<S: Stack>(handles: &[S::Handle], body: &Bytes, stop: &Stop) -> Result<Latencies> {
    let mut senders = Vec::new();
    for handle in handles {
        let (handle, body, stop) = (handle.clone(), body.clone(), stop.clone());
        senders.push(tokio::spawn(async move {
            let mut latencies = Latencies::default();
            let mut reply = [0; FANOUT_REPLY_BYTES];
            while !stop.is_set() {
                let started = Instant::now();
                let (mut send, mut recv) = S::open_bi(&handle).await?;
                S::write(&mut send, body.clone()).await?;
                S::finish(&mut send)?;
                if S::read_to_end(&mut recv, &mut reply).await? != FANOUT_REPLY_BYTES {
                    return Err("short reply".into());
                }
                latencies.record(started.elapsed());
            }
            Result::Ok(latencies)
        }));
    }
    let mut all = Latencies::default();
    for sender in senders {
        all.merge(sender.await??);
    }
    Ok(all)
}
