//! A service that takes a body while it arrives, answers later, and hears that a request was taken
//! back. See docs/services.md.

use std::error::Error;
use std::time::Duration;

use millrace_node::{Answer, BodyHead, BodyMode, BodySink, Chunk, Defer, FailureCode, Inbound};
use millrace_node::{ByteSize, Draft, Node, NodeConfig, NodeParts, Payload, SigningKey};
use millrace_node::{Class, InboundBody, Messenger, Method, Queue, Request, Service};
use millrace_node::{ShardMessenger, config::Cores, host, keys};

const SUM: Method = Method(0x1000);
const WAIT: Method = Method(0x1001);
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
            (WAIT, _) => return self.wait(&defer),
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
    fn wait(&self, defer: &Defer<'_>) -> Answer {
        let Some(responder) = defer.responder() else {
            return Answer::Failure(FailureCode::Busy);
        };
        let messenger = self.messenger.clone();
        self.messenger.spawn(Queue::Background, async move {
            messenger.sleep(Duration::from_millis(20)).await;
            if responder.is_cancelled() {
                return;
            }
            responder.reply(b"waited".to_vec().into());
        });
        Answer::Deferred
    }
}

fn start(registry: &SigningKey) -> Result<Node, Box<dyn Error>> {
    let mut config = NodeConfig::default();
    config.listen.address = "127.0.0.1:0".parse()?;
    config.shards.cores = Cores::List(host::usable_cpus()[..1].to_vec());
    config.shards.defaults.chunk_pool_bytes = ByteSize::mib(64);
    let parts = NodeParts::in_memory(&config, keys::generate()?, registry.public_key())?;
    let parts = parts.serve(SUM..=WAIT, |messenger| Example { messenger });
    Ok(Node::start(&config, parts)?)
}

fn main() -> Result<(), Box<dyn Error>> {
    let registry = keys::generate()?;
    let (alice, bob) = (start(&registry)?, start(&registry)?);
    let nodes = [&alice, &bob].map(|node| (node.public_key(), node.address()));
    let version = Draft::with_nodes("example", &nodes)?.sign(&registry)?;
    alice.offer_version(version.clone())?;
    bob.offer_version(version)?;
    alice.wait_for_peer(bob.id(), SOON)?;

    let body = alice.body(&vec![1; 3 << 20]).ok_or("the pool is full")?;
    let answer = alice.ask(bob.id(), Class::Bulk, SUM, body.into(), SOON)?;
    println!("sum: {}", answer.as_text().unwrap_or_default());

    let wait = || Request {
        class: Class::Normal,
        method: WAIT,
        body: Payload::Empty,
        deadline: SOON,
    };
    drop(alice.request(bob.id(), wait()));
    let answer = alice.request(bob.id(), wait()).wait(SOON)?;
    println!("later: {}", answer.as_text().unwrap_or_default());
    Ok(())
}
