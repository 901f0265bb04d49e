use std::{collections::BTreeMap, fmt::Write as _};

use comfy_table::{CellAlignment, Table, presets};
use weft_testbed::{
    Carried,
    report::{Figure, Target, percentile},
};

use super::{Cable, Contender, Workload, picture};

/// What was measured on one wire, in the order of its rounds.
#[derive(Debug, Default)]
pub(super) struct Series {
    runs: BTreeMap<Workload, BTreeMap<Contender, Vec<Carried>>>,
    mtus_bytes: BTreeMap<Contender, u16>,
    /// How many CPUs this session and the kernel took while nothing was measured, once a round.
    pub(super) idle: Vec<f64>,
    /// And other sessions.
    pub(super) others: Vec<f64>,
}

impl Series {
    pub(super) fn add(&mut self, row: Contender, load: Workload, mtu_bytes: u16, run: Carried) {
        self.mtus_bytes.insert(row, mtu_bytes);
        self.runs.entry(load).or_default().entry(row).or_default().push(run);
    }

    /// The median rate of a row: Gbit/s for TCP, thousands of packets a second for UDP.
    fn rate(&self, load: Workload, row: Contender) -> Option<f64> {
        let runs = self.runs.get(&load)?.get(&row)?;
        Some(median(runs, |run| rate(load, run)))
    }

    fn panel(&self, wire: Cable, load: Workload) -> picture::Panel {
        let rows = self.runs.get(&load).into_iter().flat_map(BTreeMap::keys);
        let bar = |&row| Some((row, self.rate(load, row)?));
        let bars = rows.filter_map(bar).collect();
        picture::Panel { title: format!("{load}, {wire}"), unit: unit(load), bars }
    }

    fn table(&self, load: Workload) -> Table {
        let mut table = Table::new();
        table.load_style(presets::UTF8_FULL_CONDENSED);
        let last = if load.is_tcp() { "retransmits" } else { "lost" };
        let head = [
            &load.to_string(),
            "MTU",
            unit(load),
            "lowest",
            "highest",
            "of VXLAN",
            "sealed is",
            "CPU s/GB",
            last,
        ];
        table.set_header(head);
        table.column_iter_mut().skip(1).for_each(|c| c.set_cell_alignment(CellAlignment::Right));
        let [vxlan, sealed] = [Contender::Vxlan, Contender::Sealed].map(|row| self.rate(load, row));
        let times = |ratio: Option<f64>| ratio.map_or_else(String::new, |x| format!("{x:.2} ×"));
        for (&row, runs) in self.runs.get(&load).into_iter().flatten() {
            let rates: Vec<f64> = runs.iter().map(|run| rate(load, run)).collect();
            let middle = percentile(&rates, 50.0);
            table.add_row([
                row.to_string(),
                self.mtus_bytes.get(&row).map_or_else(String::new, u16::to_string),
                format!("{middle:.2}"),
                format!("{:.2}", percentile(&rates, 0.0)),
                format!("{:.2}", percentile(&rates, 100.0)),
                times(vxlan.map(|vxlan| middle / vxlan)),
                times(sealed.map(|sealed| sealed / middle)),
                format!("{:.3}", median(runs, Carried::cpu_seconds_per_gigabyte)),
                match load.is_tcp() {
                    true => format!("{:.0}", median(runs, |run| run.retransmits as f64)),
                    false => format!("{:.1} %", median(runs, |run| run.loss * 1e2)),
                },
            ]);
        }
        table
    }
}

/// What was measured on all wires.
#[derive(Debug, Default)]
pub(super) struct Summary {
    wires: BTreeMap<Cable, Series>,
}

impl Summary {
    pub(super) fn add(&mut self, wire: Cable, series: Series) {
        self.wires.insert(wire, series);
    }

    /// The medians over one wire, a table for each load.
    pub(super) fn table(&self, wire: Cable) -> String {
        let Some(series) = self.wires.get(&wire) else { return String::new() };
        let mut text = String::new();
        for &load in series.runs.keys() {
            let _ = writeln!(text, "\n{wire}, medians\n{}", series.table(load));
        }
        let [idle, others] = [&series.idle, &series.others].map(|cpus| percentile(cpus, 50.0));
        let _ = writeln!(text, "While nothing was measured, {idle:.2} CPUs were busy with this.");
        if others > IDLE_CPUS {
            let _ =
                writeln!(text, "Other sessions had {others:.2} CPUs: measure on a quiet machine.");
        }
        text
    }

