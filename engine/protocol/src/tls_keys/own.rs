//! Which of its keys a node uses in handshakes.

use super::TlsKeys;
use crate::identity::PublicKey;
use std::time::{Duration, Instant};

/// How the key in use stands to the node's registry record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It is the newest of the record, or there is no record.
    Newest,
    /// A rotation is under way, and the newest is taken up soon.
    Older,
    /// The newest of the record has no secret half here; the one in use is still accepted.
    NewestMissing,
    /// The record names other keys, and none of them has a secret half here: peers refuse this
    /// node.
    Refused,
}

impl Standing {
    /// Stable label for status.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Newest => "newest",
            Self::Older => "older",
            Self::NewestMissing => "newest_missing",
            Self::Refused => "refused",
        }
    }
}

/// Chooses the TLS key of this node. The shell says which keys the record names and which secret
/// halves it holds, after every change and at [`OwnKey::poll_timeout`].
///
/// 1. A key of the record that replaces an accepted one is used `take_up_after` from when it was
///    seen: until then peers may not have heard of it, and would refuse it.
/// 2. A key that the record does not name any more is left at once, if another one is there.
#[derive(Clone, Debug)]
pub struct OwnKey {
    in_use: PublicKey,
    take_up_after: Duration,
    /// The key that is to be taken up, and when.
    next: Option<(PublicKey, Instant)>,
    standing: Standing,
}

impl OwnKey {
    /// The choice of a node that starts: it has no connection to lose, and waits for nothing.
    pub fn at_start(
        identity: PublicKey,
        record: Option<&TlsKeys>,
        holds: impl Fn(&PublicKey) -> bool,
        take_up_after: Duration,
    ) -> Self {
        let in_use = record.and_then(|record| best(record, &holds));
        let mut own = Self {
            in_use: in_use.unwrap_or(identity),
            take_up_after,
            next: None,
            standing: Standing::Newest,
        };
        own.standing = own.standing(record, &holds);
        own
    }

    /// Takes the record and the keys that are held now. The key to use from now on, if that is
    /// another one than before.
    pub fn update(
        &mut self,
        record: Option<&TlsKeys>,
        holds: impl Fn(&PublicKey) -> bool,
        now: Instant,
    ) -> Option<PublicKey> {
        let before = self.in_use;
        let wanted = record.and_then(|record| best(record, &holds));
        let wanted = wanted.filter(|wanted| *wanted != self.in_use);
        self.next = wanted.map(|wanted| {
            let is_accepted = record.is_some_and(|record| record.contains(&self.in_use));
            let wait = if is_accepted {
                self.take_up_after
            } else {
                Duration::ZERO
            };
            let seen = self.next.filter(|(next, _)| *next == wanted);
            let at = seen.map_or(now + wait, |(_, at)| at.min(now + wait));
            (wanted, at)
        });
        if let Some((wanted, _)) = self.next.filter(|(_, at)| *at <= now) {
            self.in_use = wanted;
            self.next = None;
        }
        self.standing = self.standing(record, &holds);
        (self.in_use != before).then_some(self.in_use)
    }

    /// When to call [`Self::update`] again; none while no key waits.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.next.map(|(_, at)| at)
    }

    /// The key in use.
    pub fn in_use(&self) -> PublicKey {
        self.in_use
    }

    /// How it stood to the record at the last update.
    pub fn status(&self) -> Standing {
        self.standing
    }

    fn standing(&self, record: Option<&TlsKeys>, holds: &impl Fn(&PublicKey) -> bool) -> Standing {
        match record {
            None => Standing::Newest,
            Some(record) if record.newest() == self.in_use => Standing::Newest,
            Some(record) if !record.contains(&self.in_use) => Standing::Refused,
            Some(record) if holds(&record.newest()) => Standing::Older,
            Some(_) => Standing::NewestMissing,
        }
    }
}

