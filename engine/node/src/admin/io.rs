//! A glommio Unix stream as hyper wants it.
//!
//! Reads go through the stream's own buffer, which is made once: hyper hands out uninitialised
//! memory, and filling that with zeros before every read would touch each byte twice.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures_lite::{AsyncBufRead, AsyncWrite};
use glommio::net::{Preallocated, UnixStream};
use hyper::rt::ReadBufCursor;

/// The size at which a local client's writes arrive in few pieces.
const READ_BUFFER_BYTES: usize = 256 << 10;

pub(super) struct HyperStream(UnixStream<Preallocated>);

impl HyperStream {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self(stream.buffered_with(Preallocated::new(READ_BUFFER_BYTES)))
    }
}

impl hyper::rt::Read for HyperStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        mut into: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let available = ready!(Pin::new(&mut self.0).poll_fill_buf(context))?;
        let taken = available.len().min(into.remaining());
        into.put_slice(&available[..taken]);
        Pin::new(&mut self.0).consume(taken);
        Poll::Ready(Ok(()))
    }
}

impl hyper::rt::Write for HyperStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_close(context)
    }
}
