//! Receiving: gives datagrams to their connections, and after the packets of one completion does
//! everything that they made possible.
//!
//! Invariant: a client whose first packet is not authentic has no connection. The packet is counted
//! as an invalid datagram, answered by nothing, and holds no place after its datagram.

use std::net::SocketAddr;
use std::time::Instant;

use millrace_edge_policy::cid::dcid_of;
use millrace_protocol::dial_request::Sealed;
use millrace_shards::datapath::Datagrams;

use super::{Arrival, Endpoint};
use crate::address::PeerAddress;
use crate::clock::wall_ms;
use crate::counters::Counter;
use crate::dial_requests;
use crate::ids::IdBytes;
use crate::mtu::PathMtu;
use crate::phase::Phase;
use crate::quic::CloseCode;
use crate::tls;

/// The connection that the last datagram of a receive completion was for.
struct Touched {
    slot: usize,
    /// A live ID of it: what the next short header is compared with.
    id: IdBytes,
    /// From where quiche is told that its datagrams are.
    info: quiche::RecvInfo,
    bytes: usize,
    /// How many packets it had received, if these come from another port than before, or to another
    /// address of this host.
    elsewhere: Option<usize>,
}

impl Endpoint {
    /// One receive completion: datagrams from one address, nearly always for one connection.
    pub(super) fn receive(&mut self, datagrams: Datagrams<'_>, now: Instant) {
        let is_open = self.parts.local.ip().is_unspecified();
        let arrival = Arrival {
            from: datagrams.from(),
            at: is_open.then(|| datagrams.local().ip()),
        };
        let mut touched: Option<Touched> = None;
        for datagram in datagrams.into_segments() {
            if let Some(sealed) = Sealed::read(datagram) {
                self.on_dial_request(&sealed, arrival.from, now);
                continue;
            }
            let is_next = |touched: &Touched| {
                datagram.get(1..17) == Some(touched.id.as_slice()) && datagram[0] & 0x80 == 0
            };
            if !touched.as_ref().is_some_and(is_next) {
                let Some(slot) = self
                    .route(datagram)
                    .or_else(|| self.accept(datagram, arrival, now))
                else {
                    continue;
                };
                if let Some(last) = touched.take_if(|last| last.slot != slot) {
                    self.on_touched(&last, arrival, now);
                }
                if touched.is_none() {
                    touched = self.touch(slot, arrival);
                }
                if let (Some(touched), Some((dcid, false))) = (&mut touched, dcid_of(datagram)) {
                    touched.id.copy_from_slice(dcid);
                }
            }
            let Some(open) = &mut touched else {
                continue;
            };
            open.bytes += datagram.len();
            let slot = open.slot;
            let Some(Some(connection)) = self.connections.get_mut(slot) else {
                continue;
            };
            connection.unacked_bytes += datagram.len();
            connection.unjudged_packets += 1;
            if let Err(error) = connection.quic.recv(datagram, open.info) {
                let is_tls = error == quiche::Error::TlsFail;
                connection.has_no_common_group |= is_tls && tls::has_no_common_group();
                let packets = connection.quic.stats().recv;
                let is_garbage = is_garbage(connection.is_server, packets, error);
                self.counters().add(Counter::DatagramsInvalid, 1);
                if is_garbage {
                    self.release(slot);
                    touched = None;
                }
            }
        }
        if let Some(last) = touched {
            self.on_touched(&last, arrival, now);
        }
    }

    /// None when datagrams from there are not for this connection.
    fn touch(&self, slot: usize, arrival: Arrival) -> Option<Touched> {
        let from = arrival.from;
        let connection = self.connections.get(slot)?.as_deref()?;
        if !connection.address.may_be(from) {
            self.counters().add(Counter::DatagramsInvalid, 1);
            return None;
        }
        let is_settled = connection.address.is_settled_at(from) && connection.source == arrival.at;
        let is_elsewhere = connection.is_server && !is_settled;
        Some(Touched {
            slot,
            id: connection.ids.oldest(),
            info: quiche::RecvInfo {
                // Only a client's port may change: quiche drops what comes to a dialler from
                // another.
                from: if connection.is_server {
                    connection.address.first()
                } else {
                    from
                },
                to: self.parts.local,
            },
            bytes: 0,
            elsewhere: is_elsewhere.then(|| connection.quic.stats().recv),
        })
    }

    fn on_touched(&mut self, touched: &Touched, arrival: Arrival, now: Instant) {
        if let (Some(before), Some(Some(connection))) =
            (touched.elsewhere, self.connections.get_mut(touched.slot))
            && connection.quic.stats().recv > before
        {
            connection.source = arrival.at;
            if !connection.address.is_settled_at(arrival.from) {
                self.follow_peer(touched.slot, arrival.from, touched.bytes, now);
            }
        }
        self.on_packets(touched.slot, now);
    }

