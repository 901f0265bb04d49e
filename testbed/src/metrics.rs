/// What an agent's `/metrics` said at one moment.
#[derive(Clone, Debug)]
pub struct Metrics(pub(crate) String);

impl Metrics {
    /// The sum of all samples of metric `name` of which the labels hold each of `labels`, such as
    /// `reason="replay"`.
    pub fn sum(&self, name: &str, labels: &[&str]) -> f64 {
        let sample = |line: &str| {
            let (series, value) = line.rsplit_once(' ')?;
            let given = series.strip_prefix(name)?;
            let ours = given.is_empty() || given.starts_with('{');
            let all = labels.iter().all(|label| given.contains(label));
            if ours && all { value.trim().parse::<f64>().ok() } else { None }
        };
        self.0.lines().filter_map(sample).sum()
    }

    pub fn text(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_summed_by_their_exact_name_and_their_labels() {
        let text = "# TYPE drops counter\ndrops_total{reason=\"a\",n=\"x\"} 2\n\
                    drops_total{reason=\"a\",n=\"y\"} 3\ndrops_total{reason=\"b\"} 4\nup 1\n";
        let metrics = Metrics(text.to_owned());
        assert_eq!(metrics.sum("drops_total", &["reason=\"a\""]), 5.0);
        assert_eq!(metrics.sum("drops_total", &[]), 9.0);
        assert_eq!(metrics.sum("drops", &[]), 0.0);
        assert_eq!(metrics.sum("up", &[]), 1.0);
    }
}
