//! Services and the methods that they own.
//!
//! Invariants
//! 1. A method has at most one service: overlapping ranges are refused when the router is built.
//! 2. A message costs one comparison when it is for the service of the message before it, and a
//!    binary search over the services otherwise.

use std::fmt;
use std::ops::RangeInclusive;

use millrace_protocol::frame::{Method, Negotiated};
use millrace_protocol::id::{ConnectionNumber, NodeId};

use super::body::{BodyHead, BodyMode};
use super::message::{Answer, Inbound};
use super::responder::Defer;

/// What speaks to peers: it owns a range of methods in a [`Router`].
///
/// A node has one instance on each shard. Its methods are called on the shard's thread and must not
/// block.
pub trait Service: 'static {
    /// A peer asks, with one of this service's methods.
    fn on_request(&mut self, request: Inbound<'_>, defer: Defer<'_>) -> Answer;

    /// A peer tells, with one of this service's methods, and expects no answer.
    fn on_send(&mut self, message: Inbound<'_>);

    /// A peer announced a body of more than 64 KiB, of a request or a one-way message with one of
    /// this service's methods: how it is to be taken. Asked before space is reserved for it, so
    /// that a service that holds bodies may drop some; there may be no space all the same, and then
    /// the message is refused.
    fn on_body(&mut self, head: &BodyHead) -> BodyMode {
        let _ = head;
        BodyMode::Whole
    }

    /// A peer announced a body for one of this service's methods, and it holds so much of this
    /// node's memory already that there is no space for it: lets go of bodies of `peer` that the
    /// service keeps and that are charged to it (`Body::is_charged`), `bytes` together as they take
    /// them in the pool; or of none, where it does not keep as much. Whether it did: then space is
    /// looked for once more.
    fn make_room(&mut self, peer: NodeId, bytes: u64) -> bool {
        let _ = (peer, bytes);
        false
    }

    /// A connection to `peer` that this shard owns is up: its hello arrived. `connection` is larger
    /// than any before; `hello` says which version the connection speaks, and which registry
    /// version the peer holds. Called for every service.
    fn on_up(&mut self, peer: NodeId, connection: ConnectionNumber, hello: &Negotiated) {
        let _ = (peer, connection, hello);
    }

    /// That connection is gone. Called for every service.
    fn on_down(&mut self, peer: NodeId, connection: ConnectionNumber) {
        let _ = (peer, connection);
    }
}

/// Why a service could not be added to a router. The program is at fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RouterError {
    /// Another service owns some of the methods.
    #[error(
        "methods {:#06x}..={:#06x} overlap methods {:#06x}..={:#06x} of another service; \
         fix: give each service a range of its own",
        added.start().0, added.end().0, held.start().0, held.end().0
    )]
    Overlap {
        /// The range that was to be added.
        added: RangeInclusive<Method>,
        /// The range that another service owns.
        held: RangeInclusive<Method>,
    },
    /// The range has no method in it.
    #[error(
        "methods {:#06x}..={:#06x} are none; fix: begin the range with its lowest method",
        .0.start().0, .0.end().0
    )]
    EmptyRange(RangeInclusive<Method>),
}

/// The services of one shard. A method that no service owns is refused and counted.
#[derive(Default)]
pub struct Router {
    /// By their first method.
    entries: Vec<Entry>,
    /// The entry of the last message.
    last: usize,
}

struct Entry {
    methods: RangeInclusive<Method>,
    service: Box<dyn Service>,
}

impl fmt::Debug for Router {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let methods = self.entries.iter().map(|entry| &entry.methods);
        f.debug_list().entries(methods).finish()
    }
}

impl Router {
    /// A router without services: it refuses every method.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a service that owns `methods`.
    ///
    /// # Errors
    /// When the range is empty, or overlaps the range of a service that was added before.
    pub fn serve(
        mut self,
        methods: RangeInclusive<Method>,
        service: impl Service,
    ) -> Result<Self, RouterError> {
        if methods.is_empty() {
            return Err(RouterError::EmptyRange(methods));
        }
        let overlaps = |entry: &&Entry| {
            entry.methods.start() <= methods.end() && methods.start() <= entry.methods.end()
        };
        if let Some(entry) = self.entries.iter().find(overlaps) {
            return Err(RouterError::Overlap {
                added: methods,
                held: entry.methods.clone(),
            });
        }
        let at = self
            .entries
            .partition_point(|entry| entry.methods.start() < methods.start());
        self.entries.insert(
            at,
            Entry {
                methods,
                service: Box::new(service),
            },
        );
        Ok(self)
    }

