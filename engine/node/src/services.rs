//! The services of a node: its own and the embedder's.

use std::fmt;
use std::ops::RangeInclusive;
use std::sync::Arc;

use millrace_protocol::frame::Method;
use millrace_transport::{Router, RouterError, Service, ShardMessenger};

/// The first method that an embedder's service may own.
pub const FIRST_FREE_METHOD: Method = Method(0x1000);

type Add = dyn Fn(&ShardMessenger, Router) -> Result<Router, RouterError> + Send + Sync;

/// The embedder's services, in the order in which they were added.
#[derive(Clone, Default)]
pub struct Services {
    all: Vec<Arc<Add>>,
}

impl fmt::Debug for Services {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Services({})", self.all.len())
    }
}

impl Services {
    /// Adds a service that owns `methods`. `make` is called once on each shard.
    pub fn add<S: Service>(
        &mut self,
        methods: RangeInclusive<Method>,
        make: impl Fn(ShardMessenger) -> S + Send + Sync + 'static,
    ) {
        self.all.push(Arc::new(move |messenger, router| {
            router.serve(methods.clone(), make(messenger.clone()))
        }));
    }

    /// Adds them to a shard's router.
    pub(crate) fn add_to(
        &self,
        messenger: &ShardMessenger,
        router: Router,
    ) -> Result<Router, RouterError> {
        let mut services = self.all.iter();
        services.try_fold(router, |router, add| add(messenger, router))
    }
}
