//! Timers: of connections, of the machine, and the look at everything now and then.

use millrace_transport::counters::Family;
use millrace_transport::driver::{Expired, Phase, Session, StreamPath};
use millrace_transport::{CloseCode, PathInfo};

use super::{HOUSEKEEPING, Running, Timer, slot_of};

impl Running {
    pub(in crate::node) fn on_timeout(&mut self) {
        let mut due = Vec::new();
        self.wheel.poll(self.now, &mut |timer| due.push(timer));
        for timer in due {
            match timer {
                Timer::Connection(slot) => self.on_connection_timeout(slot),
                Timer::Peers => {
                    self.peers_timer = None;
                    self.peers.handle_timeout(self.now);
                    self.run_actions();
                }
                Timer::Housekeeping => {
                    for connection in self.connections.values_mut() {
                        if let Some(session) = &mut connection.session {
                            session.housekeep(&mut connection.quic);
                        }
                    }
                    let slots: Vec<usize> = self.connections.keys().copied().collect();
                    slots.into_iter().for_each(|slot| self.drain_on(slot));
                    self.bodies.settle();
                    self.publish();
                    let next = self.now + HOUSEKEEPING;
                    self.wheel.schedule(Timer::Housekeeping, next);
                }
            }
        }
    }

    /// Says what is known of the ways to the peers that are up.
    pub(super) fn publish(&self) {
        let known = self.ups.iter().filter_map(|(peer, (key, _))| {
            let connection = self.connections.get(&slot_of(*key))?;
            let stats = connection.quic.stats();
            let info = PathInfo {
                rtt: stats.rtt,
                queued_bytes: connection.session.as_ref()?.queued_bytes(),
                packets_sent: stats.sent as u64,
                packets_lost: stats.lost as u64,
            };
            Some((*peer, info))
        });
        *self.paths.borrow_mut() = known.collect();
    }

    fn on_connection_timeout(&mut self, slot: usize) {
        let now = self.now;
        let Some(connection) = self.connections.get_mut(&slot) else {
            return;
        };
        connection.timer = None;
        connection.quic.on_timeout(now);
        if connection.quic.end().is_some() {
            self.remove(slot);
            return;
        }
        let mut is_released = false;
        let mut close = match connection.phase.expired(now) {
            Some(Expired::Handshake) => {
                let counters = self.state.counters();
                counters.count(Family::Refused, "connect_timeout");
                Some(CloseCode::Done)
            }
            Some(Expired::Drained(code)) => Some(code),
            None => None,
        };
        if let Some(session) = &mut connection.session {
            let due = session.on_timeout(&mut connection.quic, now);
            close = due.or(close);
            let flood = session.flood().map(|_| CloseCode::Flood);
            close = close.or(flood);
            is_released = session.take_release(now);
        }
        if let Some(code) = close {
            self.close(slot, code);
        } else if is_released {
            self.on_packets(slot);
        }
        self.mark_dirty(slot);
    }

    /// A replaced connection goes on while its messages come forward.
    pub(super) fn drain_on(&mut self, slot: usize) {
        if let Some(connection) = self.connections.get_mut(&slot)
            && matches!(connection.phase, Phase::Draining { until: None, .. })
            && let Some(session) = &mut connection.session
            && let Some(until) = session.drains_until(&connection.quic, self.now)
        {
            self.peers.drains_on(connection.key, until);
        }
    }

    pub(super) fn arm(&mut self, slot: usize) {
        let Some(connection) = self.connections.get_mut(&slot) else {
            return;
        };
        let session = connection.session.as_ref().and_then(Session::next_timeout);
        let waits = [
            connection.quic.next_timeout(),
            connection.phase.next_timeout(),
            session,
            connection.room_at,
        ];
        let timer = connection.timer.take();
        match waits.into_iter().flatten().min() {
            Some(at) => {
                let timer = self.wheel.replace(timer, Timer::Connection(slot), at);
                connection.timer = Some(timer);
            }
            None => {
                if let Some(timer) = timer {
                    self.wheel.cancel(timer);
                }
            }
        }
    }
}
