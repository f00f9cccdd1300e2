//! The services of a node: its own and the embedder's.

use std::fmt;
use std::ops::RangeInclusive;
use std::sync::Arc;

use millrace_protocol::frame::Method;
use millrace_transport::{Router, RouterError, Service, ShardMessenger};

use crate::error::StartError;

/// The first method that an embedder's service may own.
pub const FIRST_FREE_METHOD: Method = Method(0x1000);

type Add = dyn Fn(&ShardMessenger, Router) -> Result<Router, RouterError> + Send + Sync;

/// The embedder's services, in the order in which they were added.
#[derive(Clone, Default)]
pub struct Services {
    all: Vec<Arc<Add>>,
    /// The first methods that were asked for although they are reserved for the node.
    reserved: Option<RangeInclusive<Method>>,
}

impl fmt::Debug for Services {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Services({})", self.all.len())
    }
}

impl Services {
    /// Adds a service that owns `methods`, none of them below [`FIRST_FREE_METHOD`]: the node would
    /// not start. `make` is called once on each shard.
    pub fn add<S: Service>(
        &mut self,
        methods: RangeInclusive<Method>,
        make: impl Fn(ShardMessenger) -> S + Send + Sync + 'static,
    ) {
        if !methods.is_empty() && *methods.start() < FIRST_FREE_METHOD {
            self.reserved.get_or_insert_with(|| methods.clone());
        }
        self.all.push(Arc::new(move |messenger, router| {
            router.serve(methods.clone(), make(messenger.clone()))
        }));
    }

    /// Whether the services leave the node's own methods alone.
    ///
    /// # Errors
    /// [`StartError::ReservedMethods`] if one does not.
    pub(crate) fn check(&self) -> Result<(), StartError> {
        match self.reserved.clone() {
            Some(methods) => Err(StartError::ReservedMethods {
                methods,
                first_free: FIRST_FREE_METHOD,
            }),
            None => Ok(()),
        }
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
