use std::fmt;

use svg::{
    Document,
    node::element::{Rectangle, Text},
};

use super::Contender;

/// One bar chart: a load over a wire.
#[derive(Debug)]
pub(super) struct Panel {
    pub(super) title: String,
    pub(super) unit: &'static str,
    pub(super) bars: Vec<(Contender, f64)>,
}

impl Panel {
    fn highest(&self) -> f64 {
        self.bars.iter().map(|(_, value)| *value).fold(f64::MIN_POSITIVE, f64::max)
    }
}

/// For a terminal.
impl fmt::Display for Panel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}, {}", self.title, self.unit)?;
        for (row, value) in &self.bars {
            let eighths = (value / self.highest() * COLUMNS * 8.0).round() as usize;
            let rest = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"][eighths % 8];
            writeln!(f, "  {row:<13} {}{rest} {value:.2}", "█".repeat(eighths / 8))?;
        }
        Ok(())
    }
}

/// All panels on one sheet, two abreast. Readable on a light and on a dark page.
pub(super) fn svg(panels: &[Panel]) -> String {
    let tallest = panels.iter().map(|panel| panel.bars.len()).max().unwrap_or_default() as f64;
    let height = TITLE + tallest * LINE + GAP;
    let lines = panels.len().div_ceil(2) as f64;
    let sheet = Document::new()
        .set("viewBox", (0, 0, 2.0 * WIDTH, lines * height))
        .set("font-family", "sans-serif")
        .set("font-size", 13)
        .set("fill", INK);
    let place = |index: usize| ((index % 2) as f64 * WIDTH, (index / 2) as f64 * height);
    panels
        .iter()
        .enumerate()
        .fold(sheet, |sheet, (index, panel)| draw(sheet, panel, place(index)))
        .to_string()
}

fn draw(sheet: Document, panel: &Panel, (left, top): (f64, f64)) -> Document {
    let title = Text::new(format!("{}, {}", panel.title, panel.unit))
        .set("x", left + MARGIN)
        .set("y", top + TITLE - 8.0)
        .set("font-weight", "bold");
    let mut sheet = sheet.add(title);
    for (line, (row, value)) in panel.bars.iter().enumerate() {
        let y = top + TITLE + line as f64 * LINE;
        let length = value / panel.highest() * (WIDTH - LABEL - VALUE);
        let colour = if *row == Contender::Sealed { OURS } else { OTHERS };
        let label = Text::new(row.to_string())
            .set("x", left + LABEL - 8.0)
            .set("y", y + LINE * 0.7)
            .set("text-anchor", "end");
        let bar = Rectangle::new()
            .set("x", left + LABEL)
            .set("y", y + 3.0)
            .set("width", (length * 10.0).round() / 10.0)
            .set("height", LINE - 6.0)
            .set("fill", colour);
        let figure = Text::new(format!("{value:.2}"))
            .set("x", ((left + LABEL + length + 6.0) * 10.0).round() / 10.0)
            .set("y", y + LINE * 0.7);
        sheet = sheet.add(label).add(bar).add(figure);
    }
    sheet
}

const COLUMNS: f64 = 48.0;

/// In the units of the sheet, pixels at its natural size.
const WIDTH: f64 = 460.0;
const MARGIN: f64 = 14.0;
const LABEL: f64 = 110.0;
const VALUE: f64 = 70.0;
const TITLE: f64 = 34.0;
const LINE: f64 = 24.0;
const GAP: f64 = 12.0;

const INK: &str = "#777";
const OURS: &str = "#2a7f9e";
const OTHERS: &str = "#b5b5b5";

#[cfg(test)]
mod tests {
    use super::*;

    fn panel() -> Panel {
        let bars = vec![(Contender::Vxlan, 10.0), (Contender::Sealed, 5.0)];
        Panel { title: "1 TCP flow".into(), unit: "Gbit/s", bars }
    }

    #[test]
    fn a_bar_is_as_long_as_its_share_of_the_longest() {
        let text = panel().to_string();
        let lengths: Vec<_> = text.lines().skip(1).map(|line| line.matches('█').count()).collect();
        assert_eq!(lengths, [48, 24], "{text}");
    }

    #[test]
    fn a_sheet_holds_every_row_with_its_figure() {
        let sheet = svg(&[panel(), panel(), panel()]);
        assert_eq!(sheet.matches("<rect").count(), 6, "{sheet}");
        for text in ["kernel VXLAN", "weft sealed", "10.00", "5.00", "Gbit/s"] {
            assert_eq!(sheet.matches(text).count(), 3, "{text}: {sheet}");
        }
    }
}
