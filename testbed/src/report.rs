//! Figures for people and for scripts: `RESULT name value unit target cmp value met|missed`.

use std::fmt;

/// What a figure should be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Target {
    AtLeast(f64),
    AtMost(f64),
}

/// One measured figure and its target.
#[derive(Clone, Debug)]
pub struct Figure {
    pub name: &'static str,
    pub value: f64,
    pub unit: &'static str,
    pub target: Target,
}

impl Figure {
    pub fn met(&self) -> bool {
        match self.target {
            Target::AtLeast(least) => self.value >= least,
            Target::AtMost(most) => self.value <= most,
        }
    }
}

impl fmt::Display for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, value, unit, target } = self;
        let (comparison, bound) = match target {
            Target::AtLeast(bound) => (">=", bound),
            Target::AtMost(bound) => ("<=", bound),
        };
        let verdict = if self.met() { "met" } else { "missed" };
        write!(f, "RESULT {name} {value:.3} {unit} target {comparison} {bound} {verdict}")
    }
}

/// The value below which `percent` of `values` lie (nearest rank).
///
/// # Panics
///
/// There are no values.
pub fn percentile(values: &[f64], percent: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (percent / 100.0 * sorted.len() as f64).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let values: Vec<f64> = (1..=200).rev().map(f64::from).collect();
        assert_eq!(percentile(&values, 50.0), 100.0);
        assert_eq!(percentile(&values, 99.0), 198.0);
        assert_eq!(percentile(&values[..1], 99.0), 200.0);
    }

    #[test]
    fn a_figure_says_whether_its_target_is_met() {
        let ratio = Figure { name: "ratio", value: 0.96, unit: "x", target: Target::AtLeast(0.97) };
        assert_eq!(ratio.to_string(), "RESULT ratio 0.960 x target >= 0.97 missed");
    }
}
