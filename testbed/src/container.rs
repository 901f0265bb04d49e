use std::{
    cell::RefCell,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::PathBuf,
    process::Command,
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use serde_json::Value;

use crate::{
    Host,
    command::Ran,
    eventually,
    holder::{HOLD, Holder, in_network_namespace},
};

/// A container on a host: its namespaces, and the process in them.
#[derive(Debug)]
pub struct Container {
    name: String,
    host: Arc<Host>,
    /// As seen inside the host.
    pid: u32,
    /// Only where the lab started it; `weft run -d` starts the others.
    holder: RefCell<Option<Holder>>,
    attachments: RefCell<Vec<Attachment>>,
}

/// What `weft attach` answered.
#[derive(Clone, Debug)]
pub struct Attachment {
    pub network: String,
    pub name: String,
    pub ip4: Option<Ipv4Addr>,
    pub ip6: Option<Ipv6Addr>,
    pub mac: String,
    pub ifname: String,
    pub mtu_bytes: u16,
    pub gateways: Vec<IpAddr>,
    /// Where the container's resolver library asks.
    pub resolvers: Vec<IpAddr>,
    /// How long the command took, from its start to its end.
    pub took: Duration,
}

impl Attachment {
    pub fn ips(&self) -> impl Iterator<Item = IpAddr> {
        let v4 = self.ip4.map(IpAddr::V4);
        v4.into_iter().chain(self.ip6.map(IpAddr::V6))
    }

    /// # Errors
    ///
    /// `json` lacks a field that `weft attach --format json` must print.
    fn parse(json: &Value, took: Duration) -> anyhow::Result<Self> {
        let text = |field: &str| {
            let value = json.get(field).and_then(Value::as_str);
            value.map(str::to_owned).with_context(|| format!("no {field} in {json}"))
        };
        let list = |field: &str| {
            let values = json.get(field).and_then(Value::as_array);
            values.with_context(|| format!("no {field} in {json}"))
        };
        let mut attachment = Self {
            network: text("network")?,
            name: text("name")?,
            ip4: None,
            ip6: None,
            mac: text("mac")?,
            ifname: text("ifname")?,
            mtu_bytes: json.get("mtu").and_then(Value::as_u64).context("no mtu")?.try_into()?,
            gateways: Vec::new(),
            resolvers: Vec::new(),
            took,
        };
        for address in list("addresses")? {
            let text = address.as_str().context("an address is no text")?;
            let (ip, _length) = text.split_once('/').context("an address has no length")?;
            match ip.parse()? {
                IpAddr::V4(ip) => attachment.ip4 = Some(ip),
                IpAddr::V6(ip) => attachment.ip6 = Some(ip),
            }
        }
        let ips = |field: &str| -> anyhow::Result<Vec<IpAddr>> {
            let texts = list(field)?.iter();
            let texts = texts.map(|ip| ip.as_str().with_context(|| format!("{field}: {ip}")));
            texts.map(|text| Ok(text?.parse()?)).collect()
        };
        attachment.gateways = ips("gateways")?;
        attachment.resolvers = ips("resolvers")?;
        Ok(attachment)
    }
}

impl Container {
    pub(crate) fn start(host: Arc<Host>, name: &str) -> anyhow::Result<Self> {
        let resolv = host.dir().join(format!("{name}.resolv"));
        fs::write(&resolv, "")?;
        let mut command = host.enter()?;
        command.args(["unshare", "--net", "--mount", "--uts", "--propagation", "private"]);
        command.args(["bash", "-c", &format!("{SCRIPT}{HOLD}"), "container", name]).arg(resolv);
        let holder = Holder::start(command, &host.dir().join(format!("{name}.log")))?;
        let pid = holder.pid();
        let (holder, attachments) = (RefCell::new(Some(holder)), RefCell::default());
        Ok(Self { name: name.to_owned(), host, pid, holder, attachments })
    }

    /// Takes a process that runs on `host` already, such as one of `weft run -d`.
    pub fn running(host: &Arc<Host>, name: &str, pid: u32) -> Self {
        let (holder, attachments) = (RefCell::new(None), RefCell::default());
        Self { name: name.to_owned(), host: Arc::clone(host), pid, holder, attachments }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn host(&self) -> &Arc<Host> {
        &self.host
    }

    /// The process id inside the host, as `weft attach` takes it.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Runs `weft attach PID --network NETWORK --name NAME OPTIONS`, and lets the container ask for
    /// names where that says.
    ///
    /// # Errors
    ///
    /// The command fails.
    pub fn attach(&self, network: &str, options: &str) -> anyhow::Result<Attachment> {
        self.note(self.try_attach(network, options)?)
    }

    /// Takes what [`try_attach`](Self::try_attach) did for an attachment of this container.
    ///
    /// # Errors
    ///
    /// It failed.
    pub fn note(&self, ran: Ran) -> anyhow::Result<Attachment> {
        let took = ran.took;
        let json: Value = serde_json::from_str(&ran.ok()?)?;
        let attachment = Attachment::parse(&json, took)?;
        self.attachments.borrow_mut().push(attachment.clone());
        self.write_resolvers()?;
        Ok(attachment)
    }

    /// The same, but returns what the command did, whatever it was.
    ///
    /// # Errors
    ///
    /// The host is off.
    pub fn try_attach(&self, network: &str, options: &str) -> anyhow::Result<Ran> {
        let Self { pid, name, .. } = self;
        let json = "--format json";
        self.host.weft(&format!("attach {pid} --network {network} --name {name} {options} {json}"))
    }

    /// Runs `weft detach NAME --network NETWORK`.
    ///
    /// # Errors
    ///
    /// The command fails.
    pub fn detach(&self, network: &str) -> anyhow::Result<()> {
        self.host.weft(&format!("detach {} --network {network}", self.name))?.ok()?;
        self.attachments.borrow_mut().retain(|attachment| attachment.network != network);
        self.write_resolvers()
    }

    /// What it is attached to, oldest first.
    pub fn attachments(&self) -> Vec<Attachment> {
        self.attachments.borrow().clone()
    }

    /// Its attachment to `network`.
    ///
    /// # Errors
    ///
    /// There is none.
    pub fn on(&self, network: &str) -> anyhow::Result<Attachment> {
        let attachments = self.attachments.borrow();
        let found = attachments.iter().find(|attachment| attachment.network == network);
        found.cloned().with_context(|| format!("{} is not on {network}", self.name))
    }

    /// Runs a command in the container, at most a minute.
    ///
    /// # Errors
    ///
    /// The container is gone. A command that fails is a value: see [`Ran::ok`].
    pub fn exec(&self, argv: &[&str]) -> anyhow::Result<Ran> {
        let line = format!("{}/{}# {}", self.host.name(), self.name, argv.join(" "));
        Ran::run(self.command(argv)?, line)
    }

    /// A command that enters the container first, and ends within a minute.
    pub(crate) fn command(&self, argv: &[&str]) -> anyhow::Result<Command> {
        let mut command = Command::new("nsenter");
        for kind in ["net", "mnt", "uts"] {
            let flag = if kind == "mnt" { "mount" } else { kind };
            command.arg(format!("--{flag}={}", self.namespace_of(kind)?.display()));
        }
        command.args(["timeout", "--kill-after=2", "60"]).args(argv);
        Ok(command)
    }

    /// Runs a shell script in the container and returns what it printed.
    ///
    /// # Errors
    ///
    /// The container is gone, or the script failed.
    pub fn sh(&self, script: &str) -> anyhow::Result<String> {
        self.exec(&["sh", "-ec", script])?.ok()
    }

    /// Pings a name or an address once with the real `ping`, and waits a second for the answer.
    ///
    /// # Errors
    ///
    /// There is no answer.
    pub fn ping(&self, target: &str) -> anyhow::Result<String> {
        self.exec(&["ping", "-n", "-c", "1", "-W", "1", target])?.ok()
    }

    /// Pings until there is an answer.
    ///
    /// # Errors
    ///
    /// There is none within `deadline`.
    pub fn reaches(&self, target: &str, deadline: Duration) -> anyhow::Result<()> {
        let what = format!("{}/{} reaches {target}", self.host.name(), self.name);
        eventually(deadline, &what, || self.ping(target)).map(drop)
    }

    /// What the container's own resolver library answers for `name`.
    ///
    /// # Errors
    ///
    /// The library finds no address.
    pub fn resolve(&self, name: &str) -> anyhow::Result<Vec<IpAddr>> {
        let text = self.exec(&["getent", "ahosts", name])?.ok()?;
        let mut found: Vec<IpAddr> = Vec::new();
        for line in text.lines() {
            let ip = line.split_whitespace().next().context("an empty line")?.parse()?;
            if !found.contains(&ip) {
                found.push(ip);
            }
        }
        Ok(found)
    }

    /// Its network namespace, as a path for [`in_network_namespace`].
    ///
    /// # Errors
    ///
    /// The host is off.
    pub fn namespace(&self) -> anyhow::Result<PathBuf> {
        self.namespace_of("net")
    }

    /// Opens something, a socket mostly, inside the container's network namespace.
    ///
    /// # Errors
    ///
    /// The container is gone, or `open` fails.
    pub fn inside<T: Send>(
        &self,
        open: impl FnOnce() -> anyhow::Result<T> + Send,
    ) -> anyhow::Result<T> {
        in_network_namespace(&self.namespace()?, open)
    }

    /// Ends the container's process, without telling the agent.
    pub fn kill(&self) {
        match self.holder.borrow_mut().take() {
            Some(mut holder) => holder.end(),
            None => {
                let _ = self.host.exec(&["kill", "-KILL", &self.pid.to_string()]);
            }
        }
    }

    /// Lets it outlive this process.
    ///
    /// # Errors
    ///
    /// It has ended.
    pub fn keep(&self) -> anyhow::Result<()> {
        self.holder.borrow_mut().as_mut().map_or(Ok(()), Holder::keep)
    }

    fn namespace_of(&self, kind: &str) -> anyhow::Result<PathBuf> {
        // The pid is one of the host's pid namespace, so it is looked up in the host's own /proc.
        Ok(format!("/proc/{}/root/proc/{}/ns/{kind}", self.host.pid()?, self.pid).into())
    }

    fn write_resolvers(&self) -> anyhow::Result<()> {
        let mut lines = String::from("options timeout:1 attempts:2\n");
        let attachments = self.attachments.borrow();
        for resolver in attachments.iter().flat_map(|attachment| &attachment.resolvers) {
            lines.push_str(&format!("nameserver {resolver}\n"));
        }
        fs::write(self.host.dir().join(format!("{}.resolv", self.name)), lines)?;
        Ok(())
    }
}

const SCRIPT: &str = r#"
set -eu
hostname "$1"
mount --bind "$2" "$(readlink -f /etc/resolv.conf)"
ip link set lo up
echo "ready $$"
"#;
