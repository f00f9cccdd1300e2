//! The next version of a registry, before it is signed.

use std::net::SocketAddr;

use millrace_protocol::address::NodeAddress;
use millrace_protocol::id::{NodeId, SubnetId};
use millrace_protocol::identity::{PublicKey, SigningKey};
use millrace_protocol::registry::{
    NodeRecord, RegistryConfig, RegistryError, RegistryVersion, SignedVersion, SkippedRecord,
    SubnetRecord,
};
use millrace_protocol::tls_keys::{RotationError, TlsKeys};

use crate::keys::{self, KeyError};

/// Why a draft cannot be changed or signed. The caller's fault, all of them.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DraftError {
    /// The node's subnet must be named.
    #[error("the registry has {subnets} subnets: name one")]
    SubnetNeeded {
        /// How many there are.
        subnets: usize,
    },
    /// There is no such node to remove, or to rotate a key of.
    #[error("no node {node} in version {version}")]
    NoSuchNode {
        /// The node.
        node: NodeId,
        /// The version that the draft follows.
        version: u64,
    },
    /// The node's keys do not allow this step of a rotation.
    #[error("node {node}: {error}")]
    Rotation {
        /// The node.
        node: NodeId,
        /// Why.
        error: RotationError,
    },
    /// The document does not read as a version.
    #[error(transparent)]
    Refused(#[from] RegistryError),
    /// Nodes would pass over a record.
    #[error("nodes would skip {}[{}]: {} ({})", .0.table, .0.index, .0.detail, .0.reason)]
    Skipped(SkippedRecord),
}

/// The next version of a registry: the first with one empty subnet, or one that follows another.
#[derive(Debug, Clone, PartialEq)]
pub struct Draft {
    version: RegistryVersion,
}

impl Draft {
    /// Version 1, with one subnet of a new id. `name` is for operators.
    ///
    /// # Errors
    /// [`KeyError::NoRandom`].
    pub fn first(name: &str) -> Result<Self, KeyError> {
        // A subnet's id is made from a public key. The secret is forgotten: nothing here signs for
        // the subnet.
        let key = keys::generate()?.public_key();
        let subnet = SubnetRecord {
            id: SubnetId::from_public_key_der(&key.to_spki_der()),
            name: Some(name.to_owned()),
            settings: toml::Table::new(),
        };
        Ok(Self {
            version: RegistryVersion {
                number: 1,
                subnets: vec![subnet],
                ..RegistryVersion::default()
            },
        })
    }

    /// Version 1, with one subnet and these nodes: a registry for a test. `name` is for people.
    ///
    /// # Errors
    /// [`KeyError::NoRandom`].
    pub fn with_nodes(name: &str, nodes: &[(PublicKey, SocketAddr)]) -> Result<Self, KeyError> {
        let mut draft = Self::first(name)?;
        let subnet = draft.version.subnets[0].id;
        for (public_key, address) in nodes {
            draft.set_node(*public_key, subnet, [*address]);
        }
        Ok(draft)
    }

    /// The version after `newest`, with the same contents.
    pub fn after(newest: RegistryVersion) -> Self {
        Self {
            version: RegistryVersion {
                number: newest.number + 1,
                ..newest
            },
        }
    }

    /// What it says so far.
    pub fn version(&self) -> &RegistryVersion {
        &self.version
    }

    /// The registry's only subnet.
    ///
    /// # Errors
    /// [`DraftError::SubnetNeeded`] if there is another number of subnets than one.
    pub fn only_subnet(&self) -> Result<SubnetId, DraftError> {
        match self.version.subnets.as_slice() {
            [only] => Ok(only.id),
            subnets => Err(DraftError::SubnetNeeded {
                subnets: subnets.len(),
            }),
        }
    }

    /// Adds a node, or gives one another subnet and other addresses; it keeps its TLS keys.
    pub fn set_node(
        &mut self,
        public_key: PublicKey,
        subnet: SubnetId,
        addresses: impl IntoIterator<Item = impl Into<NodeAddress>>,
    ) {
        let addresses = addresses.into_iter().map(Into::into).collect();
        let mut record = NodeRecord::new(public_key, subnet, addresses);
        let known = self.version.nodes.iter().find(|node| node.id == record.id);
        if let Some(known) = known {
            record.tls_keys = known.tls_keys;
        }
        self.version.nodes.retain(|node| node.id != record.id);
        self.version.nodes.push(record);
    }

    /// Takes a step of a rotation: the node's record gets the TLS keys that `step` makes of those
    /// it has.
    ///
    /// # Errors
    /// [`DraftError::NoSuchNode`], [`DraftError::Rotation`].
    pub fn rotate(
        &mut self,
        node: NodeId,
        step: impl FnOnce(&TlsKeys) -> Result<TlsKeys, RotationError>,
    ) -> Result<(), DraftError> {
        let version = self.version.number - 1;
        let mut records = self.version.nodes.iter_mut();
        let record = records
            .find(|record| record.id == node)
            .ok_or(DraftError::NoSuchNode { node, version })?;
        let keys = step(&record.tls_keys);
        record.tls_keys = keys.map_err(|error| DraftError::Rotation { node, error })?;
        Ok(())
    }

