//! A peer without manners: a bare quiche client over a blocking socket, which sends whatever a test
//! wants.
#![allow(dead_code, clippy::unwrap_used)]

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use boring::pkey::PKey;
use boring::ssl::{SslContextBuilder, SslMethod, SslSignatureAlgorithm, SslVerifyMode};
use boring::x509::X509;
use millrace_edge_policy::cid::initial_dcid;
use millrace_protocol::frame::{
    Class, FailureCode, Header, Hello, Kind, LaneParser, Limits, Method, StreamKind,
};
use millrace_protocol::identity::SigningKey;

pub(crate) struct Raw {
    pub(crate) quic: quiche::Connection,
    socket: UdpSocket,
    local: SocketAddr,
    buffer: Vec<u8>,
    /// The node's lanes, by stream: whether their first byte was read, and what follows it.
    lanes: BTreeMap<u64, (bool, LaneParser)>,
    failures: VecDeque<(u32, FailureCode)>,
    requests: VecDeque<(u32, Method)>,
    /// Its TLS secrets, as lines of NSS's key log.
    pub(crate) secrets: Secrets,
}

/// What BoringSSL says of the keys of one connection.
#[derive(Clone, Default)]
pub(crate) struct Secrets(Arc<Mutex<Vec<u8>>>);

