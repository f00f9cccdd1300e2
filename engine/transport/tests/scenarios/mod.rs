//! What a messenger promises, as scenarios that run over any messenger: over sockets here, over the
//! simulator's network in `engine/sim`. Each is a future of one node; what its peer saw is in the
//! peer's [`Log`].
#![allow(dead_code, clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::future::{Future, poll_fn};
use std::ops::RangeInclusive;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::Duration;

use millrace_protocol::frame::{Class, FailureCode, Limits, Method, Negotiated};
use millrace_protocol::id::{ConnectionNumber, NodeId};
use millrace_shards::Queue;
use millrace_shards::chunk::{Body, CHUNK_BYTES, Chunk};
use millrace_transport::{
    Answer, BodyHead, BodyMode, BodySink, Defer, INLINE_BYTES_MAX, Inbound, InboundBody, Messenger,
    Payload, Request, Router, RouterError, RpcError, Service, TransportConfig,
};

/// Answers with the request's body.
pub(crate) const ECHO: Method = Method(0x40);
/// Never answers; the log counts the requests that wait, and those that were taken back.
pub(crate) const HANG: Method = Method(0x41);
/// A one-way message; its body begins with its number, u64, little endian.
pub(crate) const TELL: Method = Method(0x42);
/// Answers with as many bytes as a lane's frame takes, or as the request's first four say.
pub(crate) const FILL: Method = Method(0x43);
/// Keeps the body, in the log.
pub(crate) const KEEP: Method = Method(0x44);
/// Takes the body by a sink, and answers with what the sink got.
pub(crate) const STREAM: Method = Method(0x45);
const METHODS: RangeInclusive<Method> = ECHO..=STREAM;
/// No service owns it.
pub(crate) const UNKNOWN: Method = Method(0x46);

/// The largest body that travels on a lane, with the default limits.
pub(crate) const LANE_BYTES: usize = 16 << 10;

/// How long a scenario waits for what should happen at once.
const PATIENCE: Duration = Duration::from_secs(60);

/// The config that the scenarios of full queues need: queues that are soon full.
pub(crate) fn short_queues() -> TransportConfig {
    let mut config = TransportConfig::default();
    config.lane_queue_bytes.normal = 64 << 10;
    config.stream_queue_messages.bulk = 4;
    config
}

/// Bytes of answers that may wait, with [`few_answer_bytes`].
const ANSWER_QUEUE_BYTES: usize = 128 << 10;

/// The config that the scenario of waiting answers needs.
pub(crate) fn few_answer_bytes() -> TransportConfig {
    TransportConfig {
        answer_queue_bytes: ANSWER_QUEUE_BYTES as u64,
        ..TransportConfig::default()
    }
}

/// Requests of a class that are in flight at most, with [`few_in_flight`].
const IN_FLIGHT: u32 = 4;

/// The config that the scenario of bounded requests needs.
pub(crate) fn few_in_flight() -> TransportConfig {
    let mut config = TransportConfig::default();
    config.requests_out_max.latency = IN_FLIGHT;
    config.requests_out_max.normal = IN_FLIGHT;
    config.requests_out_max.bulk = IN_FLIGHT;
    config
}

/// The config that the scenario of a peer's share needs: lanes that take next to nothing, so that
/// most messages have a stream of their own.
pub(crate) fn small_budget() -> TransportConfig {
    TransportConfig {
        receive_budget_bytes: 8 << 20,
        receive_budget_peer_bytes: 4 << 20,
        limits: Limits {
            lane_body_bytes_max: 16,
            ..Limits::default()
        },
        ..TransportConfig::default()
    }
}

/// What a node saw of its peers.
#[derive(Debug, Default)]
pub(crate) struct Log(Mutex<Seen>);