    /// After the packets of one receive completion: everything they made possible.
    pub(super) fn on_packets(&mut self, slot: usize, now: Instant) {
        let Some(Some(connection)) = self.connections.get_mut(slot) else {
            return;
        };
        if matches!(connection.phase, Phase::Handshake { .. }) && connection.quic.is_established() {
            self.on_established(slot, now);
        }
        self.confirm_liveness(slot, now);
        self.drop_retired_ids(slot, now);
        let Some(Some(connection)) = self.connections.get_mut(slot) else {
            return;
        };
        if let Some(session) = &mut connection.session {
            let received = session.receive(
                &mut connection.quic,
                &mut self.router,
                &mut self.scratch,
                &mut self.parts.bodies,
                now,
            );
            for repeated in received.probe_replies {
                if PeerAddress::is_answer(repeated) {
                    let moved = connection.address.answered(repeated);
                    let counters = &self.parts.state.counters;
                    counters.add(Counter::Migrations, u64::from(moved));
                } else if PathMtu::is_reply(repeated) {
                    connection.mtu.on_reply(repeated, now);
                } else {
                    session.on_probe_reply(repeated, now);
                }
            }
            connection.quic.drop_path_events();
            connection.report_mtu(&self.parts.state.counters);
            if received.fault.is_some() {
                self.close(slot, CloseCode::Violation);
            }
        }
        self.judge_flood(slot, now);
        self.settle_heap(slot, now);
        self.mark_received(slot);
    }

    /// Brings a connection up when the peer's hello is there, before anything else is read; and
    /// takes a packet for the sign of life that a dial request made us ask for.
    pub(super) fn confirm_liveness(&mut self, slot: usize, now: Instant) {
        let Some(Some(connection)) = self.connections.get_mut(slot) else {
            return;
        };
        let Some(session) = &mut connection.session else {
            return;
        };
        let peers = self.parts.peers.get_mut(connection.index);
        if connection.phase == Phase::AwaitHello {
            match session.receive_hello(&mut connection.quic) {
                None => {}
                Some(Ok(_)) => {
                    if let Some(peers) = peers {
                        peers.hello_received(connection.key, now);
                    }
                    self.run_actions(now);
                }
                Some(Err(error)) => self.close(slot, CloseCode::of_hello(&error)),
            }
        } else if session.take_liveness(&connection.quic)
            && let Some(peers) = peers
        {
            peers.verified(connection.key);
        }
    }

    pub(super) fn on_dial_request(&mut self, sealed: &Sealed, from: SocketAddr, now: Instant) {
        let (me, keys) = (self.parts.me, &self.parts.dial_keys);
        let opened = dial_requests::open(sealed, |claimed| {
            let key = keys.get(&claimed.sender)?;
            (claimed.target == me).then_some(*key)
        });
        let Some(request) = opened else {
            self.counters().add(Counter::DialRequestsRefused, 1);
            return;
        };
        if let Some(peers) = self.parts.peers.get_mut(usize::from(request.index)) {
            peers.dial_requested(&request, from, wall_ms(), now);
            self.run_actions(now);
        }
    }
}

/// Whether a datagram that quiche refused began no connection: it is a client's, of which quiche
/// has taken no packet before, and quiche refused it before it was authenticated (RFC 9001, 5.3).
/// Any bytes after a header of the right form come so far.
fn is_garbage(is_server: bool, packets_before: usize, error: quiche::Error) -> bool {
    let is_unauthentic = matches!(
        error,
        quiche::Error::CryptoFail
            | quiche::Error::InvalidPacket
            | quiche::Error::BufferTooShort
            | quiche::Error::UnknownVersion
    );
    is_server && packets_before == 0 && is_unauthentic
}

#[cfg(test)]
mod tests {
    use super::*;
    use quiche::Error;

    // Protects connections that have begun, whose end their services and `Peers` must hear of: a
    // dial that is answered by another version, a peer whose frames are cut short, a client whose
    // first flight is wrong.
    #[test]
    fn only_a_clients_first_packet_is_garbage() {
        let cases = [
            (true, 0, Error::CryptoFail, true),
            (true, 0, Error::InvalidPacket, true),
            (true, 0, Error::BufferTooShort, true),
            (true, 1, Error::BufferTooShort, false),
            (true, 1, Error::InvalidPacket, false),
            (true, 0, Error::TlsFail, false),
            (false, 0, Error::UnknownVersion, false),
            (false, 0, Error::CryptoFail, false),
        ];
        for (is_server, packets, error, expected) in cases {
            let got = is_garbage(is_server, packets, error);
            assert_eq!(got, expected, "{is_server}, {packets}, {error}");
        }
    }
}
