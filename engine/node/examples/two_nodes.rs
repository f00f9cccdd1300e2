//! Two nodes in one process: a request with an answer, and a body of 8 MiB. See docs/embedding.md.

use std::error::Error;
use std::time::Duration;

use millrace_node::{Answer, Class, Defer, FailureCode, Inbound, InboundBody, Method, Service};
use millrace_node::{ByteSize, Draft, Node, NodeConfig, NodeParts, SigningKey};
use millrace_node::{CountingAllocator, config::Cores, host, keys, reference::of_body};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator::new(std::alloc::System);

const GREET: Method = Method(0x1000);
const HASH: Method = Method(0x1001);
const SOON: Duration = Duration::from_secs(10);

struct Greeter;

impl Service for Greeter {
    fn on_request(&mut self, request: Inbound<'_>, _defer: Defer<'_>) -> Answer {
        let answer = match (request.method, request.body) {
            (GREET, InboundBody::Slice(name)) => [b"hello, ", name].concat(),
            (HASH, InboundBody::Chunks(body)) => of_body(&body).to_string().into_bytes(),
            _ => return Answer::Failure(FailureCode::Malformed),
        };
        Answer::Reply(answer.into())
    }

    fn on_send(&mut self, _message: Inbound<'_>) {}
}

fn start(registry: &SigningKey) -> Result<Node, Box<dyn Error>> {
    let mut config = NodeConfig::default();
    config.listen.address = "127.0.0.1:0".parse()?;
    config.shards.cores = Cores::List(host::usable_cpus()[..1].to_vec());
    config.shards.defaults.chunk_pool_bytes = ByteSize::mib(64);
    let parts = NodeParts::in_memory(&config, keys::generate()?, registry.public_key())?;
    let parts = parts.serve(GREET..=HASH, |_messenger| Greeter);
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

    let name = b"alice".to_vec().into();
    let answer = alice.ask(bob.id(), Class::Latency, GREET, name, SOON)?;
    println!("answer: {}", answer.as_text().unwrap_or_default());

    let body = alice.body(&vec![7; 8 << 20]).ok_or("the pool is full")?;
    let answer = alice.ask(bob.id(), Class::Bulk, HASH, body.into(), SOON)?;
    println!("hash: {}", answer.as_text().unwrap_or_default());
    Ok(())
}
