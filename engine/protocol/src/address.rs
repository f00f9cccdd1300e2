//! Addresses as operators write them: where a node listens, for its peers and for itself.
//!
//! 1. A node's address means the same on every node: a registry is read by all of them. So no
//!    address has a scope (RFC 4007), which is a fact of one host, and none is link-local (RFC
//!    4291, 2.5.6), which leads nowhere without a scope.
//! 2. A node's address can be dialled: it names a port, and one host by its IP address or its name.
//! 3. This node listens on no address that invariant 1 keeps its peers from being given.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use thiserror::Error;

/// Longest name of a host, without a final dot (RFC 1035, 2.3.4, as text).
pub const HOST_NAME_BYTES_MAX: usize = 253;
/// Longest label of a name (RFC 1035, 2.3.4).
const LABEL_BYTES_MAX: usize = 63;

/// Why an address is refused.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum AddressError {
    /// The text is no IP address with a port.
    #[error("is not an IP address with a port")]
    Form,
    /// The text is neither that nor a host's name with a port.
    #[error("is neither an IP address nor a host's name, with a port")]
    NodeForm,
    /// It has a scope.
    #[error("has a scope, which only this host knows: no registry can tell it to the other nodes")]
    Scope,
    /// It is link-local and has no scope.
    #[error("is link-local: it leads nowhere without a scope, and only this host knows the scope")]
    LinkLocal,
    /// Port 0.
    #[error("has port 0, which cannot be dialled")]
    Port,
    /// `0.0.0.0` or `[::]`.
    #[error("is unspecified: it names no host")]
    Unspecified,
    /// A multicast group.
    #[error("is a multicast group, not a host")]
    Multicast,
}

impl AddressError {
    /// What the operator should write instead.
    pub fn fix(&self) -> &'static str {
        match self {
            Self::Scope | Self::LinkLocal => {
                "use a global address, or a unique local one (RFC 4193) such as \"[fd00::1]:4100\""
            }
            Self::Form => "write \"192.0.2.1:4100\" or \"[2001:db8::1]:4100\"",
            Self::NodeForm | Self::Port | Self::Unspecified | Self::Multicast => {
                "write \"192.0.2.1:4100\", \"[2001:db8::1]:4100\" or \"node.example:4100\""
            }
        }
    }
}

/// The name of a host, in lower case. Labels of letters, digits, `-` and `_`; the last one has a
/// letter, so that no name reads as an IP address.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostName(String);

impl HostName {
    /// The name, without a final dot.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for HostName {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let is_label = |label: &str| {
            let is_known = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
            let is_sized = (1..=LABEL_BYTES_MAX).contains(&label.len());
            is_sized
                && label.bytes().all(is_known)
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        let is_sized = text.len() <= HOST_NAME_BYTES_MAX;
        let last = text.rsplit('.').next().unwrap_or_default();
        let has_letter = last.bytes().any(|byte| byte.is_ascii_alphabetic());
        // What the host's resolver reads as a number in base 16.
        let is_hex = last.starts_with("0x") || last.starts_with("0X");
        if !is_sized || !has_letter || is_hex || !text.split('.').all(is_label) {
            return Err(AddressError::NodeForm);
        }
        Ok(Self(text.to_ascii_lowercase()))
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where a node listens, as a registry says it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum NodeAddress {
    /// An IP address and a port.
    Ip(SocketAddr),
    /// A name and a port: the addresses are what the name stands for, see [`crate::names`].
    Name {
        /// The host.
        host: HostName,
        /// The port; not 0.
        port: u16,
    },
}

impl FromStr for NodeAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        match listen_address(text) {
            Ok(address) => diallable(address).map(Self::Ip),
            Err(AddressError::Form) => named(text),
            Err(error) => Err(error),
        }
    }
}

