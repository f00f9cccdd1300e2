//! The table: a frame, what happened before it, and the reason that it must end with.

#![allow(clippy::unwrap_used, reason = "test code")]

use super::frames::{
    self, ACK, CLIENT, CLIENT6, HANDSHAKE_EPOCH_NS, NOW_NS, QUIC, ROAMING_EPOCH_NS, RUN, SYN, TCP,
    UDP, address, dial_request, handshake_id, initial, keys, long, proof_of, roaming_id, short,
    tcp, udp,
};
use super::{Case, case};
use crate::limiter::Purpose;
use crate::model::{Count, Environment, Flow, Model, REPLY_UDP_NS, STRESS_PEERS};
use crate::packet::Protocol;
use crate::reason::Reason;
use crate::settings::{Mode, Scope, levels};
use crate::source::Source;
use crate::token;

/// All of them.
pub(super) fn cases() -> Vec<Case> {
    let groups = [
        packets_and_rules(),
        quic_without_keys(),
        quic_ids(),
        quic_first_packets(),
        tcp_packets(),
    ];
    groups.into_iter().flatten().collect()
}

fn stress(level: u32) -> fn(&mut Model) {
    match level {
        1 => |model| model.stress = 1,
        _ => |model| model.stress = STRESS_PEERS,
    }
}

/// An Initial with a token that was given to `client` at `minted_ns`.
pub(super) fn with_token(from: &str, client: &str, minted_ns: u64) -> Vec<u8> {
    let minted = token::mint(&[0xdd; 8], address(client), &keys(), minted_ns).unwrap();
    udp(from, QUIC, &initial(&minted.retry_id, &minted.token))
}

/// The first packet of a client without token, proof or ID.
pub(super) fn first(from: &str) -> Vec<u8> {
    udp(from, QUIC, &initial(&[0xdd; 8], &[]))
}

/// This host sent from its port 53.
fn sent(model: &mut Model, to: &str, sent_ns: u64) {
    let flow = Flow {
        remote: Source::of(address(to).ip()),
        remote_port: address(to).port(),
        port: 53,
        protocol: Protocol::Udp,
    };
    model.replies.insert(flow, sent_ns);
}

/// The frame with another byte.
fn with(mut frame: Vec<u8>, at: usize, byte: u8) -> Vec<u8> {
    frame[at] = byte;
    frame
}

