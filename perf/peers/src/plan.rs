//! What is measured: engines, workloads and their sizes.

use std::fmt;

use clap::ValueEnum;

/// One artifact of the largest size.
pub(crate) const BULK_BYTES: usize = 128 << 20;
/// Request and response of an RPC.
pub(crate) const RPC_BYTES: usize = 1024;
/// A small one-way message.
pub(crate) const ONEWAY_BYTES: usize = 200;
/// One message of the fan-out, as in the reference's own bench.
pub(crate) const FANOUT_BYTES: usize = 1_000_000;
/// Its answer.
pub(crate) const FANOUT_REPLY_BYTES: usize = 10;
/// Peers of the fan-out.
pub(crate) const FANOUT_PEERS: usize = 12;
/// Handshakes in flight.
pub(crate) const HANDSHAKES_AT_ONCE: usize = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Engine {
    /// quinn with everything raised.
    Quinn,
    /// s2n-quic with everything raised.
    S2n,
    /// quinn with the settings of the reference's transport.
    QuinnRef,
    /// millrace as it ships: spin up to 20 us, then park.
    Millrace,
    /// millrace that never parks.
    MillraceSpin,
    /// millrace that parks at once.
    MillracePark,
}

impl Engine {
    /// Engines of this build, in the order of a round.
    pub(crate) fn all() -> Vec<Self> {
        let mut engines = vec![Self::Quinn, Self::S2n, Self::QuinnRef];
        if cfg!(feature = "millrace") {
            engines.extend([Self::Millrace, Self::MillraceSpin, Self::MillracePark]);
        }
        engines
    }

    /// False for pairs that would measure nothing.
    pub(crate) fn runs(self, workload: Workload) -> bool {
        let is_shape = workload.oneway_shape().is_some() || workload.holds_streams();
        match self {
            // Its settings leave the MTU at quinn's default, so 8972 would be 1452 again; and it
            // has one shape, a stream for each RPC.
            Self::QuinnRef => workload != Workload::Bulk8972 && !is_shape,
            // Small messages go over its lanes; the peers are tried in all shapes.
            Self::Millrace | Self::MillraceSpin | Self::MillracePark => {
                !is_shape || workload == Workload::OnewayLane
            }
            Self::Quinn | Self::S2n => true,
        }
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&name_of(self))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Workload {
    /// 128 MiB one way, UDP payload 1452.
    #[value(name = "bulk-1452")]
    Bulk1452,
    /// 128 MiB one way, UDP payload 8972.
    #[value(name = "bulk-8972")]
    Bulk8972,
    /// RPC of 1 KiB, 1 outstanding.
    #[value(name = "rpc-1")]
    Rpc1,
    /// RPC of 1 KiB, 64 outstanding.
    #[value(name = "rpc-64")]
    Rpc64,
    /// RPC of 1 KiB, 400 outstanding.
    #[value(name = "rpc-400")]
    Rpc400,
    /// The same over one held stream for each caller: what a lane would give the peers.
    #[value(name = "rpc-64-held")]
    Rpc64Held,
    /// The same over one held stream for each caller, 400 outstanding.
    #[value(name = "rpc-400-held")]
    Rpc400Held,
    /// 200-byte messages, a DATAGRAM frame each.
    #[value(name = "oneway-200-datagram")]
    OnewayDatagram,
    /// 200-byte messages, a unidirectional stream each.
    #[value(name = "oneway-200-uni")]
    OnewayUni,
    /// 200-byte messages, length-prefixed on one stream.
    #[value(name = "oneway-200-lane")]
    OnewayLane,
    /// Full mutual TLS handshakes, 16 at once.
    Handshakes,
    /// One node sends 1 MB to each of 12 peers, again and again.
    #[value(name = "fanout-12")]
    Fanout12,
    /// RPC of 1 KiB while 128 MiB goes over the same connection.
    RpcUnderBulk,
}

/// How a small message travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OnewayShape {
    Datagram,
    Uni,
    Lane,
}

impl Workload {
    pub(crate) fn udp_payload_bytes(self) -> u16 {
        if self == Self::Bulk8972 { 8972 } else { 1452 }
    }

    pub(crate) fn outstanding(self) -> usize {
        match self {
            Self::Rpc64 | Self::Rpc64Held => 64,
            Self::Rpc400 | Self::Rpc400Held => 400,
            Self::Handshakes => HANDSHAKES_AT_ONCE,
            Self::Fanout12 => FANOUT_PEERS,
            _ => 1,
        }
    }

    pub(crate) fn oneway_shape(self) -> Option<OnewayShape> {
        match self {
            Self::OnewayDatagram => Some(OnewayShape::Datagram),
            Self::OnewayUni => Some(OnewayShape::Uni),
            Self::OnewayLane => Some(OnewayShape::Lane),
            _ => None,
        }
    }

    /// One stream for each caller instead of one for each RPC.
    pub(crate) fn holds_streams(self) -> bool {
        matches!(self, Self::Rpc64Held | Self::Rpc400Held)
    }

    pub(crate) fn servers(self) -> usize {
        if self == Self::Fanout12 {
            FANOUT_PEERS
        } else {
            1
        }
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&name_of(self))
    }
}

/// The name on the command line is the name in the result.
fn name_of(value: &impl ValueEnum) -> String {
    value
        .to_possible_value()
        .map_or_else(String::new, |name| name.get_name().to_owned())
}
