//! The orderly end of a node: what is under way is finished.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::sync::Mutex;
use std::sync::mpsc::{SyncSender, sync_channel};

use futures_channel::oneshot;
use millrace_node::{
    Answer, Class, Defer, FIRST_FREE_METHOD, FailureCode, Inbound, Messenger, Method, Node,
    NodeParts, NotReady, Payload, Period, Queue, Request, RpcError, Service, ShardMessenger,
    SigningKey, keys,
};
use millrace_testkit::PATIENCE;

/// Is answered once the test says so.
const LATER: Method = FIRST_FREE_METHOD;

type Release = oneshot::Sender<()>;

struct Later {
    messenger: ShardMessenger,
    heard: SyncSender<Release>,
}

impl Service for Later {
    fn on_request(&mut self, _request: Inbound<'_>, defer: Defer<'_>) -> Answer {
        let Some(responder) = defer.responder() else {
            return Answer::Failure(FailureCode::Busy);
        };
        let (release, released) = oneshot::channel();
        self.heard.send(release).unwrap();
        self.messenger.spawn(Queue::Latency, async move {
            released.await.unwrap();
            responder.reply(b"late".to_vec().into());
        });
        Answer::Deferred
    }

    fn on_send(&mut self, _message: Inbound<'_>) {}
}

fn start(registry: &SigningKey, heard: &SyncSender<Release>) -> Node {
    let mut config = common::config();
    config.transport.drain_timeout = Period::secs(60);
    let key = keys::generate().unwrap();
    let parts = NodeParts::in_memory(&config, key, registry.public_key()).unwrap();
    let heard = Mutex::new(heard.clone());
    let parts = parts.serve(LATER..=LATER, move |messenger| Later {
        messenger,
        heard: heard.lock().unwrap().clone(),
    });
    Node::start(&config, parts).unwrap()
}

#[test]
fn a_node_that_shuts_down_answers_what_it_was_asked_and_takes_no_more() {
    let registry = keys::generate().unwrap();
    let (heard, hears) = sync_channel(1);
    let (nodes, _) = common::pair(&registry, |_| start(&registry, &heard));
    let [asks, ends] = &nodes;

    let later = || Request {
        class: Class::Normal,
        method: LATER,
        body: Payload::Empty,
        deadline: PATIENCE.into(),
    };
    let answer = asks.request(ends.id(), later());
    let release = hears.recv_timeout(PATIENCE).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| ends.shutdown());
        let status = ends.transport().status();
        assert!(status.wait(PATIENCE, <[_]>::is_empty), "it has begun");
        assert_eq!(ends.readiness(), Err(NotReady::Stopping));
        release.send(()).unwrap();
        let answer = answer.wait(PATIENCE).unwrap();
        assert_eq!(answer.as_text(), Some("late"));
    });
    let refused = ends.request(asks.id(), later()).wait(PATIENCE);
    assert_eq!(refused.unwrap_err(), RpcError::LocalShuttingDown);
    // An orderly end is no failure of a shard.
    assert_eq!(ends.readiness(), Err(NotReady::Stopping));
}
