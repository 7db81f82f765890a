//! What is said of several measurements: the middle and the edges.

use serde::Serialize;

/// Minimum, median and maximum.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// The smallest.
    pub min: f64,
    /// The middle one, or between the middle two.
    pub median: f64,
    /// The largest.
    pub max: f64,
}

impl Spread {
    /// Of `values`; `None` without any.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let sorted = sorted(values);
        Some(Self {
            min: *sorted.first()?,
            median: quantile(&sorted, 0.5),
            max: *sorted.last()?,
        })
    }
}

/// Of latencies: the best case, the usual one, and the one in a hundred.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Percentiles {
    /// The smallest.
    pub min: f64,
    /// Half of them are not larger.
    pub p50: f64,
    /// 99 of 100 are not larger.
    pub p99: f64,
}

impl Percentiles {
    /// Of `values`; `None` without any.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let sorted = sorted(values);
        Some(Self {
            min: *sorted.first()?,
            p50: quantile(&sorted, 0.5),
            p99: quantile(&sorted, 0.99),
        })
    }
}

/// Median and middle half of the ratios of pairs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Ratio {
    /// The median.
    pub median: f64,
    /// A quarter of the ratios is below.
    pub low: f64,
    /// A quarter is above.
    pub high: f64,
}

impl Ratio {
    /// Of every one of `these` by every one of `those`, which were not measured side by side.
    pub fn across(these: &[f64], those: &[f64]) -> Option<Self> {
        let ratios = these
            .iter()
            .flat_map(|this| those.iter().map(move |that| this / that));
        Self::among(ratios)
    }

    /// Of the pairs of `these` and `those`, first by second; `None` without any.
    pub fn of(these: &[f64], those: &[f64]) -> Option<Self> {
        Self::among(these.iter().zip(those).map(|(this, that)| this / that))
    }

    fn among(ratios: impl Iterator<Item = f64>) -> Option<Self> {
        // Nothing can be said beside a time of zero.
        let sorted = sorted(ratios.filter(|ratio| ratio.is_finite()));
        (!sorted.is_empty()).then(|| Self {
            median: quantile(&sorted, 0.5),
            low: quantile(&sorted, 0.25),
            high: quantile(&sorted, 0.75),
        })
    }
}

/// The quarter marks between which the middle half of `values` lies; `None` without any.
pub fn middle_half(values: &[f64]) -> Option<(f64, f64)> {
    let sorted = sorted(values.iter().copied());
    (!sorted.is_empty()).then(|| (quantile(&sorted, 0.25), quantile(&sorted, 0.75)))
}

fn sorted(values: impl IntoIterator<Item = f64>) -> Vec<f64> {
    let mut sorted: Vec<f64> = values.into_iter().collect();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// Between two values where `part` of the way through them falls between two. `sorted` is not empty.
fn quantile(sorted: &[f64], part: f64) -> f64 {
    let place = (sorted.len() - 1) as f64 * part;
    let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    below + (above - below) * place.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_is_between_the_middle_two() {
        let spread = Spread::of([4.0, 1.0, 3.0, 2.0]).unwrap();
        assert_eq!((spread.min, spread.median, spread.max), (1.0, 2.5, 4.0));
        assert_eq!(Spread::of([]), None);
    }

    #[test]
    fn one_in_a_hundred_is_above_the_99th_percentile() {
        let percentiles = Percentiles::of((0..=100).rev().map(f64::from)).unwrap();
        assert_eq!(
            (percentiles.min, percentiles.p50, percentiles.p99),
            (0.0, 50.0, 99.0)
        );
        assert_eq!(Percentiles::of([]), None);
    }

    #[test]
    fn ratios_are_of_pairs() {
        let these = [2.0, 8.0, 3.0, 4.0, 10.0];
        let those = [1.0, 2.0, 1.0, 4.0, 2.0];
        let ratio = Ratio::of(&these, &those).unwrap();
        assert_eq!((ratio.low, ratio.median, ratio.high), (2.0, 3.0, 4.0));
        assert_eq!(Ratio::of(&[], &[]), None);
        assert_eq!(Ratio::of(&[1.0], &[0.0]), None);
    }

    #[test]
    fn ratios_across_are_of_all_with_all() {
        let ratio = Ratio::across(&[2.0, 4.0], &[1.0, 2.0]).unwrap();
        assert_eq!((ratio.low, ratio.median, ratio.high), (1.75, 2.0, 2.5));
    }

    #[test]
    fn the_middle_half_leaves_out_a_quarter_on_each_side() {
        assert_eq!(middle_half(&[5.0, 1.0, 2.0, 4.0, 3.0]), Some((2.0, 4.0)));
        assert_eq!(middle_half(&[]), None);
    }
}
