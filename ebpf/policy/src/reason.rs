//! Why the edge passed, answered or dropped a packet: each packet has one reason, each reason one
//! counter.
//!
//! The order is the index of the counter in the kernel (`enum edge_reason` in
//! `ebpf/src/bpf/abi.h`); a test compares them.

use crate::action::Action;

macro_rules! reasons {
    ($($(#[$attribute:meta])* $name:ident = $label:literal, $doc:literal;)*) => {
        /// Why a packet went the way it did.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u32)]
        pub enum Reason {
            $(#[doc = $doc] $name,)*
        }

        impl Reason {
            /// Every reason, in the order of the counters.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// Label on `/metrics`, in traces and in events.
            pub fn label(self) -> &'static str {
                match self {
                    $(Self::$name => $label,)*
                }
            }

            /// One sentence for people.
            pub fn describe(self) -> &'static str {
                match self {
                    $(Self::$name => $doc,)*
                }
            }
        }
    };
}

reasons! {
    PassOther = "pass_other", "Not for a declared port: untouched.";
    PassReply = "pass_reply", "`scope = host`: answers what this host sent.";
    PassHost = "pass_host", "`scope = host`: allowed by the rules of the host.";
    PassUdp = "pass_udp", "Allowed, to a service of plain UDP.";
    PassReject = "pass_reject", "Refused by a rule; nftables answers it.";
    PassDialRequest = "pass_dial_request", "A listener asks its dialler to dial.";
    PassQuic = "pass_quic", "Carries a connection ID that this node issued.";
    PassQuicPeer = "pass_quic_peer", "First packet of a registry peer that proved itself.";
    PassQuicToken = "pass_quic_token", "First packet with a valid token.";
    PassQuicInitial = "pass_quic_initial", "First packet, within the budget of unvalidated handshakes.";
    PassQuicVersion = "pass_quic_version", "A version that this node does not speak, within its budget.";
    PassTcp = "pass_tcp", "TCP, no SYN.";
    PassTcpSyn = "pass_tcp_syn", "SYN within the limits.";
    TxRetry = "tx_retry", "Answered by a Retry.";
    TxSynCookie = "tx_syn_cookie", "Answered by a SYN cookie.";
    MalformedIp = "malformed_ip", "IP header or lengths are wrong.";
    MalformedL4 = "malformed_l4", "UDP or TCP header or lengths are wrong.";
    Martian = "martian", "An answer was due, and one of its addresses belongs to no single other host: a group, broadcast, loopback, none, or our own.";
    Fragment = "fragment", "First fragment for a declared port, or one without ports.";
    Options = "options", "IPv4 options, or an IPv6 routing header of type 0.";
    TcpFlags = "tcp_flags", "No TCP sends this combination of flags.";
    QuicMalformed = "quic_malformed", "Cut short.";
    QuicFixedBit = "quic_fixed_bit", "The fixed bit is clear (RFC 9000, 17.2).";
    QuicIdLength = "quic_id_length", "A connection ID of a length that the version forbids.";
    QuicShortInitial = "quic_short_initial", "A first packet below 1,200 bytes (RFC 9000, 14.1).";
    QuicZeroRtt = "quic_zero_rtt", "Early data (0-RTT), which this node does not accept.";
    FirewallDeny = "firewall_deny", "Denied by a rule.";
    FirewallDefault = "firewall_default", "No rule allows it.";
    FirewallRejectBudget = "firewall_reject_budget", "Refused by a rule, beyond the budget of answers.";
    QuicDialRequestBudget = "quic_dial_request_budget", "A dial request beyond the budget.";
    QuicVersionBudget = "quic_version_budget", "A foreign version beyond the budget.";
    QuicUnknownId = "quic_unknown_id", "A connection ID that this node did not issue to this address.";
    QuicExpiredId = "quic_expired_id", "A connection ID that has expired.";
    QuicIdBudget = "quic_id_budget", "Under stress: more packets than one connection ID may bring.";
    QuicProofReplayed = "quic_proof_replayed", "A peer's proof, used too often.";
    QuicPeerBudget = "quic_peer_budget", "A proven peer dials too often.";
    QuicPeersOnly = "quic_peers_only", "Under the highest stress, only registry peers may open connections.";
    QuicBadToken = "quic_bad_token", "A token that this node did not give to this address.";
    QuicExpiredToken = "quic_expired_token", "A token that has expired.";
    QuicSourceCap = "quic_source_cap", "The source has as many connections as it may.";
    QuicSourceRate = "quic_source_rate", "The source, or its prefix, opens connections too fast.";
    QuicRetryFailed = "quic_retry_failed", "A Retry was due, and the program could not build it.";
    TcpSourceCap = "tcp_source_cap", "The source has as many connections as it may.";
    TcpSourceRate = "tcp_source_rate", "The source, or its prefix, opens connections too fast.";
    TcpSynBudget = "tcp_syn_budget", "A SYN beyond the budget, and no cookie to answer with.";
    Internal = "internal", "A defect of the edge: a map is missing. Passed.";
}

impl Reason {
    /// The reason with this counter; none past the last.
    pub fn from_index(index: u32) -> Option<Self> {
        Self::ALL.get(index as usize).copied()
    }

    /// Index of the counter.
    pub fn index(self) -> u32 {
        self as u32
    }

    /// What the edge does with the packet in mode `enforce`.
    pub fn action(self) -> Action {
        match self {
            Self::TxRetry | Self::TxSynCookie => Action::Transmit,
            Self::Internal => Action::Pass,
            reason if reason < Self::TxRetry => Action::Pass,
            _ => Action::Drop,
        }
    }
}
