//! The messenger of a shard of the product: its own peers without a lock or a hop, those of other
//! shards by their mailboxes.

use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use millrace_protocol::frame::{Class, Method};
use millrace_protocol::id::NodeId;
use millrace_protocol::rpc::RpcError;
use millrace_shards::chunk::ChunkPool;
use millrace_shards::{Queue, ShardContext};

use super::handle::ShardState;
use super::message::{Payload, Request};
use super::messenger::{Messenger, PathInfo};
use super::pending::PendingAnswer;
use super::routes::Routes;

/// How often a full mailbox is asked again.
const MAILBOX_RETRY: Duration = Duration::from_millis(1);

/// The [`Messenger`] of one shard.
///
/// It does not keep the transport running: when the last [`Transport`](crate::Transport) is dropped
/// its shards stop, whatever holds a messenger.
#[derive(Clone, Debug)]
pub struct ShardMessenger {
    parts: Rc<Parts>,
}

#[derive(Debug)]
struct Parts {
    me: NodeId,
    state: Rc<ShardState>,
    context: ShardContext,
    routes: Arc<Routes>,
}

impl ShardMessenger {
    pub(crate) fn new(
        me: NodeId,
        state: Rc<ShardState>,
        context: ShardContext,
        routes: Arc<Routes>,
    ) -> Self {
        Self {
            parts: Rc::new(Parts {
                me,
                state,
                context,
                routes,
            }),
        }
    }

    /// Index of this shard, from 0.
    pub fn shard(&self) -> usize {
        self.parts.context.index
    }

    /// This shard's state, if it sends the messages of `class` to `peer`.
    fn own(&self, peer: &NodeId, class: Class) -> Option<&ShardState> {
        let Parts {
            state,
            context,
            routes,
            ..
        } = &*self.parts;
        let is_own = context.shards == 1
            || routes.owner_of(peer) == context.index
            // A body may take any connection.
            || class == Class::Bulk && state.contains(peer);
        is_own.then_some(&**state)
    }
}

impl Messenger for ShardMessenger {
    fn node_id(&self) -> NodeId {
        self.parts.me
    }

    fn request(&self, peer: NodeId, request: Request) -> PendingAnswer {
        match self.own(&peer, request.class) {
            Some(state) => state.request(&peer, request),
            None => PendingAnswer::elsewhere(self.parts.routes.request(peer, request)),
        }
    }

    fn send(
        &self,
        peer: NodeId,
        class: Class,
        method: Method,
        body: Payload,
    ) -> Result<(), RpcError> {
        match self.own(&peer, class) {
            Some(state) => state.send(&peer, class, method, body),
            None => self.parts.routes.send(peer, class, method, body),
        }
    }

    fn send_slice(
        &self,
        peer: NodeId,
        class: Class,
        method: Method,
        body: &[u8],
    ) -> Result<(), RpcError> {
        match self.own(&peer, class) {
            Some(state) => state.send_slice(&peer, class, method, body),
            None => {
                let body = Payload::Bytes(bytes::Bytes::copy_from_slice(body));
                self.parts.routes.send(peer, class, method, body)
            }
        }
    }

    fn send_to_all(
        &self,
        peers: &[NodeId],
        class: Class,
        method: Method,
        body: Payload,
    ) -> Vec<(NodeId, RpcError)> {
        let mut refused = Vec::new();
        let mut others = Vec::new();
        for peer in peers {
            match self.own(peer, class) {
                Some(state) => {
                    if let Err(error) = state.send(peer, class, method, body.clone()) {
                        refused.push((*peer, error));
                    }
                }
                None => others.push(*peer),
            }
        }
        if !others.is_empty() {
            let routes = &self.parts.routes;
            refused.extend(routes.send_to_all(&others, class, method, &body));
        }
        refused
    }

    fn on_writable(
        &self,
        peer: NodeId,
        class: Class,
    ) -> impl Future<Output = Result<(), RpcError>> + 'static {
        let own = self.own(&peer, class);
        let here = own.map(|state| state.on_writable(&peer, class));
        let routes = Arc::clone(&self.parts.routes);
        async move {
            match here {
                Some(wait) => wait.await.map(drop),
                None => on_writable_elsewhere(&routes, peer, class).await,
            }
        }
    }

    fn peers(&self) -> Vec<NodeId> {
        let mut peers = self.parts.routes.board().peer_ids();
        // A shard publishes a peer once its services have heard of it, and they may ask meanwhile.
        peers.extend(self.parts.state.peers());
        peers.sort_unstable();
        peers.dedup();
        peers
    }

    fn path(&self, peer: NodeId) -> Option<PathInfo> {
        self.parts.routes.board().path(&peer)
    }

    fn pool(&self) -> &ChunkPool {
        &self.parts.context.pool
    }

    fn now(&self) -> Instant {
        Instant::now()
    }

    fn sleep(&self, duration: Duration) -> impl Future<Output = ()> + 'static {
        millrace_shards::sleep(duration)
    }

    fn spawn(&self, queue: Queue, task: impl Future<Output = ()> + 'static) {
        self.parts.context.spawn_local(queue, task);
    }
}

/// A mailbox that is full is itself a queue that refused: it is asked again until it has room.
async fn on_writable_elsewhere(
    routes: &Arc<Routes>,
    peer: NodeId,
    class: Class,
) -> Result<(), RpcError> {
    loop {
        match routes.on_writable(peer, class) {
            Ok(wait) => return wait.await.map(drop),
            Err(RpcError::LocalBusy(_)) => millrace_shards::sleep(MAILBOX_RETRY).await,
            Err(error) => return Err(error),
        }
    }
}
