//! Containers on an interface of the host, from the first to the last, with and without the agent.

use std::time::Duration;

use anyhow::ensure;
use weft_testbed::{Lab, Lan, NetworkView, Stop, eventually, holds_for};

const SOON: Duration = Duration::from_secs(20);
/// The kernel ends namespaces one after the other, those of the whole machine.
const ENDED: Duration = Duration::from_secs(60);

#[test]
fn containers_go_on_without_the_agent_and_their_end_is_noticed() -> anyhow::Result<()> {
    let lab = Lab::cluster(1)?;
    let host = lab.host(1);
    let lan = Lan::beside(host)?;
    let before = lan.belongings()?;
    host.weft(Lan::CREATE)?.ok()?;
    let [one, two] = lan.pair("lan")?;
    let third = host.container("third")?;
    third.attach("lan", "")?;
    for (how, ends) in [(Stop::Killed, None), (Stop::Gracefully, Some(&third))] {
        let known = NetworkView::read(host, "lan")?;
        host.stop_agent(how)?;
        Lan::meet(&one, &two, "lan")?;
        one.ping("10.70.0.1")?;
        // One ends while nobody looks.
        if let Some(ends) = ends {
            ends.kill();
        }
        host.start_agent()?;
        eventually(SOON, "names are answered again", || one.ping("two"))?;
        let mut left = known.endpoints.clone();
        left.retain(|name| ends.is_none_or(|ended| ended.name() != name));
        eventually(SOON, "who is there is known", || {
            let now = NetworkView::read(host, "lan")?;
            ensure!(now.id == known.id && now.endpoints == left, "{now:?}, not {left:?}");
            Ok(())
        })?;
    }
    // An address that is in use is known to be.
    let four = host.container("four")?;
    let ip = four.attach("lan", "")?.ip4;
    ensure!([&one, &two].iter().all(|other| other.on("lan").unwrap().ip4 != ip), "{ip:?}");

    // Its namespace outlives its process as long as somebody is in it.
    let web = host.weft("run --network lan --name web -d -- sleep 600")?.ok()?;
    let beside = "run --network container:web --name beside";
    host.weft(&format!("{beside} -- ping -n -c1 -W2 one"))?.ok()?;
    let keeper = host.weft(&format!("{beside} -d -- sleep 600"))?.ok()?;
    host.sh(&format!("kill -KILL {web}"))?;
    one.reaches("web", SOON)?;
    holds_for(Duration::from_secs(2), "web stays", || one.ping("web").map(drop))?;
    // The next agent finds it by whoever is in it.
    host.stop_agent(Stop::Killed)?;
    host.start_agent()?;
    let keeper = keeper.trim();
    let asks = format!("nsenter --target {keeper} --net --mount -- getent ahostsv4 one");
    eventually(SOON, "names are answered in it", || host.sh(&asks))?;
    one.reaches("web", SOON)?;
    host.sh(&format!("kill -KILL {keeper}"))?;
    eventually(ENDED, "web is gone", || {
        let now = NetworkView::read(host, "lan")?;
        ensure!(!now.endpoints.contains(&"web".to_owned()), "{now:?}");
        ensure!(one.resolve("web").is_err(), "its name is answered");
        Ok(())
    })?;
    // A bind mount of a namespace is a way in, too.
    host.sh("ip netns add box")?;
    host.weft("attach /run/netns/box --network lan --name box")?.ok()?;
    one.reaches("box", SOON)?;
    host.sh("ip netns del box")?;
    for container in [one, two, four] {
        container.kill();
    }
    eventually(ENDED, "all are gone", || {
        let now = NetworkView::read(host, "lan")?;
        ensure!(now.endpoints.is_empty(), "{now:?}");
        let left = lan.belongings()?;
        ensure!(left == before, "{left} is not {before}");
        Ok(())
    })?;
    host.weft("network rm lan")?.ok()?;
    lab.finish();
    Ok(())
}

#[test]
fn containers_that_come_and_go_leave_nothing_behind() -> anyhow::Result<()> {
    let lab = Lab::cluster(1)?;
    let host = lab.host(1);
    let _lan = Lan::beside(host)?;
    host.weft(Lan::CREATE)?.ok()?;
    let one = host.container("one")?;
    one.attach("lan", "")?;
    // Sockets, redirections and watches of processes are descriptors.
    let descriptors = || -> anyhow::Result<usize> {
        let count = "for p in /proc/[0-9]*; do
                       tr '\\0' ' ' <$p/cmdline 2>/dev/null | grep -q 'weft agent' || continue
                       ls $p/fd
                     done | wc -l";
        Ok(host.sh(count)?.trim().parse()?)
    };
    let settled = || {
        eventually(ENDED, "one is left", || {
            let now = NetworkView::read(host, "lan")?;
            ensure!(now.endpoints == ["one"], "{now:?}");
            Ok(())
        })
    };
    let round = |round: u8| -> anyhow::Result<()> {
        host.sh(&format!(
            "for n in 1 2 3 4 5 6 7 8; do
               weft run --network lan --name r{round}-$n -- ping -n -c1 -W2 one >/dev/null &
               pids=\"$pids $!\"
             done
             for pid in $pids; do wait $pid; done"
        ))?;
        settled()
    };
    round(0)?;
    let before = descriptors()?;
    ensure!(before > 10, "{before} descriptors of the agent");
    (1..4).try_for_each(round)?;
    eventually(SOON, "the agent lets go of all", || {
        let now = descriptors()?;
        ensure!(now <= before, "{now} descriptors, before {before}");
        Ok(())
    })?;
    for _ in 0..8 {
        one.detach("lan")?;
        one.attach("lan", "")?;
        one.ping("one")?;
    }
    let now = descriptors()?;
    ensure!(now <= before + 2, "{now} descriptors, before {before}");
    lab.finish();
    Ok(())
}
