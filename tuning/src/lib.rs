//! Configuration schema and per-core profiles.
