//! Pure protocol machines: identity, registry, topology, wire frames, connections, RPC.