/// See [`Log`].
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// Requests that hang or hung.
    pub(crate) hanging: usize,
    /// Of them, those that were taken back.
    pub(crate) cancelled: usize,
    /// Numbers of the one-way messages that arrived, by class.
    pub(crate) told: [BTreeSet<u64>; 3],
    /// One-way messages that arrived after one with a higher number, by class.
    pub(crate) overtaken: [u64; 3],
    /// One-way messages that arrived again, by class.
    pub(crate) repeated: [u64; 3],
    /// Bodies that are kept.
    pub(crate) kept: Vec<Body>,
    /// Bodies that were cut, by their sinks.
    pub(crate) cut: usize,
}

impl Log {
    pub(crate) fn lock(&self) -> MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn told(&self, class: Class) -> usize {
        self.lock().told[class.index()].len()
    }
}

/// The service that the scenarios talk to.
pub(crate) struct Responding<M> {
    messenger: M,
    log: Arc<Log>,
}

/// The service of a node under test.
pub(crate) fn responding<M: Messenger>(messenger: M, log: Arc<Log>) -> Responding<M> {
    Responding { messenger, log }
}

/// The router of a node under test.
pub(crate) fn router<M: Messenger>(messenger: M, log: Arc<Log>) -> Result<Router, RouterError> {
    Router::new().serve(METHODS, responding(messenger, log))
}

/// Gathers the chunks of a body.
struct Gatherer {
    chunks: Vec<Chunk>,
    log: Arc<Log>,
}

impl BodySink for Gatherer {
    fn on_chunk(&mut self, offset: u64, chunk: Chunk) {
        let gathered: usize = self.chunks.iter().map(|chunk| chunk.len()).sum();
        assert_eq!(offset, gathered as u64, "chunks come in order");
        self.chunks.push(chunk);
    }

    fn on_cut(&mut self, _reason: &'static str) {
        self.log.lock().cut += 1;
    }
}

impl<M: Messenger> Service for Responding<M> {
    fn on_body(&mut self, head: &BodyHead) -> BodyMode {
        if head.method != STREAM {
            return BodyMode::Whole;
        }
        BodyMode::Stream(Box::new(Gatherer {
            chunks: Vec::new(),
            log: Arc::clone(&self.log),
        }))
    }

    fn on_request(&mut self, request: Inbound<'_>, defer: Defer<'_>) -> Answer {
        match (request.method, request.body) {
            (ECHO, InboundBody::Slice(slice)) => return Answer::Reply(slice.to_vec().into()),
            (ECHO, InboundBody::Chunks(body)) => return Answer::Reply(body.into()),
            (FILL, InboundBody::Slice(len)) if !len.is_empty() => {
                let len = u32::from_le_bytes(len.try_into().unwrap());
                return Answer::Reply(vec![7; len as usize].into());
            }
            (FILL, _) => return Answer::Reply(vec![7; LANE_BYTES].into()),
            (KEEP, InboundBody::Chunks(body)) => {
                self.log.lock().kept.push(body);
                return Answer::Reply(Payload::Empty);
            }
            (STREAM, InboundBody::Streamed(body)) => {
                let sink = body.into_sink::<Gatherer>().expect("what on_body gave");
                let body = Body::from_chunks(sink.chunks).expect("all but the last are full");
                return Answer::Reply(body.into());
            }
            _ => {}
        }
        let Some(responder) = defer.responder() else {
            return Answer::Failure(FailureCode::Busy);
        };
        self.log.lock().hanging += 1;
        let log = Arc::clone(&self.log);
        self.messenger.spawn(Queue::Latency, async move {
            responder.cancelled().await;
            assert!(responder.is_cancelled());
            log.lock().cancelled += 1;
        });
        Answer::Deferred
    }

    fn on_up(&mut self, peer: NodeId, _connection: ConnectionNumber, _hello: &Negotiated) {
        let peers = self.messenger.peers();
        assert!(
            peers.contains(&peer),
            "a service hears of a peer that it can reach"
        );
    }

