//! What the figures should be, for the parts that ran.
//!
//! A host has slow minutes, so a figure of the rows with rounds is the median over the rounds, and
//! a ratio is taken inside a round first. Nothing else allows for noise.

use millrace_perf::report::{Better, Target, median};

use super::child::End;
use super::plan::{BODY_RTT_MS, Contender, LINK_MBIT_PER_S, Loss, Order, Part, QUEUE};
use super::results::{Cell, Results};
use crate::plan::BULK_BYTES;

/// Of the rates at 150 ms: by the link, and by the better of quinn's two.
fn rate_targets(loss: Loss) -> Option<[f64; 2]> {
    match loss.0 {
        0 => Some([0.58, 1.0]),
        3_000 => Some([0.45, 0.9]),
        20_000 => Some([0.40, 0.9]),
        _ => None,
    }
}

pub(super) fn targets(results: &Results, parts: &[Part]) -> Vec<Target> {
    let mut list = List {
        results,
        targets: Vec::new(),
    };
    for &part in parts {
        match part {
            Part::Body(loss) => list.body(part, loss),
            Part::Grid { rtt_ms, loss } => list.rpc(part, rtt_ms, loss),
            Part::Shares(order) => list.shares(part, order),
            Part::Satellite => list.satellite(part),
            Part::Mesh => list.mesh(),
            Part::Resume { .. } => list.resume(part),
        }
    }
    list.targets
}

struct List<'a> {
    results: &'a Results,
    targets: Vec<Target>,
}

impl List<'_> {
    fn add(&mut self, name: String, value: Option<f64>, target: f64, better: Better) {
        self.targets.push(Target::new(name, value, target, better));
    }

    fn body(&mut self, part: Part, loss: Loss) {
        self.rpc(part, BODY_RTT_MS, loss);
        let Some([of_link, of_peers]) = rate_targets(loss) else {
            let name = format!("{part}: share of the body that arrived");
            let arrived = self.results.of(part, Contender::Millrace);
            let arrived = arrived.filter_map(arrived_share).collect();
            return self.add(name, median(arrived), 1.0, Better::Higher);
        };
        let mut after = vec![(Contender::Millrace, "idleness")];
        if !self.results.quick {
            after.push((Contender::MillraceMessages, "small messages"));
        }
        for (contender, before) in after {
            let rates: Vec<f64> = self.rates(part, contender).collect();
            let middle = median(rates.clone());
            let link = middle.map(|rate| rate / LINK_MBIT_PER_S as f64);
            let name = format!("{part} after {before}: rate / link");
            self.add(name, link, of_link, Better::Higher);
            let name = format!("{part} after {before}: rate / better of quinn");
            let ratio = self.to_better_quinn(part, contender);
            self.add(name, ratio, of_peers, Better::Higher);
            let lowest = rates.into_iter().min_by(f64::total_cmp);
            let spread = lowest.zip(middle).map(|(lowest, middle)| lowest / middle);
            let name = format!("{part} after {before}: slowest round / median");
            self.add(name, spread, 0.5, Better::Higher);
        }
        if !self.results.quick {
            let cells = self.results.of(part, Contender::Millrace);
            // A connection that carried no second body shows nothing of it.
            let ratios = cells.filter_map(|cell| Some(cell.rate(1)? / cell.rate(0)?));
            let ratios = ratios.collect();
            let name = format!("{part}: second body / first");
            self.add(name, median(ratios), 1.0, Better::Higher);
        }
    }

    /// A lost packet costs one round trip more at least, so this is a target where none is lost.
    fn rpc(&mut self, part: Part, rtt_ms: u64, loss: Loss) {
        if loss != Loss::NONE {
            return;
        }
        let bound_ms = 1.3 * rtt_ms as f64 + QUEUE.as_secs_f64() * 1e3;
        let cells = self.results.of(part, Contender::Millrace);
        let p99s = cells.filter_map(|cell| Some(cell.rpc_p99_ms? / bound_ms));
        let p99s = p99s.collect();
        let name = format!("{part}: RPC p99 beside the body / (1.3 RTT + queue)");
        self.add(name, median(p99s), 1.0, Better::Lower);
    }

    fn shares(&mut self, part: Part, order: Order) {
        // CUBIC that comes later has less than 0.3 beside a CUBIC too: the two are printed.
        if matches!(order, Order::MillraceFirst | Order::CubicAlone) {
            return;
        }
        let name = part.to_string();
        let shares = self.results.shares.iter().filter(|s| s.part == name);
        let smaller = shares.filter_map(|shares| shares.smaller()).collect();
        let name = format!("{part}: smaller share of the goodput");
        self.add(name, median(smaller), 0.3, Better::Higher);
    }

    fn satellite(&mut self, part: Part) {
        // A body that was cut took its time at least; one that was lost has none.
        let cells = self.results.of(part, Contender::Millrace);
        let bodies = cells.filter_map(|cell| cell.bodies.first());
        let bodies = bodies.filter(|body| !matches!(body.end, End::Lost(_)));
        let seconds = bodies.map(|body| body.seconds).collect();
        let name = format!("{part}: seconds until 8 MiB arrived");
        self.add(name, median(seconds), 30.0, Better::Lower);
    }

    fn mesh(&mut self) {
        let mesh = self.results.mesh.as_ref();
        let up = mesh.and_then(|mesh| mesh.full_mesh_s);
        let name = "mesh: seconds until every pair was up";
        self.add(name.into(), up, 15.0, Better::Lower);
        let closed = mesh.map(|mesh| mesh.ended as f64);
        // Of a mesh that was never whole, nothing can be said.
        let closed = closed.filter(|_| up.is_some());
        let name = "mesh: ends of connections in 60 s of idleness";
        self.add(name.into(), closed, 0.0, Better::Lower);
    }

    fn resume(&mut self, part: Part) {
        let name = part.to_string();
        let ramps = self.results.resumed.iter().filter(|r| r.part == name);
        let second = ramps.map(|ramp| ramp.second_rtt).collect();
        let name = format!("{part}: rate in the second round trip / link");
        self.add(name, median(second), 0.5, Better::Higher);
    }

    /// Of the first bodies. A round without a connection has the rate 0.
    fn rates(&self, part: Part, contender: Contender) -> impl Iterator<Item = f64> {
        self.results
            .of(part, contender)
            .map(|cell| cell.rate(0).unwrap_or_default())
    }

    /// Median over the rounds of the rate by the better of quinn's two in the same round.
    fn to_better_quinn(&self, part: Part, contender: Contender) -> Option<f64> {
        let quinn = [Contender::QuinnCubic, Contender::QuinnBbr];
        let ratios = self.results.of(part, contender).filter_map(|ours| {
            let theirs = quinn.map(|quinn| {
                let mut cells = self.results.of(part, quinn);
                cells.find(|cell| cell.round == ours.round)?.rate(0)
            });
            let better = theirs.into_iter().flatten().max_by(f64::total_cmp)?;
            Some(ours.rate(0).unwrap_or_default() / better)
        });
        median(ratios.collect())
    }
}