/// The newest key of the record that the node holds.
fn best(record: &TlsKeys, holds: &impl Fn(&PublicKey) -> bool) -> Option<PublicKey> {
    let newest_first = [Some(record.newest()), record.older()];
    newest_first.into_iter().flatten().find(holds)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WAIT: Duration = Duration::from_secs(9);

    fn key(seed: u8) -> PublicKey {
        PublicKey::from_bytes([seed; 32])
    }

    fn record(seeds: &[u8]) -> Option<TlsKeys> {
        let keys: Vec<_> = seeds.iter().map(|seed| key(*seed)).collect();
        TlsKeys::of(&keys).ok()
    }

    /// Second, record, keys held; what is taken up then, how the key in use stands, when the next
    /// look is.
    type Step<'s> = (u64, &'s [u8], &'s [u8], Option<u8>, Standing, Option<u64>);

    fn run(in_use: u8, steps: &[Step<'_>]) {
        let start = Instant::now();
        let mut own = OwnKey::at_start(key(in_use), None, |_| true, WAIT);
        for (second, names, held, taken, standing, next) in steps {
            let at = |second: u64| start + Duration::from_secs(second);
            let holds = |one: &PublicKey| held.iter().any(|seed| key(*seed) == *one);
            let change = own.update(record(names).as_ref(), holds, at(*second));
            assert_eq!(change, taken.map(key), "at {second} s");
            assert_eq!(own.status(), *standing, "at {second} s");
            assert_eq!(own.poll_timeout(), next.map(at), "at {second} s");
        }
    }

    // Protects connections that begin during a rotation: the new key is used when peers had time to
    // hear of it, and a later version does not delay that.
    #[test]
    fn a_new_key_is_taken_up_after_a_while() {
        use Standing::{Newest, Older};
        run(
            1,
            &[
                (0, &[1], &[1, 2], None, Newest, None),
                (10, &[1, 2], &[1, 2], None, Older, Some(19)),
                (15, &[1, 2], &[1, 2], None, Older, Some(19)),
                (18, &[1, 2], &[1, 2], None, Older, Some(19)),
                (19, &[1, 2], &[1, 2], Some(2), Newest, None),
                (30, &[2], &[1, 2], None, Newest, None),
            ],
        );
    }

    // Protects a node whose operator published a key too early: it stays with the one that peers
    // accept, and takes the new one up when its file is there.
    #[test]
    fn a_key_without_a_secret_half_is_not_used() {
        use Standing::{Newest, NewestMissing, Older, Refused};
        run(
            1,
            &[
                (0, &[1, 2], &[1], None, NewestMissing, None),
                (5, &[1, 2], &[1, 2], None, Older, Some(14)),
                (14, &[1, 2], &[1, 2], Some(2), Newest, None),
            ],
        );
        // Finished too early: there is nothing to use that peers accept.
        run(
            1,
            &[
                (0, &[2], &[1], None, Refused, None),
                (5, &[2], &[1, 2], Some(2), Newest, None),
            ],
        );
    }

    // Protects a node whose key was retired, or whose rotation was abandoned: no peer accepts the
    // key in use any more, so there is nothing to wait for.
    #[test]
    fn a_key_that_is_not_named_any_more_is_left_at_once() {
        use Standing::{Newest, Older};
        run(
            1,
            &[
                (0, &[1, 2], &[1, 2], None, Older, Some(9)),
                (3, &[2], &[1, 2], Some(2), Newest, None),
                (4, &[2, 3], &[1, 2, 3], None, Older, Some(13)),
                (13, &[2, 3], &[1, 2, 3], Some(3), Newest, None),
                (20, &[2], &[1, 2, 3], Some(2), Newest, None),
            ],
        );
    }

    #[test]
    fn a_node_that_starts_waits_for_nothing() {
        let (identity, held) = (key(1), |seed: u8| move |one: &PublicKey| *one == key(seed));
        let at_start = |seeds: &[u8], holds: u8| {
            let own = OwnKey::at_start(identity, record(seeds).as_ref(), held(holds), WAIT);
            (own.in_use(), own.status())
        };
        assert_eq!(at_start(&[1, 2], 2), (key(2), Standing::Newest));
        assert_eq!(at_start(&[2, 3], 2), (key(2), Standing::NewestMissing));
        assert_eq!(at_start(&[2, 3], 1), (identity, Standing::Refused));
        assert_eq!(at_start(&[], 1), (identity, Standing::Newest));
    }
}
