//! What the mailbox and the parking protocol synchronise with: atomics, thread-locals, the queue.
//!
//! `mailbox.rs` and `park.rs` take them from here and nowhere else. The test `loom` compiles those
//! two files with a module of its own in place of this one, so that loom sees every access and
//! tries every order of them.

pub(crate) use std::sync::atomic::{
    AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering, fence,
};
pub(crate) use std::thread_local;

pub(crate) use crossbeam::queue::ArrayQueue;
