//! Both halves of a cell, written once over [`Stack`] for quinn and s2n-quic.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::{sleep, timeout};

use super::child::{Arrivals, Before, BodyOutcome, End, Job, LAST_RPC, Outcome, RpcLog};
use super::clock;
use crate::Result;
use crate::plan::RPC_BYTES;
use crate::settings::Settings;
use crate::stack::Stack;
use crate::workloads::{self, bulk, pattern, static_body};

static MESSAGE: [u8; RPC_BYTES] = [7; RPC_BYTES];

/// Serves until the parent goes away.
pub(super) async fn serve<S: Stack>(settings: Settings, arrivals: Arrivals) -> Result<()> {
    let address = S::listen(&settings, move |mut connection| {
        let arrivals = arrivals.clone();
        tokio::spawn(async move {
            while let Some((send, recv)) = S::accept_bi(&mut connection.bi).await {
                tokio::spawn(receive::<S>(send, recv, arrivals.clone()));
            }
        });
    })?;
    workloads::announce(&[address])?;
    std::future::pending().await
}

/// A stream that ends within 1 KiB is an RPC; what goes on is a body, which is looked at and thrown
/// away.
async fn receive<S: Stack>(mut send: S::Send, mut recv: S::Recv, arrivals: Arrivals) -> Result<()> {
    let mut length = 0;
    let mut is_body = false;
    while let Some(chunk) = S::next_chunk(&mut recv).await? {
        if length + chunk.len() > RPC_BYTES {
            if chunk.first() != Some(&pattern(length)) && length >= RPC_BYTES {
                return Err(format!("body differs at {length}").into());
            }
            arrivals.add(if is_body {
                chunk.len()
            } else {
                length + chunk.len()
            });
            is_body = true;
        }
        length += chunk.len();
    }
    if is_body {
        S::write(&mut send, Bytes::from_static(b"k")).await?;
    } else {
        S::prioritise(&send);
        S::write(&mut send, Bytes::from_static(&MESSAGE)).await?;
    }
    S::finish(&mut send)
}

pub(super) async fn drive<S: Stack>(job: &Job, settings: &Settings) -> Result<Outcome> {
    let Before::Idle { .. } = job.before else {
        return Err("the peers are measured after idleness alone".into());
    };
    let mut outcome = Outcome::default();
    let body = static_body(job.body_bytes);
    let client = S::client(settings)?;
    let dialled = clock::now();
    let within = Duration::from_secs_f64(job.connect_within_s);
    let Ok(Ok(connection)) = timeout(within, S::connect(&client, job.to)).await else {
        return Ok(outcome);
    };
    outcome.connected_s = Some((clock::now() - dialled).as_secs_f64());
    sleep(job.before.lasts()).await;
    sleep(clock::until(job.starts_at_ns.unwrap_or_default())).await;

    let rpcs = RpcLog::default();
    if job.has_rpcs {
        tokio::spawn(ask::<S>(connection.handle.clone(), rpcs.clone()));
    }
    for _ in 0..job.bodies {
        let started_ns = clock::now_ns();
        let transfer = bulk::transfer::<S>(&connection.handle, &body, settings.slice_bytes);
        let end = match timeout(job.cut_in(), transfer).await {
            Ok(Ok(())) => End::Whole,
            Ok(Err(error)) => End::Lost(error.to_string()),
            Err(_over) => End::Cut,
        };
        let is_last = end != End::Whole;
        outcome.bodies.push(BodyOutcome {
            started_ns,
            ended_ns: clock::now_ns(),
            end,
        });
        rpcs.stop();
        if is_last {
            break;
        }
    }
    let waits = async {
        while rpcs.is_waiting() {
            sleep(Duration::from_millis(1)).await;
        }
    };
    // It counts with the time that it waited, if it is not back by then.
    timeout(LAST_RPC, waits).await.ok();
    rpcs.fill(&mut outcome);
    outcome.packets = S::packets(&connection.handle);
    S::close(&connection.handle);
    Ok(outcome)
}

/// One RPC after the other, until the log wants no more.
async fn ask<S: Stack>(handle: S::Handle, log: RpcLog) -> Result<()> {
    let mut response = [0; RPC_BYTES];
    while log.ask() {
        let (mut send, mut recv) = S::open_bi(&handle).await?;
        S::prioritise(&send);
        S::write(&mut send, Bytes::from_static(&MESSAGE)).await?;
        S::finish(&mut send)?;
        if S::read_to_end(&mut recv, &mut response).await? != RPC_BYTES {
            return Err("short response".into());
        }
        log.answered();
    }
    Ok(())
}