impl Secrets {
    /// The lines so far.
    pub(crate) fn lines(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl io::Write for Secrets {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// More packets than any window of a test allows at once.
const OUTGOING_MAX: usize = 100_000;

pub(crate) struct RawOptions {
    /// Present this key's certificate; none at all otherwise.
    pub(crate) key: Option<SigningKey>,
    /// What that certificate is like.
    pub(crate) certificate: Certificate,
    /// Application protocol that is offered.
    pub(crate) protocol: &'static [u8],
    /// Groups for the key exchange that are offered, as BoringSSL writes them.
    pub(crate) groups: &'static str,
    /// Accept session tickets, and resume this session.
    pub(crate) session: Option<Vec<u8>>,
    /// Initial congestion window.
    pub(crate) window_packets: usize,
    /// What the node may send before the test reads it: on one stream, and on all.
    pub(crate) windows_bytes: [u64; 2],
}

impl Default for RawOptions {
    fn default() -> Self {
        Self {
            key: None,
            certificate: Certificate::Sound,
            protocol: b"millrace/1",
            groups: "X25519",
            session: None,
            window_packets: 10,
            windows_bytes: [4 << 20, 16 << 20],
        }
    }
}

/// What a client's certificate is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Certificate {
    /// As a node's.
    Sound,
    /// Its dates are past.
    Expired,
    /// Its own signature is not right.
    BadlySigned,
    /// Of a P-256 key, in place of the node's.
    P256,
}

impl Certificate {
    /// Its private key in PKCS #8, and itself.
    fn make(self, key: &SigningKey) -> (Vec<u8>, X509) {
        let der = key.pkcs8_v0_der();
        let (pair, der) = if self == Self::P256 {
            let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
            let der = pair.serialize_der();
            (pair, der)
        } else {
            let algorithm = &rcgen::PKCS_ED25519;
            let written = der.as_slice().into();
            let pair = rcgen::KeyPair::from_pkcs8_der_and_sign_algo(&written, algorithm);
            (pair.unwrap(), der.to_vec())
        };
        let mut parameters = rcgen::CertificateParams::new(Vec::new()).unwrap();
        if self == Self::Expired {
            parameters.not_after = rcgen::date_time_ymd(2001, 1, 1);
        }
        let mut certificate = parameters.self_signed(&pair).unwrap().der().to_vec();
        if self == Self::BadlySigned {
            *certificate.last_mut().unwrap() ^= 1;
        }
        (der, X509::from_der(&certificate).unwrap())
    }
}

fn config(options: &RawOptions) -> quiche::Config {
    let mut tls = SslContextBuilder::new(SslMethod::tls()).unwrap();
    if let Some(key) = &options.key {
        let (der, certificate) = options.certificate.make(key);
        tls.set_private_key(&PKey::private_key_from_pkcs8(&der).unwrap())
            .unwrap();
        tls.set_certificate(&certificate).unwrap();
    }
    tls.set_verify_algorithm_prefs(&[SslSignatureAlgorithm::ED25519])
        .unwrap();
    tls.set_curves_list(options.groups).unwrap();
    tls.set_custom_verify_callback(SslVerifyMode::PEER, |_| Ok(()));
    let mut config =
        quiche::Config::with_boring_ssl_ctx_builder(quiche::PROTOCOL_VERSION, tls).unwrap();
    config.set_application_protos(&[options.protocol]).unwrap();
    // Longer than any test waits: it is the listener that ends silence.
    config.set_max_idle_timeout(600_000);
    config.set_max_send_udp_payload_size(1_452);
    let [stream_bytes, all_bytes] = options.windows_bytes;
    config.set_initial_max_data(all_bytes);
    config.set_initial_max_stream_data_uni(stream_bytes);
    config.set_initial_max_stream_data_bidi_local(stream_bytes);
    config.set_initial_max_streams_uni(1_000);
    config.set_initial_congestion_window_packets(options.window_packets);
    config.enable_dgram(true, 100, 100);
    config.log_keys();
    config
}

impl RawOptions {
    /// A member, or a host that claims to be one.
    pub(crate) fn of(key: &SigningKey) -> Self {
        Self {
            key: Some(key.clone()),
            ..Self::default()
        }
    }
}

impl Raw {
    pub(crate) fn dial(to: SocketAddr, options: &RawOptions) -> Self {
        Self::dial_at("127.0.0.1:0", to, options)
    }

    /// As [`Self::dial`], from an address of the test's choice.
    pub(crate) fn dial_at(bind: &str, to: SocketAddr, options: &RawOptions) -> Self {
        // The first connection ID steers to the shard that owns the connection; a member knows
        // that.
        let spread = options.key.as_ref().map_or(0, |key| key.node_id().spread());
        Self::dial_from(bind, to, options, &initial_dcid(spread, [9; 15]))
    }

    /// As [`Self::dial`], from an address and with a first destination ID of the test's choice.
    pub(crate) fn dial_from(bind: &str, to: SocketAddr, options: &RawOptions, dcid: &[u8]) -> Self {
        let socket = UdpSocket::bind(bind).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_millis(1)))
            .unwrap();
        let local = socket.local_addr().unwrap();
        let scid = quiche::ConnectionId::from_ref(&[7; 16]);
        let dcid = quiche::ConnectionId::from_ref(dcid);
        let mut quic =
            quiche::connect_with_dcid(None, &scid, &dcid, local, to, &mut config(options)).unwrap();
        let secrets = Secrets::default();
        quic.set_keylog(Box::new(secrets.clone()));
        if let Some(session) = &options.session {
            quic.set_session(session).unwrap();
        }
        Self {
            secrets,
            quic,
            socket,
            local,
            buffer: vec![0; 65_536],
            lanes: BTreeMap::new(),
            failures: VecDeque::new(),
            requests: VecDeque::new(),
        }
    }

    /// Sends what is to be sent, receives what is there, and answers probes: even a hostile peer
    /// wants to stay.
    pub(crate) fn turn(&mut self) {
        let mut probe = [0; 16];
        while let Ok(len) = self.quic.dgram_recv(&mut probe) {
            if len == probe.len() && probe[0] == Kind::Probe as u8 {
                probe[0] = Kind::ProbeReply as u8;
                self.quic.dgram_send(&probe).ok();
            }
        }
        for (packet, to) in self.outgoing() {
            self.socket.send_to(&packet, to).ok();
        }
        self.receive();
        if self.quic.timeout().is_some_and(|left| left.is_zero()) {
            self.quic.on_timeout();
        }
    }

    /// What is to be sent, not yet sent.
    pub(crate) fn outgoing(&mut self) -> Vec<(Vec<u8>, SocketAddr)> {
        let mut packets = Vec::new();
        let mut packet = [0; 1_452];
        while let Ok((len, info)) = self.quic.send(&mut packet) {
            packets.push((packet[..len].to_vec(), info.to));
            assert!(packets.len() < OUTGOING_MAX, "quiche goes on without end");
        }
        packets
    }

