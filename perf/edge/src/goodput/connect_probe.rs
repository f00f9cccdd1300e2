//! Honest clients that connect during the attack: each opens a connection, is served once, leaves,
//! and comes back.
//!
//! 1. No probe has a token, a proof, or an earlier connection: the edge treats it as a non-member,
//!    with Retry or cookie where they apply.
//! 2. Each has its own address and its own /24, and keeps to half of the rate that edge and
//!    reference grant a source: a refusal is the attack's doing.
//! 3. A probe counts when the node has served it: by a hello over QUIC, which comes after the node
//!    has checked the certificate; by an echo over TCP.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use boring::pkey::PKey;
use boring::ssl::{
    SslAlert, SslContextBuilder, SslMethod, SslOptions, SslSignatureAlgorithm, SslVerifyError,
    SslVerifyMode,
};
use boring::x509::X509;
use millrace_edge_policy::cid::initial_dcid;
use millrace_protocol::identity::SigningKey;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, socket_with};
use rustix::rand::{GetRandomFlags, getrandom};

use super::load::{BYTES, Latencies, PATIENCE, Window};
use super::node::{BODY, Identities, PROBES, by_quic, by_tcp};
use crate::Result;
use crate::frames::{OPEN_PORT, TCP_PORT};
use crate::testbed::NODE;

/// From the start of one probe to the start of the next; half of the 1,000 a minute that a source
/// may open.
const EVERY: Duration = Duration::from_millis(120);
/// The most bytes of a packet that quiche sends.
const PACKET_BYTES: usize = 1_452;

/// All probes of a run.
#[derive(Debug)]
pub(super) struct ConnectProbes {
    quic: Vec<QuicProbe>,
}

impl ConnectProbes {
    /// Makes them, and runs one of each protocol once, which must succeed without an attack.
    pub(super) fn new() -> Result<Self> {
        let identities = Identities::new();
        let node_key = *identities.node.public_key().as_bytes();
        let probe = |(index, key): (u8, &SigningKey)| -> Result<_> {
            Ok(QuicProbe {
                config: quic_config(key, node_key)?,
                spread: key.node_id().spread(),
                address: by_quic(index),
            })
        };
        let mut quic: Vec<_> = (0..PROBES)
            .zip(&identities.probes)
            .map(probe)
            .collect::<Result<_>>()?;
        let first = quic.first_mut().ok_or("there are no probes")?;
        first
            .run()
            .map_err(|error| format!("a probe by QUIC, before the attack: {error}"))?;
        probe_by_tcp(by_tcp(0))
            .map_err(|error| format!("a probe by TCP, before the attack: {error}"))?;
        Ok(Self { quic })
    }

    /// Runs until the window closes. Returns the latencies over QUIC, then those over TCP.
    pub(super) fn run(self, window: Window) -> Result<[Latencies; 2]> {
        let quic = self.quic.into_iter().map(|mut probe| {
            let index = probe.address.octets()[2];
            thread::spawn(move || repeat(index, window, || probe.run()))
        });
        let tcp = (0..PROBES).map(|index| {
            thread::spawn(move || repeat(index, window, || probe_by_tcp(by_tcp(index))))
        });
        let (quic, tcp): (Vec<_>, Vec<_>) = (quic.collect(), tcp.collect());
        let mut got = [Latencies::default(), Latencies::default()];
        for (all, threads) in got.iter_mut().zip([quic, tcp]) {
            for thread in threads {
                all.merge(&thread.join().map_err(|_| "a probe panicked")?);
            }
        }
        Ok(got)
    }
}

/// One probe after the other, spread over [`EVERY`].
fn repeat(
    index: u8,
    window: Window,
    mut probe: impl FnMut() -> std::result::Result<(), Failure>,
) -> Latencies {
    let mut latencies = Latencies::default();
    let mut next = window.from + EVERY * u32::from(index % PROBES) / u32::from(PROBES);
    loop {
        thread::sleep(next.saturating_duration_since(Instant::now()));
        let started = Instant::now();
        if started >= window.until {
            return latencies;
        }
        match probe() {
            Ok(()) => latencies.complete(started.elapsed()),
            Err(_) => latencies.fail(),
        }
        // A probe that had to wait does not come more often afterwards.
        next = (next + EVERY).max(Instant::now());
    }
}

/// Why a probe was not served.
type Failure = Box<dyn std::error::Error + Send + Sync>;

/// A probe over QUIC.
struct QuicProbe {
    config: quiche::Config,
    /// First byte of the first connection ID.
    spread: u8,
    address: Ipv4Addr,
}