/// Rules: 0 members, 1 reject 203.0.113.0/24, 2 deny 198.18.0.0/15, 3 allow 192.0.2.0/24 and
/// 2001:db8::/32.
fn packets_and_rules() -> Vec<Case> {
    let non_member = "100.64.0.1:5";
    let rejected = "203.0.113.9:5";
    let denied = "198.18.0.1:5";
    let fragment = with(first(CLIENT), 20, 0x20);
    vec![
        case("no frame", vec![], Reason::PassOther),
        case("ARP", with(first(CLIENT), 13, 6), Reason::PassOther),
        case("other port", udp(CLIENT, 53, &[0; 9]), Reason::PassOther),
        case(
            "other protocol's port",
            tcp(CLIENT, QUIC, SYN),
            Reason::PassOther,
        ),
        case("IHL 4", with(first(CLIENT), 14, 0x44), Reason::MalformedIp),
        case(
            "bad UDP length",
            with(first(CLIENT), 38, 0xff),
            Reason::MalformedL4,
        ),
        case("fragment", fragment, Reason::Fragment),
        case("options", options(), Reason::Options),
        case("SYN and FIN", tcp(CLIENT, TCP, SYN | 1), Reason::TcpFlags),
        case("reply", udp(non_member, 53, b"answer"), Reason::PassReply)
            .of_host()
            .when(|model| sent(model, "100.64.0.1:5", NOW_NS)),
        case(
            "reply, in the last moment",
            udp(non_member, 53, b"answer"),
            Reason::PassReply,
        )
        .of_host()
        .when(|model| sent(model, "100.64.0.1:5", NOW_NS - REPLY_UDP_NS)),
        case(
            "reply, too late",
            udp(non_member, 53, b"answer"),
            Reason::FirewallDefault,
        )
        .of_host()
        .when(|model| sent(model, "100.64.0.1:5", NOW_NS - REPLY_UDP_NS - 1)),
        case(
            "reply of a denied host",
            udp(denied, 53, b"answer"),
            Reason::FirewallDeny,
        )
        .of_host()
        .when(|model| sent(model, "198.18.0.1:5", NOW_NS))
        .by_rule(2),
        case(
            "reply of an allowed host",
            udp(CLIENT, 53, b"answer"),
            Reason::PassHost,
        )
        .of_host()
        .when(|model| sent(model, CLIENT, NOW_NS))
        .by_rule(3),
        case("host, allowed", udp(CLIENT, 53, b"asks"), Reason::PassHost)
            .of_host()
            .by_rule(3),
        case(
            "host, non-member",
            tcp(non_member, 22, SYN),
            Reason::FirewallDefault,
        )
        .of_host(),
        case(
            "host, fragment",
            with(udp(CLIENT, 53, b"asks"), 20, 0x20),
            Reason::Fragment,
        )
        .of_host(),
        // Step 7 is not for the host: its own stack reads the UDP length.
        case(
            "host, bad UDP length",
            with(udp(CLIENT, 53, b"asks"), 38, 0xff),
            Reason::PassHost,
        )
        .of_host()
        .by_rule(3),
        case(
            "plain UDP, by default",
            udp(non_member, UDP, b"hi"),
            Reason::PassUdp,
        ),
        case(
            "plain UDP, by rule",
            udp(CLIENT6, UDP, b"hi"),
            Reason::PassUdp,
        )
        .by_rule(3),
        case("denied by rule", first(denied), Reason::FirewallDeny).by_rule(2),
        case(
            "denied by default",
            first(non_member),
            Reason::FirewallDefault,
        ),
        case("denied, TCP", tcp(denied, TCP, SYN), Reason::FirewallDeny).by_rule(2),
        case("rejected", first(rejected), Reason::PassReject).by_rule(1),
        case(
            "rejected, no budget",
            first(rejected),
            Reason::FirewallRejectBudget,
        )
        .after([first(rejected)])
        .by_rule(1),
        case(
            "malformed before denied",
            udp(denied, QUIC, &[]),
            Reason::QuicMalformed,
        ),
    ]
}

/// An IPv4 frame with four bytes of options.
fn options() -> Vec<u8> {
    let mut frame = first(CLIENT);
    frame.splice(34..34, [1; 4]);
    let total = (frame.len() - 14) as u16;
    frame[16..18].copy_from_slice(&total.to_be_bytes());
    with(frame, 14, 0x46)
}

fn quic_without_keys() -> Vec<Case> {
    let quic = |payload: &[u8]| udp(CLIENT, QUIC, payload);
    vec![
        case("empty", quic(&[]), Reason::QuicMalformed),
        case("fixed bit", quic(&[0x3f; 30]), Reason::QuicFixedBit),
        case(
            "no dial request",
            quic(&dial_request()[..79]),
            Reason::QuicFixedBit,
        ),
        case(
            "ID of 21",
            quic(&long(0xc0, 1, &[1; 21], &[])),
            Reason::QuicIdLength,
        ),
        case(
            "ID of 7",
            quic(&initial(&[1; 7], &[])),
            Reason::QuicIdLength,
        )
        .by_rule(3),
        case(
            "short",
            quic(&initial(&[1; 8], &[])[..1_199]),
            Reason::QuicShortInitial,
        )
        .by_rule(3),
        case(
            "version 2, short",
            quic(&long(0x80, 2, &[1; 8], &[])[..1_199]),
            Reason::QuicShortInitial,
        ),
        case(
            "0-RTT",
            quic(&long(0xd0, 1, &[1; 8], &[])),
            Reason::QuicZeroRtt,
        ),
        case(
            "dial request",
            quic(&dial_request()),
            Reason::PassDialRequest,
        )
        .by_rule(3),
        case(
            "second dial request",
            quic(&dial_request()),
            Reason::QuicDialRequestBudget,
        )
        .after([quic(&dial_request())])
        .by_rule(3),
        case(
            "version 2",
            quic(&long(0x80, 2, &[1; 8], &[])),
            Reason::PassQuicVersion,
        )
        .by_rule(3),
        case(
            "second version 2",
            quic(&long(0x80, 2, &[1; 8], &[])),
            Reason::QuicVersionBudget,
        )
        .after([quic(&long(0x80, 2, &[1; 8], &[]))])
        .by_rule(3),
    ]
}

