//! s2n-quic over rustls: its own TLS library has no Ed25519 certificates.

use std::convert::Infallible;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::task::Poll;

use bytes::Bytes;
use s2n_quic::client::Connect;
use s2n_quic::connection::{BidirectionalStreamAcceptor, Handle, ReceiveStreamAcceptor};
use s2n_quic::provider::datagram::default::{Endpoint as Datagrams, Receiver, Sender};
use s2n_quic::provider::limits::Limits;
use s2n_quic::provider::tls::rustls as s2n_rustls;
use s2n_quic::provider::{congestion_controller, io};
use s2n_quic::stream::{ReceiveStream, SendStream};
use s2n_quic::{Client, Server};

use super::{Connection, Stack};
use crate::settings::{Congestion, Settings};
use crate::{Error, Result, identity, socket};

/// IPv4 and UDP headers: s2n-quic counts whole IP packets.
const IP_UDP_BYTES: u16 = 28;
/// Chunks taken from a stream in one call.
const CHUNKS_AT_ONCE: usize = 64;

pub(crate) struct S2n;

impl Stack for S2n {
    type Client = Client;
    type Handle = Handle;
    type BiAcceptor = BidirectionalStreamAcceptor;
    type UniAcceptor = ReceiveStreamAcceptor;
    type Send = SendStream;
    type Recv = ReceiveStream;

    fn listen<F>(settings: &Settings, on_connection: F) -> Result<SocketAddr>
    where
        F: Fn(Connection<Self>) + Send + Sync + 'static,
    {
        let builder = Server::builder()
            .with_tls(s2n_rustls::Server::from(identity::server_config(
                settings.crypto,
            )?))
            .map_err(never)?
            .with_io(io(settings)?)?
            .with_limits(limits(settings)?)?
            .with_datagram(datagrams(settings)?)
            .map_err(never)?;
        let mut server = match settings.congestion {
            Congestion::Cubic => builder
                .with_congestion_controller(cubic(settings)?)
                .map_err(never)?
                .start()?,
            Congestion::Bbr => builder
                .with_congestion_controller(congestion_controller::Bbr::default())
                .map_err(never)?
                .start()?,
        };
        let address = server.local_addr()?;
        tokio::spawn(async move {
            while let Some(connection) = server.accept().await {
                on_connection(split(connection));
            }
        });
        Ok(address)
    }

    fn client(settings: &Settings) -> Result<Client> {
        let builder = Client::builder()
            .with_tls(s2n_rustls::Client::from(identity::client_config(
                settings.crypto,
            )?))
            .map_err(never)?
            .with_io(io(settings)?)?
            .with_limits(limits(settings)?)?
            .with_datagram(datagrams(settings)?)
            .map_err(never)?;
        Ok(match settings.congestion {
            Congestion::Cubic => builder
                .with_congestion_controller(cubic(settings)?)
                .map_err(never)?
                .start()?,
            Congestion::Bbr => builder
                .with_congestion_controller(congestion_controller::Bbr::default())
                .map_err(never)?
                .start()?,
        })
    }

    async fn connect(client: &Client, to: SocketAddr) -> Result<Connection<Self>> {
        Ok(split(
            client
                .connect(Connect::new(to).with_server_name("peer"))
                .await?,
        ))
    }

    fn close(handle: &Handle) {
        handle.close(0u32.into());
    }

    fn packets(_handle: &Handle) -> Option<(u64, u64)> {
        // It tells them by events only.
        None
    }

    async fn open_bi(handle: &Handle) -> Result<(SendStream, ReceiveStream)> {
        let (receive, send) = handle.clone().open_bidirectional_stream().await?.split();
        Ok((send, receive))
    }

    async fn open_uni(handle: &Handle) -> Result<SendStream> {
        Ok(handle.clone().open_send_stream().await?)
    }

    async fn accept_bi(
        acceptor: &mut BidirectionalStreamAcceptor,
    ) -> Option<(SendStream, ReceiveStream)> {
        let (receive, send) = acceptor.accept_bidirectional_stream().await.ok()??.split();
        Some((send, receive))
    }

    async fn accept_uni(acceptor: &mut ReceiveStreamAcceptor) -> Option<ReceiveStream> {
        acceptor.accept_receive_stream().await.ok()?
    }

    async fn write(stream: &mut SendStream, data: Bytes) -> Result<()> {
        Ok(stream.send(data).await?)
    }

    fn finish(stream: &mut SendStream) -> Result<()> {
        Ok(stream.finish()?)
    }

    fn prioritise(_stream: &SendStream) {
        // s2n-quic has no stream priorities.
    }

    async fn read_to_end(stream: &mut ReceiveStream, into: &mut [u8]) -> Result<usize> {
        let mut length = 0;
        let mut chunks = [const { Bytes::new() }; CHUNKS_AT_ONCE];
        loop {
            let (count, open) = stream.receive_vectored(&mut chunks).await?;
            for chunk in &mut chunks[..count] {
                let chunk = std::mem::take(chunk);
                into.get_mut(length..length + chunk.len())
                    .ok_or("body longer than announced")?
                    .copy_from_slice(&chunk);
                length += chunk.len();
            }
            if !open {
                return Ok(length);
            }
        }
    }