    fn on_send(&mut self, message: Inbound<'_>) {
        let number = match &message.body {
            InboundBody::Slice(bytes) => bytes.first_chunk().copied(),
            InboundBody::Chunks(body) => body.chunks()[0].first_chunk().copied(),
            InboundBody::Streamed(_) => None,
        };
        let number = u64::from_le_bytes(number.expect("a message has its number"));
        let at = message.class.index();
        let mut seen = self.log.lock();
        let is_overtaken = seen.told[at].last().is_some_and(|last| number < *last);
        seen.overtaken[at] += u64::from(is_overtaken);
        let is_new = seen.told[at].insert(number);
        seen.repeated[at] += u64::from(!is_new);
    }
}

pub(crate) fn request(method: Method, class: Class, body: impl Into<Payload>) -> Request {
    Request {
        class,
        method,
        body: body.into(),
        deadline: PATIENCE.into(),
    }
}

/// Waits until a condition holds that another node makes true.
pub(crate) async fn until<M: Messenger>(messenger: &M, what: &str, held: impl Fn() -> bool) {
    let deadline = messenger.now() + PATIENCE;
    while !held() {
        assert!(messenger.now() < deadline, "not in time: {what}");
        messenger.sleep(Duration::from_millis(1)).await;
    }
}

/// What a future says now.
async fn poll_once<F: Future>(mut future: Pin<&mut F>) -> Poll<F::Output> {
    poll_fn(|context| Poll::Ready(future.as_mut().poll(context))).await
}

/// The body of message `number`: most are small, some fill a lane's frame, some lie in chunks.
fn numbered<M: Messenger>(messenger: &M, number: u64) -> Payload {
    let len = match number {
        _ if number.is_multiple_of(997) => LANE_BYTES,
        _ if number.is_multiple_of(101) => 1_000,
        _ => 8,
    };
    let mut bytes = vec![0; len];
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    if number.is_multiple_of(1_009) {
        let body = Body::copy_from_slice(messenger.pool(), &bytes);
        return body.expect("the pool has room for one chunk").into();
    }
    bytes.into()
}

/// Sends `count` numbered messages of `class`; waits where a queue refuses.
async fn tell<M: Messenger>(messenger: &M, peer: NodeId, class: Class, count: u64) {
    for number in 0..count {
        let body = numbered(messenger, number);
        while let Err(error) = messenger.send(peer, class, TELL, body.clone()) {
            assert_eq!(error, RpcError::LocalBusy(class));
            messenger.on_writable(peer, class).await.unwrap();
        }
    }
}

/// One-way messages of class latency arrive in their order, whatever their size; a size that would
/// break it is refused.
pub(crate) async fn latency_keeps_its_order<M: Messenger>(
    messenger: M,
    peer: NodeId,
    log: Arc<Log>,
    count: u64,
) {
    tell(&messenger, peer, Class::Latency, count).await;
    let all = || log.told(Class::Latency) as u64 == count;
    until(&messenger, "all messages of class latency", all).await;
    {
        let seen = log.lock();
        let at = Class::Latency.index();
        assert_eq!((seen.overtaken[at], seen.repeated[at]), (0, 0));
    }
    let large = vec![0; LANE_BYTES + 1];
    let refused = messenger.send(peer, Class::Latency, TELL, large.clone().into());
    let wanted = RpcError::LocalTooLarge {
        body_bytes: large.len() as u64,
        max_bytes: LANE_BYTES as u64,
    };
    assert_eq!(refused.unwrap_err(), wanted);
    // A request keeps no order, and so may be larger.
    let answer = messenger.request(peer, request(ECHO, Class::Latency, large.clone()));
    assert_eq!(answer.await.unwrap().len(), large.len() as u64);
}

/// One-way messages of class normal arrive once each, in any order.
pub(crate) async fn normal_arrives_once<M: Messenger>(
    messenger: M,
    peer: NodeId,
    log: Arc<Log>,
    count: u64,
) {
    tell(&messenger, peer, Class::Normal, count).await;
    let all = || log.told(Class::Normal) as u64 == count;
    until(&messenger, "all messages of class normal", all).await;
    assert_eq!(log.lock().repeated[Class::Normal.index()], 0);
}