fn quic_ids() -> Vec<Case> {
    let of_client = handshake_id(CLIENT, NOW_NS);
    let before = NOW_NS - HANDSHAKE_EPOCH_NS;
    let quic = |payload: &[u8]| udp(CLIENT, QUIC, payload);
    let handshake = |id: &[u8]| quic(&long(0xe0, 1, id, &[])[..60]);
    let forged = {
        let mut id = of_client;
        id[6] ^= 1;
        id
    };
    let cases = vec![
        case("short header", quic(&short(&of_client)), Reason::PassQuic),
        case("Handshake", handshake(&of_client), Reason::PassQuic),
        case(
            "Version Negotiation",
            quic(&long(0x80, 0, &of_client, &[])),
            Reason::PassQuic,
        ),
        case(
            "later Initial",
            quic(&long(0xc0, 1, &of_client, &[])[..60]),
            Reason::PassQuic,
        ),
        case(
            "over IPv6",
            udp(CLIENT6, QUIC, &short(&handshake_id(CLIENT6, NOW_NS))),
            Reason::PassQuic,
        ),
        case("forged", quic(&short(&forged)), Reason::QuicUnknownId),
        case(
            "of 15 bytes",
            handshake(&of_client[..15]),
            Reason::QuicUnknownId,
        ),
        case(
            "other port",
            udp("192.0.2.7:40001", QUIC, &short(&of_client)),
            Reason::QuicUnknownId,
        ),
        case(
            "other address",
            udp("192.0.2.8:40000", QUIC, &short(&of_client)),
            Reason::QuicUnknownId,
        ),
        case(
            "epoch before",
            quic(&short(&handshake_id(CLIENT, before))),
            Reason::PassQuic,
        ),
        case(
            "two epochs before",
            quic(&short(&handshake_id(CLIENT, before - HANDSHAKE_EPOCH_NS))),
            Reason::QuicExpiredId,
        ),
        case(
            "roaming",
            udp("192.0.2.99:1", QUIC, &short(&roaming_id(NOW_NS))),
            Reason::PassQuic,
        ),
        case(
            "roaming, epoch before",
            quic(&short(&roaming_id(NOW_NS - ROAMING_EPOCH_NS))),
            Reason::PassQuic,
        ),
        case(
            "roaming, expired",
            quic(&short(&roaming_id(NOW_NS - 2 * ROAMING_EPOCH_NS))),
            Reason::QuicExpiredId,
        ),
        case(
            "no budget without stress",
            quic(&short(&of_client)),
            Reason::PassQuic,
        )
        .after([quic(&short(&of_client))]),
        case(
            "first under stress",
            quic(&short(&of_client)),
            Reason::PassQuic,
        )
        .when(stress(2)),
        case(
            "budget under stress",
            handshake(&of_client),
            Reason::QuicIdBudget,
        )
        .after([quic(&short(&of_client))])
        .when(stress(1)),
        case(
            "the ID of another packet",
            quic(&short(&roaming_id(NOW_NS))),
            Reason::PassQuic,
        )
        .after([quic(&short(&of_client))])
        .when(stress(1)),
    ];
    cases.into_iter().map(|case| case.by_rule(3)).collect()
}

