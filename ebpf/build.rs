//! Compiles the kernel's programs into `OUT_DIR`, one object for each `src/bpf/*.bpf.c`.
//!
//! It takes clang (`CLANG` names another than the one on the path) and none of the kernel's
//! headers: `src/bpf/kernel.h` has what the programs use of them, and libbpf's own headers come
//! with `libbpf-cargo`. Before that it computes the table with which `retry.h` signs.

use std::error::Error;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs};

use libbpf_cargo::SkeletonBuilder;

const PROGRAMS: [&str; 4] = ["edge", "stamp", "conn_state", "steer"];

/// Programs that only tests load, from `tests/bpf`.
const TEST_PROGRAMS: [&str; 3] = ["flood", "naive", "wrong"];

/// The hash key of GCM: AES-128 of a zero block under the key of RFC 9001 section 5.8
/// (`be0c690b9f66575a1d766b54e368c84e`).
const GHASH_KEY: u128 = 0x7295_6a45_4ffa_ff54_85a1_3a12_44d0_1d47;

/// The mask of the tag: AES-128 under the same key of the RFC's nonce (`461599d35d632bf2239825bb`)
/// and the counter 1.
const TAG_PAD: u128 = 0x555e_4b74_9355_6eea_af75_d35b_d7fb_a5d8;

fn main() -> Result<(), Box<dyn Error>> {
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let home = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let (source, tests) = (home.join("src/bpf"), home.join("tests/bpf"));
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed={}", source.display());
    println!("cargo:rerun-if-changed={}", tests.display());
    println!("cargo:rerun-if-env-changed=CLANG");
    fs::write(out.join("ghash.h"), ghash_header()?)?;
    let includes = [source.as_path(), out.as_path()];
    for program in PROGRAMS {
        compile(&source, program, &includes, &out)?;
    }
    for program in TEST_PROGRAMS {
        compile(&tests, program, &includes, &out)?;
    }
    Ok(())
}

fn compile(
    folder: &Path,
    program: &str,
    includes: &[&Path],
    out: &Path,
) -> Result<(), Box<dyn Error>> {
    let includes = includes.iter().map(|path| format!("-I{}", path.display()));
    let arguments = ["-mcpu=v3", "-Wall", "-Wextra", "-Wno-unused-parameter"].map(String::from);
    let mut builder = SkeletonBuilder::new();
    if let Some(clang) = env::var_os("CLANG") {
        builder.clang(clang);
    }
    builder
        .source(folder.join(format!("{program}.bpf.c")))
        .obj(out.join(format!("{program}.bpf.o")))
        .clang_args(arguments.into_iter().chain(includes))
        .build()
        .map_err(|error| format!("{error:#}; the programs take clang 14 or newer").into())
}

/// `GHASH_TABLE[position][byte]`: the product of H and a block that holds only this byte, in the
/// order of memory.
fn ghash_header() -> Result<String, Box<dyn Error>> {
    let mut header = String::from("#define GHASH_TABLE { \\\n");
    let mut powers = GHASH_KEY;
    for _position in 0..16 {
        let bits: [u128; 8] = std::array::from_fn(|_| {
            let power = powers;
            powers = times_x(powers);
            power
        });
        header.push('{');
        for byte in 0..=u8::MAX {
            let product = bits
                .iter()
                .enumerate()
                .filter(|(bit, _)| byte & (0x80 >> bit) != 0)
                .fold(0, |sum, (_, power)| sum ^ power);
            let [first, second] = words(product);
            write!(header, "{{ {first:#x}ull, {second:#x}ull }}, ")?;
        }
        header.push_str("}, \\\n");
    }
    let [first, second] = words(TAG_PAD);
    writeln!(header, "}}")?;
    writeln!(header, "#define RETRY_PAD_FIRST {first:#x}ull")?;
    writeln!(header, "#define RETRY_PAD_SECOND {second:#x}ull")?;
    Ok(header)
}

/// Times x in GCM's field, whose bits run backwards (NIST SP 800-38D, 6.3).
fn times_x(element: u128) -> u128 {
    (element >> 1) ^ if element & 1 == 1 { 0xe1 << 120 } else { 0 }
}

/// A block as the two words that a little-endian machine loads from it.
fn words(block: u128) -> [u64; 2] {
    [
        ((block >> 64) as u64).swap_bytes(),
        (block as u64).swap_bytes(),
    ]
}
