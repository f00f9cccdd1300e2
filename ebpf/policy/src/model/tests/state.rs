//! The effect of time, generations, leases and answers; and that no frame makes the model panic.

use super::frames::{
    CLIENT, CLIENT6, HANDSHAKE_EPOCH_NS, NOW_NS, QUIC, TCP, UDP, address, compiled, dial_request,
    handshake_id, initial, keys, model, proof_of, short, tcp, udp,
};
use super::table::{first, with_token};
use crate::model::{Cookie, Environment, Model};
use crate::packet::{Packet, Transport};
use crate::reason::Reason;
use crate::retry;
use crate::settings::{Mode, Scope};
use crate::token;
use crate::verdict::{Action, Stamp};
use proptest::prelude::*;

fn at(now_ns: u64) -> Environment {
    Environment {
        now_ns,
        ..Environment::default()
    }
}

// Protects validated clients: the Retry's token lets its client in, and no other.
#[test]
fn a_retry_leads_to_a_connection() {
    for client in [CLIENT, CLIENT6] {
        let mut model = model(Mode::Enforce, Scope::Ports);
        model.stress = 1;
        let asked = first(client);
        let decision = model.decide(&asked, at(NOW_NS));
        assert_eq!(decision.action, Action::Transmit);
        assert_eq!((decision.stress, decision.service), (1, Some(0)));
        let frame = decision.frame.unwrap();
        assert!(frame.len() < asked.len(), "an answer amplifies");

        let answer = Packet::parse(&frame).unwrap();
        assert_eq!(answer.destination, address(client).ip());
        let Ok(Transport::Udp(payload)) = answer.transport() else {
            panic!("no UDP");
        };
        let minted = token::mint(&[0xdd; 8], address(client), &keys(), NOW_NS).unwrap();
        assert_eq!(payload, retry::packet(&[0x55; 5], &[0xdd; 8], &minted));

        // 1 + 4 + 1 + 5 bytes, then the length of the ID.
        let (retry_id, token) = (&payload[12..28], &payload[28..60]);
        let again = initial(retry_id, token);
        let reason = |model: &mut Model, from, now_ns| {
            model.decide(&udp(from, QUIC, &again), at(now_ns)).reason
        };
        let epoch_end = (NOW_NS / HANDSHAKE_EPOCH_NS + 2) * HANDSHAKE_EPOCH_NS;
        let other_port = client.replace(":40000", ":40001");
        assert_eq!(reason(&mut model, client, NOW_NS), Reason::PassQuicToken);
        assert_eq!(
            reason(&mut model, &other_port, NOW_NS),
            Reason::QuicBadToken
        );
        assert_eq!(
            reason(&mut model, client, epoch_end - 1),
            Reason::PassQuicToken
        );
        assert_eq!(
            reason(&mut model, client, epoch_end),
            Reason::QuicExpiredToken
        );
    }
}

// Protects an operator whose rules cut off their author: the clock alone takes an unconfirmed set
// back.
#[test]
fn an_unconfirmed_set_reverts() {
    let mut model = model(Mode::Count, Scope::Ports);
    model.publish(compiled(Mode::Enforce, Scope::Ports));
    model.revert_at_ns = NOW_NS + 1;
    let non_member = first("100.64.0.1:5");
    let before = model.decide(&non_member, at(NOW_NS));
    assert_eq!((before.generation, before.action), (0, Action::Drop));
    let after = model.decide(&non_member, at(NOW_NS + 1));
    assert_eq!((after.generation, after.action), (1, Action::Pass));
    assert_eq!(after.reason, Reason::FirewallDefault);
}

#[test]
fn a_model_without_config_owns_nothing() {
    let mut model = Model::new(1);
    for frame in [first(CLIENT), tcp(CLIENT, TCP, 2), udp(CLIENT6, UDP, b"")] {
        let decision = model.decide(&frame, at(0));
        assert_eq!(decision.reason, Reason::PassOther);
        assert_eq!((decision.stamp, decision.service), (None, None));
    }
    // A malformed packet has no port to look up; without a config it is only counted.
    let mut broken = first(CLIENT);
    broken[14] = 0;
    let decision = model.decide(&broken, at(0));
    assert_eq!(
        (decision.reason, decision.action),
        (Reason::MalformedIp, Action::Pass)
    );
    assert!(decision.counted);
}

