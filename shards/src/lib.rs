//! Thread-per-core shard runtime: io_uring ring, buffers, sockets, mailboxes, chunk pool.
