//! The way to the shards of a node from other shards and threads: their mailboxes, and what they
//! publish of their connections.
//!
//! Invariants
//! 1. Nothing here keeps a shard running: a mailbox outlives its shard and then refuses.
//! 2. Small messages to a peer always go to the same shard, by which they keep their order.
//! 3. A cancellation for which a mailbox has no room is counted, and the shard finds the request
//!    that no one waits for when it next keeps house: it is late, not lost.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use millrace_protocol::frame::{Class, Method};
use millrace_protocol::id::NodeId;
use millrace_protocol::rpc::RpcError;
use millrace_shards::mailbox::{MailError, MailSender};

use super::command::{Command, Recipients, RemoteRequest, RemoteSend, RemoteWait};
use super::message::{Payload, Request};
use super::remote::{CallId, Canceller, RemoteAnswer, RemoteCompletion};
use crate::counters::{Counters, Family};
use crate::status::StatusBoard;

/// Reason of a cancellation that the shard finds later than by its mailbox.
const CANCEL_LATE: &str = "local_cancel_late";

/// The mailboxes of a node's shards.
#[derive(Debug)]
pub(crate) struct Routes {
    senders: Vec<MailSender<Command>>,
    /// By shard: what it counts, and whether it has to look for requests to be cancelled.
    counters: Vec<Arc<Counters>>,
    has_abandoned: Vec<AtomicBool>,
    board: Arc<StatusBoard>,
    connections_per_peer: u8,
    /// Which of a peer's connections takes the next body.
    turn: AtomicUsize,
}

impl Routes {
    pub(crate) fn new(
        senders: Vec<MailSender<Command>>,
        counters: Vec<Arc<Counters>>,
        board: Arc<StatusBoard>,
        connections_per_peer: u8,
    ) -> Self {
        Self {
            has_abandoned: senders.iter().map(|_| AtomicBool::new(false)).collect(),
            senders,
            counters,
            board,
            connections_per_peer,
            turn: AtomicUsize::new(0),
        }
    }

    pub(crate) fn board(&self) -> &Arc<StatusBoard> {
        &self.board
    }

    /// Whether requests in flight on `shard` may have been abandoned without a cancellation since
    /// the last call.
    pub(crate) fn take_abandoned(&self, shard: usize) -> bool {
        let flag = self.has_abandoned.get(shard);
        flag.is_some_and(|flag| flag.swap(false, Ordering::Acquire))
    }

    /// The shard that owns a peer's first connection, which all small messages take.
    pub(crate) fn owner_of(&self, peer: &NodeId) -> usize {
        usize::from(peer.owner_shard(0, self.senders.len() as u8))
    }

    /// The shard that sends the next message of `class` to `peer`, which takes its turn: bodies
    /// take turns over the connections that are up.
    fn shard_for(&self, peer: &NodeId, class: Class) -> usize {
        self.shard_at(peer, class, || self.turn.fetch_add(1, Ordering::Relaxed))
    }

    /// As [`Self::shard_for`], and takes no turn.
    fn next_shard_for(&self, peer: &NodeId, class: Class) -> usize {
        self.shard_at(peer, class, || self.turn.load(Ordering::Relaxed))
    }

    fn shard_at(&self, peer: &NodeId, class: Class, turn: impl Fn() -> usize) -> usize {
        if class == Class::Bulk && self.connections_per_peer > 1 {
            let up = self.board.shards_of(peer);
            if let Some(shard) = turn().checked_rem(up.len()).and_then(|at| up.get(at)) {
                return *shard;
            }
        }
        self.owner_of(peer)
    }

    /// Asks `peer`, on the shard that owns its connection.
    pub(crate) fn request(self: &Arc<Self>, peer: NodeId, request: Request) -> RemoteAnswer {
        let class = request.class;
        let shard = self.shard_for(&peer, class);
        let canceller = Arc::clone(self) as Arc<dyn Canceller>;
        let (completion, answer) = RemoteCompletion::new(shard, canceller);
        let command = Command::Request(Box::new(RemoteRequest {
            peer,
            request,
            completion,
        }));
        // The completion is dropped with a command that was not taken: this error is the later one.
        if let Err(error) = self.post(shard, class, command) {
            answer.fail(error);
        }
        answer
    }

