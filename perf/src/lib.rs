//! Benchmarks, side-by-side peers, regression gate.
