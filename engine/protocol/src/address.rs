//! Addresses as operators write them: where a peer listens, and where this node does.
//!
//! 1. A peer's address means the same on every node: a registry is read by all of them. So no
//!    address has a scope (RFC 4007), which is a fact of one host, and none is link-local (RFC
//!    4291, 2.5.6), which leads nowhere without a scope.
//! 2. A peer's address can be dialled: it names a port and one host.
//! 3. This node listens on no address that invariant 1 keeps its peers from being given.

use std::net::{IpAddr, SocketAddr};
use thiserror::Error;

/// Why an address is refused.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum AddressError {
    /// The text is no IP address with a port.
    #[error("is not an IP address with a port")]
    Form,
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
            Self::Form | Self::Port | Self::Unspecified | Self::Multicast => {
                "write \"192.0.2.1:4100\" or \"[2001:db8::1]:4100\""
            }
        }
    }
}

/// Reads where a peer listens.
///
/// # Errors
/// When it is no IP address with a port, or other nodes could not dial it.
pub fn peer_address(text: &str) -> Result<SocketAddr, AddressError> {
    let address = listen_address(text)?;
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

#[cfg(test)]
mod tests {
    use super::*;

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
            ("192.0.2.1", Err(E::Form), Err(E::Form)),
            ("", Err(E::Form), Err(E::Form)),
        ];
        for (text, peer, listen) in table {
            assert_eq!(peer_address(text).map(drop), peer, "{text} of a peer");
            assert_eq!(listen_address(text).map(drop), listen, "{text} to listen");
        }
    }
}
