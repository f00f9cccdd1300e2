//! Seeded simulator and in-memory network for the protocol machines.