impl fmt::Display for NodeAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(address) => address.fmt(f),
            Self::Name { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

impl From<SocketAddr> for NodeAddress {
    fn from(address: SocketAddr) -> Self {
        Self::Ip(address)
    }
}

/// Reads where this node listens: port 0 and the unspecified addresses are allowed.
///
/// # Errors
/// When it is no IP address with a port, or is one that no peer can be given.
pub fn listen_address(text: &str) -> Result<SocketAddr, AddressError> {
    // An interface's name (`%eth0`) does not parse; a number (`%2`) does. No other part of an
    // address has the sign.
    if text.contains('%') {
        return Err(AddressError::Scope);
    }
    let address: SocketAddr = text.parse().map_err(|_| AddressError::Form)?;
    match address.ip() {
        IpAddr::V6(ip) if ip.is_unicast_link_local() => Err(AddressError::LinkLocal),
        _ => Ok(address),
    }
}

fn diallable(address: SocketAddr) -> Result<SocketAddr, AddressError> {
    let ip = address.ip();
    if address.port() == 0 {
        return Err(AddressError::Port);
    }
    if ip.is_unspecified() {
        return Err(AddressError::Unspecified);
    }
    if ip.is_multicast() {
        return Err(AddressError::Multicast);
    }
    Ok(address)
}

fn named(text: &str) -> Result<NodeAddress, AddressError> {
    let (host, port) = text.rsplit_once(':').ok_or(AddressError::NodeForm)?;
    // A sign is not a digit, and `u16` takes one.
    if !port.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(AddressError::NodeForm);
    }
    let port: u16 = port.parse().map_err(|_| AddressError::NodeForm)?;
    let host = host.strip_suffix('.').unwrap_or(host).parse()?;
    if port == 0 {
        return Err(AddressError::Port);
    }
    Ok(NodeAddress::Name { host, port })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    // Protects operators from an address that only one host can use, or none: it is refused where
    // it is written, and says why.
    #[test]
    fn an_address_that_other_nodes_cannot_use_is_refused() {
        use AddressError as E;
        let table = [
            ("192.0.2.1:4100", Ok(()), Ok(())),
            ("[2001:db8::1]:4100", Ok(()), Ok(())),
            ("[fd00::1]:4100", Ok(()), Ok(())),
            ("[fe80::1%eth0]:4100", Err(E::Scope), Err(E::Scope)),
            ("[fe80::1%2]:4100", Err(E::Scope), Err(E::Scope)),
            ("[2001:db8::1%2]:4100", Err(E::Scope), Err(E::Scope)),
            ("[fe80::1]:4100", Err(E::LinkLocal), Err(E::LinkLocal)),
            ("[febf::1]:4100", Err(E::LinkLocal), Err(E::LinkLocal)),
            ("192.0.2.1:0", Err(E::Port), Ok(())),
            ("0.0.0.0:4100", Err(E::Unspecified), Ok(())),
            ("[::]:4100", Err(E::Unspecified), Ok(())),
            ("[ff02::1]:4100", Err(E::Multicast), Ok(())),
            ("224.0.0.1:4100", Err(E::Multicast), Ok(())),
            ("192.0.2.1", Err(E::NodeForm), Err(E::Form)),
            ("", Err(E::NodeForm), Err(E::Form)),
            ("localhost:4100", Ok(()), Err(E::Form)),
            ("a-1.example:4100", Ok(()), Err(E::Form)),
            ("a_b.example.:4100", Ok(()), Err(E::Form)),
            ("localhost:0", Err(E::Port), Err(E::Form)),
            ("localhost:65536", Err(E::NodeForm), Err(E::Form)),
            ("localhost:+1", Err(E::NodeForm), Err(E::Form)),
            ("localhost", Err(E::NodeForm), Err(E::Form)),
            (":4100", Err(E::NodeForm), Err(E::Form)),
            ("-a.example:4100", Err(E::NodeForm), Err(E::Form)),
            ("a..example:4100", Err(E::NodeForm), Err(E::Form)),
            ("a b:4100", Err(E::NodeForm), Err(E::Form)),
            ("caf\u{e9}.example:4100", Err(E::NodeForm), Err(E::Form)),
            // The host's resolver takes these for IPv4 addresses.
            ("127.1:4100", Err(E::NodeForm), Err(E::Form)),
            ("0x7f.0x1:4100", Err(E::NodeForm), Err(E::Form)),
        ];
        for (text, node, listen) in table {
            assert_eq!(
                text.parse::<NodeAddress>().map(drop),
                node,
                "{text} of a node"
            );
            assert_eq!(listen_address(text).map(drop), listen, "{text} to listen");
        }
    }

    #[test]
    fn names_are_bounded_and_have_one_form() {
        let label = "a".repeat(LABEL_BYTES_MAX);
        let longest = [&label[..], &label, &label, &label[..61]].join(".");
        assert_eq!(longest.len(), HOST_NAME_BYTES_MAX);
        assert!(longest.parse::<HostName>().is_ok());
        assert!(format!("{longest}a").parse::<HostName>().is_err());
        assert!(format!("{label}a").parse::<HostName>().is_err());
        let upper: NodeAddress = "Node.EXAMPLE.:4100".parse().unwrap();
        assert_eq!(upper.to_string(), "node.example:4100");
    }

    proptest! {
        // Protects a registry's text: what is written for an address reads as the same address.
        #[test]
        fn what_reads_is_written_and_reads_again(text in "[a-zA-Z0-9.:_%\\[\\]-]{0,24}") {
            if let Ok(address) = text.parse::<NodeAddress>() {
                prop_assert_eq!(address.to_string().parse(), Ok(address));
            }
        }
    }
}
