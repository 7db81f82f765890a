//! The plots of the page, as SVG. Each is drawn for a width; colours are the light theme's, by which the page's style
//! finds what to change in the dark.

use super::comparison::Comparison;
use super::phases::{Clock, PHASES, Phase, Run};
use super::stats::{Ratio, middle_half};
use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// Text, and the median.
pub const INK: RGBColor = RGBColor(0x1f, 0x23, 0x28);
/// Lines behind.
pub const LINE: RGBColor = RGBColor(0xd1, 0xd9, 0xe0);
/// What the host has stamped.
pub const HOST: RGBColor = RGBColor(0x09, 0x69, 0xda);
/// What the guest has stamped.
pub const GUEST: RGBColor = RGBColor(0x82, 0x50, 0xdf);

/// From this width on there is room for labels at the left; below, they are over the bars.
const LABELS_AT_LEFT: u32 = 600;

/// The room they take there.
const LABEL_WIDTH: u32 = 190;

/// The shortest time that the logarithmic axis shows, ms: a hundredth. What is shorter is drawn there.
const SHORTEST: f64 = 0.01;

/// The height of the axis with its labels.
const AXIS: u32 = 34;

/// A plot, or the plotting library's reason why there is none.
pub type Drawn<T> = Result<T, Box<dyn std::error::Error>>;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// The phases of one boot, one under the other.
///
/// # Errors
/// When it cannot be drawn.
pub fn waterfall(run: &Run, width: u32) -> Drawn<String> {
    let bars = PHASES
        .iter()
        .filter_map(|phase| Some((phase, run.at(phase.from)?, run.at(phase.to)?)));
    let bars: Vec<_> = bars.collect();
    let end = bars.iter().map(|(_, _, to)| *to).fold(1.0, f64::max);
    let labels: Vec<&str> = bars.iter().map(|(phase, ..)| phase.title).collect();
    // Room for the last time behind its bar.
    rows(&labels, 0.0..end * 1.12, 8, width, &time_text, |area, chart| {
        for (row, (phase, from, to)) in bars.iter().enumerate() {
            let y = row as f64 + 0.66;
            let (left, middle) = chart.backend_coord(&(from.min(*to), y));
            let (right, _) = chart.backend_coord(&(*to, y));
            bar(area, (left, right.max(left + 2)), middle, 6, &color(phase))?;
            let text = time_text(to - from);
            let free = width as i32 - right;
            let (x, side) = match free > 60 {
                true => (right.max(left + 2) + 4, HPos::Left),
                false => (left - 4, HPos::Right),
            };
            area.draw(&Text::new(text, (x, middle), text_style(side, 12)))?;
        }
        Ok(())
    })
}

/// How long each phase took in every boot: a dot each, the middle half as a box, the median as a line.
///
/// # Errors
/// When it cannot be drawn.
pub fn distribution(runs: &[Run], width: u32) -> Drawn<String> {
    let phases = PHASES.iter().map(|phase| (phase, phase.all_ms(runs)));
    let phases: Vec<(&Phase, Vec<f64>)> = phases.filter(|(_, all)| !all.is_empty()).collect();
    let scale = |ms: f64| ms.max(SHORTEST).log10();
    let all = || phases.iter().flat_map(|(_, all)| all).copied().map(scale);
    let low = all().fold(0.0, f64::min).floor();
    let high = all().fold(low + 1.0, f64::max).ceil();
    let labels: Vec<&str> = phases.iter().map(|(phase, _)| phase.title).collect();
    let unscale = |x: f64| time_text(10_f64.powf(x));
    let decades = (high - low) as usize;
    rows(&labels, low..high, decades + 1, width, &unscale, |area, chart| {
        for (row, (phase, all)) in phases.iter().enumerate() {
            let at = |ms: f64| chart.backend_coord(&(scale(ms), row as f64 + 0.66));
            if let Some((low, high)) = middle_half(all) {
                let (left, middle) = at(low);
                bar(
                    area,
                    (left, at(high).0.max(left + 1)),
                    middle,
                    6,
                    &color(phase).mix(0.3),
                )?;
            }
            for &ms in all {
                area.draw(&Circle::new(at(ms), 2, color(phase).filled()))?;
            }
            if let Some(median) = super::stats::Spread::of(all.iter().copied()).map(|spread| spread.median) {
                let (x, y) = at(median);
                area.draw(&PathElement::new([(x, y - 8), (x, y + 8)], INK.stroke_width(2)))?;
            }
        }
        Ok(())
    })
}

/// The ratios, each with its middle half, around the line of no difference.
///
/// # Errors
/// When it cannot be drawn.
pub fn ratios(comparison: &Comparison, width: u32) -> Drawn<String> {
    let with_ratio = comparison
        .rows
        .iter()
        .filter_map(|row| Some((row.what, row.ratio?)));
    // A negative time has no place among ratios.
    let rows_: Vec<(&str, Ratio)> = with_ratio.filter(|(_, ratio)| ratio.low > 0.0).collect();
    let edges = || {
        rows_
            .iter()
            .flat_map(|(_, ratio)| [ratio.low.log2(), ratio.high.log2()])
    };
    let low = edges().fold(-0.2, f64::min) - 0.1;
    let high = edges().fold(0.2, f64::max) + 0.1;
    let labels: Vec<&str> = rows_.iter().map(|(what, _)| *what).collect();
    let unscale = |x: f64| format!("{:.2}", 2_f64.powf(x));
    rows(&labels, low..high, 8, width, &unscale, |area, chart| {
        let (x, top) = chart.backend_coord(&(0.0, 0.0));
        let (_, bottom) = chart.backend_coord(&(0.0, rows_.len() as f64));
        area.draw(&PathElement::new([(x, top), (x, bottom)], INK.stroke_width(1)))?;
        for (row, (_, ratio)) in rows_.iter().enumerate() {
            let at = |ratio: f64| chart.backend_coord(&(ratio.log2(), row as f64 + 0.66));
            let (left, middle) = at(ratio.low);
            bar(
                area,
                (left, at(ratio.high).0.max(left + 1)),
                middle,
                4,
                &HOST.mix(0.3),
            )?;
            area.draw(&Circle::new(at(ratio.median), 4, HOST.filled()))?;
        }
        Ok(())
    })
}