/// A queue that refused says once when it has fallen under half. Runs with [`short_queues`].
pub(crate) async fn a_full_queue_says_when_it_has_room<M: Messenger>(messenger: M, peer: NodeId) {
    let chunks = Body::copy_from_slice(messenger.pool(), &vec![0; 128 << 10]);
    let chunks = chunks.expect("the pool has room for one chunk");
    let cases: [(Class, Payload); 2] = [
        (Class::Normal, vec![0; 1_000].into()),
        (Class::Bulk, chunks.into()),
    ];
    for (class, body) in cases {
        let send = || messenger.send(peer, class, TELL, body.clone());
        let free = std::pin::pin!(messenger.on_writable(peer, class));
        assert_eq!(
            poll_once(free).await,
            Poll::Ready(Ok(())),
            "nothing was refused"
        );
        let accepted = (0..10_000).take_while(|_| send().is_ok()).count();
        assert!((1..10_000).contains(&accepted), "{class:?}: {accepted}");
        let mut full = std::pin::pin!(messenger.on_writable(peer, class));
        assert_eq!(poll_once(full.as_mut()).await, Poll::Pending, "{class:?}");
        full.await.unwrap();
        // Room for half of a queue's bytes: more than a third of it.
        for sent in 0..(accepted / 3).max(1) {
            assert_eq!(send(), Ok(()), "{class:?}: {sent} of {accepted}");
        }
    }
    let nobody = NodeId::from_bytes([0xee; 29]);
    let wait = messenger.on_writable(nobody, Class::Normal).await;
    assert_eq!(wait.unwrap_err(), RpcError::NotConnected);
}

/// Requests over the bound of those in flight wait for room, and all are answered; a request that
/// ends in another way makes room too. Runs with [`few_in_flight`].
pub(crate) async fn a_bound_of_requests_says_when_it_has_room<M: Messenger>(
    messenger: M,
    peer: NodeId,
) {
    for class in Class::ALL {
        let hang = || messenger.request(peer, request(HANG, class, vec![1]));
        let busy = |answer: &Poll<Result<Payload, RpcError>>| matches!(answer, Poll::Ready(Err(error)) if *error == RpcError::LocalBusy(class));
        let mut kept: Vec<_> = (0..IN_FLIGHT).map(|_| hang()).collect();
        let mut free = std::pin::pin!(messenger.on_writable(peer, class));
        let is_free = poll_once(free.as_mut()).await;
        assert_eq!(is_free, Poll::Ready(Ok(())), "nothing was refused");
        let refused = poll_once(std::pin::pin!(hang())).await;
        assert!(busy(&refused), "{class:?}: {refused:?}");
        // By taking requests back.
        let mut full = std::pin::pin!(messenger.on_writable(peer, class));
        while kept.len() >= IN_FLIGHT as usize / 2 {
            let is_free = poll_once(full.as_mut()).await;
            assert_eq!(is_free, Poll::Pending, "{class:?}: {}", kept.len());
            kept.pop();
        }
        assert_eq!(poll_once(full.as_mut()).await, Poll::Ready(Ok(())));
        drop(kept);
        // By deadlines.
        let soon = || {
            let mut request = request(HANG, class, vec![1]);
            request.deadline = Duration::from_millis(200).into();
            messenger.request(peer, request)
        };
        let late: Vec<_> = (0..IN_FLIGHT).map(|_| soon()).collect();
        let refused = poll_once(std::pin::pin!(hang())).await;
        assert!(busy(&refused), "{class:?}: {refused:?}");
        messenger.on_writable(peer, class).await.unwrap();
        drop(late);
        // By answers, which are not taken before the wait is over.
        let echo = || messenger.request(peer, request(ECHO, class, vec![1]));
        let answered: Vec<_> = (0..IN_FLIGHT).map(|_| echo()).collect();
        let refused = poll_once(std::pin::pin!(hang())).await;
        assert!(busy(&refused), "{class:?}: {refused:?}");
        messenger.on_writable(peer, class).await.unwrap();
        for answer in answered {
            assert_eq!(answer.await.unwrap().len(), 1);
        }
    }
}

