//! Sections 4 and 5 of the specification: which packets may open a connection, and which belong to
//! one.

use super::{Case, Cookie, STRESS_PEERS};
use crate::cid::{BadId, LocalCid};
use crate::limiter::{Limit, Purpose};
use crate::packet::{INITIAL_BYTES_MIN, Initial, OUR_ID_BYTES, Packet, Quic, TcpFlags};
use crate::proof;
use crate::reason::Reason;
use crate::retry;
use crate::settings::{Budget, Mode, levels};
use crate::source::Source;
use crate::token::{self, BadToken};
use std::net::{IpAddr, SocketAddr};

/// Shortest destination ID that a client may choose.
const CLIENT_ID_BYTES_MIN: usize = 8;

impl Case<'_> {
    pub(super) fn admit_quic(
        &mut self,
        packet: &Packet<'_>,
        quic: Quic<'_>,
    ) -> Result<Reason, Reason> {
        let client = SocketAddr::new(packet.source, packet.source_port);
        match quic {
            Quic::DialRequest if self.charge_budget(Budget::DialRequest) => {
                Ok(Reason::PassDialRequest)
            }
            Quic::DialRequest => Err(Reason::QuicDialRequestBudget),
            Quic::Version { .. } if self.charge_budget(Budget::Version) => {
                Ok(Reason::PassQuicVersion)
            }
            Quic::Version { .. } => Err(Reason::QuicVersionBudget),
            Quic::Known(id) => match self.check_id(id, client) {
                Ok(()) => self.admit_known(id),
                Err(BadId::Unknown) => Err(Reason::QuicUnknownId),
                Err(BadId::Expired) => Err(Reason::QuicExpiredId),
            },
            // The client chose the ID, so a wrong tag proves nothing.
            Quic::Initial(initial) => match self.check_id(initial.destination_id, client) {
                Ok(()) => self.admit_known(initial.destination_id),
                Err(_) => self.admit_initial(packet, client, &initial),
            },
        }
    }

    fn check_id(&self, id: &[u8], client: SocketAddr) -> Result<(), BadId> {
        LocalCid::check(id, &self.model.keys, client, self.environment.now_ns).map(|_| ())
    }

    fn admit_known(&self, id: &[u8]) -> Result<Reason, Reason> {
        let limit = self.compiled.settings.limits.id;
        let words = first_words(id);
        if self.stress() != 0 && !self.charge(words, Purpose::ConnectionId, limit) {
            return Err(Reason::QuicIdBudget);
        }
        Ok(Reason::PassQuic)
    }

    fn admit_initial(
        &mut self,
        packet: &Packet<'_>,
        client: SocketAddr,
        initial: &Initial<'_>,
    ) -> Result<Reason, Reason> {
        if initial.datagram_bytes < INITIAL_BYTES_MIN {
            return Err(Reason::QuicShortInitial);
        }
        if initial.destination_id.len() < CLIENT_ID_BYTES_MIN {
            return Err(Reason::QuicIdLength);
        }
        let token = initial.token()?;
        if let Some(node) = self.proven_peer(initial.destination_id, packet.source) {
            return self.admit_peer(initial.destination_id, node);
        }
        if self.stress() == STRESS_PEERS {
            return Err(Reason::QuicPeersOnly);
        }
        let is_validated = self.check_token(token, initial.destination_id, client)?;
        self.check_rate(packet.source)?;
        if is_validated {
            self.check_cap(packet.source)?;
            return self.admit_validated(packet.source);
        }
        if self.stress() == 0 && self.charge_budget(Budget::Unvalidated) {
            self.check_cap(packet.source)?;
            return Ok(Reason::PassQuicInitial);
        }
        packet.refuse_martians()?;
        self.answer_by_retry(packet, client, initial)
    }

    fn proven_peer(&self, id: &[u8], source: IpAddr) -> Option<u32> {
        let wall_ns = self
            .environment
            .now_ns
            .wrapping_add(self.model.wall_offset_ns);
        let key_of = |node| self.model.peers.get(&node).copied();
        proof::check(id, source, wall_ns, key_of)
    }

    fn admit_peer(&self, id: &[u8], node: u32) -> Result<Reason, Reason> {
        let limits = &self.compiled.settings.limits;
        if !self.charge(first_words(id), Purpose::Proof, limits.proof) {
            return Err(Reason::QuicProofReplayed);
        }
        if !self.charge([u64::from(node), 0], Purpose::Peer, limits.peer) {
            return Err(Reason::QuicPeerBudget);
        }
        Ok(Reason::PassQuicPeer)
    }

    /// Whether the packet has a token that shows its source.
    fn check_token(
        &self,
        token: &[u8],
        destination_id: &[u8],
        client: SocketAddr,
    ) -> Result<bool, Reason> {
        let keys = &self.model.keys;
        match token::open(token, destination_id, client, keys, self.environment.now_ns) {
            Ok(_) => Ok(true),
            Err(BadToken::Unknown) => Ok(false),
            Err(BadToken::Forged) => Err(Reason::QuicBadToken),
            Err(BadToken::Expired) => Err(Reason::QuicExpiredToken),
        }
    }

    /// Checks the rate of a source whose address may be spoofed: charges nothing.
    fn check_rate(&self, source: IpAddr) -> Result<(), Reason> {
        let settings = &self.compiled.settings;
        let source = Source::of(source);
        let limits = levels(settings.limits.source_quic);
        let sketch = self.model.sketch();
        if !sketch.look_source(source, Purpose::Quic, &limits, self.environment.now_ns) {
            return Err(Reason::QuicSourceRate);
        }
        Ok(())
    }

    fn check_cap(&self, source: IpAddr) -> Result<(), Reason> {
        let source = Source::of(source);
        let cap = self.compiled.settings.caps.quic;
        let held = self.environment.now_ns < self.model.lease_until_ns;
        let count = self.model.quic_sources.get(&source.cap_key());
        let full =
            count.is_some_and(|count| count.run == self.model.run && count.connections >= cap);
        if cap != 0 && held && full {
            return Err(Reason::QuicSourceCap);
        }
        Ok(())
    }

    fn admit_validated(&self, source: IpAddr) -> Result<Reason, Reason> {
        let limits = levels(self.compiled.settings.limits.source_quic);
        let (sketch, source) = (self.model.sketch(), Source::of(source));
        if !self.environment.read_only
            && !sketch.charge_source(source, Purpose::Quic, &limits, self.environment.now_ns)
        {
            return Err(Reason::QuicSourceRate);
        }
        Ok(Reason::PassQuicToken)
    }

    fn answer_by_retry(
        &mut self,
        packet: &Packet<'_>,
        client: SocketAddr,
        initial: &Initial<'_>,
    ) -> Result<Reason, Reason> {
        if self.compiled.settings.mode == Mode::Enforce {
            let original_id = initial.destination_id;
            let minted = token::mint(
                original_id,
                client,
                &self.model.keys,
                self.environment.now_ns,
            )
            .ok_or(Reason::QuicRetryFailed)?;
            let answer = retry::packet(initial.source_id, original_id, &minted);
            self.answer = Some(retry::frame(packet, &answer));
        }
        Ok(Reason::TxRetry)
    }

    /// Section 5 of the specification.
    pub(super) fn admit_tcp(&self, packet: &Packet<'_>, flags: TcpFlags) -> Result<Reason, Reason> {
        let source = packet.source;
        if !flags.opens() {
            let is_watched = self.environment.now_ns < self.model.cookies_watched_until_ns;
            if flags.goes_on() && is_watched && self.environment.meets_listener {
                self.look_tcp(source)?;
            }
            return Ok(Reason::PassTcp);
        }
        self.look_tcp(source)?;
        let within = self.charge_budget(Budget::Syn);
        if within && self.stress() == 0 {
            return Ok(Reason::PassTcpSyn);
        }
        packet.refuse_martians()?;
        match self.environment.cookie {
            Cookie::Given(_) => Ok(Reason::TxSynCookie),
            Cookie::Room => Ok(Reason::PassTcpSyn),
            Cookie::None if within => Ok(Reason::PassTcpSyn),
            Cookie::None => Err(Reason::TcpSynBudget),
        }
    }

    /// Whether a source is within its rates and its cap.
    fn look_tcp(&self, source: IpAddr) -> Result<(), Reason> {
        let settings = &self.compiled.settings;
        let source = Source::of(source);
        let limits = levels(settings.limits.source_tcp);
        let sketch = self.model.sketch();
        if !sketch.look_source(source, Purpose::Tcp, &limits, self.environment.now_ns) {
            return Err(Reason::TcpSourceRate);
        }
        let cap = u64::from(settings.caps.tcp);
        let count = self.model.tcp_sources.get(&source.cap_key());
        if cap != 0 && count.is_some_and(|count| *count >= cap) {
            return Err(Reason::TcpSourceCap);
        }
        Ok(())
    }

    fn charge(&self, words: [u64; 2], purpose: Purpose, limit: Limit) -> bool {
        let (sketch, now_ns) = (self.model.sketch(), self.environment.now_ns);
        if self.environment.read_only {
            return sketch.look(words, purpose, 0, limit, now_ns);
        }
        sketch.charge(words, purpose, 0, limit, now_ns)
    }
}

/// Bytes 0 to 16 of an ID that has at least 16, as two little-endian words.
fn first_words(id: &[u8]) -> [u64; 2] {
    let mut bytes = [0; OUR_ID_BYTES];
    bytes.copy_from_slice(&id[..OUR_ID_BYTES]);
    let both = u128::from_le_bytes(bytes);
    [both as u64, (both >> 64) as u64]
}