    /// The service that owns `method`.
    pub fn service_of(&mut self, method: Method) -> Option<&mut dyn Service> {
        let owns = |entry: &Entry| entry.methods.contains(&method);
        if !self.entries.get(self.last).is_some_and(owns) {
            let after = self
                .entries
                .partition_point(|entry| *entry.methods.start() <= method);
            let at = after.checked_sub(1)?;
            if !owns(&self.entries[at]) {
                return None;
            }
            self.last = at;
        }
        Some(self.entries[self.last].service.as_mut())
    }

    /// Tells every service that a connection is up.
    pub fn on_up(&mut self, peer: NodeId, connection: ConnectionNumber, hello: &Negotiated) {
        for entry in &mut self.entries {
            entry.service.on_up(peer, connection, hello);
        }
    }

    /// Tells every service that a connection is gone.
    pub fn on_down(&mut self, peer: NodeId, connection: ConnectionNumber) {
        for entry in &mut self.entries {
            entry.service.on_down(peer, connection);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::rc::Rc;

    use super::*;

    /// Counts the connections it hears of, so that a test can tell which service it was given.
    struct Named(Rc<Cell<u32>>);

    impl Service for Named {
        fn on_request(&mut self, _request: Inbound<'_>, _defer: Defer<'_>) -> Answer {
            Answer::Deferred
        }

        fn on_send(&mut self, _message: Inbound<'_>) {}

        fn on_up(&mut self, _: NodeId, _: ConnectionNumber, _: &Negotiated) {
            self.0.set(self.0.get() + 1);
        }
    }

    const HELLO: Negotiated = Negotiated {
        version: 1,
        features: 0,
        registry_version: 1,
        shards: 1,
    };

    fn range(first: u16, last: u16) -> RangeInclusive<Method> {
        Method(first)..=Method(last)
    }

    fn named() -> (Named, Rc<Cell<u32>>) {
        let heard = Rc::default();
        (Named(Rc::clone(&heard)), heard)
    }

    #[test]
    fn each_method_finds_the_service_that_owns_it() {
        let services = [(range(10, 19), 0), (range(0, 0), 1), (range(20, 20), 2)];
        let mut router = Router::new();
        let mut heard = Vec::new();
        for (methods, _) in &services {
            let (service, cell) = named();
            heard.push(cell);
            router = router.serve(methods.clone(), service).unwrap();
        }
        let owners = [
            (0, Some(1)),
            (1, None),
            (9, None),
            (10, Some(0)),
            (19, Some(0)),
            (20, Some(2)),
            (21, None),
            (u16::MAX, None),
            (15, Some(0)),
            (0, Some(1)),
        ];
        for (method, owner) in owners {
            heard.iter().for_each(|cell| cell.set(0));
            let service = router.service_of(Method(method));
            assert_eq!(service.is_some(), owner.is_some(), "method {method}");
            if let Some(service) = service {
                service.on_up(NodeId::from_bytes([1; 29]), ConnectionNumber(1), &HELLO);
            }
            let heard: Vec<_> = heard.iter().map(|cell| cell.get()).collect();
            let wanted: Vec<_> = (0..3).map(|at| u32::from(owner == Some(at))).collect();
            assert_eq!(heard, wanted, "method {method}");
        }
    }

    #[test]
    fn overlapping_and_empty_ranges_are_refused() {
        let router = || Router::new().serve(range(10, 19), named().0).unwrap();
        for (first, last) in [(10, 19), (0, 10), (19, 30), (12, 13), (0, u16::MAX)] {
            let refused = router().serve(range(first, last), named().0);
            let wanted = RouterError::Overlap {
                added: range(first, last),
                held: range(10, 19),
            };
            assert_eq!(refused.unwrap_err(), wanted);
        }
        let empty = router().serve(range(5, 4), named().0).unwrap_err();
        assert_eq!(empty, RouterError::EmptyRange(range(5, 4)));
        assert!(router().serve(range(0, 9), named().0).is_ok());
    }

    #[test]
    fn every_service_hears_of_every_connection() {
        let ((a, heard_a), (b, heard_b)) = (named(), named());
        let router = Router::new().serve(range(1, 1), a).unwrap();
        let mut router = router.serve(range(2, 2), b).unwrap();
        router.on_up(NodeId::from_bytes([1; 29]), ConnectionNumber(1), &HELLO);
        assert_eq!((heard_a.get(), heard_b.get()), (1, 1));
    }
}
