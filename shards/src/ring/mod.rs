#![allow(unsafe_code)]
//! The shard's ring: one io_uring, and what moves through it.
//!
//! | file | moves |
//! |---|---|
//! | `udp_rx` | UDP in: a multishot receive per socket into shared slots |
//! | `udp_tx` | UDP out: GSO trains from slots |
//! | `submitter` | nothing: the one hot system call |
//!
//! A further kind (TCP, files) is a file beside these and brings four things: it owns all memory
//! that its entries name; it builds each entry; it takes each completion, by a kind of its own in
//! [`token`]; and it says how many requests are in flight, for [`Ring::quiesce`]. The UDP sockets
//! are the first of the ring's registered files; other files follow them. What the loop gets from
//! it goes through `datapath`, which knows no ring.
//!
//! Needs Linux 6.1: `IORING_SETUP_SINGLE_ISSUER` (6.0), `IORING_SETUP_DEFER_TASKRUN` (6.1),
//! multishot `recvmsg` (6.0), provided buffer rings (5.19); io_uring_setup(2), io_uring_enter(2).
//!
//! Cost: one `io_uring_enter` per turn, which submits what the turn made and runs what the kernel
//! deferred; none while the flags in shared memory say that nothing waits.
//!
//! Soundness argument. The kernel reads and writes memory named in submissions until their
//! completions. All such memory (slots, buffer ring, train records, message header templates, the
//! timer's time) is owned by [`Ring`], lies in mappings or boxes that never move, and is freed only
//! after `Drop` has cancelled and reaped every request; if it cannot, it is leaked. A receive slot
//! is either in the kernel's hands or in `backlog`, never both. A transmit slot is lent to a turn's
//! `Trains` only while no train of it is in flight; its trains are submitted after it came back,
//! and only if they lie in it.
//!
//! Invariants:
//!
//! 1. The ring is created, used and dropped on one thread.
//! 2. Every receive completion that holds a slot goes through `backlog`; none is dropped.
//! 3. No eventfd, nor anything signalled by one, is ever polled in the ring.
//! 4. The ring's own eventfd is silent but during a park in glommio.

mod submitter;
mod udp_rx;
mod udp_tx;

use std::collections::VecDeque;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use crate::config::ShardConfig;
use crate::datapath::{Datagrams, Refused, Slot, Train, TrainBuffer, Trains};
use crate::park::{self, Parker};
use crate::socket::{ShardSocket, SocketId};
use crate::stats::ShardStats;

use submitter::Submitter;
use udp_rx::UdpRx;
use udp_tx::UdpTx;

/// Requests by kind, in the high byte of `user_data`. The low bytes hold the index of the
/// completion's owner: a socket for `RECV`, a train's record for `SEND`.
mod token {
    pub(super) const RECV: u64 = 1 << 56;
    pub(super) const SEND: u64 = 2 << 56;
    pub(super) const WOKEN: u64 = 3 << 56;
    pub(super) const PIPE: u64 = 4 << 56;
    pub(super) const TIMER: u64 = 5 << 56;
    pub(super) const IGNORED: u64 = 6 << 56;
    pub(super) const KIND: u64 = 0xff << 56;
}

pub(crate) struct Ring {
    uring: ManuallyDrop<IoUring>,
    submitter: Submitter,
    rx: ManuallyDrop<Option<UdpRx>>,
    tx: ManuallyDrop<UdpTx>,
    /// Receive completions not handed over yet.
    backlog: VecDeque<Received>,
    /// Room for the trains of a turn, empty between turns; as long as there are records.
    finished: Vec<Train>,
    /// Open for as long as the ring has them registered.
    _sockets: Vec<ShardSocket>,
    parker: Arc<Parker>,
    stats: Arc<ShardStats>,
    pipe_armed: bool,
    timer: Option<Instant>,
    timer_spec: Box<types::Timespec>,
    /// Wakers whose MSG_RING waits for the submit.
    waking: Vec<Arc<Parker>>,
}

/// A receive completion that holds a slot.
#[derive(Debug, Clone, Copy)]
struct Received {
    slot: u16,
    socket: SocketId,
    bytes: u32,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring")
            .field("backlog", &self.backlog.len())
            .finish_non_exhaustive()
    }
}