    /// Removes a node.
    ///
    /// # Errors
    /// [`DraftError::NoSuchNode`].
    pub fn remove_node(&mut self, node: NodeId) -> Result<(), DraftError> {
        let before = self.version.nodes.len();
        self.version.nodes.retain(|record| record.id != node);
        if self.version.nodes.len() == before {
            let version = self.version.number - 1;
            return Err(DraftError::NoSuchNode { node, version });
        }
        Ok(())
    }

    /// Signs it.
    ///
    /// # Errors
    /// [`DraftError::Refused`] or [`DraftError::Skipped`] if nodes would not take it whole.
    pub fn sign(&self, key: &SigningKey) -> Result<SignedVersion, DraftError> {
        sign_document(self.version.to_document(), key).map(|(signed, _)| signed)
    }
}

/// Signs a document that was written by hand; gives what it says, too.
///
/// # Errors
/// [`DraftError::Refused`] or [`DraftError::Skipped`] if nodes would not take it whole.
pub fn sign_document(
    document: String,
    key: &SigningKey,
) -> Result<(SignedVersion, RegistryVersion), DraftError> {
    let signed = SignedVersion::sign(document, key);
    let version = signed.verify(&key.public_key(), &RegistryConfig::default())?;
    match version.skipped.first() {
        None => Ok((signed, version)),
        Some(skipped) => Err(DraftError::Skipped(skipped.clone())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draft() -> (Draft, SigningKey) {
        (Draft::first("test").unwrap(), keys::generate().unwrap())
    }

    #[test]
    fn nodes_are_added_replaced_and_removed() {
        let (mut draft, key) = draft();
        let node = keys::generate().unwrap().public_key();
        let subnet = draft.only_subnet().unwrap();
        for port in [4100, 4101] {
            draft.set_node(node, subnet, [SocketAddr::from(([127, 0, 0, 1], port))]);
        }
        let signed = draft.sign(&key).unwrap();
        let read = signed
            .verify(&key.public_key(), &RegistryConfig::default())
            .unwrap();
        assert_eq!(read.number, 1);
        assert_eq!(read.nodes.len(), 1);
        let address = SocketAddr::from(([127, 0, 0, 1], 4101));
        assert_eq!(read.nodes[0].addresses, [address.into()]);

        let mut next = Draft::after(read);
        assert_eq!(next.version().number, 2);
        next.remove_node(node.node_id()).unwrap();
        assert!(matches!(
            next.remove_node(node.node_id()),
            Err(DraftError::NoSuchNode { version: 1, .. })
        ));
    }

    /// Protects a node that moves during a rotation: a new address does not bring an old key back.
    #[test]
    fn a_rotation_outlives_a_new_address_and_is_signed_only_for_an_own_key() {
        let (mut draft, key) = draft();
        let subnet = draft.only_subnet().unwrap();
        let [node, other, new] = [0, 1, 2].map(|_| keys::generate().unwrap().public_key());
        let at = |port| [SocketAddr::from(([127, 0, 0, 1], port))];
        draft.set_node(node, subnet, at(4100));
        draft.set_node(other, subnet, at(4101));
        let absent = new.node_id();
        assert!(matches!(
            draft.rotate(absent, |keys| keys.finish()),
            Err(DraftError::NoSuchNode { .. })
        ));
        assert!(matches!(
            draft.rotate(node.node_id(), |keys| keys.finish()),
            Err(DraftError::Rotation { .. })
        ));
        let mut shared = draft.clone();
        shared
            .rotate(node.node_id(), |keys| keys.begin(other))
            .unwrap();
        let refused = shared.sign(&key).unwrap_err();
        assert!(matches!(
            refused,
            DraftError::Refused(RegistryError::SharedKey { .. })
        ));

        draft
            .rotate(node.node_id(), |keys| keys.begin(new))
            .unwrap();
        draft.set_node(node, subnet, at(4102));
        draft.rotate(node.node_id(), |keys| keys.finish()).unwrap();
        draft.sign(&key).unwrap();
        let record = draft.version().nodes.last().unwrap();
        assert_eq!(record.id, node.node_id());
        assert_eq!(record.tls_keys, TlsKeys::one(new));
    }

    /// A version that nodes would take in part is not signed.
    #[test]
    fn a_record_that_nodes_would_skip_is_refused() {
        let (mut draft, key) = draft();
        let subnet = draft.only_subnet().unwrap();
        let node = keys::generate().unwrap().public_key();
        draft.set_node(node, subnet, [SocketAddr::from(([127, 0, 0, 1], 0))]);
        let refused = draft.sign(&key).unwrap_err();
        assert!(
            matches!(&refused, DraftError::Skipped(skipped) if skipped.table == "nodes"),
            "{refused}"
        );
    }
}
