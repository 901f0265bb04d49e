//! How answers are shown: tables for people, JSON for machines.

use std::io::{self, Write};

use clap::ValueEnum;
use comfy_table::{Table, presets::NOTHING};
use serde::Serialize;

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
pub(super) enum Format {
    #[default]
    Table,
    Json,
}

/// Writes `value` as indented JSON.
pub(super) fn json(out: &mut impl Write, value: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer_pretty(&mut *out, value)?;
    writeln!(out)
}

/// Writes rows under upper-case headings, columns aligned, nothing drawn between them.
pub(super) fn table<const N: usize>(
    out: &mut impl Write,
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
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
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
        table(&mut out, ["NAME", "ADDRESS"], rows).unwrap();
        insta::assert_snapshot!(String::from_utf8(out).unwrap(), @r"
        NAME       ADDRESS
        web        10.0.0.2
        database   -
        ");
    }
}
