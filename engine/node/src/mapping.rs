//! From the config's values to the structs of the crates that use them.

use std::collections::BTreeMap;

use millrace_protocol::frame::Limits;
use millrace_protocol::id::{IdError, NodeId};
use millrace_protocol::path::{PathConfig, PathProfile};
use millrace_shards::config::{HugePages, ShardConfig};
use millrace_shards::socket::UdpGroupConfig;
use millrace_transport::FloodRates;
use millrace_transport::config::{CongestionControl, PerClass, ProfileConfig, TransportConfig};
use millrace_tuning::NodeConfig;
use millrace_tuning::config::{self, ShardProfile};
use millrace_tuning::units::{to_u16, to_u32, to_usize};

/// One shard for each core that the config names, or for each of `cpus`.
pub fn shards(config: &NodeConfig, cpus: &[u64]) -> Vec<ShardConfig> {
    let cpus = config.shards.cpus(cpus);
    cpus.iter()
        .map(|cpu| shard(config.shards.profile_of(*cpu), Some(*cpu)))
        .collect()
}

/// One shard; without a core it is not pinned.
pub fn shard(profile: &ShardProfile, cpu: Option<u64>) -> ShardConfig {
    ShardConfig {
        cpu: cpu.map(to_usize),
        spin: profile.spin.get(),
        rx_slots: to_u16(profile.rx_slots),
        rx_slots_max: to_u16(profile.rx_slots_max),
        tx_slots: to_u16(profile.tx_slots),
        tx_slots_max: to_u16(profile.tx_slots_max),
        ring_entries: u32::try_from(profile.ring_entries).unwrap_or(u32::MAX),
        mailbox_capacity: to_usize(profile.mailbox_capacity),
        receive_batch: to_usize(profile.receive_batch),
        chunk_pool_bytes: profile.chunk_pool_bytes.bytes(),
        chunk_pool_ahead_bytes: profile.chunk_pool_ahead_bytes.bytes(),
        huge_pages: match profile.huge_pages {
            config::HugePages::Auto => HugePages::Auto,
            config::HugePages::Never => HugePages::Never,
            config::HugePages::Require => HugePages::Require,
        },
        ..ShardConfig::default()
    }
}

/// The transport's sockets.
pub fn udp(config: &NodeConfig, shards: usize) -> UdpGroupConfig {
    UdpGroupConfig {
        local: config.listen.address,
        shards,
        recv_buffer_bytes: to_usize(config.listen.receive_buffer_bytes.bytes()),
        send_buffer_bytes: to_usize(config.listen.send_buffer_bytes.bytes()),
        ..UdpGroupConfig::default()
    }
}

/// The peers with a profile of their own.
///
/// # Errors
/// The first text that is no node id, and why.
pub fn peer_profiles(
    config: &NodeConfig,
) -> Result<BTreeMap<NodeId, PathProfile>, (String, IdError)> {
    let transport = &config.transport;
    let lan = transport
        .lan_peers
        .iter()
        .map(|text| (text, PathProfile::Lan));
    let wan = transport
        .wan_peers
        .iter()
        .map(|text| (text, PathProfile::Wan));
    lan.chain(wan)
        .map(|(text, profile)| match text.parse() {
            Ok(id) => Ok((id, profile)),
            Err(error) => Err((text.clone(), error)),
        })
        .collect()
}