    /// Tells `peer`, on the shard that owns its connection. An error after the mailbox is counted
    /// there.
    pub(crate) fn send(
        &self,
        peer: NodeId,
        class: Class,
        method: Method,
        body: Payload,
    ) -> Result<(), RpcError> {
        let shard = self.shard_for(&peer, class);
        let peers = Recipients::One(peer);
        self.post_send(shard, peers, class, method, body)
    }

    /// Waits until the queue of `class` to `peer` takes messages again, on the shard that sends the
    /// next one. A message of another asker may take that turn before the wait is over.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub(crate) fn on_writable(
        self: &Arc<Self>,
        peer: NodeId,
        class: Class,
    ) -> Result<RemoteAnswer, RpcError> {
        let shard = self.next_shard_for(&peer, class);
        let canceller = Arc::clone(self) as Arc<dyn Canceller>;
        let (completion, answer) = RemoteCompletion::new(shard, canceller);
        let wait = RemoteWait {
            peer,
            class,
            completion,
        };
        self.post(shard, class, Command::OnWritable(Box::new(wait)))?;
        Ok(answer)
    }

    /// Tells peers of one shard by one mailbox message.
    pub(crate) fn post_send(
        &self,
        shard: usize,
        peers: Recipients,
        class: Class,
        method: Method,
        body: Payload,
    ) -> Result<(), RpcError> {
        let send = RemoteSend {
            peers,
            class,
            method,
            body,
        };
        self.post(shard, class, Command::Send(Box::new(send)))
    }

    /// Tells all `peers`: one mailbox message for each shard that owns some of them, all with the
    /// same buffer. Who was refused, and why.
    pub(crate) fn send_to_all(
        &self,
        peers: &[NodeId],
        class: Class,
        method: Method,
        body: &Payload,
    ) -> Vec<(NodeId, RpcError)> {
        let mut by_shard = vec![Vec::new(); self.senders.len()];
        for peer in peers {
            by_shard[self.owner_of(peer)].push(*peer);
        }
        let mut refused = Vec::new();
        for (shard, peers) in by_shard.into_iter().enumerate() {
            if !peers.is_empty() {
                let sent = self.fan_out(shard, peers, class, method, body);
                refused.extend(sent);
            }
        }
        refused
    }

    /// As [`Self::send_to_all`], to peers of one shard.
    pub(crate) fn fan_out(
        &self,
        shard: usize,
        peers: Vec<NodeId>,
        class: Class,
        method: Method,
        body: &Payload,
    ) -> Vec<(NodeId, RpcError)> {
        let send = RemoteSend {
            peers: Recipients::Many(peers),
            class,
            method,
            body: body.clone(),
        };
        match self.try_post(shard, Command::Send(Box::new(send))) {
            Ok(()) => Vec::new(),
            Err(refused) => {
                let error = error_of(&refused, class);
                match refused.into_message() {
                    Command::Send(send) => {
                        let peers = send.peers.as_slice().iter();
                        peers.map(|peer| (*peer, error)).collect()
                    }
                    _ => Vec::new(),
                }
            }
        }
    }

    /// Sends `command` to every shard; false when a mailbox was full.
    pub(crate) fn post_to_all(&self, command: impl Fn() -> Command) -> bool {
        self.post_each((0..self.senders.len()).map(|_| command()))
    }

    /// Sends one command to each shard, in their order; false when a mailbox was full.
    pub(crate) fn post_each(&self, commands: impl IntoIterator<Item = Command>) -> bool {
        let commands = commands.into_iter().enumerate();
        let post = |(shard, command)| self.try_post(shard, command).is_ok();
        // Every shard, also after one that refused.
        commands.map(post).fold(true, |all, one| all & one)
    }

    fn post(&self, shard: usize, class: Class, command: Command) -> Result<(), RpcError> {
        self.try_post(shard, command)
            .map_err(|refused| error_of(&refused, class))
    }

    fn try_post(&self, shard: usize, command: Command) -> Result<(), MailError<Command>> {
        match self.senders.get(shard) {
            Some(sender) => sender.try_send(command),
            None => Err(MailError::Closed(command)),
        }
    }
}