/// As [`a_bound_of_requests_says_when_it_has_room`], on a shard that has no connection to the peer;
/// others have so many that carry the class.
pub(crate) async fn a_bound_at_another_shard_says_when_it_has_room<M: Messenger>(
    messenger: M,
    peer: NodeId,
    log: Arc<Log>,
    class: Class,
    connections: usize,
) {
    let hang = || messenger.request(peer, request(HANG, class, vec![1]));
    let most = IN_FLIGHT as usize * connections;
    let before = log.lock().hanging;
    let kept: Vec<_> = (0..most).map(|_| hang()).collect();
    let all_hang = || log.lock().hanging == before + most;
    until(&messenger, "as many as the bounds allow hang", all_hang).await;
    for _ in 0..connections {
        assert_eq!(hang().await.unwrap_err(), RpcError::LocalBusy(class));
    }
    let mut full = std::pin::pin!(messenger.on_writable(peer, class));
    assert_eq!(poll_once(full.as_mut()).await, Poll::Pending);
    // Behind the wait in its mailbox: what it says, it has said by then.
    assert_eq!(hang().await.unwrap_err(), RpcError::LocalBusy(class));
    assert_eq!(poll_once(full.as_mut()).await, Poll::Pending, "{class:?}");
    drop(kept);
    full.await.unwrap();
    let gone = || {
        let seen = log.lock();
        seen.cancelled == seen.hanging
    };
    until(&messenger, "all that hung are taken back", gone).await;
    messenger.on_writable(peer, class).await.unwrap();
    let answer = messenger.request(peer, request(ECHO, class, vec![1]));
    assert_eq!(answer.await.unwrap().len(), 1);
}

