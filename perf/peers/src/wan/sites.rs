//! 13 sites and the links between them: a fixed table, by round trips as the public Internet has
//! them between such places.

use std::time::Duration;

use millrace_perf::relay::LinkConfig;

use super::plan::{LINK_MBIT_PER_S, MBIT, QUEUE};

/// Nodes of the mesh.
pub(super) const SITES: usize = 13;

/// Of a site: the packets of a million that its own access loses, and its round trips to the sites
/// before it in the table, milliseconds.
type Site = (u32, &'static [u64]);

const TABLE: [Site; SITES] = [
    // Frankfurt, two halls.
    (0, &[]),
    (0, &[1]),
    // Helsinki.
    (0, &[24, 24]),
    // London, behind a VPN.
    (3_000, &[16, 16, 38]),
    // Ashburn, Dallas, San Jose.
    (0, &[90, 90, 108, 76]),
    (0, &[118, 118, 138, 106, 32]),
    (0, &[148, 148, 164, 136, 62, 40]),
    // Sao Paulo, Johannesburg, Mumbai.
    (5_000, &[204, 204, 224, 190, 118, 140, 176]),
    (5_000, &[164, 164, 186, 156, 232, 254, 290, 330]),
    (5_000, &[124, 124, 146, 114, 196, 224, 232, 308, 260]),
    // Singapore, Sydney.
    (1_000, &[158, 158, 178, 168, 228, 204, 172, 336, 300, 58]),
    (
        1_000,
        &[246, 246, 270, 258, 200, 178, 146, 316, 398, 148, 92],
    ),
    // A ship, by satellite.
    (
        15_000,
        &[600, 600, 600, 590, 580, 590, 600, 560, 600, 590, 600, 600],
    ),
];

/// Every pair of sites with its link.
pub(super) fn links() -> Vec<([usize; 2], LinkConfig)> {
    let mut links = Vec::new();
    for (later, &(loss_ppm, rtts_ms)) in TABLE.iter().enumerate() {
        for (earlier, &rtt_ms) in rtts_ms.iter().enumerate() {
            let link = LinkConfig {
                rtt: Duration::from_millis(rtt_ms),
                bits_per_second: LINK_MBIT_PER_S * MBIT,
                queue: QUEUE,
                loss_ppm: loss_ppm + TABLE[earlier].0,
                seed: links.len() as u64 + 1,
            };
            links.push(([earlier, later], link));
        }
    }
    links
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_has_a_link_within_the_bounds_of_the_matrix() {
        let links = links();
        assert_eq!(links.len(), SITES * (SITES - 1) / 2);
        let rtts = links.iter().map(|(_, link)| link.rtt.as_millis());
        assert_eq!((rtts.clone().min(), rtts.max()), (Some(1), Some(600)));
        let losses = links.iter().map(|(_, link)| link.loss_ppm);
        assert_eq!(
            (losses.clone().min(), losses.max()),
            (Some(0), Some(20_000))
        );
    }
}