    /// Sends a datagram from this client's address.
    pub(crate) fn send_datagram(&self, datagram: &[u8], to: SocketAddr) {
        self.socket.send_to(datagram, to).unwrap();
    }

    /// Receives what is there, waiting a millisecond for it.
    pub(crate) fn receive(&mut self) {
        while let Ok((len, from)) = self.socket.recv_from(&mut self.buffer) {
            let info = quiche::RecvInfo {
                from,
                to: self.local,
            };
            self.quic.recv(&mut self.buffer[..len], info).ok();
            if self.quic.timeout().is_some_and(|left| left.is_zero()) {
                break;
            }
        }
    }

    /// Takes a Retry with this token as if the other side had sent it: the next first packet bears
    /// the token.
    pub(crate) fn be_retried(&mut self, token: &[u8]) {
        let (mut first, to) = self.outgoing().swap_remove(0);
        let header = quiche::Header::from_slice(&mut first, 0).unwrap();
        // Of this client alone: by it the node finds the connection.
        let mut retry_id = [5; 16];
        retry_id[1..3].copy_from_slice(&self.local.port().to_be_bytes());
        let retry_id = quiche::ConnectionId::from_ref(&retry_id);
        let mut retry = vec![0; 1_200];
        let (id, original, version) = (&header.scid, &header.dcid, header.version);
        let len = quiche::retry(id, original, &retry_id, token, version, &mut retry).unwrap();
        let info = quiche::RecvInfo {
            from: to,
            to: self.local,
        };
        self.quic.recv(&mut retry[..len], info).unwrap();
    }

    /// Waits for one datagram and takes it in; its first byte.
    pub(crate) fn receive_one(&mut self, limit: Duration) -> Option<u8> {
        let until = Instant::now() + limit;
        while Instant::now() < until {
            if let Ok((len, from)) = self.socket.recv_from(&mut self.buffer) {
                let first = self.buffer[0];
                let info = quiche::RecvInfo {
                    from,
                    to: self.local,
                };
                self.quic.recv(&mut self.buffer[..len], info).ok();
                return Some(first);
            }
        }
        None
    }

    /// Takes turns until `done`, at most `limit`; whether it was done.
    pub(crate) fn drive(
        &mut self,
        limit: Duration,
        mut done: impl FnMut(&mut quiche::Connection) -> bool,
    ) -> bool {
        let until = Instant::now() + limit;
        while Instant::now() < until {
            self.turn();
            if done(&mut self.quic) {
                return true;
            }
        }
        false
    }

    pub(crate) fn establish(&mut self) {
        assert!(
            self.drive(Duration::from_secs(10), |quic| quic.is_established()),
            "no handshake"
        );
        // The other side hears of it by this.
        self.turn();
    }

    /// Establishes, and says hello on the first lane, as every peer must before anything else.
    /// [`Self::stream`] names the streams that are left.
    pub(crate) fn introduce(&mut self) {
        self.establish();
        let hello = Hello::new(0, 1).encode();
        assert!(self.send(Self::LANE, &hello_lane(&hello), false));
    }

    /// The n-th stream after the lane that the hello went on.
    pub(crate) fn stream(n: u64) -> u64 {
        Self::LANE + 4 + 4 * n
    }

    /// The first stream that a client opens: a lane, which begins with its hello.
    pub(crate) const LANE: u64 = 2;

    /// The last of the node's lanes, which are its first streams (RFC 9000, 2.1).
    const LAST_LANE: u64 = 3 + 4 * 4;

    /// Takes turns until a stream of the node has ended, and reads it; what is behind the header of
    /// the message on it.
    pub(crate) fn message(&mut self, limit: Duration) -> Option<Vec<u8>> {
        let mut streams: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
        let mut ended = None;
        let mut bytes = vec![0; 65_536];
        self.drive(limit, |quic| {
            for stream in quic.readable().collect::<Vec<_>>() {
                while let Ok((read, is_end)) = quic.stream_recv(stream, &mut bytes) {
                    streams.entry(stream).or_default().extend(&bytes[..read]);
                    ended = is_end.then_some(stream).or(ended);
                }
            }
            ended.is_some()
        });
        let message = streams.remove(&ended?)?;
        // The first byte says what the stream is.
        Some(message[1 + Header::BYTES..].to_vec())
    }

