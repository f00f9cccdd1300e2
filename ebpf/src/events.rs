//! Sampled drops, as the program reports them.
//!
//! Events are for people: when the buffer is full, the program loses the event and never the
//! packet.

use std::cell::RefCell;
use std::fmt;
use std::mem::offset_of;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use libbpf_rs::{RingBuffer, RingBufferBuilder};
use millrace_edge_policy::reason::Reason;
use millrace_edge_policy::source::Source;

use crate::abi::{EdgeEvent, RULE_DEFAULT};
use crate::maps::Maps;

/// The most events that wait for [`Events::wait`]; the program loses further ones.
const WAITING_MAX: usize = 4_096;

/// One drop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// CLOCK_MONOTONIC, nanoseconds.
    pub now_ns: u64,
    /// Why.
    pub reason: Reason,
    /// The rule that decided.
    pub rule: Option<u32>,
    /// The sender, as the packet claims.
    pub source: SocketAddr,
    /// Port of this host.
    pub port: u16,
    /// 17 (UDP) or 6 (TCP).
    pub protocol: u8,
    /// Index of the interface that received it.
    pub interface_index: u32,
    /// Bytes of the frame.
    pub length_bytes: u32,
}

impl Event {
    /// Reads an event. None if another version of the program reported it.
    fn of(bytes: &[u8]) -> Option<Self> {
        let part = |offset: usize| bytes.get(offset..offset + 4)?.try_into().ok();
        let word = |offset| part(offset).map(u32::from_le_bytes);
        let half = |offset: usize| {
            Some(u16::from_le_bytes(
                bytes.get(offset..offset + 2)?.try_into().ok()?,
            ))
        };
        let rule = word(offset_of!(EdgeEvent, rule))?;
        let at = offset_of!(EdgeEvent, source);
        let source = Source::from_bytes(bytes.get(at..at + 16)?.try_into().ok()?);
        let low = word(offset_of!(EdgeEvent, now_ns))?;
        let high = word(offset_of!(EdgeEvent, now_ns) + 4)?;
        Some(Self {
            now_ns: u64::from(high) << 32 | u64::from(low),
            reason: Reason::from_index(word(offset_of!(EdgeEvent, reason))?)?,
            rule: (rule != RULE_DEFAULT).then_some(rule),
            source: SocketAddr::new(source.to_ip(), half(offset_of!(EdgeEvent, source_port))?),
            port: half(offset_of!(EdgeEvent, port))?,
            protocol: *bytes.get(offset_of!(EdgeEvent, protocol))?,
            interface_index: word(offset_of!(EdgeEvent, ifindex))?,
            length_bytes: word(offset_of!(EdgeEvent, length))?,
        })
    }
}

/// A reader of events. There should be only one: each event reaches one reader.
pub struct Events<'m> {
    ring: RingBuffer<'m>,
    waiting: Rc<RefCell<Vec<Event>>>,
}

impl fmt::Debug for Events<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Events({} waiting)", self.waiting.borrow().len())
    }
}

impl<'m> Events<'m> {
    /// Starts to read events.
    ///
    /// # Errors
    ///
    /// The kernel's error for the ring buffer.
    pub fn open(maps: &'m Maps) -> Result<Self, libbpf_rs::Error> {
        let waiting: Rc<RefCell<Vec<Event>>> = Rc::default();
        let taken = Rc::clone(&waiting);
        let mut builder = RingBufferBuilder::new();
        builder.add(maps.events(), move |bytes| {
            let mut taken = taken.borrow_mut();
            if taken.len() < WAITING_MAX {
                taken.extend(Event::of(bytes));
            }
            0
        })?;
        Ok(Self {
            ring: builder.build()?,
            waiting,
        })
    }

    /// Returns the events since the last call, or those that come within `period` if there were
    /// none.
    ///
    /// # Errors
    ///
    /// The kernel's error for polling the ring buffer.
    pub fn wait(&self, period: Duration) -> Result<Vec<Event>, libbpf_rs::Error> {
        self.ring.poll(period)?;
        Ok(std::mem::take(&mut *self.waiting.borrow_mut()))
    }
}
