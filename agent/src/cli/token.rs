use std::{io::Write, time::Duration};

use clap::{Args, Subcommand};

use super::{Client, client::encode, output::Output};
use crate::api::types::{CreateToken, CreatedToken, TokenStatus};

/// Make and manage the tokens that let hosts join
#[derive(Args, Debug)]
pub(super) struct Token {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a token and print it; it is not shown again
    #[command(after_help = "Example:
  weft token create --ttl 30m --uses 3")]
    Create {
        /// How long it may be used: a number and s, m, h or d
        #[arg(long, value_name = "TIME", default_value = "1h", value_parser = parse_ttl)]
        ttl: Duration,
        /// How many hosts may join with it
        #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
        uses: u32,
    },
    /// List the tokens that can still be used
    #[command(after_help = "Example:
  weft token ls")]
    Ls,
    /// Take tokens back
    #[command(after_help = "Example:
  weft token rm 5f2c09aa41d87be3")]
    Rm {
        #[arg(required = true, value_name = "ID")]
        ids: Vec<String>,
    },
}

impl Token {
    pub(super) async fn run(self, agent: &Client, out: &mut Output<'_>) -> anyhow::Result<()> {
        match self.command {
            Command::Create { ttl, uses } => {
                let body = CreateToken { ttl_seconds: ttl.as_secs(), uses };
                let created: CreatedToken = agent.post("/v1/tokens", &body).await?;
                out.show_line(&created, &created.token)?;
            }
            Command::Ls => {
                let tokens: Vec<TokenStatus> = agent.get("/v1/tokens").await?;
                out.show_all(&tokens, ["ID", "EXPIRES", "USES LEFT"], |token| {
                    [token.id.clone(), token.expires.clone(), token.uses_left.to_string()]
                })?;
            }
            Command::Rm { ids } => {
                for id in ids {
                    let () = agent.delete(&format!("/v1/tokens/{}", encode(&id))).await?;
                    writeln!(out, "{id}")?;
                }
            }
        }
        Ok(())
    }
}

const MAX_TTL: Duration = Duration::from_secs(30 * 86_400);

/// Reads a number and one unit, from one second to thirty days.
fn parse_ttl(text: &str) -> Result<Duration, String> {
    let remedy = "give a number and s, m, h or d, from 1s to 30d, such as 30m";
    let unit = match text.chars().last() {
        Some('s') => 1,
        Some('m') => 60,
        Some('h') => 3_600,
        Some('d') => 86_400,
        _ => return Err(remedy.into()),
    };
    let number: u64 = text[..text.len() - 1].parse().map_err(|_| remedy.to_owned())?;
    let ttl = Duration::from_secs(number.saturating_mul(unit));
    match ttl.is_zero() || ttl > MAX_TTL {
        true => Err(remedy.into()),
        false => Ok(ttl),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_a_number_and_a_unit_within_bounds() {
        assert_eq!(parse_ttl("90m"), Ok(Duration::from_secs(5_400)));
        for bad in ["", "5", "m", "0s", "31d", "-1h", "1.5h", "99999999999999999999d", "1é"] {
            assert!(parse_ttl(bad).is_err(), "{bad}");
        }
    }
}
