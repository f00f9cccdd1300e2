//! A NAT: forwards datagrams between a dialler and a listener, from a port that changes when the
//! test says so, and notes the connection IDs that pass.
#![allow(dead_code, clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use millrace_edge_policy::cid::{LocalCid, dcid_of};

/// How often a thread looks whether it is to end.
const LOOK: Duration = Duration::from_millis(20);

/// What passed.
#[derive(Default)]
pub(crate) struct Passed {
    /// Datagrams from the dialler.
    pub(crate) datagrams: usize,
    /// The last of them that had a short header.
    pub(crate) last_short: Vec<u8>,
    /// Destination IDs of short headers to the listener.
    pub(crate) to_listener: BTreeSet<LocalCid>,
    /// Destination IDs of short headers to the dialler.
    pub(crate) to_dialler: BTreeSet<LocalCid>,
}

struct State {
    inside: UdpSocket,
    listener: SocketAddr,
    dialler: Mutex<Option<SocketAddr>>,
    outside: Mutex<Outside>,
    passed: Mutex<Passed>,
    changed: Condvar,
    stop: AtomicBool,
}

/// The mapping that holds now.
struct Outside {
    socket: Arc<UdpSocket>,
    open: Arc<AtomicBool>,
}

/// Ends with its threads when dropped.
pub(crate) struct Relay {
    state: Arc<State>,
    threads: Vec<JoinHandle<()>>,
}

impl Relay {
    /// A relay at `inside` for a listener.
    pub(crate) fn start(inside: SocketAddr, listener: SocketAddr) -> Self {
        let inside = UdpSocket::bind(inside).unwrap();
        inside.set_read_timeout(Some(LOOK)).unwrap();
        let outside = Outside::bind(&inside);
        let state = Arc::new(State {
            inside,
            listener,
            dialler: Mutex::new(None),
            outside: Mutex::new(outside),
            passed: Mutex::default(),
            changed: Condvar::new(),
            stop: AtomicBool::new(false),
        });
        let forward = {
            let state = Arc::clone(&state);
            std::thread::spawn(move || state.forward())
        };
        let mut relay = Self {
            state,
            threads: vec![forward],
        };
        relay.answer();
        relay
    }

    /// The address that the listener sees.
    pub(crate) fn address(&self) -> SocketAddr {
        let outside = self.state.outside.lock().unwrap();
        outside.socket.local_addr().unwrap()
    }

    /// From now on the listener sees another port; what it sends to the old one is lost.
    pub(crate) fn rebind(&mut self) {
        let new = Outside::bind(&self.state.inside);
        let old = std::mem::replace(&mut *self.state.outside.lock().unwrap(), new);
        old.open.store(false, Ordering::Relaxed);
        self.answer();
    }

    /// Waits until what passed is as wanted; whether it came to be.
    pub(crate) fn wait(&self, patience: Duration, wanted: impl Fn(&Passed) -> bool) -> bool {
        let passed = self.state.passed.lock().unwrap();
        let waited = self
            .state
            .changed
            .wait_timeout_while(passed, patience, |passed| !wanted(passed));
        !waited.unwrap().1.timed_out()
    }

    /// The last datagram with a short header that the dialler sent.
    pub(crate) fn last_short(&self) -> Vec<u8> {
        self.state.passed.lock().unwrap().last_short.clone()
    }

    /// Forgets what passed.
    pub(crate) fn forget(&self) {
        *self.state.passed.lock().unwrap() = Passed::default();
    }

    fn answer(&mut self) {
        let state = Arc::clone(&self.state);
        let (socket, open) = {
            let outside = state.outside.lock().unwrap();
            (Arc::clone(&outside.socket), Arc::clone(&outside.open))
        };
        let answer = move || state.answer(&socket, &open);
        self.threads.push(std::thread::spawn(answer));
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().ok();
        }
    }
}

impl Outside {
    /// Another port of the relay's address.
    fn bind(inside: &UdpSocket) -> Self {
        let ip = inside.local_addr().unwrap().ip();
        let socket = UdpSocket::bind((ip, 0)).unwrap();
        socket.set_read_timeout(Some(LOOK)).unwrap();
        Self {
            socket: Arc::new(socket),
            open: Arc::new(AtomicBool::new(true)),
        }
    }
}

impl State {
    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// From the dialler to the listener.
    fn forward(&self) {
        let mut buffer = vec![0; 65_536];
        while !self.is_stopped() {
            let Ok((len, from)) = self.inside.recv_from(&mut buffer) else {
                continue;
            };
            *self.dialler.lock().unwrap() = Some(from);
            let outside = Arc::clone(&self.outside.lock().unwrap().socket);
            outside.send_to(&buffer[..len], self.listener).ok();
            let mut passed = self.passed.lock().unwrap();
            passed.datagrams += 1;
            if let Some(id) = short_id(&buffer[..len]) {
                passed.to_listener.insert(id);
                passed.last_short = buffer[..len].to_vec();
            }
            self.changed.notify_all();
        }
    }

    /// From the listener to the dialler, while a mapping is open.
    fn answer(&self, outside: &UdpSocket, open: &AtomicBool) {
        let mut buffer = vec![0; 65_536];
        while !self.is_stopped() && open.load(Ordering::Relaxed) {
            let Ok((len, _)) = outside.recv_from(&mut buffer) else {
                continue;
            };
            let dialler = *self.dialler.lock().unwrap();
            if let Some(dialler) = dialler {
                self.inside.send_to(&buffer[..len], dialler).ok();
            }
            let mut passed = self.passed.lock().unwrap();
            passed.to_dialler.extend(short_id(&buffer[..len]));
            self.changed.notify_all();
        }
    }
}

fn short_id(datagram: &[u8]) -> Option<LocalCid> {
    let (dcid, is_long) = dcid_of(datagram)?;
    LocalCid::decode(dcid).filter(|_| !is_long && datagram[0] & 0x40 != 0)
}