    /// Takes turns until the node has sent a failure; its request's id and its code.
    pub(crate) fn failure(&mut self, limit: Duration) -> Option<(u32, FailureCode)> {
        self.read_until(limit, |raw| raw.failures.pop_front())
    }

    /// Takes turns until the node has sent a request on a lane; its id and its method.
    pub(crate) fn request(&mut self, limit: Duration) -> Option<(u32, Method)> {
        self.read_until(limit, |raw| raw.requests.pop_front())
    }

    fn read_until<T>(
        &mut self,
        limit: Duration,
        mut next: impl FnMut(&mut Self) -> Option<T>,
    ) -> Option<T> {
        let until = Instant::now() + limit;
        loop {
            let found = next(self);
            if found.is_some() || Instant::now() >= until {
                return found;
            }
            self.turn();
            self.read_lanes();
        }
    }

    /// Reads the node's lanes, and nothing of its other streams.
    fn read_lanes(&mut self) {
        let mut bytes = [0; 4_096];
        let is_lane = |stream: &u64| *stream <= Self::LAST_LANE;
        for stream in self.quic.readable().filter(is_lane).collect::<Vec<_>>() {
            while let Ok((read, _)) = self.quic.stream_recv(stream, &mut bytes) {
                let lane = self.lanes.entry(stream).or_insert_with(|| {
                    // The first byte says what the stream is.
                    (false, LaneParser::new(Limits::default()))
                });
                let skipped = usize::from(!std::mem::replace(&mut lane.0, true));
                let (failures, requests) = (&mut self.failures, &mut self.requests);
                let mut on_frame = |header: Header, _: &[u8]| match header.kind {
                    Kind::Failure => {
                        failures.push_back((header.id, FailureCode::from_arg(header.arg)));
                    }
                    Kind::Request => requests.push_back((header.id, header.method)),
                    _ => {}
                };
                lane.1.push(&bytes[skipped..read], &mut on_frame).unwrap();
            }
        }
    }

    /// Sends all of `bytes` on a stream, or as much as the other side wants to have.
    pub(crate) fn send(&mut self, stream: u64, bytes: &[u8], fin: bool) -> bool {
        let mut sent = 0;
        self.drive(Duration::from_secs(3), |quic| {
            if quic.is_closed() || quic.is_draining() {
                return true;
            }
            match quic.stream_send(stream, &bytes[sent..], fin) {
                Ok(n) => sent += n,
                Err(quiche::Error::Done) => {}
                // Stopped by the other side: it has had enough.
                Err(_) => return true,
            }
            sent == bytes.len()
        })
    }
}

/// A session that a server with this key gives a client with these options. The server gives
/// tickets, as no node does.
pub(crate) fn session_of_other_server(key: &SigningKey, options: &RawOptions) -> Vec<u8> {
    let [from, to] = [1, 2].map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
    let [one, two] = [[1; 16], [2; 16]];
    let [one, two] = [&one, &two].map(|id| quiche::ConnectionId::from_ref(id));
    let mut client = quiche::connect(None, &one, from, to, &mut config(options)).unwrap();
    let mut accepting = config(&RawOptions::of(key));
    let mut server = quiche::accept(&two, None, to, from, &mut accepting).unwrap();
    let pass = |speaker: &mut quiche::Connection, listener: &mut quiche::Connection| {
        let mut packet = [0; 1_452];
        while let Ok((len, info)) = speaker.send(&mut packet) {
            let info = quiche::RecvInfo {
                from: info.from,
                to: info.to,
            };
            listener.recv(&mut packet[..len], info).unwrap();
        }
    };
    for _ in 0..4 {
        pass(&mut client, &mut server);
        pass(&mut server, &mut client);
    }
    client.session().expect("a ticket").to_vec()
}

/// A lane that begins with a hello of this body.
pub(crate) fn hello_lane(body: &[u8]) -> Vec<u8> {
    let header = Header {
        kind: Kind::Hello,
        class: Class::Latency,
        method: Method(0),
        id: 0,
        body_bytes: body.len() as u32,
        arg: 0,
    };
    [&[StreamKind::Lane.encode()], &header.encode()[..], body].concat()
}