fn quic_first_packets() -> Vec<Case> {
    let proven = |nonce| {
        udp(
            CLIENT,
            QUIC,
            &initial(&proof_of(nonce, CLIENT, NOW_NS), &[]),
        )
    };
    let token = |from| with_token(from, CLIENT, NOW_NS);
    let expired_id = handshake_id(CLIENT, NOW_NS - 2 * HANDSHAKE_EPOCH_NS);
    let late_token = with_token(CLIENT, CLIENT, NOW_NS - 2 * HANDSHAKE_EPOCH_NS);
    let mut forged_token = [0; 32];
    forged_token[..3].copy_from_slice(&[0x4d, 0, 8]);
    let cut_token = with(first(CLIENT), 42 + 6 + 8 + 1 + 5, 0x7f);
    let cases = vec![
        case("within the budget", first(CLIENT), Reason::PassQuicInitial),
        case("over IPv6", first(CLIENT6), Reason::PassQuicInitial),
        case("beyond the budget", first("192.0.2.9:1"), Reason::TxRetry).after([first(CLIENT)]),
        case("Retry over IPv6", first(CLIENT6), Reason::TxRetry).when(stress(1)),
        case("token past the end", cut_token, Reason::QuicMalformed),
        case(
            "expired ID of ours",
            udp(CLIENT, QUIC, &initial(&expired_id, &[])),
            Reason::PassQuicInitial,
        ),
        case("proven", proven(1), Reason::PassQuicPeer).when(stress(2)),
        case("repeated proof", proven(1), Reason::QuicProofReplayed).after([proven(1)]),
        case("second proof", proven(2), Reason::PassQuicPeer).after([proven(1)]),
        case("third proof", proven(3), Reason::QuicPeerBudget).after([proven(1), proven(2)]),
        case(
            "proof of another address",
            udp(
                "192.0.2.8:40000",
                QUIC,
                &initial(&proof_of(1, CLIENT, NOW_NS), &[]),
            ),
            Reason::QuicPeersOnly,
        )
        .when(stress(2)),
        case("peers only", first(CLIENT), Reason::QuicPeersOnly).when(stress(2)),
        case("token, peers only", token(CLIENT), Reason::QuicPeersOnly).when(stress(2)),
        case("token", token(CLIENT), Reason::PassQuicToken).when(stress(1)),
        case(
            "token of another port",
            token("192.0.2.7:40001"),
            Reason::QuicBadToken,
        ),
        case(
            "token for another ID",
            udp(CLIENT, QUIC, &initial(&[1; 16], &forged_token)),
            Reason::QuicBadToken,
        ),
        case(
            "token of 32 bytes, of another server",
            udp(CLIENT, QUIC, &initial(&[1; 16], &[0x4d; 32])),
            Reason::PassQuicInitial,
        ),
        case(
            "token of one byte",
            udp(CLIENT, QUIC, &initial(&[1; 8], &[1])),
            Reason::PassQuicInitial,
        ),
        case(
            "token of one byte, stress",
            udp(CLIENT, QUIC, &initial(&[1; 8], &[1])),
            Reason::TxRetry,
        )
        .when(stress(1)),
        case("expired token", late_token, Reason::QuicExpiredToken),
        case("third connection", token(CLIENT), Reason::QuicSourceRate)
            .after([token(CLIENT), token(CLIENT)]),
        case(
            "no token beyond the rate",
            first(CLIENT),
            Reason::QuicSourceRate,
        )
        .after([token(CLIENT), token(CLIENT)]),
        case("unvalidated costs nothing", first(CLIENT), Reason::TxRetry).after([
            first(CLIENT),
            first(CLIENT),
            first(CLIENT),
        ]),
        case("at the cap", token(CLIENT), Reason::QuicSourceCap).when(|model| {
            let source = Source::of(address(CLIENT).ip());
            model.quic_sources.insert(
                source,
                Count {
                    run: RUN,
                    connections: 3,
                },
            );
        }),
        case(
            "of the /64 at the cap",
            first(CLIENT6),
            Reason::QuicSourceCap,
        )
        .when(|model| {
            let source = Source::of("2001:db8::".parse().unwrap());
            model.quic_sources.insert(
                source,
                Count {
                    run: RUN,
                    connections: 4,
                },
            );
        }),
        case("below the cap", first(CLIENT), Reason::PassQuicInitial).when(|model| {
            let source = Source::of(address(CLIENT).ip());
            model.quic_sources.insert(
                source,
                Count {
                    run: RUN,
                    connections: 2,
                },
            );
        }),
        case("a dead run's count", first(CLIENT), Reason::PassQuicInitial).when(|model| {
            let source = Source::of(address(CLIENT).ip());
            model.quic_sources.insert(
                source,
                Count {
                    run: RUN - 1,
                    connections: 3,
                },
            );
        }),
        case("a lapsed count", first(CLIENT), Reason::PassQuicInitial).when(|model| {
            let source = Source::of(address(CLIENT).ip());
            model.quic_sources.insert(
                source,
                Count {
                    run: RUN,
                    connections: 3,
                },
            );
            model.lease_until_ns = NOW_NS;
        }),
        case(
            "a group, stress",
            with(first(CLIENT), 0, 1),
            Reason::Martian,
        )
        .when(stress(1)),
        case("lapsed stress", first(CLIENT), Reason::PassQuicInitial).when(|model| {
            model.stress = STRESS_PEERS;
            model.lease_until_ns = NOW_NS;
        }),
    ];
    cases.into_iter().map(|case| case.by_rule(3)).collect()
}

