use std::{
    io::{BufRead as _, BufReader},
    net::IpAddr,
    process::{Child, Stdio},
};

use anyhow::Context as _;
use nix::sys::signal::{Signal, kill};
use serde_json::Value;

use crate::{CpuTime, Place, holder::pid_of};

/// What iperf3 sends.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Load {
    /// So many TCP flows, as fast as they go.
    Tcp { flows: u8 },
    /// One flow of UDP datagrams with so many bytes of payload, as fast as the sender can.
    Udp { payload_bytes: u16 },
}

/// What arrived, and what it cost.
#[derive(Clone, Copy, Debug, Default)]
pub struct Carried {
    /// Of the payload, at the receiver.
    pub gigabits_per_second: f64,
    /// Datagrams that arrived; 0 for TCP.
    pub packets_per_second: f64,
    /// The share of datagrams that did not arrive, 0 to 1; 0 for TCP.
    pub loss: f64,
    pub retransmits: u64,
    /// CPU time that was spent while the load ran: by both hosts with all their processes, by
    /// iperf3 and by the kernel, less what these take when idle.
    pub cpu_seconds: f64,
    /// Payload that arrived in all, in units of 10⁹ bytes.
    pub gigabytes: f64,
}

impl Carried {
    /// CPU time for 10⁹ bytes of payload that arrived, in seconds.
    pub fn cpu_seconds_per_gigabyte(&self) -> f64 {
        self.cpu_seconds / self.gigabytes
    }
}

impl Load {
    /// Runs iperf3 between two places for `seconds`, TCP after one more that does not count; `idle`
    /// is how many CPUs are busy without it, of those that [`CpuTime`] takes for ours.
    ///
    /// # Errors
    ///
    /// iperf3 is not installed, or nothing arrives.
    pub fn run(
        self,
        from: &Place,
        to: &Place,
        address: IpAddr,
        seconds: u32,
        idle: f64,
    ) -> anyhow::Result<Carried> {
        let mut server = Server::start(to)?;
        let (address, seconds) = (address.to_string(), seconds.to_string());
        let mut argv = vec!["iperf3", "--client", &address, "--time", &seconds, "--json"];
        let (flows, payload);
        match self {
            Self::Tcp { flows: count } => {
                flows = count.to_string();
                argv.extend(["--omit", "1", "--parallel", &flows]);
            }
            Self::Udp { payload_bytes } => {
                payload = payload_bytes.to_string();
                // With a second that does not count, iperf3 takes its losses for those of the rest.
                argv.extend(["--udp", "--bitrate", "0", "--length", &payload]);
            }
        }
        let before = CpuTime::now()?;
        let text = from.exec(&argv)?.ok()?;
        let spent = CpuTime::now()?.since(before);
        let cpu_seconds = spent.ours - idle * spent.wall;
        server.0.wait()?;
        let report: Value = serde_json::from_str(&text)?;
        self.read(&report, cpu_seconds.max(0.0))
            .with_context(|| format!("iperf3 to {address} reports {report}"))
    }

    fn read(self, report: &Value, cpu_seconds: f64) -> Option<Carried> {
        let number = |pointer: &str| report.pointer(pointer).and_then(Value::as_f64);
        let (gigabits_per_second, packets_per_second, loss, retransmits) = match self {
            Self::Tcp { .. } => {
                let retransmits = number("/end/sum_sent/retransmits")? as u64;
                (number("/end/sum_received/bits_per_second")? / 1e9, 0.0, 0.0, retransmits)
            }
            Self::Udp { payload_bytes } => {
                let bytes = number("/end/sum_received/bytes")?;
                let per_second = bytes / number("/end/sum_received/seconds")?;
                let sent = number("/end/sum/packets")?;
                let loss = 1.0 - bytes / f64::from(payload_bytes) / sent;
                (per_second * 8.0 / 1e9, per_second / f64::from(payload_bytes), loss, 0)
            }
        };
        // The second before the count costs CPU as well, so its bytes count there.
        let intervals = report.get("intervals")?.as_array()?;
        let bytes = |interval: &Value| interval.pointer("/sum/bytes").and_then(Value::as_f64);
        let sent: f64 = intervals.iter().filter_map(bytes).sum();
        let gigabytes = sent * (1.0 - loss) / 1e9;
        let arrived = gigabytes > 0.0 && gigabits_per_second > 0.0;
        arrived.then_some(Carried {
            gigabits_per_second,
            packets_per_second,
            loss,
            retransmits,
            cpu_seconds,
            gigabytes,
        })
    }
}

/// An iperf3 that serves one client. In this session, not a daemon: the kernel may give each
/// session the same share of the CPUs, whatever runs in it (sched(7), autogroup).
#[derive(Debug)]
struct Server(Child);

impl Server {
    fn start(at: &Place) -> anyhow::Result<Self> {
        let mut process = at
            .command(&["iperf3", "--server", "--one-off", "--forceflush"])?
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start iperf3")?;
        let output = process.stdout.take().context("iperf3 has no output")?;
        let server = Self(process);
        let mut lines = BufReader::new(output).lines();
        let listens = lines.by_ref().map_while(Result::ok).any(|line| line.contains("listening"));
        anyhow::ensure!(listens, "iperf3 does not listen: is it installed?");
        // What it prints about its client is read by nobody, and must not fill the pipe.
        std::thread::spawn(move || lines.for_each(drop));
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // `timeout` passes this on to iperf3, as it could not pass on SIGKILL.
        let _ = kill(pid_of(self.0.id()), Signal::SIGTERM);
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn datagrams_that_were_lost_do_not_count_as_carried() {
        let report = json!({
            "intervals": [{"sum": {"bytes": 2e9}}, {"sum": {"bytes": 2e9}}],
            "end": {
                "sum": {"packets": 4e6},
                "sum_received": {"bytes": 3e9, "seconds": 2.0},
            },
        });
        let carried = Load::Udp { payload_bytes: 1000 }.read(&report, 6.0).unwrap();
        assert_eq!((carried.packets_per_second, carried.loss), (1.5e6, 0.25));
        assert_eq!(carried.cpu_seconds_per_gigabyte(), 2.0);
    }
}
