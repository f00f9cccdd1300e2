//! The edge in the kernel.

pub mod nft;
pub mod privileges;
