//! The trait of an engine, so that the workloads are the same code for all of them.

use std::future::Future;
use std::net::SocketAddr;

use bytes::Bytes;

use crate::Result;
use crate::settings::Settings;

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

    /// Packets sent, and of them declared lost, where the engine tells.
    fn packets(handle: &Self::Handle) -> Option<(u64, u64)>;

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
