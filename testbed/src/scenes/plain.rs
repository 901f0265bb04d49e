use std::net::IpAddr;

use anyhow::{Context as _, ensure};
use weft_testbed::{
    Container, Lab, Throughput,
    baseline::Baseline,
    report::{Figure, Target, percentile},
    throughput,
};

/// Measures TCP between containers on two hosts, over weft and over the same made by hand, in
/// turns.
#[expect(clippy::print_stdout, reason = "a benchmark reports")]
pub(crate) fn run() -> anyhow::Result<()> {
    let lab = Lab::cluster(2)?;
    let network = lab.create_network("app --subnet 10.40.0.0/24")?;
    let one = lab.host(1).container("c1")?;
    let other = lab.host(2).container("c2")?;
    one.attach("app", "")?;
    let address: IpAddr = other.attach("app", "")?.ip4.context("no IPv4 address")?.into();
    one.reaches(&address.to_string(), std::time::Duration::from_secs(5))?;

    let bare = Lab::builder().hosts(2).build()?;
    let hand = Baseline::build(&bare, network.mtu_bytes)?;

    println!("{ROUNDS} rounds of {SECONDS} s, one TCP flow, MTU {}, Gbit/s", network.mtu_bytes);
    println!("round   weft      by hand   retransmits");
    let (mut over_weft, mut by_hand) = (Vec::new(), Vec::new());
    for round in 1..=ROUNDS {
        let weft = || measure(&one, &other, address);
        let made = || measure(&hand.one, &hand.other, hand.address_of_other);
        // Who goes first changes, so that a drift of the machine favours neither.
        let (weft, made) = match round % 2 {
            0 => (weft()?, made()?),
            _ => {
                let made = made()?;
                (weft()?, made)
            }
        };
        println!(
            "{round:<7} {:<9.2} {:<9.2} {} / {}",
            weft.gigabits_per_second, made.gigabits_per_second, weft.retransmits, made.retransmits
        );
        over_weft.push(weft.gigabits_per_second);
        by_hand.push(made.gigabits_per_second);
    }

    let [weft, made] = [over_weft, by_hand].map(|values| percentile(&values, 50.0));
    ensure!(made > 0.0, "nothing passes by hand");
    println!("median  {weft:<9.2} {made:<9.2}");
    let (value, target) = (weft / made, Target::AtLeast(0.97));
    println!("{}", Figure { name: "plain_ratio", value, unit: "x", target });
    lab.finish();
    bare.finish();
    Ok(())
}

fn measure(one: &Container, other: &Container, address: IpAddr) -> anyhow::Result<Throughput> {
    throughput(one, other, address, SECONDS)
}

const ROUNDS: usize = 7;
const SECONDS: u32 = 3;
