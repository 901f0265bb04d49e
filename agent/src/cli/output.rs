//! How answers are shown: tables for people, JSON for machines.

use std::{
    fmt,
    io::{self, Write},
};

use clap::ValueEnum;
use comfy_table::{Table, presets::NOTHING};
use serde::Serialize;

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
pub(super) enum Format {
    #[default]
    Table,
    Json,
}

/// Where the answers of a command go, and how they are shown there.
pub(super) struct Output<'a> {
    pub(super) format: Format,
    out: &'a mut dyn Write,
}

impl<'a> Output<'a> {
    pub(super) fn new(format: Format, out: &'a mut dyn Write) -> Self {
        Self { format, out }
    }

    /// Shows `value` as JSON, or to people as `text` writes it.
    pub(super) fn show(
        &mut self,
        value: &impl Serialize,
        text: impl FnOnce(&mut Self) -> io::Result<()>,
    ) -> io::Result<()> {
        match self.format {
            Format::Json => self.json(value),
            Format::Table => text(self),
        }
    }

    /// Shows `value` as JSON, or to people in one line.
    pub(super) fn show_line(
        &mut self,
        value: &impl Serialize,
        line: impl fmt::Display,
    ) -> io::Result<()> {
        self.show(value, |out| writeln!(out, "{line}"))
    }

    /// Shows `all` as JSON, or as a table with a row for each.
    pub(super) fn show_all<T: Serialize, const N: usize>(
        &mut self,
        all: &[T],
        headings: [&str; N],
        row: impl FnMut(&T) -> [String; N],
    ) -> io::Result<()> {
        self.show(&all, |out| out.table(headings, all.iter().map(row)))
    }

    /// Writes `value` as indented JSON.
    pub(super) fn json(&mut self, value: &impl Serialize) -> io::Result<()> {
        serde_json::to_writer_pretty(&mut *self, value)?;
        writeln!(self)
    }

    /// Writes rows under upper-case headings, columns aligned, nothing drawn between them.
    pub(super) fn table<const N: usize>(
        &mut self,
        headings: [&str; N],
        rows: impl IntoIterator<Item = [String; N]>,
    ) -> io::Result<()> {
        let mut table = Table::new();
        table.load_style(NOTHING).set_header(headings);
        for row in rows {
            table.add_row(row);
        }
        for column in table.column_iter_mut() {
            column.set_padding((0, 3));
        }
        for line in table.to_string().lines() {
            writeln!(self, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

impl Write for Output<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.out.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Joins values with commas; a dash where there are none.
pub(super) fn list<T: ToString>(values: impl IntoIterator<Item = T>) -> String {
    let texts: Vec<_> = values.into_iter().map(|value| value.to_string()).collect();
    match texts.is_empty() {
        true => "-".into(),
        false => texts.join(", "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_aligned_columns_without_rules() {
        let mut out = Vec::new();
        let rows = [["web".into(), "10.0.0.2".into()], ["database".into(), list::<String>([])]];
        Output::new(Format::Table, &mut out).table(["NAME", "ADDRESS"], rows).unwrap();
        insta::assert_snapshot!(String::from_utf8(out).unwrap(), @r"
        NAME       ADDRESS
        web        10.0.0.2
        database   -
        ");
    }
}