    pub(super) fn bars(&self) -> String {
        self.panels().iter().map(|panel| format!("\n{panel}")).collect()
    }

    pub(super) fn svg(&self) -> String {
        picture::svg(&self.panels())
    }

    /// The figures that have a target, of those that were measured. All on the segmenting wire.
    pub(super) fn figures(&self) -> Vec<Figure> {
        let Some(series) = self.wires.get(&Cable::Segmenting) else { return Vec::new() };
        let figure = |&(name, load, others, least): &Goal| {
            let best = others.iter().filter_map(|&row| series.rate(load, row));
            let best = best.max_by(f64::total_cmp)?;
            let value = series.rate(load, Contender::Sealed)? / best;
            Some(Figure { name, value, unit: "x", target: Target::AtLeast(least) })
        };
        GOALS.iter().filter_map(figure).collect()
    }

    fn panels(&self) -> Vec<picture::Panel> {
        let panels = |(&wire, series): (&Cable, &Series)| {
            series.runs.keys().map(|&load| series.panel(wire, load)).collect::<Vec<_>>()
        };
        self.wires.iter().flat_map(panels).collect()
    }
}

fn rate(load: Workload, run: &Carried) -> f64 {
    match load.is_tcp() {
        true => run.gigabits_per_second,
        false => run.packets_per_second / 1e3,
    }
}

fn unit(load: Workload) -> &'static str {
    if load.is_tcp() { "Gbit/s" } else { "kpackets/s" }
}

fn median(runs: &[Carried], of: impl Fn(&Carried) -> f64) -> f64 {
    percentile(&runs.iter().map(of).collect::<Vec<_>>(), 50.0)
}

/// More than is left of a machine that does nothing.
const IDLE_CPUS: f64 = 0.2;

/// A figure's name, its load, the rows of which the best is what sealed is divided by, the least.
type Goal = (&'static str, Workload, &'static [Contender], f64);

const WIREGUARD: &[Contender] = &[Contender::WireguardGo, Contender::Boringtun];
const NEBULA: &[Contender] = &[Contender::Nebula];
const VXLAN: &[Contender] = &[Contender::Vxlan];

const GOALS: [Goal; 10] = [
    ("sealed_tcp1_of_wireguard", Workload::Tcp1, WIREGUARD, 8.0),
    ("sealed_tcp1_of_nebula", Workload::Tcp1, NEBULA, 6.0),
    ("sealed_tcp1_of_vxlan", Workload::Tcp1, VXLAN, 0.65),
    ("sealed_tcp4_of_wireguard", Workload::Tcp4, WIREGUARD, 8.0),
    ("sealed_tcp4_of_nebula", Workload::Tcp4, NEBULA, 6.0),
    ("sealed_tcp4_of_vxlan", Workload::Tcp4, VXLAN, 0.65),
    ("sealed_udp64_of_nebula", Workload::Udp64, NEBULA, 1.5),
    ("sealed_udp64_of_vxlan", Workload::Udp64, VXLAN, 0.7),
    ("sealed_udp1300_of_nebula", Workload::Udp1300, NEBULA, 1.5),
    ("sealed_udp1300_of_vxlan", Workload::Udp1300, VXLAN, 0.7),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_divides_by_the_best_of_its_rows_and_needs_both_sides() {
        let mut series = Series::default();
        for (row, gigabits) in
            [(Contender::Sealed, 8.0), (Contender::Boringtun, 0.5), (Contender::WireguardGo, 0.8)]
        {
            for share in [0.9, 1.0, 1.1] {
                let run = Carried { gigabits_per_second: gigabits * share, ..Carried::default() };
                series.add(row, Workload::Tcp1, 1400, run);
            }
        }
        let mut summary = Summary::default();
        summary.add(Cable::Segmenting, series);
        let figures: Vec<String> = summary.figures().iter().map(Figure::to_string).collect();
        assert_eq!(figures, ["RESULT sealed_tcp1_of_wireguard 10.000 x target >= 8 met"]);
    }
}
