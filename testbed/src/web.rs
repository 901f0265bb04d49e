use std::{fs, time::Duration};

use anyhow::{Context as _, ensure};

use crate::{Container, Daemon, Place, eventually};

/// nginx in a container: answers every request at port 80 with the container's name.
#[derive(Debug)]
pub struct WebServer {
    _processes: Vec<Daemon>,
}

impl WebServer {
    /// Serves with one process.
    ///
    /// # Errors
    ///
    /// nginx is not installed, or does not listen within 5 s.
    pub fn start(container: &Container) -> anyhow::Result<Self> {
        Self::start_processes(container, 1)
    }

    /// Serves with so many processes, among which the kernel divides the connections.
    ///
    /// # Errors
    ///
    /// As [`start`](Self::start).
    pub fn start_processes(container: &Container, count: u16) -> anyhow::Result<Self> {
        let start = |number| start_nginx(container, number);
        let processes = (1..=count).map(start).collect::<anyhow::Result<Vec<_>>>()?;
        eventually(
            Duration::from_secs(5),
            &format!("nginx listens in {}", container.name()),
            || {
                let sockets = container.sh("ss -4 -tlnH 'sport = 80'")?;
                let logs: Vec<String> = processes.iter().map(Daemon::log).collect();
                ensure!(sockets.lines().count() == processes.len(), "{sockets:?} {logs:?}");
                anyhow::Ok(())
            },
        )?;
        Ok(Self { _processes: processes })
    }
}

/// Starts one process, as master and worker in one: nothing of it outlives it.
fn start_nginx(container: &Container, number: u16) -> anyhow::Result<Daemon> {
    let (host, name) = (container.host(), container.name());
    let dir = host.dir().join(format!("{name}.nginx{number}"));
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let dir = dir.display().to_string();
    let config = format!("{dir}/nginx.conf");
    fs::write(&config, CONFIG.replace("DIR", &dir).replace("NAME", name))?;
    let namespace = format!("--net=/proc/{}/ns/net", container.pid());
    let argv = ["nsenter", &namespace, "nginx", "-p", &dir, "-c", &config];
    Daemon::start(host, &format!("nginx-{name}-{number}"), &argv)
}

/// What a client of a [`WebServer`] does.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Requests {
    /// Request after request on each connection.
    Kept,
    /// A connection for each request.
    Single,
}

/// How hard clients press.
#[derive(Clone, Copy, Debug)]
pub struct Pressure {
    /// Connections at a time.
    pub connections: u16,
    /// Threads of wrk. What one alone can send may leave a part of the machine idle.
    pub threads: u16,
}

/// What wrk measured.
#[derive(Clone, Copy, Debug)]
pub struct Served {
    pub per_second: f64,
    /// Milliseconds.
    pub median: f64,
    /// Milliseconds.
    pub p99: f64,
    /// Connections and requests that failed, late answers among them.
    pub failed: u64,
    /// Answers that took longer than 5 s.
    pub late: u64,
}

impl Requests {
    /// Runs wrk against `http://TARGET/` for `seconds`.
    ///
    /// # Errors
    ///
    /// wrk is not installed, or nothing is served.
    pub fn run(
        self,
        from: &Place,
        target: &str,
        pressure: Pressure,
        seconds: u32,
    ) -> anyhow::Result<Served> {
        let Pressure { connections, threads } = pressure;
        let (threads, connections) = (threads.to_string(), connections.to_string());
        let seconds = format!("{seconds}s");
        let url = format!("http://{target}/");
        let mut argv = vec![
            "wrk",
            "--latency",
            "-t",
            &threads,
            "-c",
            &connections,
            "-d",
            &seconds,
            "--timeout",
            "5s",
        ];
        if self == Self::Single {
            argv.extend(["-H", "Connection: close"]);
        }
        argv.push(&url);
        let text = from.exec(&argv)?.ok()?;
        read(&text).with_context(|| format!("wrk at {target} reports {text}"))
    }
}

/// Reads the report of wrk 4.
fn read(text: &str) -> Option<Served> {
    let line = |start: &str| text.lines().find_map(|line| line.trim().strip_prefix(start));
    let per_second: f64 = line("Requests/sec:")?.trim().parse().ok()?;
    let errors = line("Socket errors:").map_or(0, numbers);
    let refused = line("Non-2xx or 3xx responses:").map_or(0, numbers);
    (per_second > 0.0).then_some(Served {
        per_second,
        median: milliseconds(line("50%")?.trim())?,
        p99: milliseconds(line("99%")?.trim())?,
        failed: errors + refused,
        late: line("Socket errors:")
            .and_then(|line| line.split_once("timeout "))
            .map_or(0, |(_, n)| numbers(n)),
    })
}

fn numbers(text: &str) -> u64 {
    let words = text.split(|c: char| !c.is_ascii_digit());
    words.filter_map(|word| word.parse::<u64>().ok()).sum()
}

/// wrk prints `us`, `ms` and `s`.
fn milliseconds(text: &str) -> Option<f64> {
    let (number, unit) = text.split_at(text.find(|c: char| c.is_ascii_alphabetic())?);
    let factor = match unit {
        "us" => 1e-3,
        "ms" => 1.0,
        "s" => 1e3,
        _ => return None,
    };
    Some(number.parse::<f64>().ok()? * factor)
}

/// As few system calls as nginx makes.
const CONFIG: &str = "
daemon off;
master_process off;
pid DIR/nginx.pid;
error_log DIR/error.log;
events { worker_connections 8192; }
http {
  access_log off;
  keepalive_requests 100000000;
  # No client is waited for that has ended, and whose reset was lost.
  client_header_timeout 10s;
  client_body_temp_path DIR/body;
  proxy_temp_path DIR/proxy;
  fastcgi_temp_path DIR/fastcgi;
  uwsgi_temp_path DIR/uwsgi;
  scgi_temp_path DIR/scgi;
  server {
    listen 80 backlog=4096 reuseport;
    listen [::]:80 backlog=4096 reuseport;
    location / { return 200 \"NAME\\n\"; }
  }
}
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_of_wrk_is_understood() {
        let report = "Running 2s test @ http://10.0.0.1/\n  1 threads and 10 connections\n  \
                      Thread Stats   Avg      Stdev     Max   +/- Stdev\n    \
                      Latency   273.20us  334.62us   9.29ms   93.58%\n  \
                      Latency Distribution\n     50%  190.00us\n     75%  280.00us\n     \
                      90%    0.51ms\n     99%    1.72ms\n  84072 requests in 2.00s\n  \
                      Socket errors: connect 1, read 2, write 0, timeout 4\n\
                      Requests/sec:  42012.52\nTransfer/sec:      6.81MB\n";
        let served = read(report).unwrap();
        assert_eq!((served.per_second, served.failed, served.late), (42012.52, 7, 4));
        assert_eq!((served.median, served.p99), (0.19, 1.72));
        assert!(read(&report.replace("42012.52", "0.00")).is_none());
    }
}
