//! The bound on the packets that a closing connection may still send.
//!
//! quiche ends by itself once the closing frame is out. It does not get there while the peer has
//! not confirmed the handshake and a probe is due: quiche then wants to ask for an answer, a
//! closing connection asks for none, and so it sends acknowledgements without end. It keeps each of
//! these packets in memory.

use crate::quic_connection::QuicConnection;

/// More packets than the rest of a handshake takes, with the probes of its packet number spaces and
/// the closing frame.
const PACKETS_MAX: u32 = 16;

/// The last packets of a connection.
#[derive(Debug, Default)]
pub(crate) struct CloseSender {
    packets: u32,
}

impl CloseSender {
    /// Builds the next packet of a closing connection and returns its length.
    ///
    /// # Errors
    /// quiche's own; [`quiche::Error::Done`] also at the bound.
    pub(crate) fn send(
        &mut self,
        quic: &mut QuicConnection,
        buffer: &mut [u8],
    ) -> quiche::Result<usize> {
        if self.is_over() {
            return Err(quiche::Error::Done);
        }
        let (len, _) = quic.send(buffer)?;
        self.packets += 1;
        Ok(len)
    }

    /// Whether nothing more is sent.
    pub(crate) fn is_over(&self) -> bool {
        self.packets >= PACKETS_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quic_pair::{pair, say};

    /// Packets of a closing connection.
    fn packets_of(close_sender: &mut CloseSender, quic: &mut QuicConnection) -> u32 {
        let mut packet = [0; 2_000];
        let sent = std::iter::repeat_with(|| close_sender.send(quic, &mut packet));
        sent.take_while(Result::is_ok).take(1_000).count() as u32
    }

    // Protects the shard, and its memory, from a connection that is closed before its handshake is
    // confirmed.
    #[test]
    fn it_ends_although_quiche_goes_on() {
        let [mut client, mut server] = pair();
        while !client.is_established() {
            say(&mut client, Some(&mut server));
            say(&mut server, Some(&mut client));
        }
        // The packet that confirms the handshake is lost, and a probe is due.
        say(&mut client, None);
        while let Some(left) = client.timeout().filter(|left| !left.is_zero()) {
            std::thread::sleep(left);
        }
        client.on_timeout();
        client.close(0, b"done");
        let mut close_sender = CloseSender::default();
        assert_eq!(packets_of(&mut close_sender, &mut client), PACKETS_MAX);
        assert!(close_sender.is_over());
        assert!(
            client.send(&mut [0; 2_000]).is_ok(),
            "quiche ends by itself: the bound is not needed any more"
        );
    }

    #[test]
    fn a_confirmed_connection_says_it_once() {
        let [mut client, mut server] = pair();
        for _ in 0..4 {
            say(&mut client, Some(&mut server));
            say(&mut server, Some(&mut client));
        }
        client.close(0, b"done");
        let mut close_sender = CloseSender::default();
        assert_eq!(packets_of(&mut close_sender, &mut client), 1);
        assert!(!close_sender.is_over() && client.is_draining());
    }
}
