//! Two connections of quiche that exchange packets in memory, for unit tests.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use millrace_protocol::identity::SigningKey;
use millrace_protocol::tls_keys::{TlsKeys, Validity};
use millrace_protocol::topology::{Member, Topology};
use quiche::{ConnectionId, RecvInfo};

use crate::buffers::Buffers;
use crate::config::{ProfileConfig, TransportConfig};
use crate::quic::quic_config;
use crate::quic_connection::QuicConnection;
use crate::tls::{Credentials, Members, pin};

const CLIENT: &str = "127.0.0.1:1";
const SERVER: &str = "127.0.0.1:2";

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// A dialler and a listener that have sent nothing yet, with the LAN's profile.
pub(crate) fn pair() -> [QuicConnection; 2] {
    pair_of(|config| &config.lan)
}

/// The same with the profile of long paths: BBR, paced.
pub(crate) fn paced_pair() -> [QuicConnection; 2] {
    pair_of(|config| &config.wan)
}

fn pair_of(profile: fn(&TransportConfig) -> &ProfileConfig) -> [QuicConnection; 2] {
    let keys = [1, 2].map(|seed| SigningKey::from_seed([seed; 32]));
    let validity = Validity::starting(0, Duration::from_secs(60));
    let credentials = |key: &SigningKey| Credentials::new(key, validity).unwrap();
    let [dialler, listener] = keys.each_ref().map(credentials);
    let member = |key: &SigningKey| Member::new(key.public_key(), Vec::new());
    let members = keys.each_ref().map(member);
    let members = Members::new(Arc::new(Topology::from_members(members, 1)));
    let config = TransportConfig {
        lan: ProfileConfig {
            initial_rtt: Duration::from_millis(1),
            ..ProfileConfig::lan()
        },
        ..TransportConfig::default()
    };
    let server = listener.server(&members).unwrap();
    let [mut client, mut server] = [dialler.client().unwrap(), server]
        .map(|tls| quic_config(&config, profile(&config), tls).unwrap());
    let (from, to) = (address(CLIENT), address(SERVER));
    let [first, second] = [[1; 16], [2; 16]];
    let (first, second) = (
        ConnectionId::from_ref(&first),
        ConnectionId::from_ref(&second),
    );
    let mut client = QuicConnection::new(|| {
        quiche::connect_with_buffer_factory::<Buffers>(None, &first, from, to, &mut client)
    })
    .unwrap();
    pin(client.as_mut(), TlsKeys::one(keys[1].public_key()));
    let server = QuicConnection::new(|| {
        quiche::accept_with_buf_factory::<Buffers>(&second, None, to, from, &mut server)
    })
    .unwrap();
    [client, server]
}

/// Sends all that `speaker` has; the listener receives it if there is one.
pub(crate) fn say(speaker: &mut QuicConnection, mut listener: Option<&mut QuicConnection>) {
    let mut packet = [0; 2_000];
    while let Ok((len, info)) = speaker.send(&mut packet) {
        let (from, to) = (info.from, info.to);
        if let Some(listener) = &mut listener {
            listener
                .recv(&mut packet[..len], RecvInfo { from, to })
                .unwrap();
        }
    }
}