impl Ring {
    /// Creates the ring on the shard's thread and arms its requests.
    pub(crate) fn new(
        config: &ShardConfig,
        sockets: Vec<ShardSocket>,
        parker: Arc<Parker>,
        stats: Arc<ShardStats>,
        eventfd: BorrowedFd<'_>,
    ) -> io::Result<Self> {
        let entries = config.ring_entries.max(64).next_power_of_two();
        let uring = build(entries)?;
        uring.submitter().register_eventfd(eventfd.as_raw_fd())?;
        let submitter = Submitter::new(&uring);
        let tx = UdpTx::new(config, entries, &sockets)?;
        let rx = if sockets.is_empty() {
            None
        } else {
            let descriptors: Vec<_> = sockets
                .iter()
                .map(|socket| socket.fd().as_raw_fd())
                .collect();
            uring.submitter().register_files(&descriptors)?;
            Some(UdpRx::new(config, &sockets, &uring)?)
        };
        let slots = rx.as_ref().map_or(0, UdpRx::slots_max);
        let mut ring = Self {
            uring: ManuallyDrop::new(uring),
            submitter,
            rx: ManuallyDrop::new(rx),
            tx: ManuallyDrop::new(tx),
            backlog: VecDeque::with_capacity(usize::from(slots)),
            finished: Vec::with_capacity(entries as usize),
            _sockets: sockets,
            parker,
            stats,
            pipe_armed: false,
            timer: None,
            timer_spec: Box::new(types::Timespec::new()),
            waking: Vec::with_capacity(park::WAKES),
        };
        park::reserve_wakes();
        ring.silence_eventfd();
        ring.parker.bind_ring(own_descriptor(&ring.uring)?);
        ring.arm();
        ring.submit();
        ring.reap();
        if ring.stats.receives_dropped.get() > 0 {
            // The first receive was refused at once: a kernel without multishot receives.
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        Ok(ring)
    }

    /// Whether anything waits: a completion, deferred work, an overflow, a submission, a wake-up.
    pub(crate) fn has_work(&mut self) -> bool {
        if !self.backlog.is_empty() || park::has_pending_wakes() {
            return true;
        }
        if !self.uring.completion().is_empty() {
            return true;
        }
        let sq = self.uring.submission();
        !sq.is_empty() || sq.taskrun() || sq.cq_overflow()
    }

    /// Whether an enter would do anything: submissions, deferred work or an overflow wait.
    fn needs_enter(&mut self) -> bool {
        let sq = self.uring.submission();
        !sq.is_empty() || sq.taskrun() || sq.cq_overflow()
    }

    /// Runs what the kernel deferred, if it says that there is anything and no receive waits.
    /// Returns whether it entered the kernel.
    pub(crate) fn poll(&mut self) -> bool {
        let enter = self.backlog.is_empty() && self.needs_enter();
        if enter {
            self.submit();
        }
        enter
    }

    /// Arms what ran out, sends wake-ups that wait, then enters the kernel once if need be.
    pub(crate) fn submit(&mut self) {
        self.arm();
        self.push_wakes();
        if self.needs_enter() {
            self.enter(0, None);
        }
        self.waking.clear();
    }

    /// Drains the completion queue: sends are freed, receives go to the backlog. Returns whether
    /// there was anything but sends, which give the datapath nothing to do.
    pub(crate) fn reap(&mut self) -> bool {
        let mut any = false;
        let mut pipe = false;
        {
            let Self {
                uring,
                rx,
                tx,
                backlog,
                stats,
                ..
            } = self;
            let mut cq = uring.completion();
            cq.sync();
            for cqe in &mut cq {
                let kind = cqe.user_data() & token::KIND;
                any |= kind != token::SEND;
                match kind {
                    token::RECV => {
                        let socket = SocketId::new(cqe.user_data() as u8);
                        if let (false, Some(rx)) = (cqueue::more(cqe.flags()), rx.as_mut()) {
                            rx.ended(socket);
                        }
                        match (cqueue::buffer_select(cqe.flags()), rx.as_mut()) {
                            (Some(slot), Some(rx)) if cqe.result() >= 0 => {
                                rx.taken(cqe.result() as usize);
                                backlog.push_back(Received {
                                    slot,
                                    socket,
                                    bytes: cqe.result() as u32,
                                });
                            }
                            (_, Some(rx)) if cqe.result() == -libc::ENOBUFS => {
                                stats.enobufs_rearms.add(1);
                                rx.starved();
                            }
                            _ => stats.receives_dropped.add(1),
                        }
                    }
                    token::SEND => {
                        let train = (cqe.user_data() & !token::KIND) as usize;
                        tx.completed(train, cqe.result(), cqe.flags(), stats);
                    }
                    token::WOKEN => stats.wakes_message.add(1),
                    token::PIPE => {
                        stats.wakes_pipe.add(1);
                        pipe = true;
                        if !cqueue::more(cqe.flags()) {
                            self.pipe_armed = false;
                        }
                    }
                    token::TIMER => {
                        self.timer = None;
                        stats.wakes_timeout.add(1);
                    }
                    _ => {}
                }
            }
        }
        if pipe {
            self.parker.pipe().drain();
        }
        any
    }

    /// Hands the oldest receive completion to `handle`, then its slot back to the kernel. Returns
    /// whether there was one.
    pub(crate) fn receive(&mut self, handle: impl FnOnce(Datagrams<'_>)) -> bool {
        let (Some(received), Some(rx)) = (self.backlog.pop_front(), self.rx.as_mut()) else {
            return false;
        };
        match rx.message(received) {
            Some(datagrams) => {
                self.stats.receives.add(1);
                self.stats.datagrams_received.add(datagrams.count() as u64);
                self.stats.bytes_received.add(datagrams.bytes() as u64);
                handle(datagrams);
            }
            None => self.stats.receives_dropped.add(1),
        }
        rx.give_back(received.slot);
        true
    }

    /// A train that the kernel refused as too large, once.
    pub(crate) fn take_refused(&mut self) -> Option<Refused> {
        self.tx.take_refused()
    }

    /// Lets `build` fill trains within this turn's budget, and queues them for the next submit.
    pub(crate) fn transmit<R>(&mut self, build: impl FnOnce(&mut Trains<'_>) -> R) -> R {
        self.tx.begin_turn();
        let list = std::mem::take(&mut self.finished);
        let mut lender = Lender { ring: self };
        let mut trains = Trains::new(&mut lender, list);
        let result = build(&mut trains);
        let mut finished = trains.end();
        self.send_trains(&mut finished);
        self.tx.seal();
        self.finished = finished;
        result
    }

    fn send_trains(&mut self, finished: &mut Vec<Train>) {
        for train in finished.drain(..) {
            if let Some(entry) = self.tx.send(&train, &self.stats) {
                self.push_entry(&entry);
            }
        }
    }

    /// Sends what is finished, then takes a slot for more, by reaping and then by growing.
    fn next_tx_slot(&mut self, finished: &mut Vec<Train>) -> Option<u16> {
        self.send_trains(finished);
        self.tx.seal();
        if let Some(slot) = self.tx.next_slot() {
            return Some(slot);
        }
        if self.tx.turn_is_over() {
            return None;
        }
        // What was sent completes inline on most paths: one enter frees its slots. Receives that
        // show up go to the backlog.
        self.enter(0, None);
        self.reap();
        if let Some(slot) = self.tx.next_slot() {
            return Some(slot);
        }
        if self.tx.grow(&self.stats)
            && let Some(slot) = self.tx.next_slot()
        {
            return Some(slot);
        }
        self.stats.tx_starved.add(1);
        None
    }

    /// Lets the eventfd speak, for a park in glommio.
    pub(crate) fn enable_eventfd(&mut self) {
        self.uring.completion().enable_eventfd();
    }

    /// Keeps the eventfd quiet: the loop polls.
    pub(crate) fn silence_eventfd(&mut self) {
        self.uring.completion().disable_eventfd();
    }

    /// Blocks in the ring until a completion or the timeout.
    pub(crate) fn park(&mut self, timeout: Duration) {
        if self.enter(1, Some(&types::Timespec::from(timeout))) {
            self.stats.wakes_timeout.add(1);
        }
    }

    /// Arms the ring's timer, so that a park in glommio ends by `deadline`.
    pub(crate) fn arm_timer(&mut self, deadline: Instant, now: Instant) {
        if self.timer.is_some_and(|armed| armed <= deadline) {
            return;
        }
        *self.timer_spec = types::Timespec::from(deadline.saturating_duration_since(now));
        let spec: *const types::Timespec = &raw const *self.timer_spec;
        let entry = if self.timer.is_some() {
            // Fails when the timer just fired: then its completion waits already.
            opcode::TimeoutUpdate::new(token::TIMER, spec)
                .build()
                .user_data(token::IGNORED)
        } else {
            opcode::Timeout::new(spec).build().user_data(token::TIMER)
        };
        self.timer = Some(deadline);
        self.push_entry(&entry);
    }

    /// Arms the receives and the pipe's poll where they are not.
    fn arm(&mut self) {
        if !self.pipe_armed {
            let fd = types::Fd(self.parker.pipe().read_end().as_raw_fd());
            let entry = opcode::PollAdd::new(fd, libc::POLLIN as u32)
                .multi(true)
                .build();
            self.push_entry(&entry.user_data(token::PIPE));
            self.pipe_armed = true;
        }
        let may_arm = match self.rx.as_mut() {
            Some(rx) => rx.is_unarmed() && rx.may_arm(&self.stats),
            None => false,
        };
        if !may_arm {
            return;
        }
        while let Some((socket, entry)) = self.rx.as_mut().and_then(UdpRx::arm) {
            let index = socket.index() as u64;
            self.push_entry(&entry.user_data(token::RECV | index));
        }
    }

    fn push_wakes(&mut self) {
        while let Some(parker) = park::take_pending_wake() {
            if let Some(fd) = parker.ring_fd() {
                let entry = opcode::MsgRingData::new(types::Fd(fd), 0, token::WOKEN, None)
                    .build()
                    .flags(squeue::Flags::SKIP_SUCCESS)
                    .user_data(token::IGNORED);
                self.push_entry(&entry);
                self.waking.push(parker);
            }
        }
    }

    /// Queues a submission, entering the kernel when the queue is full.
    fn push_entry(&mut self, entry: &squeue::Entry) {
        loop {
            // SAFETY: what the entry points to is owned by this ring and stays in place until the
            // entry's completion (module argument).
            if unsafe { self.uring.submission().push(entry) }.is_ok() {
                return;
            }
            self.enter(0, None);
            // If the kernel is out of resources, completions free them.
            self.reap();
        }
    }

    /// One `io_uring_enter`: submits all, runs deferred work, waits for `want` completions or the
    /// timeout. Returns whether it ended by the timeout.
    ///
    /// # Panics
    /// When the kernel refuses the call itself: the ring is broken, and the shard with it.
    fn enter(&mut self, want: u32, timeout: Option<&types::Timespec>) -> bool {
        self.stats.enters.add(1);
        let to_submit = self.uring.submission().len() as u32;
        let result = self.submitter.enter(to_submit, want, timeout);
        let Err(error) = result else { return false };
        match error.raw_os_error() {
            Some(libc::ETIME) => return true,
            Some(libc::EBUSY) => self.stats.cq_overflows.add(1),
            // A signal, or a moment without memory: what was not submitted stays queued.
            Some(libc::EINTR | libc::EAGAIN) => {}
            _ => panic!("io_uring_enter failed: {error}"),
        }
        false
    }

    /// Cancels and reaps every request. Returns whether the kernel holds none of our memory.
    fn quiesce(&mut self) -> bool {
        for _ in 0..1000 {
            let receiving = self.rx.as_ref().is_some_and(UdpRx::is_armed);
            let armed = receiving || self.pipe_armed || self.timer.is_some();
            if !armed && self.tx.in_flight() == 0 {
                return true;
            }
            if armed {
                let any = types::CancelBuilder::any().all();
                let entry = opcode::AsyncCancel2::new(any)
                    .build()
                    .user_data(token::IGNORED);
                self.push_entry(&entry);
            }
            self.enter(1, Some(&types::Timespec::from(Duration::from_millis(10))));
            self.reap();
        }
        false
    }
}

/// The ring as the buffer of one turn's trains.
struct Lender<'a> {
    ring: &'a mut Ring,
}

impl<'a> TrainBuffer<'a> for Lender<'a> {
    fn next_slot(&mut self, finished: &mut Vec<Train>) -> Option<Slot<'a>> {
        let index = self.ring.next_tx_slot(finished)?;
        // SAFETY: the slot was just taken. `Trains`, the only caller, gave up the slot lent before,
        // and uses this one until it asks again or ends, which is within the borrow of the ring.
        Some(unsafe { self.ring.tx.lend(index) })
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let quiet = self.quiesce();
        // The parker keeps a descriptor of the ring: without this the sockets would live with it.
        let _ = self.uring.submitter().unregister_files();
        let _ = self.uring.submitter().unregister_eventfd();
        if let Some(rx) = self.rx.as_ref() {
            rx.unregister(&self.uring);
        }
        // SAFETY: dropped once, here.
        unsafe { ManuallyDrop::drop(&mut self.uring) };
        if quiet {
            // SAFETY: dropped once, here; no request names its memory any more.
            unsafe { ManuallyDrop::drop(&mut self.rx) };
            // SAFETY: as above.
            unsafe { ManuallyDrop::drop(&mut self.tx) };
        }
    }
}

/// Another descriptor of the ring.
fn own_descriptor(uring: &IoUring) -> io::Result<OwnedFd> {
    // SAFETY: the descriptor is open for as long as the ring is borrowed.
    let fd = unsafe { BorrowedFd::borrow_raw(uring.as_raw_fd()) };
    fd.try_clone_to_owned()
}

/// Makes a ring for one thread whose completions run when that thread asks for them.
fn build(entries: u32) -> io::Result<IoUring> {
    IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_coop_taskrun()
        .setup_taskrun_flag()
        .setup_submit_all()
        .setup_cqsize(entries * 4)
        .build(entries)
}

/// Makes a small ring of the same kind and drops it: tells whether this system allows one.
pub(crate) fn probe() -> io::Result<()> {
    build(8).map(drop)
}
