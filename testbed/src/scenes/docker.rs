use std::{
    net::{IpAddr, Ipv4Addr, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use weft_testbed::{
    Container, Docker, Engine as _, IMAGE, Lab, Question, eventually, query,
    report::{Figure, Target, percentile},
    throughput,
};

/// Measures weft against Docker's own overlay in swarm mode: the same daemons, one after the other.
#[expect(clippy::print_stdout, reason = "a benchmark reports")]
pub(crate) fn run() -> anyhow::Result<()> {
    let lab = Lab::cluster(2)?;
    let course = Course::new(&lab)?;
    let mut sides = [Side::new(&course, "weft")?, Side::new(&course, "swarm")?];
    for round in 0..ROUNDS {
        for side in &mut sides {
            side.start_and_kill(&course, round)?;
        }
    }
    for _ in 0..FLOWS {
        for side in &mut sides {
            side.carry(&course)?;
        }
    }
    lose_a_host(&lab, &mut sides)?;

    println!(
        "Docker on two hosts; medians of {ROUNDS} rounds, the best of {FLOWS} flows, one lost host"
    );
    println!("{:<36} {:>8} {:>8}", "", "weft", "swarm");
    let quicker = Target::AtMost(1.0);
    // Both are the kernel's own VXLAN between the same links, and as fast as each other. Flows differ
    // by what else the machine does: the best of each is compared, and 3 % between them are no more
    // than what is left of that.
    let as_fast = Target::AtLeast(0.97);
    let rows: [(&str, &'static str, Pick, f64, Target); 5] = [
        ("name visible after docker start, ms", "docker_visible", |s| &s.visible, 50.0, quicker),
        ("docker start itself, ms", "docker_start", |side| &side.started, 50.0, quicker),
        ("name gone after docker kill, ms", "docker_gone", |side| &side.gone, 50.0, quicker),
        ("name gone after a power-off, ms", "docker_lost", |side| &side.lost, 50.0, quicker),
        ("one TCP flow, Gbit/s", "docker_flow", |side| &side.flows, 100.0, as_fast),
    ];
    for (what, name, pick, percent, target) in rows {
        let [weft, swarm] = [&sides[0], &sides[1]].map(|side| percentile(pick(side), percent));
        println!("{what:<36} {weft:>8.1} {swarm:>8.1}");
        println!("{}", Figure { name, value: weft / swarm, unit: "of swarm's", target });
    }
    lab.finish();
    Ok(())
}

type Pick = fn(&Side) -> &Vec<f64>;

/// Two daemons that are both a swarm and hosts of weft.
struct Course {
    one: Docker,
    two: Docker,
}

impl Course {
    /// The second host manages the swarm, so that the first can be lost.
    fn new(lab: &Lab) -> anyhow::Result<Self> {
        let (one, two) = (Docker::start(lab, 1)?, Docker::start(lab, 2)?);
        let address = lab.host(2).address();
        two.run(&format!("swarm init --advertise-addr {address}"))?;
        let token = two.run("swarm join-token -q worker")?;
        let own = lab.host(1).address();
        one.run(&format!("swarm join --advertise-addr {own} --token {token} {address}:2377"))?;
        two.run("network create -d overlay --attachable --subnet 10.70.0.0/24 swarm")?;
        lab.host(1).weft("docker network create weft --subnet 10.71.0.0/24")?.ok()?;
        eventually(Duration::from_secs(5), "both have weft", || two.run("network inspect weft"))?;
        Ok(Self { one, two })
    }
}

/// One of the two networks, and what was measured on it.
struct Side {
    network: &'static str,
    /// A container on the second host, and a socket to its own resolver.
    observer: Container,
    resolver: UdpSocket,
    visible: Vec<f64>,
    started: Vec<f64>,
    gone: Vec<f64>,
    lost: Vec<f64>,
    flows: Vec<f64>,
}

impl Side {
    fn new(course: &Course, network: &'static str) -> anyhow::Result<Self> {
        let observer = running(&course.two, &format!("{network}-observer"), network)?;
        running(&course.one, &format!("{network}-peer"), network)?;
        let resolver = observer.inside(|| {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.connect((Ipv4Addr::new(127, 0, 0, 11), 53))?;
            Ok(socket)
        })?;
        let (visible, started, gone) = (Vec::new(), Vec::new(), Vec::new());
        let (lost, flows) = (Vec::new(), Vec::new());
        Ok(Self { network, observer, resolver, visible, started, gone, lost, flows })
    }

    /// Starts a container on the first host and ends it, and asks for its name on the second.
    fn start_and_kill(&mut self, course: &Course, round: usize) -> anyhow::Result<()> {
        let (docker, network) = (&course.one, self.network);
        let name = format!("{network}-{round}");
        docker
            .run(&format!("create --init --name {name} --network {network} {IMAGE} sleep 1000"))?;
        let (started, visible) = self.during(docker, "start", &name, true)?;
        let (_, gone) = self.during(docker, "kill", &name, false)?;
        docker.run(&format!("rm {name}"))?;
        self.started.push(started);
        self.visible.push(visible);
        self.gone.push(gone);
        Ok(())
    }

    /// Runs `docker COMMAND NAME`; returns how long it took, and when the name was as `wanted`, in
    /// milliseconds from its start.
    fn during(
        &self,
        docker: &Docker,
        command: &str,
        name: &str,
        wanted: bool,
    ) -> anyhow::Result<(f64, f64)> {
        let start = Instant::now();
        thread::scope(|scope| {
            let commanded = scope.spawn(move || {
                docker.run(&format!("{command} {name}")).map(|_| milliseconds(start))
            });
            let seen = self.wait_for(name, wanted, start)?;
            match commanded.join() {
                Ok(took) => Ok((took?, seen)),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    fn wait_for(&self, name: &str, wanted: bool, start: Instant) -> anyhow::Result<f64> {
        while start.elapsed() < PATIENCE {
            // Docker's resolver is silent about names that nobody knows.
            let reply = query(&self.resolver, name, Question::A, Duration::from_millis(10));
            let found = reply.is_ok_and(|reply| !reply.addresses.is_empty());
            if found == wanted {
                return Ok(milliseconds(start));
            }
        }
        anyhow::bail!("{name} is not {} within {PATIENCE:?}", if wanted { "seen" } else { "gone" })
    }

    fn carry(&mut self, course: &Course) -> anyhow::Result<()> {
        let peer = format!("{}-peer", self.network);
        let address: IpAddr = course.one.address(&peer, self.network)?;
        let peer = course.one.process(&peer)?;
        let measured = throughput(&self.observer, &peer, address, 3)?;
        self.flows.push(measured.gigabits_per_second);
        Ok(())
    }
}

/// Cuts the first host's power, and waits until neither network gives its names any more.
fn lose_a_host(lab: &Lab, sides: &mut [Side; 2]) -> anyhow::Result<()> {
    let start = Instant::now();
    lab.host(1).power_off();
    thread::scope(|scope| {
        let waits: Vec<_> = sides
            .iter_mut()
            .map(|side| {
                scope.spawn(move || {
                    let lost = side.wait_for(&format!("{}-peer", side.network), false, start)?;
                    side.lost.push(lost);
                    anyhow::Ok(())
                })
            })
            .collect();
        waits.into_iter().try_for_each(|wait| match wait.join() {
            Ok(outcome) => outcome,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })
}

fn running(docker: &Docker, name: &str, network: &str) -> anyhow::Result<Container> {
    docker.container(name, &format!("--network {network}"))?;
    docker.process(name)
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

const ROUNDS: usize = 10;
const FLOWS: usize = 6;
const PATIENCE: Duration = Duration::from_secs(30);
