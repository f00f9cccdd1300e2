//! Times the pure hot pieces: those whose instructions the gate counts.

use std::time::Duration;

use criterion::{Criterion, Throughput};
use millrace_perf::pieces;

fn main() {
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .sample_size(30)
        .configure_from_args();
    let mut group = criterion.benchmark_group("pieces");
    for piece in pieces::ALL {
        group.throughput(Throughput::Elements(piece.operations));
        group.bench_function(piece.name, |bencher| {
            let mut pass = (piece.prepare)();
            bencher.iter(&mut *pass);
        });
    }
    group.finish();
    criterion.final_summary();
}