fn error_of(refused: &MailError<Command>, class: Class) -> RpcError {
    match refused {
        MailError::Full(_) => RpcError::LocalBusy(class),
        MailError::Closed(_) => RpcError::LocalShuttingDown,
    }
}

impl Canceller for Routes {
    fn cancel(&self, shard: usize, call: CallId) {
        let posted = self.try_post(shard, Command::Cancel(Box::new(call)));
        // A shard that has stopped has nothing in flight.
        if let Err(MailError::Full(_)) = posted
            && let (Some(counters), Some(flag)) =
                (self.counters.get(shard), self.has_abandoned.get(shard))
        {
            counters.count(Family::Failed, CANCEL_LATE);
            // After the answer was marked as dropped: who takes the flag finds it so.
            flag.store(true, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use millrace_shards::mailbox::{MailReceiver, mailbox};

    use super::*;
    use crate::config::PerClass;
    use crate::status::{Load, PeerStatus};
    use millrace_protocol::path::PathProfile;

    const SHARDS: u8 = 4;

    fn peer() -> NodeId {
        NodeId::from_bytes([1; 29])
    }

    fn up() -> PeerStatus {
        PeerStatus {
            node_id: peer(),
            connection: millrace_protocol::id::ConnectionNumber(1),
            address: None,
            profile: PathProfile::Lan,
            remembered: None,
            rtt: None,
            probe_rtt: None,
            queued_bytes: PerClass {
                latency: 0,
                normal: 0,
                bulk: 0,
            },
            congestion_window_bytes: 0,
            udp_payload_bytes: 1_200,
            frames_held: 0,
            packets_sent: 0,
            packets_lost: 0,
            bytes_sent: 0,
            bytes_received: 0,
            duplicates_refused: 0,
            shard: 0,
        }
    }

    /// Mailboxes of shards, of which these have a connection to the peer.
    fn testbed(connected: &[usize]) -> (Arc<Routes>, Vec<MailReceiver<Command>>) {
        let mailboxes = (0..SHARDS).map(|_| mailbox(8).unwrap());
        let (senders, receivers): (Vec<_>, Vec<_>) = mailboxes.unzip();
        let board = Arc::new(StatusBoard::new(senders.len()));
        for shard in connected {
            board.publish(*shard, vec![up()], Load::default());
        }
        let counters = senders.iter().map(|_| Arc::default()).collect();
        let count = connected.len() as u8;
        (
            Arc::new(Routes::new(senders, counters, board, count)),
            receivers,
        )
    }

    /// Which mailbox has a message.
    fn taken(receivers: &mut [MailReceiver<Command>]) -> usize {
        let full = receivers
            .iter_mut()
            .position(|mail| mail.try_recv().is_some());
        full.expect("a message was sent")
    }

    // Protects a shard's thread and its mailbox: a wait at another shard than the one that sends
    // the next message is over at once, for ever.
    #[test]
    fn a_wait_for_room_is_where_the_next_message_goes() {
        let owner = usize::from(peer().owner_shard(0, SHARDS));
        let second = (owner + 2) % usize::from(SHARDS);
        let (routes, mut receivers) = testbed(&[owner, second]);
        for class in Class::ALL {
            let mut shards = [0; SHARDS as usize];
            for _ in 0..6 {
                let waits = [(); 2].map(|()| {
                    let wait = routes.on_writable(peer(), class).unwrap();
                    (wait, taken(&mut receivers)).1
                });
                let request = Request {
                    class,
                    method: Method(0),
                    body: Payload::Empty,
                    deadline: Duration::from_secs(1).into(),
                };
                drop(routes.request(peer(), request));
                let asked = taken(&mut receivers);
                assert_eq!(waits, [asked; 2], "{class:?}: a wait takes no turn");
                shards[asked] += 1;
            }
            let bulk = usize::from(class == Class::Bulk) * 3;
            assert_eq!(
                (shards[owner], shards[second]),
                (6 - bulk, bulk),
                "{class:?}"
            );
        }
    }
}
