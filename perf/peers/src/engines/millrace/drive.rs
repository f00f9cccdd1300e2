//! The driving side: when its peers are up, one task on the shard runs the whole measurement.

use std::cell::Cell;
use std::future::Future;
use std::rc::Rc;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use millrace_perf::report::median;
use millrace_protocol::frame::{Class, Method, Negotiated};
use millrace_protocol::id::{ConnectionNumber, NodeId};
use millrace_shards::chunk::Body;
use millrace_shards::{Queue, yield_now};
use millrace_transport::{
    Answer, Defer, Inbound, Messenger, Payload, Request, RpcError, Service, ShardMessenger,
};
use tokio::sync::oneshot;

use super::{
    BODY, COUNT, Identities, ONEWAY, RPC, body_bytes, handshakes, member, nowhere, pattern_body,
    rpc_body, shard, start, topology,
};
use crate::measure::{Latencies, Measurement, Meter, gbit_per_s};
use crate::plan::{BULK_BYTES, Engine, FANOUT_BYTES, ONEWAY_BYTES, RPC_BYTES, Workload};
use crate::settings::Settings;
use crate::workloads::Job;
use crate::{Error, Result};

static ONEWAY_MESSAGE: [u8; ONEWAY_BYTES] = [9; ONEWAY_BYTES];
/// One-way messages handed over between two looks at the clock.
const ONEWAY_BATCH: usize = 64;
/// No measured request comes near it.
const DEADLINE: Duration = Duration::from_secs(20);

pub(crate) fn drive(engine: Engine, job: Job, settings: &Settings) -> Result<Measurement> {
    let server_pid = job.server_pid;
    let mut measurement = if job.workload == Workload::Handshakes {
        handshakes::drive(engine, &job, settings)?
    } else {
        let identities = Identities::new();
        let me = identities.driver(0);
        let servers = job.addresses.iter().enumerate();
        let members = servers.map(|(index, &address)| member(identities.server(index), address));
        let topology = topology(members.chain([member(me, nowhere())]), 1);
        let shard = shard(engine, job.workload, 1);
        let (sender, result) = channel();
        let job = std::sync::Arc::new(job);
        let node = start(me, &topology, shard, settings, move |messenger| Driver {
            messenger,
            job: std::sync::Arc::clone(&job),
            result: sender.clone(),
            peers: Vec::new(),
        })?;
        let measurement = result.recv()??;
        node.shutdown();
        measurement
    };
    measurement.rss_bytes = crate::measure::peak_rss_bytes(server_pid)?;
    Ok(measurement)
}

/// Starts the measurement once every peer is up.
struct Driver {
    messenger: ShardMessenger,
    job: std::sync::Arc<Job>,
    result: Sender<Result<Measurement>>,
    peers: Vec<NodeId>,
}

impl Service for Driver {
    fn on_request(&mut self, _request: Inbound<'_>, _defer: Defer<'_>) -> Answer {
        Answer::Reply(Payload::Empty)
    }

    fn on_send(&mut self, _message: Inbound<'_>) {}

    fn on_up(&mut self, peer: NodeId, _connection: ConnectionNumber, _hello: &Negotiated) {
        self.peers.push(peer);
        if self.peers.len() == self.job.addresses.len() {
            let run = Run {
                messenger: self.messenger.clone(),
                job: std::sync::Arc::clone(&self.job),
                peers: self.peers.clone(),
            };
            let result = self.result.clone();
            self.messenger.spawn(Queue::Latency, async move {
                // Fails when the driver has stopped waiting; then the result is not needed.
                result.send(run.measure().await).ok();
            });
        }
    }
}

/// One measurement, on the shard.
#[derive(Clone)]
struct Run {
    messenger: ShardMessenger,
    job: std::sync::Arc<Job>,
    peers: Vec<NodeId>,
}

impl Run {
    async fn measure(self) -> Result<Measurement> {
        match self.job.workload {
            Workload::Bulk1452 | Workload::Bulk8972 => self.bulk().await,
            Workload::Rpc1 | Workload::Rpc64 | Workload::Rpc400 => self.rpc().await,
            Workload::OnewayDatagram | Workload::OnewayUni | Workload::OnewayLane => {
                self.oneway().await
            }
            Workload::Fanout12 => self.fanout().await,
            Workload::RpcUnderBulk => self.mixed().await,
            Workload::Handshakes | Workload::Rpc64Held | Workload::Rpc400Held => {
                Err("not a workload of this driver".into())
            }
        }
    }

    async fn bulk(self) -> Result<Measurement> {
        let body = self.body()?;
        for _ in 0..2 {
            self.transfer(self.peers[0], &body).await?;
        }
        let meter = Meter::start(self.job.server_pid)?;
        let mut rates = Vec::with_capacity(self.job.transfers);
        for _ in 0..self.job.transfers {
            let started = Instant::now();
            self.transfer(self.peers[0], &body).await?;
            rates.push(gbit_per_s(BULK_BYTES, started.elapsed()));
        }
        let reading = meter.stop()?;
        Ok(Measurement {
            gbit_per_s: median(rates),
            cpu_s_per_gb: Some(reading.cpu_s_per_gb(BULK_BYTES * self.job.transfers)),
            cores_used: Some(reading.cores_used()),
            ..Measurement::default()
        })
    }

