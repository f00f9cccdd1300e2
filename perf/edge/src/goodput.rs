//! Goodput under attack: what honest clients of the node still get while hostile packets arrive at a fixed rate.
//!
//! The attacker has one core. The other one is the host's: a thread that receives for the node's device and filters, the
//! node (QUIC RPC, TCP echo) and its clients. The clients offer a fixed load, far from what the core could do, so that what
//! is missing from it is what the attack took. They are connected before the attack begins.

mod client;
mod load;
mod node;

use std::fmt;
use std::io::{BufRead, BufReader, Write};
use std::mem::MaybeUninit;
use std::num::NonZeroU32;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use serde::Serialize;

pub(crate) use client::drive;
pub(crate) use load::Load;
pub(crate) use node::serve;

use crate::Result;
use crate::filters::{Filter, Parts};
use crate::frames::Shape;
use crate::generator::{Generator, Sources};

/// Hostile packets per second.
pub(crate) const RATES: [u32; 4] = [0, 500_000, 1_000_000, 2_000_000];
/// The attack goes on around the measurement by this much.
const LEAD: Duration = Duration::from_millis(200);

/// One measurement.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Point {
    #[serde(serialize_with = "label")]
    pub(crate) filter: Filter,
    /// Hostile packets per second.
    pub(crate) rate: u32,
    /// Share of what came in that found the node's ring full, hostile or not.
    pub(crate) ring_full: f64,
    pub(crate) quic: Load,
    pub(crate) tcp: Load,
}

fn label<S: serde::Serializer>(filter: &Filter, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&filter.label())
}

/// Measures one filter at one rate for `lasts`. The host's core is `cpu`; the calling thread is the attacker.
pub(crate) fn measure(
    parts: &Parts<'_>,
    filter: Filter,
    rate: u32,
    cpu: usize,
    lasts: Duration,
) -> Result<Point> {
    let _standing = filter.stand(parts, Sources::MILLION)?;
    let _node = {
        let _inside = parts.rig.enter_node()?;
        Role::start("serve", cpu, lasts)?
    };
    let mut client = {
        let _inside = parts.rig.enter_client()?;
        Role::start("drive", cpu, lasts)?
    };
    let before = parts.rig.received()?;
    client.go()?;
    if let Some(rate) = NonZeroU32::new(rate) {
        let attack = (lasts + 2 * LEAD).as_secs_f64() * f64::from(rate.get());
        let mut object = MaybeUninit::uninit();
        let interface = parts.rig.client_index();
        let (shape, sources) = (Shape::Initial, Sources::MILLION);
        let generator = Generator::load(&mut object, shape, sources, interface, Some(rate))?;
        let _inside = parts.rig.enter_client()?;
        generator.send(attack as u32)?;
    }
    let [quic, tcp] = serde_json::from_str(&client.line()?)?;
    let after = parts.rig.received()?;
    let full = (after.dropped - before.dropped) as f64;
    let ring_full = full / (full + (after.packets - before.packets) as f64);
    Ok(Point { filter, rate, ring_full, quic, tcp })
}

/// A copy of this process in a namespace: the node or its clients. Ends when this is dropped.
struct Role {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Role {
    /// Starts it in the namespace of the calling thread, and waits until it is ready.
    fn start(name: &str, cpu: usize, lasts: Duration) -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args([name, "--cpu", &cpu.to_string(), "--seconds", &lasts.as_secs_f64().to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().ok_or("no output of a child")?);
        let mut role = Self { child, stdin, stdout };
        role.line().map_err(|error| format!("{name}: {error}"))?;
        Ok(role)
    }

    fn go(&mut self) -> Result<()> {
        let stdin = self.stdin.as_mut().ok_or("no input of a child")?;
        writeln!(stdin)?;
        Ok(stdin.flush()?)
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        if self.stdout.read_line(&mut line)? == 0 {
            return Err("ended without an answer".into());
        }
        Ok(line)
    }
}

impl Drop for Role {
    fn drop(&mut self) {
        // It ends when its input does; one that hangs is killed.
        drop(self.stdin.take());
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

impl fmt::Debug for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Role({})", self.child.id())
    }
}
