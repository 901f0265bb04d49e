//! Times on the command line.

use std::time::Duration;

/// Reads a number and its unit: `0`, `500ms`, `30s`, `2m`.
///
/// # Errors
///
/// It is none, or longer than an hour.
pub(super) fn parse(text: &str) -> Result<Duration, String> {
    let remedy = || "give 0, or a number and ms, s or m, up to 60m, such as 30s".to_owned();
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let units = [("ms", 1), ("s", 1_000), ("m", 60_000)];
    let read = |(unit, milliseconds): (&str, u64)| {
        let number = text.strip_suffix(unit)?.parse::<u64>().ok()?;
        Some(Duration::from_millis(number.saturating_mul(milliseconds)))
    };
    let time = units.into_iter().find_map(read).ok_or_else(remedy)?;
    if time <= LONGEST { Ok(time) } else { Err(remedy()) }
}

const LONGEST: Duration = Duration::from_secs(3_600);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_units() {
        for (text, milliseconds) in
            [("0", 0), ("0s", 0), ("500ms", 500), ("30s", 30_000), ("2m", 120_000)]
        {
            assert_eq!(parse(text), Ok(Duration::from_millis(milliseconds)), "{text}");
        }
        for bad in ["", "5", "s", "-1s", "1.5s", "61m", "1h", "99999999999999999999s"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
