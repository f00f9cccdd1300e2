//! A node of a subnet as a library: transport, registry, services, admin socket and edge, wired together.
