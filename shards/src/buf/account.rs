//! Accounts: who is charged for space, and how the owner of a budget hears that it came back.
//!
//! The owner of a budget (a shard) charges an account when space is taken. The space may be given
//! back on any thread: that adds to the account's counter, without a lock and without waking the
//! owner. The owner settles the counter when it next asks for space.
//!
//! Invariants:
//!
//! 1. Every charge is credited once, when the space it stands for can be taken again, or when the
//!    one that is charged gives the space up and others hold it still.
//! 2. An account lives until its last charge is credited, whether or not its owner still does.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes that came back and that the owner of the budget has not settled yet.
#[derive(Debug, Default)]
pub struct Account {
    credited_bytes: AtomicU64,
}

impl Account {
    /// An account to which nothing came back.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// Takes the bytes that came back since the last call, from any thread.
    #[must_use = "credited bytes are reported once"]
    pub fn settle(&self) -> u64 {
        // The common case is that nothing came back: a load leaves the cache line shared.
        if self.credited_bytes.load(Ordering::Relaxed) == 0 {
            return 0;
        }
        // Pairs with the release in `credit`: the space is in its pool before the owner counts on
        // it.
        self.credited_bytes.swap(0, Ordering::Acquire)
    }

    /// Gives `bytes` of charged space back.
    pub(super) fn credit(&self, bytes: u64) {
        self.credited_bytes.fetch_add(bytes, Ordering::Release);
    }
}

/// A charge for memory that is not in a pool; credited when it is dropped, on any thread.
#[derive(Debug)]
#[must_use = "a charge is credited when it is dropped"]
pub struct Charge {
    account: Arc<Account>,
    bytes: u64,
}

impl Charge {
    /// Charges `bytes` to `account`.
    pub fn new(account: &Arc<Account>, bytes: u64) -> Self {
        Self {
            account: Arc::clone(account),
            bytes,
        }
    }

    /// Bytes that are charged.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.account.credit(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A charge comes back once, from any thread, also when the owner looks in between.
    #[test]
    fn charges_come_back_once() {
        let account = Account::new();
        assert_eq!(account.settle(), 0);
        let charges: Vec<_> = (1..=8).map(|n| Charge::new(&account, n)).collect();
        assert_eq!(charges.iter().map(Charge::bytes).sum::<u64>(), 36);
        let mut settled = 0;
        std::thread::scope(|scope| {
            let threads: Vec<_> = charges
                .into_iter()
                .map(|charge| scope.spawn(move || drop(charge)))
                .collect();
            while !threads.iter().all(|thread| thread.is_finished()) {
                settled += account.settle();
                std::thread::yield_now();
            }
        });
        assert_eq!(settled + account.settle(), 36);
        assert_eq!(account.settle(), 0);
    }
}