impl QuicProbe {
    /// Opens a connection from a port of its own, waits for the node's hello, closes.
    fn run(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let socket = UdpSocket::bind((self.address, 0))?;
        let local = socket.local_addr()?;
        let node = SocketAddr::from((NODE, OPEN_PORT));
        let mut ids = [0; 31];
        getrandom(&mut ids, GetRandomFlags::empty())?;
        let (scid, random) = ids.split_at(16);
        let dcid = initial_dcid(self.spread, random.try_into()?);
        let scid = quiche::ConnectionId::from_ref(scid);
        let dcid = quiche::ConnectionId::from_ref(&dcid);
        let mut quic =
            quiche::connect_with_dcid(None, &scid, &dcid, local, node, &mut self.config)?;
        let mut packet = [0; 2048];
        loop {
            send(&mut quic, &socket)?;
            if quic.stream_readable_next().is_some() {
                quic.close(true, 0, b"").ok();
                return send(&mut quic, &socket);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || quic.is_closed() {
                return Err(match quic.peer_error() {
                    Some(error) => format!("the node says {:?}", error.error_code).into(),
                    None => "not served in time".into(),
                });
            }
            let timeout = quic.timeout().unwrap_or(left).min(left);
            // Zero would mean for ever.
            socket.set_read_timeout(Some(timeout.max(Duration::from_micros(1))))?;
            match socket.recv_from(&mut packet) {
                Ok((length, from)) => {
                    let info = quiche::RecvInfo { from, to: local };
                    // A packet of another connection changes nothing.
                    quic.recv(&mut packet[..length], info).ok();
                }
                Err(error) if is_timeout(&error) => quic.on_timeout(),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl std::fmt::Debug for QuicProbe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "QuicProbe({})", self.address)
    }
}

fn is_timeout(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

fn send(quic: &mut quiche::Connection, socket: &UdpSocket) -> Result<()> {
    let mut packet = [0; PACKET_BYTES];
    loop {
        match quic.send(&mut packet) {
            Ok((length, info)) => socket.send_to(&packet[..length], info.to)?,
            Err(quiche::Error::Done) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
    }
}

/// Connects from `address`, has one message echoed, closes.
fn probe_by_tcp(address: Ipv4Addr) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let socket = socket_with(
        AddressFamily::INET,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    bind(&socket, &SocketAddr::from((address, 0)))?;
    // The timeout holds for connect as well.
    set_socket_timeout(&socket, Timeout::Send, Some(PATIENCE))?;
    connect(&socket, &SocketAddr::from((NODE, TCP_PORT)))?;
    let mut connection = TcpStream::from(socket);
    connection.set_nodelay(true)?;
    connection.write_all(&BODY)?;
    let mut answer = [0; BYTES];
    let mut read = 0;
    while read < BYTES {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err("not served in time".into());
        }
        connection.set_read_timeout(Some(left))?;
        match connection.read(&mut answer[read..])? {
            0 => return Err("the node has closed".into()),
            more => read += more,
        }
    }
    Ok(())
}

/// The transport's TLS: Ed25519 on both sides, X25519, no tickets, the node's key pinned.
fn quic_config(key: &SigningKey, node_key: [u8; 32]) -> Result<quiche::Config> {
    let der = key.pkcs8_v0_der();
    let pair =
        rcgen::KeyPair::from_pkcs8_der_and_sign_algo(&der.as_slice().into(), &rcgen::PKCS_ED25519)?;
    let certificate = rcgen::CertificateParams::new(Vec::new())?.self_signed(&pair)?;
    let mut tls = SslContextBuilder::new(SslMethod::tls())?;
    tls.set_private_key(&*PKey::private_key_from_pkcs8(&der)?)?;
    tls.set_certificate(&*X509::from_der(certificate.der())?)?;
    tls.set_verify_algorithm_prefs(&[SslSignatureAlgorithm::ED25519])?;
    tls.set_curves_list("X25519")?;
    tls.set_options(SslOptions::NO_TICKET);
    tls.set_custom_verify_callback(SslVerifyMode::PEER, move |ssl| {
        let mut raw = [0; 32];
        let key = ssl
            .peer_certificate()
            .and_then(|certificate| certificate.public_key().ok());
        match key.as_ref().map(|key| key.raw_public_key(&mut raw)) {
            Some(Ok(key)) if *key == node_key[..] => Ok(()),
            _ => Err(SslVerifyError::Invalid(SslAlert::CERTIFICATE_UNKNOWN)),
        }
    });
    let mut config = quiche::Config::with_boring_ssl_ctx_builder(quiche::PROTOCOL_VERSION, tls)?;
    config.set_application_protos(&[b"millrace/1"])?;
    config.set_max_idle_timeout(3_000);
    config.set_max_send_udp_payload_size(PACKET_BYTES);
    config.set_initial_max_data(1 << 20);
    config.set_initial_max_stream_data_uni(1 << 18);
    config.set_initial_max_streams_uni(16);
    config.grease(false);
    Ok(config)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests {
    use std::collections::BTreeSet;

    use millrace_edge_policy::settings::Limits;

    use super::super::node::probe_addresses;
    use super::*;
    use crate::testbed::HONEST;

    // Protects the figures: a probe that its own rate refuses would count as lost to the attack.
    #[test]
    fn probes_keep_to_half_of_what_a_source_may() {
        let limits = Limits::default();
        for limit in [limits.source_quic, limits.source_tcp] {
            assert!(EVERY >= 2 * Duration::from_nanos(limit.interval_ns));
        }
        let networks: BTreeSet<_> = probe_addresses()
            .map(|address| address.to_bits() >> 8)
            .collect();
        assert_eq!(networks.len(), 2 * usize::from(PROBES));
        assert!(probe_addresses().all(|address| HONEST.contains(&address)));
    }
}
