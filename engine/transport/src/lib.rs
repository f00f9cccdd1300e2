//! QUIC connections on shards: mutual TLS, lanes, message streams, RPC, bulk bodies.
