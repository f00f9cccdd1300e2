//! Handshakes: the server is a node; the load comes from one shard that does nothing but dial.
//!
//! A node keeps one connection to each peer, so a node is no load generator. This one is a datapath
//! of its own on the same shard runtime: 16 identities, each with one bare quiche connection at a
//! time, with the TLS settings of the transport. A handshake counts when the server's hello
//! arrives, as for the peers; then the connection is closed and the next one begins.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::Instant;

use boring::pkey::PKey;
use boring::ssl::{
    SslAlert, SslContextBuilder, SslMethod, SslOptions, SslSignatureAlgorithm, SslVerifyError,
    SslVerifyMode,
};
use boring::x509::X509;
use millrace_edge_policy::cid::initial_dcid;
use millrace_protocol::identity::SigningKey;
use millrace_shards::{
    Datagrams, Datapath, ShardSocket, Trains, Transmit, UdpGroupConfig, bind_group, spawn,
};

use super::{Identities, drivers, shard};
use crate::Result;
use crate::measure::{Latencies, Measurement, Meter};
use crate::plan::Engine;
use crate::settings::Settings;
use crate::workloads::Job;

pub(super) fn drive(engine: Engine, job: &Job, settings: &Settings) -> Result<Measurement> {
    let identities = Identities::new();
    let server_key = *identities.server(0).public_key().as_bytes();
    let to = job.addresses[0];
    let group = UdpGroupConfig {
        local: (std::net::Ipv4Addr::LOCALHOST, 0).into(),
        recv_buffer_bytes: settings.socket_buffer_bytes,
        send_buffer_bytes: settings.socket_buffer_bytes,
        ..UdpGroupConfig::default()
    };
    let socket: ShardSocket = bind_group(&group)?.pop().ok_or("no socket")?;
    let local = socket.local_addr();
    let (sender, finished) = channel();
    let mut dialers = Vec::new();
    for index in 0..drivers(job.workload) {
        let key = identities.driver(index);
        dialers.push((
            quic_config(key, server_key, settings)?,
            key.node_id().spread(),
        ));
    }
    let config = shard(engine, job.workload, 1);
    let from = Instant::now() + job.warm_up();
    let until = from + job.duration;
    let handle = spawn(config, 0, 1, Some(socket), move |_context| {
        Generator::new(dialers, local, to, from..until, sender)
    })?;
    thread::sleep(job.warm_up());
    let meter = Meter::start(job.server_pid)?;
    // One message at the end: this thread shares its core with the shard.
    let latencies = finished.recv()?;
    let reading = meter.stop()?;
    handle.stop();
    if latencies.len() == 0 {
        return Err("no handshake was finished".into());
    }
    let rps = latencies.len() as f64 / reading.wall.as_secs_f64();
    let [p50_us, p99_us] = latencies.quantiles_us([0.5, 0.99]);
    Ok(Measurement {
        p50_us,
        p99_us,
        rps: Some(rps),
        cores_used: Some(reading.cores_used()),
        ..Measurement::default()
    })
}

/// The transport's TLS: Ed25519 on both sides, X25519, no tickets, the server's key pinned.
fn quic_config(
    key: &SigningKey,
    server_key: [u8; 32],
    settings: &Settings,
) -> Result<quiche::Config> {
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
            Some(Ok(key)) if *key == server_key[..] => Ok(()),
            _ => Err(SslVerifyError::Invalid(SslAlert::CERTIFICATE_UNKNOWN)),
        }
    });
    let mut config = quiche::Config::with_boring_ssl_ctx_builder(quiche::PROTOCOL_VERSION, tls)?;
    config.set_application_protos(&[b"millrace/1"])?;
    config.set_max_idle_timeout(3_000);
    config.set_max_send_udp_payload_size(settings.udp_payload_bytes.into());
    config.set_initial_max_data(1 << 20);
    config.set_initial_max_stream_data_uni(1 << 18);
    config.set_initial_max_streams_uni(16);
    config.grease(false);
    Ok(config)
}

struct Dialer {
    config: quiche::Config,
    /// First byte of the first connection ID: what a node of this identity would use.
    spread: u8,
    quic: Option<quiche::Connection>,
    started: Instant,
}

/// Keeps one handshake of each identity under way.
struct Generator {
    dialers: Vec<Dialer>,
    /// Dialers with something to send.
    dirty: VecDeque<usize>,
    local: SocketAddr,
    to: SocketAddr,
    /// What is measured.
    window: Range<Instant>,
    latencies: Option<Latencies>,
    finished: Sender<Latencies>,
    dials: u64,
    stopping: bool,
}