    async fn read_exact(stream: &mut ReceiveStream, into: &mut [u8]) -> Result<bool> {
        let mut length = 0;
        while length < into.len() {
            let Some(chunk) = stream.receive().await? else {
                return if length == 0 {
                    Ok(false)
                } else {
                    Err("the stream ended early".into())
                };
            };
            // One message at a time is on its way, so a chunk never holds part of the next.
            into.get_mut(length..length + chunk.len())
                .ok_or("more than one message")?
                .copy_from_slice(&chunk);
            length += chunk.len();
        }
        Ok(true)
    }

    async fn next_chunk(stream: &mut ReceiveStream) -> Result<Option<Bytes>> {
        Ok(stream.receive().await?)
    }

    async fn send_datagrams(handle: &Handle, message: &Bytes, count: usize) -> Result<()> {
        let mut left = count;
        poll_fn(|context| {
            let outcome = handle.datagram_mut(|sender: &mut Sender| {
                while left > 0 {
                    match sender.poll_send_datagram(&mut message.clone(), context) {
                        Poll::Ready(Ok(())) => left -= 1,
                        Poll::Ready(Err(error)) => {
                            return Poll::Ready(Err(Error::from(error.to_string())));
                        }
                        Poll::Pending => return Poll::Pending,
                    }
                }
                Poll::Ready(Ok(()))
            });
            outcome.unwrap_or_else(|error| Poll::Ready(Err(error.to_string().into())))
        })
        .await
    }

    async fn recv_datagrams(handle: &Handle) -> Result<(u64, u64)> {
        poll_fn(|context| {
            let outcome = handle.datagram_mut(|receiver: &mut Receiver| {
                let (mut count, mut bytes) = (0, 0);
                loop {
                    match receiver.poll_recv_datagram(context) {
                        Poll::Ready(Ok(datagram)) => {
                            count += 1;
                            bytes += datagram.len() as u64;
                        }
                        Poll::Ready(Err(error)) => {
                            return Poll::Ready(Err(Error::from(error.to_string())));
                        }
                        Poll::Pending if count > 0 => return Poll::Ready(Ok((count, bytes))),
                        Poll::Pending => return Poll::Pending,
                    }
                }
            });
            outcome.unwrap_or_else(|error| Poll::Ready(Err(error.to_string().into())))
        })
        .await
    }
}

fn split(connection: s2n_quic::Connection) -> Connection<S2n> {
    let (handle, acceptor) = connection.split();
    let (bi, uni) = acceptor.split();
    Connection { handle, bi, uni }
}

fn io(settings: &Settings) -> Result<io::Default> {
    let packet_bytes = settings.udp_payload_bytes + IP_UDP_BYTES;
    Ok(io::Default::builder()
        .with_rx_socket(socket::bind_loopback(settings.socket_buffer_bytes)?)?
        .with_max_mtu(packet_bytes)?
        .with_initial_mtu(packet_bytes)?
        .with_base_mtu(packet_bytes)?
        .build()?)
}

fn cubic(settings: &Settings) -> Result<congestion_controller::Cubic> {
    let builder = congestion_controller::cubic::Builder::default();
    let builder = match u32::try_from(settings.initial_window_bytes)? {
        0 => builder,
        bytes => builder.with_initial_congestion_window(bytes),
    };
    Ok(builder.build())
}

fn limits(settings: &Settings) -> Result<Limits> {
    let window = settings.window_bytes.into();
    let stream_window = settings.stream_window_bytes.into();
    let streams = settings.max_streams.into();
    let mut limits = Limits::new()
        .with_data_window(window)?
        .with_bidirectional_local_data_window(stream_window)?
        .with_bidirectional_remote_data_window(stream_window)?
        .with_unidirectional_data_window(stream_window)?
        .with_max_send_buffer_size(settings.send_window_bytes)?
        .with_max_open_local_bidirectional_streams(streams)?
        .with_max_open_remote_bidirectional_streams(streams)?
        .with_max_open_local_unidirectional_streams(streams)?
        .with_max_open_remote_unidirectional_streams(streams)?
        .with_max_idle_timeout(settings.idle_timeout)?
        .with_initial_round_trip_time(settings.initial_rtt)?;
    if settings.ack_threshold > 0 {
        limits = limits.with_ack_elicitation_interval(settings.ack_threshold)?;
    }
    Ok(limits)
}

fn datagrams(settings: &Settings) -> Result<Datagrams> {
    Datagrams::builder()
        .with_send_capacity(settings.datagram_queue)
        .and_then(|builder| builder.with_recv_capacity(settings.datagram_queue))
        .map_err(|error| Error::from(error.to_string()))?
        .build()
        .map_err(never)
}

fn never(error: Infallible) -> Error {
    match error {}
}
