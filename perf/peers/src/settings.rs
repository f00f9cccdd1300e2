//! What each engine is given. `README.md` says why; `--set name=value` changes it for a look.

use std::str::FromStr;
use std::time::Duration;

use crate::plan::{Engine, Workload};
use crate::{Error, Result};

/// The knobs of one measurement.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) udp_payload_bytes: u16,
    /// Let the engine search for a larger payload, as by default, instead of starting at the
    /// target.
    pub(crate) default_mtu: bool,
    /// SO_RCVBUF and SO_SNDBUF.
    pub(crate) socket_buffer_bytes: usize,
    /// Receive window of the connection.
    pub(crate) window_bytes: u32,
    /// Receive window of a stream.
    pub(crate) stream_window_bytes: u32,
    /// What the sender may buffer unacknowledged.
    pub(crate) send_window_bytes: u32,
    pub(crate) max_streams: u32,
    /// DATAGRAM frames queued in each direction.
    pub(crate) datagram_queue: usize,
    /// Piece of a body handed to the engine at a time.
    pub(crate) slice_bytes: usize,
    /// Packets for each ACK that the sender asks for; 0 leaves the default.
    pub(crate) ack_threshold: u8,
    pub(crate) congestion: Congestion,
    /// 0 leaves the engine's default.
    pub(crate) initial_window_bytes: u64,
    /// RTT assumed before the first sample, where the engine lets one say so: s2n-quic.
    pub(crate) initial_rtt: Duration,
    pub(crate) idle_timeout: Duration,
    /// Cipher implementation of rustls.
    pub(crate) crypto: Crypto,
    /// One task for each request at the server instead of one loop for each connection.
    pub(crate) task_per_request: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Congestion {
    Cubic,
    Bbr,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Crypto {
    AwsLc,
    Ring,
}

impl Settings {
    pub(crate) fn for_engine(
        engine: Engine,
        workload: Workload,
        changes: &[String],
    ) -> Result<Self> {
        let mut settings = match engine {
            Engine::S2n => Self::s2n(workload),
            Engine::QuinnRef => Self::reference(workload),
            _ => Self::quinn(workload),
        };
        for change in changes {
            let (name, value) = change.split_once('=').ok_or("--set wants NAME=VALUE")?;
            settings.set(name, value)?;
        }
        Ok(settings)
    }

    fn quinn(workload: Workload) -> Self {
        Self {
            udp_payload_bytes: workload.udp_payload_bytes(),
            default_mtu: false,
            socket_buffer_bytes: 8 << 20,
            window_bytes: 8 << 20,
            stream_window_bytes: 8 << 20,
            send_window_bytes: 8 << 20,
            // Each allowed stream costs memory and time when a connection starts.
            max_streams: if workload == Workload::Handshakes {
                16
            } else {
                4096
            },
            // s2n-quic reserves the queue when a connection starts.
            datagram_queue: if workload == Workload::OnewayDatagram {
                16 << 10
            } else {
                16
            },
            slice_bytes: 1 << 20,
            ack_threshold: 0,
            congestion: Congestion::Cubic,
            initial_window_bytes: 1 << 20,
            initial_rtt: Duration::from_millis(1),
            idle_timeout: Duration::from_secs(5),
            crypto: Crypto::AwsLc,
            task_per_request: false,
        }
    }

    fn s2n(workload: Workload) -> Self {
        Self {
            slice_bytes: 1 << 20,
            ..Self::quinn(workload)
        }
    }

    /// The constants of the reference's transport; the rest stays as quinn has it.
    fn reference(workload: Workload) -> Self {
        Self {
            default_mtu: true,
            socket_buffer_bytes: 25_000_000,
            window_bytes: 200_000_000,
            stream_window_bytes: 4_000_000,
            send_window_bytes: 100_000_000,
            max_streams: 1000,
            ack_threshold: 0,
            initial_window_bytes: 0,
            task_per_request: true,
            ..Self::quinn(workload)
        }
    }

    /// For long paths: windows of the product of rate and RTT, and the defaults of the protocol
    /// where the others are tuned to loopback.
    pub(crate) fn wan(congestion: Congestion) -> Self {
        Self {
            window_bytes: 32 << 20,
            stream_window_bytes: 16 << 20,
            send_window_bytes: 64 << 20,
            // As millrace: what a sender may burst into a path that it does not know is the
            // operator's choice, not the engine's merit.
            initial_window_bytes: 512 * 1_452,
            // RFC 9002, 6.2.2.
            initial_rtt: Duration::from_millis(333),
            idle_timeout: Duration::from_secs(60),
            congestion,
            ..Self::quinn(Workload::RpcUnderBulk)
        }
    }

    pub(crate) fn set(&mut self, name: &str, value: &str) -> Result<()> {
        match name {
            "payload" => self.udp_payload_bytes = parse(value)?,
            "socket-buffer" => self.socket_buffer_bytes = parse(value)?,
            "window" => self.window_bytes = parse(value)?,
            "stream-window" => self.stream_window_bytes = parse(value)?,
            "send-window" => self.send_window_bytes = parse(value)?,
            "max-streams" => self.max_streams = parse(value)?,
            "datagram-queue" => self.datagram_queue = parse(value)?,
            "slice" => self.slice_bytes = parse(value)?,
            "ack-threshold" => self.ack_threshold = parse(value)?,
            "initial-window" => self.initial_window_bytes = parse(value)?,
            "task-per-request" => self.task_per_request = parse(value)?,
            "congestion" => {
                self.congestion = match value {
                    "cubic" => Congestion::Cubic,
                    "bbr" => Congestion::Bbr,
                    _ => return Err("congestion is cubic or bbr".into()),
                }
            }
            "crypto" => {
                self.crypto = match value {
                    "aws-lc" => Crypto::AwsLc,
                    "ring" => Crypto::Ring,
                    _ => return Err("crypto is aws-lc or ring".into()),
                }
            }
            _ => return Err(format!("unknown setting {name}").into()),
        }
        Ok(())
    }
}

fn parse<T: FromStr>(value: &str) -> Result<T>
where
    T::Err: std::error::Error + Send + Sync + 'static,
{
    value
        .parse()
        .map_err(|error| Error::from(format!("{value}: {error}")))
}
