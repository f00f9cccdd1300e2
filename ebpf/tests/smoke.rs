#![allow(missing_docs)]
use millrace_edge::load::{LoadOptions, Loaded, Program, Steering};
#[test]
fn loads() {
    let loaded = Loaded::load(&LoadOptions::default());
    match loaded {
        Err(e) => panic!("{e}"),
        Ok(l) => {
            let r = l.run(Program::Edge, &[0u8; 60], 1).unwrap();
            println!("{r:?}");
        }
    }
    if let Err(e) = Steering::load(4) {
        panic!("{e}")
    }
}