    async fn rpc(self) -> Result<Measurement> {
        self.callers(Instant::now() + self.job.warm_up()).await?;
        let meter = Meter::start(self.job.server_pid)?;
        let latencies = self.callers(Instant::now() + self.job.duration).await?;
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

    async fn callers(&self, until: Instant) -> Result<Latencies> {
        let outstanding = self.job.workload.outstanding();
        self.side_by_side(outstanding, |run, _| async move {
            run.calls(Class::Normal, || Instant::now() >= until).await
        })
        .await
    }

    /// One outstanding RPC after the other.
    async fn calls(&self, class: Class, is_over: impl Fn() -> bool) -> Result<Latencies> {
        let mut latencies = Latencies::default();
        while !is_over() {
            let started = Instant::now();
            let answer = self
                .ask(self.peers[0], class, RPC, rpc_body().into())
                .await?;
            if answer.len() != RPC_BYTES as u64 {
                return Err("short response".into());
            }
            latencies.record(started.elapsed());
        }
        Ok(latencies)
    }

    async fn oneway(self) -> Result<Measurement> {
        self.send_until(Instant::now() + self.job.warm_up()).await?;
        let before = self.count().await?;
        let meter = Meter::start(self.job.server_pid)?;
        self.send_until(Instant::now() + self.job.duration).await?;
        let after = self.count().await?;
        let reading = meter.stop()?;
        let count = after - before;
        Ok(Measurement {
            rps: Some(count as f64 / reading.wall.as_secs_f64()),
            gbit_per_s: Some(gbit_per_s(count as usize * ONEWAY_BYTES, reading.wall)),
            cores_used: Some(reading.cores_used()),
            ..Measurement::default()
        })
    }

    async fn send_until(&self, until: Instant) -> Result<()> {
        while Instant::now() < until {
            for _ in 0..ONEWAY_BATCH {
                let peer = self.peers[0];
                match self
                    .messenger
                    .send_slice(peer, Class::Normal, ONEWAY, &ONEWAY_MESSAGE)
                {
                    Ok(()) => {}
                    // Full: the loop sends what waits before this goes on.
                    Err(RpcError::LocalBusy(_)) => break,
                    Err(error) => return Err(error.into()),
                }
            }
            yield_now().await;
        }
        Ok(())
    }

    /// Asks what has arrived until two answers agree.
    async fn count(&self) -> Result<u64> {
        let mut last = None;
        loop {
            let request = Request {
                class: Class::Normal,
                method: COUNT,
                body: Payload::Empty,
                deadline: DEADLINE.into(),
            };
            let answer = match self.messenger.request(self.peers[0], request).await {
                Ok(answer) => answer,
                // The messages before it still fill the queue.
                Err(RpcError::LocalBusy(_)) => {
                    yield_now().await;
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            let bytes = answer.as_slice().and_then(|slice| slice.try_into().ok());
            let count = u64::from_le_bytes(bytes.ok_or("short count")?);
            if last.replace(count) == Some(count) {
                return Ok(count);
            }
        }
    }

    async fn fanout(self) -> Result<Measurement> {
        let body = self.body()?;
        self.senders(&body, Instant::now() + self.job.warm_up())
            .await?;
        let meter = Meter::start(self.job.server_pid)?;
        let latencies = self
            .senders(&body, Instant::now() + self.job.duration)
            .await?;
        let reading = meter.stop()?;
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

    async fn senders(&self, body: &Body, until: Instant) -> Result<Latencies> {
        self.side_by_side(self.peers.len(), |run, index| {
            let body = body.clone();
            async move {
                let mut latencies = Latencies::default();
                while Instant::now() < until {
                    let started = Instant::now();
                    run.transfer(run.peers[index], &body).await?;
                    latencies.record(started.elapsed());
                }
                Ok(latencies)
            }
        })
        .await
    }

    async fn mixed(self) -> Result<Measurement> {
        let body = self.body()?;
        self.transfer(self.peers[0], &body).await?;
        let is_over = Rc::new(Cell::new(false));
        let meter = Meter::start(self.job.server_pid)?;
        let caller = self.task({
            let (run, is_over) = (self.clone(), Rc::clone(&is_over));
            async move { run.calls(Class::Latency, || is_over.get()).await }
        });
        for _ in 0..self.job.transfers {
            self.transfer(self.peers[0], &body).await?;
        }
        let reading = meter.stop()?;
        is_over.set(true);
        let latencies = caller.await??;
        let bytes = BULK_BYTES * self.job.transfers;
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

    /// The body of this workload, in chunks.
    fn body(&self) -> Result<Body> {
        pattern_body(self.messenger.pool(), body_bytes(self.job.workload))
    }

    /// Sends a body and waits until the peer has all of it.
    async fn transfer(&self, peer: NodeId, body: &Body) -> Result<()> {
        self.ask(peer, Class::Bulk, BODY, body.clone().into())
            .await
            .map(drop)
    }

    async fn ask(
        &self,
        peer: NodeId,
        class: Class,
        method: Method,
        body: Payload,
    ) -> Result<Payload> {
        let request = Request {
            class,
            method,
            body,
            deadline: DEADLINE.into(),
        };
        Ok(self.messenger.request(peer, request).await?)
    }

    /// Runs `count` tasks and merges what they measured.
    async fn side_by_side<F>(
        &self,
        count: usize,
        task: impl Fn(Self, usize) -> F,
    ) -> Result<Latencies>
    where
        F: Future<Output = Result<Latencies>> + 'static,
    {
        let tasks: Vec<_> = (0..count)
            .map(|index| self.task(task(self.clone(), index)))
            .collect();
        let mut all = Latencies::default();
        for task in tasks {
            all.merge(task.await??);
        }
        Ok(all)
    }

    fn task<T: 'static>(
        &self,
        task: impl Future<Output = T> + 'static,
    ) -> impl Future<Output = Result<T>> {
        let (sender, receiver) = oneshot::channel();
        self.messenger.spawn(Queue::Latency, async move {
            // The other end waits for it, or the measurement has failed.
            sender.send(task.await).ok();
        });
        async move { receiver.await.map_err(Error::from) }
    }
}