/// An answer that its queue has no room for is a refusal, not silence. Runs with [`short_queues`].
pub(crate) async fn a_full_answer_queue_says_busy<M: Messenger>(messenger: M, peer: NodeId) {
    // They arrive in a few packets, and want a hundred times the queue's bytes.
    const REQUESTS: usize = 400;
    let ask = |_| messenger.request(peer, request(FILL, Class::Normal, Payload::Empty));
    let asked: Vec<_> = (0..REQUESTS).map(ask).collect();
    let (mut whole, mut busy) = (0, 0);
    for answer in asked {
        match answer.await {
            Ok(answer) if answer.len() == LANE_BYTES as u64 => whole += 1,
            Err(RpcError::Peer(FailureCode::Busy)) => busy += 1,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(whole + busy, REQUESTS);
    assert!(whole > 0 && busy > 0, "{whole} answers, {busy} refusals");
}

/// Answers that wait for their asker hold so many bytes and no more; the next ones are refused, and
/// what is sent or taken back makes room. One that is longer is refused for good, unless it lies in
/// chunks. Runs with [`few_answer_bytes`].
pub(crate) async fn answers_that_wait_are_bounded_in_bytes<M: Messenger>(
    messenger: M,
    peer: NodeId,
) {
    // They arrive in a few packets, and want thirty times the bound; by number they would fit.
    const REQUESTS: usize = 200;
    let ask = |bytes: usize| {
        let bytes = (bytes as u32).to_le_bytes().to_vec();
        messenger.request(peer, request(FILL, Class::Normal, bytes))
    };
    let many = || -> Vec<_> { (0..REQUESTS).map(|_| ask(20_000)).collect() };
    let (mut whole, mut busy) = (0, 0);
    for answer in many() {
        match answer.await {
            Ok(answer) if answer.len() == 20_000 => whole += 1,
            Err(RpcError::Peer(FailureCode::Busy)) => busy += 1,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(whole + busy, REQUESTS);
    assert!(whole > 0 && busy > 0, "{whole} answers, {busy} refusals");
    drop(many());
    // The longest is taken once no other waits.
    let deadline = messenger.now() + PATIENCE;
    loop {
        match ask(ANSWER_QUEUE_BYTES).await {
            Ok(answer) => break assert_eq!(answer.len(), ANSWER_QUEUE_BYTES as u64),
            Err(error) => assert_eq!(error, RpcError::Peer(FailureCode::Busy)),
        }
        assert!(
            messenger.now() < deadline,
            "answers that were taken back hold room"
        );
        messenger.sleep(Duration::from_millis(1)).await;
    }
    let too_large = RpcError::Peer(FailureCode::TooLarge);
    assert_eq!(ask(ANSWER_QUEUE_BYTES + 1).await.map(drop), Err(too_large));
    let in_chunks = body_of(&messenger, 2 * ANSWER_QUEUE_BYTES);
    let answer = messenger.request(peer, request(ECHO, Class::Bulk, in_chunks));
    assert_eq!(answer.await.unwrap().len(), 2 * ANSWER_QUEUE_BYTES as u64);
}

fn body_of<M: Messenger>(messenger: &M, len: usize) -> Body {
    let bytes: Vec<u8> = (0..len).map(|at| ((at * 31) >> 5) as u8).collect();
    Body::copy_from_slice(messenger.pool(), &bytes).expect("the pool has room")
}

/// A body is charged to its peer until the service drops it: a full share is Busy, what never fits
/// is TooLarge. Small requests with streams of their own are answered nevertheless. Runs with
/// [`small_budget`].
pub(crate) async fn a_peer_that_fills_its_share_is_busy<M: Messenger>(
    messenger: M,
    peer: NodeId,
    log: Arc<Log>,
) {
    let keep = async |len: usize| {
        let body = body_of(&messenger, len);
        let answer = messenger.request(peer, request(KEEP, Class::Bulk, body));
        answer.await.map(drop)
    };
    let refused = |code| Err(RpcError::Peer(code));
    let len = 3 << 19;
    assert_eq!(keep(len).await, Ok(()));
    assert_eq!(keep(len).await, Ok(()));
    assert_eq!(keep(len).await, refused(FailureCode::Busy));
    assert_eq!(keep(5 << 20).await, refused(FailureCode::TooLarge));
    // Up to the last byte of the share.
    assert_eq!(keep(1 << 20).await, Ok(()));
    assert_eq!(keep(INLINE_BYTES_MAX + 1).await, refused(FailureCode::Busy));
    for len in [20, 40 << 10, INLINE_BYTES_MAX] {
        let answer = messenger.request(peer, request(ECHO, Class::Normal, vec![5; len]));
        assert_eq!(answer.await.map(|answer| answer.len()), Ok(len as u64));
    }
    log.lock().kept.pop();
    let kept = log.lock().kept.pop();
    assert_eq!(kept.map(|body| body.len()), Some(len));
    assert_eq!(keep(len).await, Ok(()));
    assert_eq!(keep(len).await, refused(FailureCode::Busy));
    log.lock().kept.clear();
}

/// A service that gives a sink gets a body chunk by chunk; none is cut.
pub(crate) async fn a_sink_gets_a_body_chunk_by_chunk<M: Messenger>(
    messenger: M,
    peer: NodeId,
    log: Arc<Log>,
) {
    for len in [(64 << 10) + 1, CHUNK_BYTES, 2 * CHUNK_BYTES + 5] {
        let body = body_of(&messenger, len);
        let answer = messenger.request(peer, request(STREAM, Class::Bulk, body.clone()));
        let Payload::Chunks(got) = answer.await.unwrap() else {
            panic!("{len} bytes come back in chunks");
        };
        let bytes = |body: &Body| -> Vec<u8> {
            let slices = body.slices(CHUNK_BYTES);
            slices.flat_map(|slice| slice.to_vec()).collect()
        };
        assert!(bytes(&got) == bytes(&body), "{len}");
    }
    assert_eq!(log.lock().cut, 0);
}

/// A request whose answer is dropped is taken back, and the peer's service sees it.
pub(crate) async fn a_dropped_answer_is_seen_by_the_peer<M: Messenger>(
    messenger: M,
    peer: NodeId,
    log: Arc<Log>,
) {
    for class in Class::ALL {
        let (hanging, cancelled) = {
            let seen = log.lock();
            (seen.hanging, seen.cancelled)
        };
        let answer = messenger.request(peer, request(HANG, class, vec![1; 100]));
        let kept = messenger.request(peer, request(HANG, class, vec![1; 100]));
        let both = || log.lock().hanging == hanging + 2;
        until(&messenger, "both requests hang", both).await;
        drop(answer);
        let one = || log.lock().cancelled == cancelled + 1;
        until(&messenger, "the peer sees the cancellation", one).await;
        drop(kept);
        let two = || log.lock().cancelled == cancelled + 2;
        until(&messenger, "the peer sees the other one", two).await;
    }
}

/// A method that no service owns is refused; the caller looks at what the peer counted.
pub(crate) async fn an_unknown_method_is_refused<M: Messenger>(messenger: M, peer: NodeId) {
    let answer = messenger.request(peer, request(UNKNOWN, Class::Normal, vec![1]));
    let wanted = RpcError::Peer(FailureCode::UnknownMethod);
    assert_eq!(answer.await.unwrap_err(), wanted);
    let told = messenger.send(peer, Class::Normal, UNKNOWN, vec![1].into());
    assert_eq!(told, Ok(()));
}

/// One message to many peers arrives at each of them; those that the caller's shard refuses are
/// named, and no others. `is_own` says which peers are of that shard.
pub(crate) async fn one_message_reaches_all<M: Messenger>(
    messenger: M,
    logs: Vec<Arc<Log>>,
    is_own: impl Fn(&NodeId) -> bool,
) {
    const NUMBER: u64 = 1 << 40;
    let nobody = NodeId::from_bytes([0xee; 29]);
    let mut peers = messenger.peers();
    assert_eq!(peers.len(), logs.len());
    for (class, len) in [(Class::Latency, 100), (Class::Normal, 40_000)] {
        let mut bytes = vec![0; len];
        bytes[..8].copy_from_slice(&NUMBER.to_le_bytes());
        let refused = messenger.send_to_all(&peers, class, TELL, bytes.into());
        assert_eq!(refused, []);
        for log in &logs {
            let has = || log.lock().told[class.index()].contains(&NUMBER);
            until(&messenger, "each peer has the message", has).await;
        }
    }
    peers.push(nobody);
    let large = vec![0; LANE_BYTES + 1];
    let refused = messenger.send_to_all(&peers, Class::Latency, TELL, large.into());
    let too_large = RpcError::LocalTooLarge {
        body_bytes: LANE_BYTES as u64 + 1,
        max_bytes: LANE_BYTES as u64,
    };
    let why = |peer: &NodeId| {
        if *peer == nobody {
            RpcError::NotConnected
        } else {
            too_large
        }
    };
    let own = peers.iter().filter(|peer| is_own(peer));
    let wanted: Vec<_> = own.map(|peer| (*peer, why(peer))).collect();
    assert_eq!(refused, wanted);
}

/// Peers, paths and time of the whole node.
pub(crate) async fn a_messenger_knows_its_node<M: Messenger>(
    messenger: M,
    me: NodeId,
    peers: Vec<NodeId>,
) {
    assert_eq!(messenger.node_id(), me);
    assert_eq!(messenger.peers(), peers);
    for peer in &peers {
        let has_rtt = || messenger.path(*peer).is_some_and(|path| path.rtt.is_some());
        until(&messenger, "the path to a peer is measured", has_rtt).await;
        let path = messenger.path(*peer).unwrap();
        assert!(path.packets_sent > 0 && path.packets_lost <= path.packets_sent);
        let answer = messenger.request(*peer, request(ECHO, Class::Normal, vec![3; 10]));
        assert_eq!(answer.await.unwrap().len(), 10);
    }
    assert_eq!(messenger.path(NodeId::from_bytes([0xee; 29])), None);
    let before = messenger.now();
    messenger.sleep(Duration::from_millis(20)).await;
    assert!(messenger.now() >= before + Duration::from_millis(20));
}