/// The transport's limits, windows and times.
pub fn transport(config: &NodeConfig) -> TransportConfig {
    let from = &config.transport;
    TransportConfig {
        udp_payload_bytes_max: to_usize(from.udp_payload_bytes_max.bytes()),
        discover_mtu: from.mtu == config::Mtu::Discover,
        keep_alive: from.keep_alive.get(),
        idle_timeout: from.idle_timeout.get(),
        connect_timeout: from.connect_timeout.get(),
        redial_delay_min: from.redial_delay_min.get(),
        redial_delay_max: from.redial_delay_max.get(),
        drain_timeout: from.drain_timeout.get(),
        connections_per_peer: u8::try_from(from.connections_per_peer).unwrap_or(u8::MAX),
        paths: PathConfig {
            profile: match from.path {
                config::PathChoice::Auto => None,
                config::PathChoice::Lan => Some(PathProfile::Lan),
                config::PathChoice::Wan => Some(PathProfile::Wan),
            },
            // `NodeParts` has refused ids that are none.
            peers: peer_profiles(config).unwrap_or_default(),
            lan_rtt_max: from.lan_rtt_max.get(),
            ..PathConfig::default()
        },
        lan: ProfileConfig {
            initial_window_packets: to_usize(from.lan_initial_window_packets),
            connection_window_bytes: from.lan_connection_window_bytes.bytes(),
            stream_window_bytes: from.lan_stream_window_bytes.bytes(),
            ..ProfileConfig::lan()
        },
        wan: ProfileConfig {
            congestion_control: CongestionControl::Bbr2 {
                loss_threshold: f32::from(to_u16(from.wan_loss_percent)) / 100.0,
            },
            initial_window_packets: to_usize(from.wan_initial_window_packets),
            connection_window_bytes: from.wan_connection_window_bytes.bytes(),
            stream_window_bytes: from.wan_stream_window_bytes.bytes(),
            ..ProfileConfig::wan()
        },
        streams_max: from.streams_max,
        lanes: u8::try_from(from.lanes).unwrap_or(u8::MAX),
        lane_queue_bytes: PerClass {
            latency: to_usize(from.lane_queue_latency_bytes.bytes()),
            normal: to_usize(from.lane_queue_normal_bytes.bytes()),
            bulk: to_usize(from.lane_queue_bulk_bytes.bytes()),
        },
        stream_queue_messages: PerClass {
            latency: to_usize(from.stream_queue_latency_max),
            normal: to_usize(from.stream_queue_normal_max),
            bulk: to_usize(from.stream_queue_bulk_max),
        },
        answer_queue_bytes: from.answer_queue_bytes.bytes(),
        queue_bytes_max: from.queue_bytes_max.bytes(),
        inline_bytes_max: from.inline_bytes_max.bytes(),
        streams_active_max: to_usize(from.streams_active_max),
        requests_out_max: PerClass {
            latency: to_u32(from.requests_out_latency_max),
            normal: to_u32(from.requests_out_normal_max),
            bulk: to_u32(from.requests_out_bulk_max),
        },
        requests_in_max: PerClass {
            latency: to_u32(from.requests_in_latency_max),
            normal: to_u32(from.requests_in_normal_max),
            bulk: to_u32(from.requests_in_bulk_max),
        },
        receive_budget_peer_bytes: from.receive_budget_peer_bytes.bytes(),
        receive_budget_bytes: from.receive_budget_bytes.bytes(),
        stream_progress_bytes: from.stream_progress_bytes.bytes(),
        stream_progress_interval: from.stream_progress_interval.get(),
        body_patience: from.body_patience.get(),
        body_bytes_per_second_min: from.body_bytes_per_second_min.bytes(),
        limits: Limits {
            lane_body_bytes_max: to_u32(from.lane_body_bytes_max.bytes()),
            body_bytes_max: to_u32(from.body_bytes_max.bytes()),
        },
        probe_interval: from.probe_interval.get(),
        probe_failures_max: to_u32(from.probe_failures_max),
        connections_max: to_usize(from.connections_max),
        probes_per_second_max: to_u32(from.probes_per_second_max),
        dials_max: to_usize(from.dials_max),
        handshakes_max: to_usize(from.handshakes_max),
        quic_heap_bytes_max: from.quic_heap_bytes_max.bytes(),
        packets_per_turn: to_usize(from.packets_per_turn),
        frames_per_second_max: from.frames_per_second_max,
        flood_rates: FloodRates::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two places name defaults: the schema for operators and the crates for their own users. They
    /// agree, apart from what a whole node needs more of.
    #[test]
    fn defaults_of_the_config_are_those_of_the_crates() {
        let config = NodeConfig::default();
        let mapped = TransportConfig {
            connections_max: TransportConfig::default().connections_max,
            ..transport(&config)
        };
        assert_eq!(
            format!("{mapped:#?}"),
            format!("{:#?}", TransportConfig::default())
        );
        let mapped = ShardConfig {
            chunk_pool_bytes: ShardConfig::default().chunk_pool_bytes,
            ..shard(&config.shards.defaults, None)
        };
        assert_eq!(mapped, ShardConfig::default());
        let shards_max = config::SHARDS_MAX;
        assert_eq!(shards_max, millrace_shards::SHARDS_MAX);
    }
}
