//! quinn: raised to its best, or with the reference's constants.

use std::future::poll_fn;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use quinn::congestion::{BbrConfig, CubicConfig};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::udp::{RecvMeta, Transmit};
use quinn::{
    AckFrequencyConfig, AsyncUdpSocket, ClientConfig, Endpoint, EndpointConfig, MtuDiscoveryConfig,
    ReadExactError, RecvStream, Runtime, SendStream, ServerConfig, TokioRuntime, TransportConfig,
    UdpPoller, VarInt,
};

use super::{Connection, Stack};
use crate::plan::ONEWAY_BYTES;
use crate::settings::{Congestion, Settings};
use crate::{Result, identity, socket};

/// Chunks taken from a stream in one call.
const CHUNKS_AT_ONCE: usize = 64;
/// Most payload of one GSO train: 65,535 less the headers.
const MAX_TRAIN_BYTES: usize = 65_507;

pub(crate) struct Quinn;

impl Stack for Quinn {
    type Client = Endpoint;
    type Handle = quinn::Connection;
    type BiAcceptor = quinn::Connection;
    type UniAcceptor = quinn::Connection;
    type Send = SendStream;
    type Recv = RecvStream;

    fn listen<F>(settings: &Settings, on_connection: F) -> Result<SocketAddr>
    where
        F: Fn(Connection<Self>) + Send + Sync + 'static,
    {
        let crypto = QuicServerConfig::try_from(identity::server_config(settings.crypto)?)?;
        let mut config = ServerConfig::with_crypto(Arc::new(crypto));
        config.transport_config(Arc::new(transport(settings)?));
        let endpoint = endpoint(settings, Some(config))?;
        let address = endpoint.local_addr()?;
        let on_connection = Arc::new(on_connection);
        tokio::spawn(async move {
            while let Some(incoming) = endpoint.accept().await {
                let on_connection = Arc::clone(&on_connection);
                // A task each: handshakes go on side by side.
                tokio::spawn(async move {
                    if let Ok(connection) = incoming.await {
                        on_connection(split(connection));
                    }
                });
            }
        });
        Ok(address)
    }

    fn client(settings: &Settings) -> Result<Endpoint> {
        let crypto = QuicClientConfig::try_from(identity::client_config(settings.crypto)?)?;
        let mut config = ClientConfig::new(Arc::new(crypto));
        config.transport_config(Arc::new(transport(settings)?));
        let mut endpoint = endpoint(settings, None)?;
        endpoint.set_default_client_config(config);
        Ok(endpoint)
    }

    async fn connect(client: &Endpoint, to: SocketAddr) -> Result<Connection<Self>> {
        Ok(split(client.connect(to, "peer")?.await?))
    }

    fn close(handle: &quinn::Connection) {
        handle.close(VarInt::from_u32(0), b"");
    }

    fn packets(handle: &quinn::Connection) -> Option<(u64, u64)> {
        let path = handle.stats().path;
        Some((path.sent_packets, path.lost_packets))
    }

    async fn open_bi(handle: &quinn::Connection) -> Result<(SendStream, RecvStream)> {
        Ok(handle.open_bi().await?)
    }

    async fn open_uni(handle: &quinn::Connection) -> Result<SendStream> {
        Ok(handle.open_uni().await?)
    }

    async fn accept_bi(acceptor: &mut quinn::Connection) -> Option<(SendStream, RecvStream)> {
        acceptor.accept_bi().await.ok()
    }

    async fn accept_uni(acceptor: &mut quinn::Connection) -> Option<RecvStream> {
        acceptor.accept_uni().await.ok()
    }

    async fn write(stream: &mut SendStream, data: Bytes) -> Result<()> {
        Ok(stream.write_chunk(data).await?)
    }

    fn finish(stream: &mut SendStream) -> Result<()> {
        Ok(stream.finish()?)
    }

    fn prioritise(stream: &SendStream) {
        let _closed = stream.set_priority(1);
    }

    async fn read_to_end(stream: &mut RecvStream, into: &mut [u8]) -> Result<usize> {
        let mut length = 0;
        while length < into.len() {
            match stream.read(&mut into[length..]).await? {
                Some(read) => length += read,
                None => return Ok(length),
            }
        }
        match stream.read_chunk(1, true).await? {
            None => Ok(length),
            Some(_) => Err("body longer than announced".into()),
        }
    }

