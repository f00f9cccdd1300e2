//! The edge in the kernel.