/// Draws labelled rows over an axis with about `marks` marks; `fill` puts something into them. Row N has its middle at N + 0.66.
fn rows(
    labels: &[&str],
    range: std::ops::Range<f64>,
    marks: usize,
    width: u32,
    axis_text: &dyn Fn(f64) -> String,
    fill: impl FnOnce(&Area<'_>, &Chart<'_, '_>) -> Drawn<()>,
) -> Drawn<String> {
    let at_left = width >= LABELS_AT_LEFT;
    let row_height = if at_left { 24 } else { 36 };
    let height = labels.len() as u32 * row_height + AXIS;
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (width, height)).into_drawing_area();
        let mut chart = ChartBuilder::on(&area)
            .margin_left(if at_left { LABEL_WIDTH } else { 12 })
            .margin_right(24)
            .set_label_area_size(LabelAreaPosition::Bottom, AXIS)
            .build_cartesian_2d(range.clone(), labels.len() as f64..0.0)?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .disable_y_axis()
            .x_labels(if at_left { marks } else { marks.min(4) })
            .x_label_formatter(&|x| axis_text(*x))
            .x_label_style(text_style(HPos::Center, 12))
            .axis_style(LINE)
            .bold_line_style(LINE)
            .light_line_style(TRANSPARENT)
            .draw()?;
        for (row, label) in labels.iter().enumerate() {
            let (left, middle) = chart.backend_coord(&(range.start, row as f64 + 0.66));
            let text = match at_left {
                true => Text::new(*label, (left - 8, middle), text_style(HPos::Right, 13)),
                false => Text::new(*label, (left, middle - 15), text_style(HPos::Left, 13)),
            };
            area.draw(&text)?;
        }
        fill(&area, &chart)?;
        area.present()?;
    }
    Ok(svg)
}

fn bar(area: &Area<'_>, (left, right): (i32, i32), middle: i32, half: i32, color: &impl Color) -> Drawn<()> {
    let corners = [(left, middle - half), (right, middle + half)];
    Ok(area.draw(&Rectangle::new(corners, color.filled()))?)
}

fn color(phase: &Phase) -> RGBColor {
    match phase.stamped_by {
        Clock::Host => HOST,
        Clock::Guest => GUEST,
    }
}

fn text_style(side: HPos, size: u32) -> TextStyle<'static> {
    ("sans-serif", size)
        .into_font()
        .color(&INK)
        .pos(Pos::new(side, VPos::Center))
}

/// A time with a unit and about three digits.
pub fn time_text(ms: f64) -> String {
    match ms.abs() {
        0.0 => "0".into(),
        small if small < 10.0 => format!("{} ms", trimmed(format!("{ms:.2}"))),
        middling if middling < 1000.0 => format!("{ms:.0} ms"),
        _ => format!("{} s", trimmed(format!("{:.2}", ms / 1000.0))),
    }
}

/// Without zeros at the end of a fraction.
fn trimmed(number: String) -> String {
    number.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::super::phases::tests::runs;
    use super::super::report::tests::full;
    use super::*;

    #[test]
    fn times_have_units_and_no_idle_digits() {
        assert_eq!(time_text(0.0), "0");
        assert_eq!(time_text(0.1), "0.1 ms");
        assert_eq!(time_text(-1.25), "-1.25 ms");
        assert_eq!(time_text(10.0), "10 ms");
        assert_eq!(time_text(999.4), "999 ms");
        assert_eq!(time_text(12_340.0), "12.34 s");
        assert_eq!(time_text(100_000.0), "100 s");
    }

    #[test]
    fn every_phase_has_its_label_and_bar_at_any_width() {
        for width in [340, 860] {
            let svg = waterfall(&runs(1, 1.0)[0], width).unwrap();
            assert!(svg.starts_with(&format!("<svg width=\"{width}\" ")), "{svg}");
            for phase in PHASES {
                assert!(
                    svg.contains(&phase.title.replace('\'', "&apos;")),
                    "{} in {svg}",
                    phase.title
                );
            }
            assert_eq!(svg.matches("<rect").count(), PHASES.len(), "{svg}");
        }
    }

    #[test]
    fn boots_of_no_length_or_less_and_one_boot_alone_are_drawn() {
        let mut run = runs(1, 1.0).remove(0);
        run.milestones_ms.values_mut().for_each(|ms| *ms = 0.0);
        waterfall(&run, 340).unwrap();
        distribution(&[run.clone()], 340).unwrap();
        run.milestones_ms.values_mut().for_each(|ms| *ms = -5.0);
        waterfall(&run, 860).unwrap();
        distribution(&[run], 860).unwrap();
    }

    #[test]
    fn a_dot_is_drawn_for_every_boot_and_phase() {
        let svg = distribution(&runs(6, 1.0), 860).unwrap();
        assert_eq!(svg.matches("<circle").count(), 6 * PHASES.len());
        let report = full();
        let svg = ratios(&report.comparisons[0], 860).unwrap();
        assert_eq!(svg.matches("<circle").count(), PHASES.len() + 1);
    }
}