#[test]
fn hits_belong_to_a_generation() {
    let mut model = model(Mode::Enforce, Scope::Ports);
    let frame = first("198.18.0.1:5");
    for _ in 0..3 {
        model.decide(&frame, at(NOW_NS));
    }
    assert_eq!(model.hits[&(model.active, 2)], 3);
    let old = model.active;
    model.publish(compiled(Mode::Enforce, Scope::Ports));
    model.decide(&frame, at(NOW_NS));
    assert_eq!((model.hits[&(old, 2)], model.hits[&(old ^ 1, 2)]), (3, 1));
    model.publish(compiled(Mode::Enforce, Scope::Ports));
    assert_eq!(model.hits.get(&(old, 2)), None);
}

#[test]
fn rejected_packets_are_stamped_for_an_answer() {
    let rejected = first("203.0.113.9:5");
    let stamps = [(Mode::Enforce, Stamp::Reject), (Mode::Count, Stamp::Pass)];
    for (mode, stamp) in stamps {
        let decision = model(mode, Scope::Ports).decide(&rejected, at(NOW_NS));
        assert_eq!(decision.reason, Reason::PassReject);
        assert_eq!(decision.stamp, Some(stamp));
        assert_eq!(decision.counted, mode == Mode::Count);
    }
    let replied = model(Mode::Enforce, Scope::Ports).decide(&udp(CLIENT, 53, b""), at(NOW_NS));
    assert_eq!(replied.stamp, None);
}

// Protects `trace`: a look charges no source.
#[test]
fn read_only_charges_nothing() {
    let mut model = model(Mode::Enforce, Scope::Ports);
    let id = handshake_id(CLIENT, NOW_NS);
    let looked_at = [
        (0, first(CLIENT), Reason::PassQuicInitial),
        (
            0,
            udp(CLIENT, QUIC, &dial_request()),
            Reason::PassDialRequest,
        ),
        (0, first("203.0.113.9:5"), Reason::PassReject),
        (0, tcp(CLIENT, TCP, 2), Reason::PassTcpSyn),
        (1, with_token(CLIENT, CLIENT, NOW_NS), Reason::PassQuicToken),
        (1, udp(CLIENT, QUIC, &short(&id)), Reason::PassQuic),
        (
            2,
            udp(CLIENT, QUIC, &initial(&proof_of(1, CLIENT, NOW_NS), &[])),
            Reason::PassQuicPeer,
        ),
    ];
    for (stress, frame, reason) in looked_at {
        model.stress = stress;
        let environment = Environment {
            read_only: true,
            ..at(NOW_NS)
        };
        for _ in 0..5 {
            assert_eq!(model.decide(&frame, environment).reason, reason);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    // Protects the host: any bytes, at any time, in any stress, have one reason and one counter.
    #[test]
    fn any_frame_counts_once(
        base in 0..8_usize,
        changes in proptest::collection::vec((0..140_usize, any::<u8>()), 0..4),
        cut in prop_oneof![Just(2_000_usize), 0..1_300_usize],
        noise in proptest::collection::vec(any::<u8>(), 0..200),
        now_ns in prop_oneof![Just(NOW_NS), any::<u64>()],
        cookie in prop_oneof![
            Just(Cookie::None),
            Just(Cookie::Room),
            (1..=u32::MAX).prop_map(Cookie::Given)
        ],
        meets_listener in any::<bool>(),
        stress in 0..3_u32,
        host in any::<bool>(),
        enforce in any::<bool>(),
    ) {
        let mut frame = match base {
            0 => first(CLIENT),
            1 => first(CLIENT6),
            2 => with_token(CLIENT, CLIENT, NOW_NS),
            3 => udp(CLIENT, QUIC, &short(&handshake_id(CLIENT, NOW_NS))),
            4 => udp(CLIENT6, QUIC, &initial(&proof_of(1, CLIENT6, NOW_NS), &[])),
            5 => tcp(CLIENT, TCP, 2),
            6 => udp(CLIENT, UDP, &noise),
            _ => noise,
        };
        for (at, byte) in changes {
            if let Some(place) = frame.get_mut(at) {
                *place = byte;
            }
        }
        frame.truncate(cut);
        let mode = if enforce { Mode::Enforce } else { Mode::Count };
        let scope = if host { Scope::Host } else { Scope::Ports };
        let mut model = model(mode, scope);
        model.stress = stress;
        for round in 1..=3_u64 {
            let decision = model.decide(&frame, Environment { now_ns, cookie, meets_listener, read_only: false });
            let counted: u64 = model.counters.as_flattened().iter().sum();
            prop_assert_eq!(counted, round);
            prop_assert_ne!(decision.reason, Reason::Internal);
            prop_assert_eq!(decision.frame.is_some(), enforce && decision.reason == Reason::TxRetry);
            prop_assert!(enforce || decision.action == Action::Pass);
        }
    }
}
