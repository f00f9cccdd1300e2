//! Whether the shards have room for connections to all members.

use millrace_protocol::id::NodeId;
use millrace_protocol::topology::Topology;
use millrace_transport::TransportConfig;
use millrace_tuning::host::Members;

use crate::error::StartError;

/// The room of a node for its peers.
#[derive(Debug, Clone)]
pub(crate) struct Room {
    transport: TransportConfig,
    shards: usize,
}

impl Room {
    /// That of a node with so many shards.
    pub(crate) fn of(transport: TransportConfig, shards: usize) -> Self {
        Self { transport, shards }
    }

    /// What the members of `topology` need on the node `me`.
    pub(crate) fn members(&self, me: &NodeId, topology: &Topology) -> Members {
        let Self { transport, shards } = self;
        let peers_max = transport.peers_max(*shards);
        let mut members = Members {
            count: topology.len() as u64,
            ..Members::default()
        };
        for index in 0..transport.pair_connections(*shards) {
            let peers =
                topology.peers_by_shard(me, index, u8::try_from(*shards).unwrap_or(u8::MAX));
            let left_out: usize = peers.iter().map(|of| of.saturating_sub(peers_max)).sum();
            let most = peers.into_iter().max().unwrap_or(0);
            let min = transport.connections_min(most, *shards) as u64;
            members.left_out = members.left_out.max(left_out as u64);
            members.connections_min = members.connections_min.max(min);
        }
        members
    }

    /// As the operator reads it: why not all of these have room, and the fix.
    pub(crate) fn obstacle(&self, members: &Members) -> Option<String> {
        let (reason, fix) = members.obstacle(self.transport.connections_max as u64)?;
        Some(format!("{reason}; fix: {fix}"))
    }

    /// A node that would leave members out does not start: each node leaves out those with the
    /// highest ids, and so some would have no peer at all.
    ///
    /// # Errors
    /// [`StartError::Config`].
    pub(crate) fn check(&self, me: &NodeId, topology: &Topology) -> Result<(), StartError> {
        match self.obstacle(&self.members(me, topology)) {
            None => Ok(()),
            Some(reason) => Err(StartError::Config {
                key: "transport.connections_max".to_owned(),
                reason,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use millrace_protocol::identity::SigningKey;
    use millrace_protocol::topology::Member;

    use super::*;

    /// Protects the advice: the number that it names is the smallest that leaves no member out.
    #[test]
    fn the_number_to_set_is_the_smallest_that_helps() {
        let keys: Vec<_> = (0..60)
            .map(|seed| SigningKey::from_seed([seed; 32]))
            .collect();
        let members = keys
            .iter()
            .map(|key| Member::new(key.public_key(), Vec::new()));
        let topology = Topology::from_members(members, 1);
        let me = keys[0].node_id();
        let room = |connections_max, connections_per_peer, shards| {
            let transport = TransportConfig {
                connections_max,
                connections_per_peer,
                ..TransportConfig::default()
            };
            Room::of(transport, shards).members(&me, &topology)
        };
        // Three connections for each of 59 peers, and 16 for others.
        let on_one = room(128, 1, 1);
        assert_eq!(
            (on_one.count, on_one.left_out, on_one.connections_min),
            (60, 59 - 37, 3 * 59 + 16)
        );
        for (connections_per_peer, shards) in [(1, 1), (1, 2), (2, 2), (4, 3), (2, 1)] {
            let needed = room(2, connections_per_peer, shards).connections_min;
            let left_out = |max| room(max as usize, connections_per_peer, shards).left_out;
            assert!(
                left_out(needed) == 0 && left_out(needed - 1) > 0,
                "{needed}"
            );
        }
        // A node that is no member keeps no connections.
        let stranger = SigningKey::from_seed([99; 32]).node_id();
        let none = Room::of(TransportConfig::default(), 1).members(&stranger, &topology);
        assert_eq!(none.left_out, 0);
    }
}
