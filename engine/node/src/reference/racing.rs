//! Futures that run beside each other on one thread.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::Poll;

/// Some futures; each makes progress while another is awaited. Those that are left when this is
/// dropped are dropped.
pub(crate) struct Race<F> {
    running: Vec<(usize, Pin<Box<F>>)>,
}

impl<F: Future> Race<F> {
    pub(crate) fn new(futures: impl IntoIterator<Item = F>) -> Self {
        let running = futures.into_iter().map(Box::pin).enumerate().collect();
        Self { running }
    }

    /// The next output, and which future's it is; none when all have ended.
    pub(crate) async fn next(&mut self) -> Option<(usize, F::Output)> {
        poll_fn(|context| {
            for at in 0..self.running.len() {
                let (index, future) = &mut self.running[at];
                if let Poll::Ready(output) = future.as_mut().poll(context) {
                    let index = *index;
                    self.running.swap_remove(at);
                    return Poll::Ready(Some((index, output)));
                }
            }
            if self.running.is_empty() {
                return Poll::Ready(None);
            }
            Poll::Pending
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use futures_channel::oneshot::channel;
    use futures_lite::future::{block_on, poll_once};

    use super::*;

    #[test]
    fn outputs_come_as_the_futures_end() {
        let (senders, receivers): (Vec<_>, Vec<_>) = (0..3).map(|_| channel::<u8>()).unzip();
        let mut race = Race::new(receivers);
        let mut senders: Vec<_> = senders.into_iter().map(Some).collect();
        let mut send = |at: usize| senders[at].take().unwrap().send(at as u8).unwrap();
        block_on(async {
            assert!(poll_once(race.next()).await.is_none());
            send(1);
            assert_eq!(race.next().await, Some((1, Ok(1))));
            send(2);
            assert_eq!(race.next().await, Some((2, Ok(2))));
            assert!(poll_once(race.next()).await.is_none());
            send(0);
            assert_eq!(race.next().await, Some((0, Ok(0))));
            assert_eq!(race.next().await, None);
        });
    }
}
