use std::collections::BTreeMap;

use comfy_table::{CellAlignment, Table, presets};
use weft_testbed::{
    Carried, Served,
    report::{Figure, Target, percentile},
};

use super::contender::Way;

/// What was measured, in the order of the rounds.
#[derive(Debug, Default)]
pub(super) struct Series {
    runs: BTreeMap<Way, Vec<Run>>,
}

#[derive(Clone, Copy, Debug)]
struct Run {
    bulk: Carried,
    kept: Served,
    single: Served,
}

impl Series {
    pub(super) fn add(&mut self, way: Way, bulk: Carried, kept: Served, single: Served) {
        self.runs.entry(way).or_default().push(Run { bulk, kept, single });
    }

    fn median(&self, way: Way, of: fn(&Run) -> f64) -> f64 {
        let values: Vec<f64> = self.runs[&way].iter().map(of).collect();
        percentile(&values, 50.0)
    }

    pub(super) fn table(&self) -> Table {
        let mut table = Table::new();
        table.load_style(presets::UTF8_FULL_CONDENSED);
        table.set_header([
            "way",
            "Gbit/s, 1 flow",
            "CPU s/GB",
            "requests/s, kept",
            "p50 ms",
            "p99 ms",
            "connections/s",
            "p50 ms",
            "p99 ms",
        ]);
        table.column_iter_mut().skip(1).for_each(|c| c.set_cell_alignment(CellAlignment::Right));
        for &way in self.runs.keys() {
            let middle = |of| self.median(way, of);
            table.add_row([
                way.to_string(),
                format!("{:.2}", middle(|run| run.bulk.gigabits_per_second)),
                format!("{:.2}", middle(|run| run.bulk.cpu_seconds_per_gigabyte())),
                format!("{:.0}", middle(|run| run.kept.per_second)),
                format!("{:.2}", middle(|run| run.kept.median)),
                format!("{:.2}", middle(|run| run.kept.p99)),
                format!("{:.0}", middle(|run| run.single.per_second)),
                format!("{:.2}", middle(|run| run.single.median)),
                format!("{:.2}", middle(|run| run.single.p99)),
            ]);
        }
        table
    }

    pub(super) fn figures(&self) -> Vec<Figure> {
        // Of each round by itself: what slows the machine down for a while slows both.
        let ratio = |name, of: fn(&Run) -> f64, way, to, least| {
            let rounds = self.runs[&way].iter().zip(&self.runs[&to]);
            let ratios: Vec<f64> = rounds.map(|(way, to)| of(way) / of(to)).collect();
            let value = percentile(&ratios, 50.0);
            Figure { name, value, unit: "x", target: Target::AtLeast(least) }
        };
        let bulk: fn(&Run) -> f64 = |run| run.bulk.gigabits_per_second;
        let kept: fn(&Run) -> f64 = |run| run.kept.per_second;
        let single: fn(&Run) -> f64 = |run| run.single.per_second;
        let (vip, ingress) = (Way::Vip, Way::Ingress);
        vec![
            ratio("vip_throughput_of_direct", bulk, vip, Way::Direct, 0.97),
            ratio("ingress_throughput_of_direct", bulk, ingress, Way::Direct, 0.9),
            ratio("ingress_throughput_of_routed", bulk, ingress, Way::Routed, 0.9),
            ratio("ingress_throughput_of_haproxy", bulk, ingress, Way::Haproxy, 1.0),
            ratio("ingress_throughput_of_docker_proxy", bulk, ingress, Way::DockerProxy, 1.0),
            ratio("ingress_requests_of_haproxy", kept, ingress, Way::Haproxy, 1.0),
            ratio("ingress_requests_of_docker_proxy", kept, ingress, Way::DockerProxy, 1.0),
            ratio("ingress_connections_of_haproxy", single, ingress, Way::Haproxy, 1.0),
            ratio("ingress_connections_of_docker_proxy", single, ingress, Way::DockerProxy, 1.0),
        ]
    }
}
