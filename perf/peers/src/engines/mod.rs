//! The engines behind one trait, so that the workloads are the same code for all of them.

#[cfg(feature = "millrace")]
mod millrace;
mod quinn;
mod s2n;

use std::future::Future;
use std::net::SocketAddr;

use bytes::Bytes;

use crate::Result;
use crate::measure::Measurement;
use crate::plan::{Engine, Workload};
use crate::settings::Settings;
use crate::workloads::{self, Job};

/// A QUIC implementation on a single-threaded tokio runtime.
///
/// Every future is `Send` only because tokio's `spawn` asks for it; nothing leaves the thread.
pub(crate) trait Stack: 'static {
    type Client: Send + Sync;
    type Handle: Clone + Send + Sync + 'static;
    type BiAcceptor: Send + 'static;
    type UniAcceptor: Send + 'static;
    type Send: Send + 'static;
    type Recv: Send + 'static;

    /// Listens on a fresh loopback port and hands over every connection once its handshake is done.
    fn listen<F>(settings: &Settings, on_connection: F) -> Result<SocketAddr>
    where
        F: Fn(Connection<Self>) + Send + Sync + 'static;

    fn client(settings: &Settings) -> Result<Self::Client>;

    fn connect(
        client: &Self::Client,
        to: SocketAddr,
    ) -> impl Future<Output = Result<Connection<Self>>> + Send;

    fn close(handle: &Self::Handle);

    fn open_bi(
        handle: &Self::Handle,
    ) -> impl Future<Output = Result<(Self::Send, Self::Recv)>> + Send;

    fn open_uni(handle: &Self::Handle) -> impl Future<Output = Result<Self::Send>> + Send;

    /// `None` once the connection is closed.
    fn accept_bi(
        acceptor: &mut Self::BiAcceptor,
    ) -> impl Future<Output = Option<(Self::Send, Self::Recv)>> + Send;

    /// `None` once the connection is closed.
    fn accept_uni(
        acceptor: &mut Self::UniAcceptor,
    ) -> impl Future<Output = Option<Self::Recv>> + Send;

    /// Hands bytes over without a copy; waits while the engine's send window is full.
    fn write(stream: &mut Self::Send, data: Bytes) -> impl Future<Output = Result<()>> + Send;

    fn finish(stream: &mut Self::Send) -> Result<()>;

    /// More urgent than the other streams, where the engine knows such a thing.
    fn prioritise(stream: &Self::Send);

    /// Copies the stream into caller's memory until its end; returns the length.
    fn read_to_end(
        stream: &mut Self::Recv,
        into: &mut [u8],
    ) -> impl Future<Output = Result<usize>> + Send;

    /// Fills caller's memory; false when the stream ended before its first byte.
    fn read_exact(
        stream: &mut Self::Recv,
        into: &mut [u8],
    ) -> impl Future<Output = Result<bool>> + Send;

    /// The next bytes in order, in the engine's own memory.
    fn next_chunk(stream: &mut Self::Recv) -> impl Future<Output = Result<Option<Bytes>>> + Send;

    /// Sends `count` DATAGRAM frames of the same content, waiting for room.
    fn send_datagrams(
        handle: &Self::Handle,
        message: &Bytes,
        count: usize,
    ) -> impl Future<Output = Result<()>> + Send;

    /// Takes the DATAGRAM frames that are there, at least one; returns how many and their bytes.
    fn recv_datagrams(handle: &Self::Handle) -> impl Future<Output = Result<(u64, u64)>> + Send;
}

/// A connection whose handshake is done.
pub(crate) struct Connection<S: Stack + ?Sized> {
    pub(crate) handle: S::Handle,
    pub(crate) bi: S::BiAcceptor,
    pub(crate) uni: S::UniAcceptor,
}

/// Serves one workload until the parent goes away.
pub(crate) fn serve(engine: Engine, workload: Workload, settings: Settings) -> Result<()> {
    match engine {
        Engine::Quinn | Engine::QuinnRef => {
            single_threaded()?.block_on(workloads::serve::<quinn::Quinn>(workload, settings))
        }
        Engine::S2n => {
            single_threaded()?.block_on(workloads::serve::<s2n::S2n>(workload, settings))
        }
        #[cfg(feature = "millrace")]
        _ => millrace::serve(engine, workload, &settings),
        #[cfg(not(feature = "millrace"))]
        _ => Err("this build has no millrace".into()),
    }
}

/// Drives one workload and reports what it saw.
pub(crate) fn drive(engine: Engine, job: Job, settings: Settings) -> Result<Measurement> {
    match engine {
        Engine::Quinn | Engine::QuinnRef => {
            single_threaded()?.block_on(workloads::drive::<quinn::Quinn>(job, settings))
        }
        Engine::S2n => single_threaded()?.block_on(workloads::drive::<s2n::S2n>(job, settings)),
        #[cfg(feature = "millrace")]
        _ => millrace::drive(engine, job, &settings),
        #[cfg(not(feature = "millrace"))]
        _ => Err("this build has no millrace".into()),
    }
}

fn single_threaded() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?)
}
