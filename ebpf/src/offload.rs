//! Offloads of a network card that change frames before the program sees them.

use std::fs;
use std::io;
use std::os::fd::AsFd as _;

use crate::interface::{AttachMode, Interface, any_socket};
use crate::sys;

/// The VLAN devices on this interface, in the calling thread's network namespace, whose tags native
/// XDP never sees. The program's own answers, Retries and SYN cookies, would leave without a tag.
///
/// # Errors
///
/// The kernel's error. A host without VLANs is no error.
pub fn untagged_answers(interface: &Interface) -> io::Result<Vec<String>> {
    if interface.mode != AttachMode::Native || !takes_vlan_tags(&interface.name)? {
        return Ok(Vec::new());
    }
    match fs::read_to_string("/proc/thread-self/net/vlan/config") {
        Ok(text) => Ok(vlans_on(&interface.name, &text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// What to tell the operator about answers that would be lost; none if there are none, or the
/// kernel does not say.
#[must_use]
pub fn untagged_warning(interface: &Interface) -> Option<String> {
    let vlans = untagged_answers(interface).ok()?;
    (!vlans.is_empty()).then(|| {
        format!(
            "warning: {0} takes VLAN tags off before the program: Retries and SYN cookies to {1} leave without one \
             and are lost; `ethtool -K {0} rxvlan off`, or xdp = \"generic\" in [edge]",
            interface.name,
            vlans.join(", ")
        )
    })
}

/// Whether the card removes VLAN tags and hands them over beside the frame: `rx-vlan-offload` of
/// `ethtool -k`.
///
/// # Errors
///
/// The kernel's error.
pub fn takes_vlan_tags(interface: &str) -> io::Result<bool> {
    let any = any_socket()?;
    Ok(sys::ethtool_flags(any.as_fd(), interface)? & sys::RX_VLAN_OFFLOAD != 0)
}

/// Reads `/proc/net/vlan/config`: two lines of heading, then `eth0.100       | 100  | eth0`.
fn vlans_on(interface: &str, config: &str) -> Vec<String> {
    let rows = config.lines().map(|line| line.split('|').map(str::trim));
    rows.filter_map(|mut row| {
        let (name, _id, below) = (row.next()?, row.next()?, row.next()?);
        (below == interface).then(|| name.to_owned())
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vlans_are_found_by_what_carries_them() {
        let config = "VLAN Dev name\t | VLAN ID\nName-Type: VLAN_NAME_TYPE_RAW_PLUS_VID_NO_PAD\n\
                      eth0.5         | 5  | eth0\nguests         | 60  | eth0\neth1.5         | 5  | eth1\n";
        assert_eq!(vlans_on("eth0", config), ["eth0.5", "guests"]);
        assert_eq!(vlans_on("eth1", config), ["eth1.5"]);
        assert!(vlans_on("eth", config).is_empty());
        assert!(vlans_on("eth0", "").is_empty());
    }
}
