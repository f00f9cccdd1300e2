//! Goodput as SVG: small files that read well on light and on dark pages.

use std::fs;
use std::path::Path;

use plotters::prelude::*;

use super::{Load, Point, Series};
use crate::Result;
use crate::filters::Filter;

const SIZE: (u32, u32) = (640, 360);
/// Legible on white and on near-black alike.
const INK: RGBColor = RGBColor(128, 128, 128);
const LINES: [RGBColor; 5] = [
    RGBColor(31, 140, 90),
    RGBColor(120, 180, 60),
    RGBColor(214, 84, 55),
    RGBColor(214, 150, 40),
    RGBColor(70, 120, 200),
];

/// A figure of a load.
type Metric = fn(&Load) -> f64;

/// Writes `goodput-{quic,tcp,new-quic,new-tcp}-{completed,p99}.svg` into `folder`.
pub(crate) fn write(folder: &Path, points: &[Point]) -> Result<()> {
    fs::create_dir_all(folder)?;
    let quic: fn(&Point) -> Load = |point| point.quic;
    let tcp: fn(&Point) -> Load = |point| point.tcp;
    for (name, title, series, load) in [
        ("quic", "QUIC RPC", Series::Connected, quic),
        ("tcp", "TCP echo", Series::Connected, tcp),
        ("new-quic", "New QUIC connections", Series::NewByQuic, quic),
        ("new-tcp", "New TCP connections", Series::NewByTcp, tcp),
    ] {
        let points: Vec<_> = points
            .iter()
            .filter(|point| point.series == series)
            .cloned()
            .collect();
        // The run left it out, so the earlier plot stays.
        if points.is_empty() {
            continue;
        }
        let points = points.as_slice();
        let file = |what: &str| folder.join(format!("goodput-{name}-{what}.svg"));
        let completed = |load: &Load| load.completed_per_second;
        let p99 = |load: &Load| (load.p99_us / 1000.0).max(0.01);
        let caption = format!("{title}: completed per second");
        draw(
            &file("completed"),
            &caption,
            points,
            load,
            completed,
            Scale::Linear,
        )?;
        let caption = format!("{title}: p99, ms");
        draw(
            &file("p99"),
            &caption,
            points,
            load,
            p99,
            Scale::Logarithmic,
        )?;
    }
    Ok(())
}

#[derive(Clone, Copy)]
enum Scale {
    Linear,
    Logarithmic,
}

fn draw(
    path: &Path,
    caption: &str,
    points: &[Point],
    load: fn(&Point) -> Load,
    metric: Metric,
    scale: Scale,
) -> Result<()> {
    let lines = lines(points, load, metric);
    let highest = lines
        .iter()
        .flat_map(|(_, line)| line)
        .map(|&(_, y)| y)
        .fold(0.0, f64::max);
    let rates = points.iter().map(|point| point.rate).max().unwrap_or(0);
    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    let mut builder = ChartBuilder::on(&root);
    builder
        .caption(caption, ("sans-serif", 20, &INK))
        .margin(10)
        .x_label_area_size(44)
        .y_label_area_size(60);
    let x = 0.0..f64::from(rates) / 1e6;
    // Two coordinate systems are two types, and so two charts.
    macro_rules! finish {
        ($y:expr) => {{
            let mut chart = builder.build_cartesian_2d(x, $y)?;
            chart
                .configure_mesh()
                .disable_x_mesh()
                .light_line_style(TRANSPARENT)
                .bold_line_style(INK.mix(0.25))
                .axis_style(INK)
                .label_style(("sans-serif", 15, &INK))
                .x_desc("million hostile packets per second")
                .draw()?;
            for ((filter, line), colour) in lines.into_iter().zip(LINES) {
                chart
                    .draw_series(LineSeries::new(line, colour.stroke_width(2)))?
                    .label(filter.label())
                    .legend(move |(x, y)| {
                        PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2))
                    });
            }
            chart
                .configure_series_labels()
                .position(SeriesLabelPosition::UpperRight)
                .label_font(("sans-serif", 15, &INK))
                .draw()?;
        }};
    }
    match scale {
        // The legend has the room above the lines.
        Scale::Linear => finish!(0.0..highest * 1.8),
        Scale::Logarithmic => finish!((0.1..highest.max(1.0) * 100.0).log_scale()),
    }
    root.present()?;
    Ok(())
}

/// One line for each filter, in the order of their first points.
fn lines(
    points: &[Point],
    load: fn(&Point) -> Load,
    metric: Metric,
) -> Vec<(Filter, Vec<(f64, f64)>)> {
    let mut lines: Vec<(Filter, Vec<_>)> = Vec::new();
    for point in points {
        let at = (f64::from(point.rate) / 1e6, metric(&load(point)));
        match lines.iter_mut().find(|(filter, _)| *filter == point.filter) {
            Some((_, line)) => line.push(at),
            None => lines.push((point.filter, vec![at])),
        }
    }
    lines
}
