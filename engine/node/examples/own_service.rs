//! A service that takes a body while it arrives, answers later, and hears that a request was taken
//! back. See docs/services.md.

use std::error::Error;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use millrace_node::{Answer, BodyHead, BodyMode, BodySink, Chunk, Defer, FailureCode, Inbound};
use millrace_node::{ByteSize, Draft, Node, NodeConfig, NodeParts, Payload, SigningKey};
use millrace_node::{Class, InboundBody, Messenger, Method, Queue, Request, Service};
use millrace_node::{CountingAllocator, ShardMessenger, config::Cores, host, keys};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator::new(std::alloc::System);

const SUM: Method = Method(0x1000);
const HANG: Method = Method(0x1001);
const SOON: Duration = Duration::from_secs(10);

#[derive(Default)]
struct Sum {
    chunks: u64,
    total: u64,
}

impl BodySink for Sum {
    fn on_chunk(&mut self, _offset: u64, chunk: Chunk) {
        self.chunks += 1;
        self.total += chunk.iter().map(|&byte| u64::from(byte)).sum::<u64>();
    }
}

struct Example {
    messenger: ShardMessenger,
    events: Sender<&'static str>,
}

impl Service for Example {
    fn on_body(&mut self, head: &BodyHead) -> BodyMode {
        match head.method {
            SUM if head.body_bytes <= 4 << 20 => BodyMode::Stream(Box::new(Sum::default())),
            _ => BodyMode::Refuse(FailureCode::TooLarge),
        }
    }

    fn on_request(&mut self, request: Inbound<'_>, defer: Defer<'_>) -> Answer {
        let body = match (request.method, request.body) {
            (SUM, InboundBody::Streamed(body)) => body,
            (HANG, _) => return self.hang(&defer),
            _ => return Answer::Failure(FailureCode::Malformed),
        };
        let Some(sum) = body.into_sink::<Sum>() else {
            return Answer::Failure(FailureCode::Internal);
        };
        let text = format!("{} in {} chunks", sum.total, sum.chunks);
        Answer::Reply(text.into_bytes().into())
    }

    fn on_send(&mut self, _message: Inbound<'_>) {}
}

impl Example {
    fn hang(&self, defer: &Defer<'_>) -> Answer {
        let Some(responder) = defer.responder() else {
            return Answer::Failure(FailureCode::Busy);
        };
        let events = self.events.clone();
        self.messenger.spawn(Queue::Background, async move {
            let _ = events.send("asked");
            responder.cancelled().await;
            let _ = events.send("taken back");
        });
        Answer::Deferred
    }
}

fn start(registry: &SigningKey, events: Sender<&'static str>) -> Result<Node, Box<dyn Error>> {
    let mut config = NodeConfig::default();
    config.listen.address = "127.0.0.1:0".parse()?;
    config.shards.cores = Cores::List(host::usable_cpus()[..1].to_vec());
    config.shards.defaults.chunk_pool_bytes = ByteSize::mib(64);
    let parts = NodeParts::in_memory(&config, keys::generate()?, registry.public_key())?;
    let parts = parts.serve(SUM..=HANG, move |messenger| Example {
        messenger,
        events: events.clone(),
    });
    Ok(Node::start(&config, parts)?)
}

fn main() -> Result<(), Box<dyn Error>> {
    let registry = keys::generate()?;
    let (sender, events) = channel();
    let (alice, bob) = (start(&registry, sender.clone())?, start(&registry, sender)?);
    let nodes = [&alice, &bob].map(|node| (node.public_key(), node.address()));
    let version = Draft::with_nodes("example", &nodes)?.sign(&registry)?;
    alice.offer_version(version.clone())?;
    bob.offer_version(version)?;
    alice.wait_for_peer(bob.id(), SOON)?;

    let body = alice.body(&vec![1; 3 << 20]).ok_or("the pool is full")?;
    let answer = alice.ask(bob.id(), Class::Bulk, SUM, body.into(), SOON)?;
    println!("sum: {}", answer.as_text().unwrap_or_default());

    let request = Request {
        class: Class::Normal,
        method: HANG,
        body: Payload::Empty,
        deadline: SOON.into(),
    };
    let answer = alice.request(bob.id(), request);
    println!("request: {}", events.recv_timeout(SOON)?);
    drop(answer);
    println!("request: {}", events.recv_timeout(SOON)?);
    Ok(())
}
