//! One call of the plugin, and what it did.

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use weft_testbed::{Host, Lab};

/// One call, and what the plugin did.
pub(crate) struct Call<'a> {
    host: &'a Host,
    verb: &'a str,
    conf: Value,
    /// The container's id, and its namespace unless it is gone.
    container: (&'a str, Option<&'a str>),
    ifname: &'a str,
    args: &'a str,
}

impl<'a> Call<'a> {
    pub(crate) fn new(host: &'a Host, verb: &'a str, conf: &Value, id: &'a str) -> Self {
        let conf = conf.clone();
        Self { host, verb, conf, container: (id, Some(id)), ifname: "eth0", args: "" }
    }

    pub(crate) fn without_namespace(self) -> Self {
        Self { container: (self.container.0, None), ..self }
    }

    pub(crate) fn args(self, args: &'a str) -> Self {
        Self { args, ..self }
    }

    pub(crate) fn ifname(self, ifname: &'a str) -> Self {
        Self { ifname, ..self }
    }

    pub(crate) fn prev(mut self, result: &Value) -> Self {
        self.conf["prevResult"] = result.clone();
        self
    }

    /// Runs the plugin; what it printed must be one JSON value or nothing.
    pub(crate) fn run(self) -> anyhow::Result<(i32, Value)> {
        let (id, netns) = self.container;
        let netns = netns.map_or_else(String::new, |name| format!("/run/netns/{name}"));
        let env = [
            ("COMMAND", self.verb),
            ("CONTAINERID", id),
            ("NETNS", &netns),
            ("IFNAME", self.ifname),
            ("ARGS", self.args),
            ("PATH", "/usr/lib/cni"),
        ];
        let env = env.map(|(name, value)| (format!("CNI_{name}"), value.to_owned()));
        run(self.host, &env, &self.conf.to_string(), "weft-cni")
    }

    /// Runs what must succeed.
    pub(crate) fn ok(self) -> anyhow::Result<Value> {
        let what = format!("{} {} on {}", self.verb, self.container.0, self.host.name());
        let (code, answer) = self.run()?;
        ensure!(code == 0, "{what}: exit code {code}, {answer}");
        Ok(answer)
    }

    /// Runs what must fail under `code`, with a message that holds `word`.
    pub(crate) fn refused(self, code: u64, word: &str) -> anyhow::Result<()> {
        let what = format!("{} {}", self.verb, self.conf);
        let version = self.conf["cniVersion"].clone();
        let (exit, answer) = self.run()?;
        failed_with((exit, &answer), code, word).context(what)?;
        ensure!(version.is_null() || answer["cniVersion"] == version, "{answer}");
        Ok(())
    }
}

pub(crate) fn run(
    host: &Host,
    env: &[(String, String)],
    input: &str,
    program: &str,
) -> anyhow::Result<(i32, Value)> {
    let env: Vec<String> = env.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let shell = ["sh", "-c", "printf %s \"$1\" | \"$2\"", "cni", input, program];
    let command: Vec<&str> =
        ["env"].into_iter().chain(env.iter().map(String::as_str)).chain(shell).collect();
    let ran = host.exec(&command)?;
    let answer = match ran.stdout.trim() {
        "" => Value::Null,
        text => serde_json::from_str(text).with_context(|| format!("no JSON: {ran}"))?,
    };
    Ok((ran.code, answer))
}

pub(crate) fn failed_with(
    (exit, answer): (i32, &Value),
    code: u64,
    word: &str,
) -> anyhow::Result<()> {
    ensure!(exit == 1, "exit code {exit}: {answer}");
    ensure!(answer["code"] == code, "not code {code}: {answer}");
    let message = answer["msg"].as_str().context("no msg")?;
    ensure!(message.contains(word), "the message lacks {word:?}: {answer}");
    ensure!(answer["details"].is_string() && answer["cniVersion"].is_string(), "{answer}");
    Ok(())
}

/// A cluster whose hosts have the plugin by its name.
pub(crate) fn cluster(hosts: u8) -> anyhow::Result<Lab> {
    let lab = Lab::cluster(hosts)?;
    for host in lab.hosts() {
        std::os::unix::fs::symlink("weft", host.dir().join("bin/weft-cni"))?;
    }
    Ok(lab)
}

pub(crate) fn conf(version: &str, network: &str) -> Value {
    json!({"cniVersion": version, "name": network, "type": "weft-cni"})
}

/// How many endpoints `host` has.
pub(crate) fn own(host: &Host) -> anyhow::Result<usize> {
    let endpoints = host.weft_json("ps")?;
    let name = host.name();
    Ok(endpoints.as_array().into_iter().flatten().filter(|e| e["node"] == name).count())
}

pub(crate) fn in_namespace(host: &Host, netns: &str, script: &str) -> anyhow::Result<String> {
    host.exec(&["ip", "netns", "exec", netns, "sh", "-ec", script])?.ok()
}
