//! The honest clients: RPCs over one QUIC connection, and TCP connections that echo.
//!
//! A request counts if it was sent in the parent's window and got an answer.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use millrace_protocol::frame::{Class, Negotiated};
use millrace_protocol::id::{ConnectionNumber, NodeId};
use millrace_shards::Queue;
use millrace_transport::{
    Answer, Defer, EdgeStart, Inbound, Messenger, Payload, Request, Service, ShardMessenger,
    Transport,
};

use super::RoleArgs;
use super::connect_probe::ConnectProbes;
use super::load::{BYTES, CALLERS, Latencies, Load, PATIENCE, THINK, Window};
use super::node::{BODY, Identities, RPC, client_address, start};
use crate::frames::TCP_PORT;
use crate::testbed::NODE;
use crate::{Result, cpu};
use millrace_edge::clock::now_ns;

/// How long the connection may take, before the attack begins.
const CONNECT: Duration = Duration::from_secs(10);

/// Connects, reports that it is ready, waits for the window, sends requests until it closes, and
/// prints the latencies.
pub(crate) fn drive(role: RoleArgs) -> Result<()> {
    cpu::pin_to(role.cpu)?;
    let got = if role.probes {
        let probes = ConnectProbes::new()?;
        probes.run(ready()?)?
    } else {
        ask()?
    };
    let lasts = Duration::from_secs_f64(role.seconds);
    let loads: [Load; 2] = got.map(|latencies| latencies.summarise(lasts));
    println!("{}", serde_json::to_string(&loads)?);
    Ok(())
}

/// Reports that the attack may begin, and waits for the window.
fn ready() -> Result<Window> {
    println!("ready");
    let mut line = String::new();
    std::io::stdin().read_line(&mut line)?;
    let [from, until] = serde_json::from_str::<[u64; 2]>(&line)?.map(instant_at);
    Ok(Window { from, until })
}

/// Connects, and sends requests until the window closes. Returns the latencies over QUIC, then
/// those over TCP.
fn ask() -> Result<[Latencies; 2]> {
    let rpc = Rpc::connect()?;
    let echoes: Vec<_> = (0..CALLERS).map(|_| connect()).collect::<Result<_>>()?;
    let window = ready()?;
    rpc.record(window)?;
    let callers: Vec<_> = echoes
        .into_iter()
        .map(|connection| thread::spawn(move || ask_by_tcp(connection, window)))
        .collect();
    let mut tcp = Latencies::default();
    for caller in callers {
        tcp.merge(&caller.join().map_err(|_| "a caller panicked")?);
    }
    Ok([rpc.end()?, tcp])
}

/// The [`Instant`] of a time of CLOCK_MONOTONIC.
fn instant_at(ns: u64) -> Instant {
    let (now, present_ns) = (Instant::now(), now_ns());
    now + Duration::from_nanos(ns) - Duration::from_nanos(present_ns)
}

fn connect() -> Result<TcpStream> {
    let node = SocketAddr::from((NODE, TCP_PORT));
    let connection = TcpStream::connect_timeout(&node, CONNECT)?;
    connection.set_nodelay(true)?;
    connection.set_read_timeout(Some(PATIENCE))?;
    Ok(connection)
}

/// One outstanding request after the other. The client does not reopen a connection that broke: its
/// requests are missing.
fn ask_by_tcp(mut connection: TcpStream, window: Window) -> Latencies {
    let Window { from, until } = window;
    let mut latencies = Latencies::default();
    let mut answer = [0; BYTES];
    while Instant::now() < until {
        let started = Instant::now();
        let mut read = 0;
        if connection.write_all(&BODY).is_err() {
            latencies.fail();
            break;
        }
        while read < BYTES {
            match connection.read(&mut answer[read..]) {
                Ok(0) => break,
                Ok(more) => read += more,
                // The answer may still come; the next answer must not be taken for it.
                Err(error) if error.kind() == ErrorKind::WouldBlock && Instant::now() < until => {
                    latencies.fail();
                }
                Err(_) => break,
            }
        }
        if read < BYTES {
            latencies.fail();
            break;
        }
        if started >= from && started < until {
            latencies.complete(started.elapsed());
        }
        thread::sleep(THINK);
    }
    latencies
}

/// The QUIC client: callers are tasks on its shard, which send requests from the moment that the
/// connection is up.
struct Rpc {
    transport: Transport,
    /// When to record.
    window: Arc<OnceLock<Window>>,
    results: Receiver<Latencies>,
}

impl Rpc {
    fn connect() -> Result<Self> {
        let window = Arc::new(OnceLock::new());
        let (sender, results) = channel();
        let (up, is_up) = channel();
        let identities = Identities::new();
        let begun = Arc::clone(&window);
        let client = move |messenger| Client {
            messenger,
            up: up.clone(),
            window: Arc::clone(&begun),
            results: sender.clone(),
        };
        let edge = EdgeStart::default();
        let (address, topology) = (client_address(), Identities::of_client());
        let transport = start(&identities.client, address, topology, edge, client)?;
        is_up
            .recv_timeout(CONNECT)
            .map_err(|_| "the QUIC connection did not come up")?;
        Ok(Self {
            transport,
            window,
            results,
        })
    }

    fn record(&self, window: Window) -> Result<()> {
        self.window
            .set(window)
            .map_err(|_| "recorded before".into())
    }

    fn end(self) -> Result<Latencies> {
        let mut all = Latencies::default();
        for _ in 0..CALLERS {
            all.merge(&self.results.recv_timeout(CONNECT)?);
        }
        self.transport.shutdown();
        Ok(all)
    }
}

/// Starts the callers when the node is up.
struct Client {
    messenger: ShardMessenger,
    up: Sender<()>,
    window: Arc<OnceLock<Window>>,
    results: Sender<Latencies>,
}

impl Service for Client {
    fn on_request(&mut self, _request: Inbound<'_>, _defer: Defer<'_>) -> Answer {
        Answer::Reply(Payload::Empty)
    }

    fn on_send(&mut self, _message: Inbound<'_>) {}

    fn on_up(&mut self, peer: NodeId, _connection: ConnectionNumber, _hello: &Negotiated) {
        // The second call comes after a break: the callers still run, and have counted the requests
        // that failed.
        if self.up.send(()).is_err() || self.window.get().is_some() {
            return;
        }
        for _ in 0..CALLERS {
            let (messenger, window) = (self.messenger.clone(), Arc::clone(&self.window));
            let results = self.results.clone();
            self.messenger.spawn(Queue::Latency, async move {
                // The receiver is gone if the measurement has failed.
                results
                    .send(ask_by_quic(&messenger, peer, &window).await)
                    .ok();
            });
        }
    }
}

/// One outstanding request after the other, until the window closes.
async fn ask_by_quic(
    messenger: &impl Messenger,
    peer: NodeId,
    window: &OnceLock<Window>,
) -> Latencies {
    let mut latencies = Latencies::default();
    loop {
        let started = Instant::now();
        let request = Request {
            class: Class::Normal,
            method: RPC,
            body: Payload::Bytes(BODY.as_slice().into()),
            deadline: PATIENCE.into(),
        };
        let answer = messenger.request(peer, request).await;
        if let Some(window) = window.get() {
            if started >= window.until {
                return latencies;
            }
            match answer {
                _ if started < window.from => {}
                Ok(answer) if answer.len() == BYTES as u64 => latencies.complete(started.elapsed()),
                _ => latencies.fail(),
            }
        }
        messenger.sleep(THINK).await;
    }
}
