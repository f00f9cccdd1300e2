//! The serving side: answers requests, receives bodies into chunks, counts one-way messages.

use bytes::Bytes;
use millrace_protocol::frame::FailureCode;
use millrace_transport::{Answer, Defer, Inbound, InboundBody, Payload, Service};

use super::{
    BODY, COUNT, Identities, ONEWAY, RPC, body_bytes, check_body, drivers, member, nowhere,
    rpc_body, shard, start, topology,
};
use crate::plan::{Engine, FANOUT_REPLY_BYTES, ONEWAY_BYTES, RPC_BYTES, Workload};
use crate::settings::Settings;
use crate::{Result, workloads};

static REPLY: [u8; FANOUT_REPLY_BYTES] = [1; FANOUT_REPLY_BYTES];

/// Serves until the parent goes away.
pub(crate) fn serve(engine: Engine, workload: Workload, settings: &Settings) -> Result<()> {
    let identities = Identities::new();
    let mut nodes = Vec::new();
    for index in 0..workload.servers() {
        let me = identities.server(index);
        let others = (0..drivers(workload)).map(|index| identities.driver(index));
        let members = others.chain([me]).map(|key| member(key, nowhere()));
        let shard = shard(engine, workload, workload.servers());
        let service = move |_messenger| Server::new(body_bytes(workload));
        nodes.push(start(me, &topology(members, 1), shard, settings, service)?);
    }
    let addresses: Vec<_> = nodes.iter().map(|node| node.local_addr()).collect();
    workloads::announce(&addresses)?;
    loop {
        std::thread::park();
    }
}

struct Server {
    body_bytes: usize,
    /// The content of the first body has been looked at.
    is_checked: bool,
    oneway_count: u64,
}

impl Server {
    fn new(body_bytes: usize) -> Self {
        Self {
            body_bytes,
            is_checked: false,
            oneway_count: 0,
        }
    }

    fn is_whole(&mut self, body: &InboundBody<'_>) -> bool {
        let InboundBody::Chunks(body) = body else {
            return false;
        };
        if !self.is_checked && check_body(body).is_err() {
            return false;
        }
        self.is_checked = true;
        body.len() == self.body_bytes
    }
}

impl Service for Server {
    fn on_request(&mut self, request: Inbound<'_>, _defer: Defer<'_>) -> Answer {
        match request.method {
            RPC if request.body.len() == RPC_BYTES as u64 => Answer::Reply(rpc_body().into()),
            BODY if self.is_whole(&request.body) => {
                Answer::Reply(Payload::Bytes(Bytes::from_static(&REPLY)))
            }
            COUNT => Answer::Reply(self.oneway_count.to_le_bytes().to_vec().into()),
            _ => Answer::Failure(FailureCode::Malformed),
        }
    }

    fn on_send(&mut self, message: Inbound<'_>) {
        if message.method == ONEWAY && message.body.len() == ONEWAY_BYTES as u64 {
            self.oneway_count += 1;
        }
    }
}