impl Generator {
    fn new(
        configs: Vec<(quiche::Config, u8)>,
        local: SocketAddr,
        to: SocketAddr,
        window: Range<Instant>,
        finished: Sender<Latencies>,
    ) -> Self {
        let now = Instant::now();
        let dialer = |(config, spread)| Dialer {
            config,
            spread,
            quic: None,
            started: now,
        };
        let mut generator = Self {
            dialers: configs.into_iter().map(dialer).collect(),
            dirty: VecDeque::new(),
            local,
            to,
            window,
            latencies: Some(Latencies::default()),
            finished,
            dials: 0,
            stopping: false,
        };
        for index in 0..generator.dialers.len() {
            generator.dial(index, now);
        }
        generator
    }

    fn dial(&mut self, index: usize, now: Instant) {
        self.dials += 1;
        let dialer = &mut self.dialers[index];
        let mut scid = [index as u8; 16];
        scid[1..9].copy_from_slice(&self.dials.to_le_bytes());
        let mut random = [index as u8; 15];
        random[..8].copy_from_slice(&self.dials.to_le_bytes());
        let dcid = initial_dcid(dialer.spread, random);
        let scid = quiche::ConnectionId::from_ref(&scid);
        let dcid = quiche::ConnectionId::from_ref(&dcid);
        dialer.started = now;
        // Cannot fail with settings that worked before; the measurement then has no handshakes and
        // says so.
        dialer.quic =
            quiche::connect_with_dcid(None, &scid, &dcid, self.local, self.to, &mut dialer.config)
                .ok();
        self.dirty.push_back(index);
    }
}

impl Datapath for Generator {
    type Message = ();

    fn on_message(&mut self, (): (), _now: Instant) {}

    fn on_datagrams(&mut self, datagrams: Datagrams<'_>, now: Instant) {
        let info = quiche::RecvInfo {
            from: datagrams.from(),
            to: self.local,
        };
        for datagram in datagrams.into_segments() {
            // The first byte of our connection IDs names the dialer.
            let at = if datagram.first().is_some_and(|byte| byte & 0x80 != 0) {
                6
            } else {
                1
            };
            let Some(&index) = datagram.get(at) else {
                continue;
            };
            let Some(dialer) = self.dialers.get_mut(usize::from(index)) else {
                continue;
            };
            let Some(quic) = &mut dialer.quic else {
                continue;
            };
            // Late packets of the connection before are refused.
            if quic.recv(datagram, info).is_err() {
                continue;
            }
            if quic.stream_readable_next().is_some() {
                quic.close(true, 0, b"").ok();
                if self.window.contains(&now)
                    && let Some(latencies) = &mut self.latencies
                {
                    latencies.record(now - dialer.started);
                }
            }
            self.dirty.push_back(usize::from(index));
        }
    }

    fn on_timeout(&mut self, now: Instant) {
        for (index, dialer) in self.dialers.iter_mut().enumerate() {
            if let Some(quic) = &mut dialer.quic
                && quic.timeout_instant().is_some_and(|at| at <= now)
            {
                quic.on_timeout();
                self.dirty.push_back(index);
            }
        }
    }

    fn next_timeout(&mut self) -> Option<Instant> {
        self.dialers
            .iter()
            .filter_map(|dialer| dialer.quic.as_ref()?.timeout_instant())
            .min()
    }

    fn transmit(&mut self, trains: &mut Trains<'_>, now: Instant) -> Transmit {
        if now >= self.window.end
            && let Some(latencies) = self.latencies.take()
        {
            // The measurement was given up when its receiver is gone.
            self.finished.send(latencies).ok();
        }
        while let Some(index) = self.dirty.pop_front() {
            let Some(quic) = &mut self.dialers[index].quic else {
                continue;
            };
            loop {
                let Some(buffer) = trains.packet(1_452) else {
                    self.dirty.push_front(index);
                    return Transmit::More;
                };
                match quic.send(buffer) {
                    Ok((len, info)) => trains.push(len, info.to),
                    Err(_) => break,
                }
            }
            if (quic.local_error().is_some() || quic.is_closed() || quic.is_draining())
                && !self.stopping
            {
                self.dial(index, now);
            }
        }
        Transmit::Done
    }

    fn has_pending(&self) -> bool {
        !self.dirty.is_empty()
    }

    fn on_stop(&mut self, _now: Instant) {
        self.stopping = true;
    }

    fn is_stopped(&self, _now: Instant) -> bool {
        self.stopping
    }
}