    async fn read_exact(stream: &mut RecvStream, into: &mut [u8]) -> Result<bool> {
        match stream.read_exact(into).await {
            Ok(()) => Ok(true),
            Err(ReadExactError::FinishedEarly(0)) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    async fn next_chunk(stream: &mut RecvStream) -> Result<Option<Bytes>> {
        Ok(stream
            .read_chunk(usize::MAX, true)
            .await?
            .map(|chunk| chunk.bytes))
    }

    async fn send_datagrams(
        handle: &quinn::Connection,
        message: &Bytes,
        count: usize,
    ) -> Result<()> {
        for _ in 0..count {
            handle.send_datagram_wait(message.clone()).await?;
        }
        Ok(())
    }

    async fn recv_datagrams(handle: &quinn::Connection) -> Result<(u64, u64)> {
        let mut bytes = handle.read_datagram().await?.len() as u64;
        let mut count = 1;
        let mut next = std::pin::pin!(handle.read_datagram());
        // Those that are there already, without giving the turn away between them.
        poll_fn(|context| {
            while count < CHUNKS_AT_ONCE as u64 {
                match next.as_mut().poll(context) {
                    Poll::Ready(Ok(datagram)) => {
                        bytes += datagram.len() as u64;
                        count += 1;
                        next.set(handle.read_datagram());
                    }
                    _ => break,
                }
            }
            Poll::Ready(())
        })
        .await;
        Ok((count, bytes))
    }
}

fn split(connection: quinn::Connection) -> Connection<Quinn> {
    Connection {
        bi: connection.clone(),
        uni: connection.clone(),
        handle: connection,
    }
}

fn endpoint(settings: &Settings, server: Option<ServerConfig>) -> Result<Endpoint> {
    let mut config = EndpointConfig::default();
    if !settings.default_mtu {
        // Without this a peer may not send more than quinn's default of 1472.
        config.max_udp_payload_size(settings.udp_payload_bytes.max(1472))?;
    }
    let socket = socket::bind_loopback(settings.socket_buffer_bytes)?;
    let socket = TrainLimit {
        socket: TokioRuntime.wrap_udp_socket(socket)?,
        max_segments: MAX_TRAIN_BYTES / usize::from(settings.udp_payload_bytes),
    };
    let runtime = Arc::new(TokioRuntime);
    Ok(Endpoint::new_with_abstract_socket(
        config,
        server,
        Arc::new(socket),
        runtime,
    )?)
}

/// quinn sends 10 segments at a time whatever their size; above 6,550 bytes each the kernel refuses
/// such a train (EMSGSIZE), quinn takes that for a lost probe, and nearly nothing arrives. So the
/// socket reports how many fit.
#[derive(Debug)]
struct TrainLimit {
    socket: Arc<dyn AsyncUdpSocket>,
    max_segments: usize,
}

impl AsyncUdpSocket for TrainLimit {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.socket).create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.socket.try_send(transmit)
    }

    fn poll_recv(
        &self,
        context: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.socket.poll_recv(context, buffers, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.socket.max_transmit_segments().min(self.max_segments)
    }

    fn max_receive_segments(&self) -> usize {
        self.socket.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.socket.may_fragment()
    }
}

fn transport(settings: &Settings) -> Result<TransportConfig> {
    let mut transport = TransportConfig::default();
    transport
        .receive_window(VarInt::from_u32(settings.window_bytes))
        .stream_receive_window(VarInt::from_u32(settings.stream_window_bytes))
        .send_window(settings.send_window_bytes.into())
        .max_concurrent_bidi_streams(VarInt::from_u32(settings.max_streams))
        .max_concurrent_uni_streams(VarInt::from_u32(settings.max_streams))
        .datagram_send_buffer_size(settings.datagram_queue * ONEWAY_BYTES)
        .datagram_receive_buffer_size(Some(settings.datagram_queue * ONEWAY_BYTES))
        .max_idle_timeout(Some(settings.idle_timeout.try_into()?));
    if !settings.default_mtu {
        let mut discovery = MtuDiscoveryConfig::default();
        discovery.upper_bound(settings.udp_payload_bytes);
        transport
            .initial_mtu(settings.udp_payload_bytes)
            .min_mtu(settings.udp_payload_bytes)
            .mtu_discovery_config(Some(discovery));
    }
    if settings.ack_threshold > 0 {
        let mut acks = AckFrequencyConfig::default();
        acks.ack_eliciting_threshold(VarInt::from_u32(settings.ack_threshold.into()));
        transport.ack_frequency_config(Some(acks));
    }
    match settings.congestion {
        Congestion::Cubic => {
            let mut cubic = CubicConfig::default();
            if settings.initial_window_bytes > 0 {
                cubic.initial_window(settings.initial_window_bytes);
            }
            transport.congestion_controller_factory(Arc::new(cubic));
        }
        Congestion::Bbr => {
            let mut bbr = BbrConfig::default();
            if settings.initial_window_bytes > 0 {
                bbr.initial_window(settings.initial_window_bytes);
            }
            transport.congestion_controller_factory(Arc::new(bbr));
        }
    }
    Ok(transport)
}