fn arrived_share(cell: &Cell) -> Option<f64> {
    let body = cell.bodies.first()?;
    Some(body.arrived_bytes as f64 / BULK_BYTES as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wan::relay::RelayReport;
    use crate::wan::results::BodyFigures;

    const PART: Part = Part::Body(Loss::NONE);

    fn cell(contender: Contender, round: usize, rates: &[f64]) -> Cell {
        let body = |&mbit_per_s: &f64| BodyFigures {
            mbit_per_s,
            arrived_bytes: BULK_BYTES as u64,
            seconds: 1.0,
            end: End::Whole,
        };
        Cell {
            part: PART.to_string(),
            contender: contender.to_string(),
            round,
            connected_s: Some(0.2),
            bodies: rates.iter().map(body).collect(),
            rpcs: 1,
            rpc_p50_ms: Some(150.0),
            rpc_p99_ms: Some(245.0),
            packets_sent: None,
            packets_lost: None,
            sender_rss_mib: 0,
            receiver_rss_mib: 0,
            fault: None,
            relay: RelayReport::default(),
        }
    }

    fn value(results: &Results, name: &str) -> Option<f64> {
        let targets = targets(results, &[PART]);
        let target = targets.iter().find(|target| target.name.ends_with(name));
        target.expect("a target of that name").value
    }

    /// Protects the ratio to quinn from a slow minute of the host, and from a choice of the quinn
    /// that was the better one in another round.
    #[test]
    fn the_better_quinn_is_that_of_the_same_round() {
        let mut results = Results::default();
        for (round, [ours, cubic, bbr]) in [
            [200.0, 100.0, 50.0],
            [20.0, 5.0, 10.0],
            [100.0, 100.0, 50.0],
        ]
        .into_iter()
        .enumerate()
        {
            let contenders = [
                (Contender::Millrace, ours),
                (Contender::QuinnCubic, cubic),
                (Contender::QuinnBbr, bbr),
            ];
            for (contender, rate) in contenders {
                results.cells.push(cell(contender, round, &[rate, rate]));
            }
        }
        assert_eq!(
            value(&results, "idleness: rate / better of quinn"),
            Some(2.0)
        );
        assert_eq!(
            value(&results, "idleness: slowest round / median"),
            Some(0.2)
        );
        assert_eq!(value(&results, "second body / first"), Some(1.0));
        assert_eq!(value(&results, "(1.3 RTT + queue)"), Some(1.0));
    }

    /// Protects "no run below half of the median": a round that never connected is one.
    #[test]
    fn a_round_without_a_connection_has_the_rate_0() {
        let mut results = Results::default();
        for (round, rates) in [&[200.0][..], &[], &[200.0]].into_iter().enumerate() {
            results.cells.push(cell(Contender::Millrace, round, rates));
        }
        assert_eq!(
            value(&results, "idleness: slowest round / median"),
            Some(0.0)
        );
        assert_eq!(value(&results, "small messages: rate / link"), None);
    }
}