fn tcp_packets() -> Vec<Case> {
    let syn = |from| tcp(from, TCP, SYN);
    let spend = |model: &mut Model| {
        let environment = Environment {
            now_ns: NOW_NS,
            ..Environment::default()
        };
        model.decide(&tcp("192.0.2.200:1", TCP, SYN), environment);
    };
    let cases = vec![
        case("no SYN", tcp(CLIENT, TCP, ACK), Reason::PassTcp),
        case("SYN and ACK", tcp(CLIENT, TCP, SYN | ACK), Reason::PassTcp),
        case("RST at the cap", tcp(CLIENT, TCP, 4), Reason::PassTcp).when(full_of_tcp),
        case("SYN", syn(CLIENT), Reason::PassTcpSyn),
        case(
            "SYN with a cookie to spare",
            syn(CLIENT),
            Reason::PassTcpSyn,
        )
        .with_cookie(),
        case("at the cap", syn(CLIENT), Reason::TcpSourceCap).when(full_of_tcp),
        case("beyond the rate", syn(CLIENT), Reason::TcpSourceRate).when(|model| {
            charge_tcp(model, CLIENT);
            charge_tcp(model, CLIENT);
        }),
        case("its neighbour", syn("192.0.2.8:1"), Reason::PassTcpSyn).when(|model| {
            charge_tcp(model, CLIENT);
            charge_tcp(model, CLIENT);
        }),
        case("beyond the budget", syn(CLIENT), Reason::TcpSynBudget).when(spend),
        case(
            "beyond the budget, cookie",
            syn(CLIENT),
            Reason::TxSynCookie,
        )
        .when(spend)
        .with_cookie(),
        case("beyond the budget, room", syn(CLIENT), Reason::PassTcpSyn)
            .when(spend)
            .with_room(),
        case("stress, room", syn(CLIENT), Reason::PassTcpSyn)
            .when(stress(1))
            .with_room(),
        case("stress, cookie", syn(CLIENT), Reason::TxSynCookie)
            .when(stress(1))
            .with_cookie(),
        case("stress, no cookie", syn(CLIENT), Reason::PassTcpSyn).when(stress(2)),
    ];
    cases.into_iter().map(|case| case.by_rule(3)).collect()
}

fn full_of_tcp(model: &mut Model) {
    model
        .tcp_sources
        .insert(Source::of(address(CLIENT).ip()), 3);
}

/// The kernel's charges and counts when a connection is established.
fn charge_tcp(model: &Model, from: &str) {
    let limits = levels(
        frames::settings(Mode::Enforce, Scope::Ports)
            .limits
            .source_tcp,
    );
    let source = Source::of(address(from).ip());
    let purpose = Purpose::Tcp;
    assert!(
        model
            .sketch()
            .charge_source(source, purpose, &limits, NOW_NS)
    );
}
