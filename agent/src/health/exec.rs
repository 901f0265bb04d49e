//! Programs that check an endpoint.

use std::{path::PathBuf, process::Stdio, time::Duration};

use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    process::{Child, Command},
    runtime::Handle,
    time,
};
use weft_model::Family;
use weft_vxlan::Namespace;

use super::{failure::Failure, targets::ProgramContext};

/// Which programs services may run on this host: those in one directory. What a service says comes
/// from any member of the cluster; what may be run here is for the owner of this host to say.
pub(super) struct Programs {
    directory: PathBuf,
}

impl Programs {
    pub(super) fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    /// What is to be run for an endpoint.
    ///
    /// # Errors
    ///
    /// There is no such program in the directory.
    pub(super) fn command(
        &self,
        line: &[String],
        context: &ProgramContext,
    ) -> Result<Command, Failure> {
        let (name, arguments) =
            line.split_first().map_or(("", line), |(first, rest)| (first, rest));
        let plain = !name.is_empty() && !name.contains('/') && name != ".." && name != ".";
        let program = self.directory.join(name);
        if !plain || !program.is_file() {
            let (name, directory) = (name.to_owned(), self.directory.clone());
            return Err(Failure::NoProgram { name, directory });
        }
        let ProgramContext { endpoint, network, service, .. } = context;
        let mut command = plain_command(program);
        command
            .args(arguments)
            .env("WEFT_ENDPOINT", endpoint.id.to_string())
            .env("WEFT_NAME", endpoint.name.as_str())
            .env("WEFT_NETWORK", network.as_str())
            .env("WEFT_SERVICE", service.as_str());
        for ip in endpoint.ips() {
            let variable = match Family::of(ip) {
                Family::V4 => "WEFT_ADDRESS",
                Family::V6 => "WEFT_ADDRESS6",
            };
            command.env(variable, ip.to_string());
        }
        Ok(command)
    }
}

/// Podman's own check of a container, which runs inside of it.
pub(super) fn podman_check(container: &str) -> Command {
    let mut command = plain_command("podman".into());
    // Its warnings would stand before the reason.
    command.args(["--log-level", "error", "healthcheck", "run", container]);
    command
}

fn plain_command(program: PathBuf) -> Command {
    let mut command = Command::new(program);
    command
        .env_clear()
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    command
}

/// The namespace of the endpoint's container.
///
/// # Errors
///
/// It has gone.
pub(super) fn namespace_of(context: &ProgramContext) -> Result<Namespace, Failure> {
    let gone = || Failure::Namespace { why: "it is not the container's any more".into() };
    context.sandbox.open_if(&context.endpoint.sandbox)?.ok_or_else(gone)
}

/// Starts a program, in `namespace` if there is one.
///
/// # Errors
///
/// It cannot be started.
pub(super) async fn start(
    mut command: Command,
    namespace: Option<Namespace>,
) -> Result<Running, Failure> {
    let program = PathBuf::from(command.as_std().get_program());
    let not_run = move |error: std::io::Error| Failure::NotRun { program, why: error.to_string() };
    let child = match namespace {
        Some(namespace) => {
            let runtime = Handle::current();
            namespace
                .run_async(move || {
                    let _entered = runtime.enter();
                    command.spawn().map_err(not_run)
                })
                .await?
        }
        None => command.spawn().map_err(not_run)?,
    };
    let group = child.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw);
    Ok(Running { child, group: Group(group) })
}

/// A program at work. Dropping it ends it, with all that it started.
pub(super) struct Running {
    // Dropped first: as long as the child is not waited for, its id is nobody else's.
    group: Group,
    child: Child,
}

/// A process group to kill.
struct Group(Option<Pid>);

impl Running {
    /// Waits for its end.
    ///
    /// # Errors
    ///
    /// It did not end with status 0; with what it printed.
    pub(super) async fn end(mut self) -> Result<(), Failure> {
        let (stdout, stderr) = (self.child.stdout.take(), self.child.stderr.take());
        let (mut said, mut complained) = (Vec::new(), Vec::new());
        let status = {
            let read = async {
                tokio::join!(listen(stdout, &mut said), listen(stderr, &mut complained));
            };
            tokio::pin!(read);
            let mut reading = true;
            let status = loop {
                tokio::select! {
                    status = self.child.wait() => break status,
                    () = &mut read, if reading => reading = false,
                }
            };
            if reading {
                // What it left running may hold its output open for long.
                let _ = time::timeout(LAST_WORDS, read).await;
            }
            status
        };
        // It has been waited for: its id may be another's by now.
        self.group.0 = None;
        match status {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => {
                complained.append(&mut said);
                let (status, output) = (status.to_string(), excerpt(&complained));
                Err(Failure::Exit { status, output })
            }
            Err(error) => Err(Failure::Exit { status: error.to_string(), output: String::new() }),
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            // It may just have ended.
            let _ = killpg(group, Signal::SIGKILL);
        }
    }
}

/// Keeps the beginning of what is printed, and reads the rest too: who prints is not held up.
async fn listen(from: Option<impl AsyncRead + Unpin>, into: &mut Vec<u8>) {
    let Some(mut from) = from else { return };
    let mut buffer = [0; 1024];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        let room = OUTPUT_LIMIT - into.len();
        into.extend_from_slice(&buffer[..count.min(room)]);
    }
}

/// The first line with something on it.
fn excerpt(output: &[u8]) -> String {
    let text = String::from_utf8_lossy(output);
    let line = text.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or_default();
    line.chars().filter(|char| !char.is_control()).take(EXCERPT).collect()
}

/// Bytes of a program's output that are kept.
const OUTPUT_LIMIT: usize = 4096;
/// Characters of it that everybody is told.
const EXCERPT: usize = 200;
/// How long a program's output may come after its end.
const LAST_WORDS: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, sync::Arc};

    use super::*;
    use crate::{
        api::types::Sandbox,
        fixture::{endpoint, network},
    };

    #[tokio::test]
    async fn a_program_is_told_whom_it_checks() {
        let dir = tempfile::tempdir().unwrap();
        script(
            dir.path(),
            "check",
            "echo \"$1 $WEFT_NAME $WEFT_NETWORK $WEFT_SERVICE $WEFT_ADDRESS\"; exit 3",
        );
        let failure = run(dir.path(), &["check", "now"]).await.unwrap_err();
        let Failure::Exit { status, output } = failure else { panic!("{failure:?}") };
        assert_eq!(
            (status.as_str(), output.as_str()),
            ("exit status: 3", "now box app web 10.1.0.8")
        );
    }

    #[tokio::test]
    async fn only_programs_of_the_directory_are_run() {
        let dir = tempfile::tempdir().unwrap();
        script(dir.path(), "good", "exit 0");
        assert_eq!(run(dir.path(), &["good"]).await, Ok(()));
        let absolute = dir.path().join("good").display().to_string();
        for line in
            [&["/bin/true"][..], &["../bin/true"], &["bad"], &[""], &["."], &[], &[&absolute]]
        {
            let failure = run(dir.path(), line).await.unwrap_err();
            assert!(matches!(failure, Failure::NoProgram { .. }), "{line:?}: {failure:?}");
        }
    }

    #[tokio::test]
    async fn a_program_that_is_given_up_ends_with_all_that_it_started() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        // Whoever has the pipe open for writing is alive.
        script(dir.path(), "slow", &format!("exec 3>{}; sleep 1000 & sleep 1000", pipe.display()));
        let started = start(command(dir.path(), &["slow"]).unwrap(), None).await.unwrap();
        let mut reader = tokio::net::unix::pipe::OpenOptions::new().open_receiver(&pipe).unwrap();
        assert!(time::timeout(Duration::from_millis(300), started.end()).await.is_err());
        let mut rest = Vec::new();
        let ended = time::timeout(Duration::from_secs(5), reader.read_to_end(&mut rest)).await;
        assert!(ended.is_ok(), "somebody is left");
    }

    #[tokio::test]
    async fn a_program_that_prints_much_is_not_held_up() {
        let dir = tempfile::tempdir().unwrap();
        script(dir.path(), "loud", "head -c 1000000 /dev/zero | tr '\\0' x; echo; exit 1");
        let failure = run(dir.path(), &["loud"]).await.unwrap_err();
        let Failure::Exit { output, .. } = failure else { panic!("{failure:?}") };
        assert_eq!(output.len(), EXCERPT);
    }

    async fn run(directory: &Path, line: &[&str]) -> Result<(), Failure> {
        start(command(directory, line)?, None).await?.end().await
    }

    fn command(directory: &Path, line: &[&str]) -> Result<Command, Failure> {
        let app = network(1, "app");
        let context = ProgramContext {
            sandbox: Sandbox::Pid(1),
            endpoint: endpoint(&app, "box", "10.1.0.8"),
            network: app.name,
            service: "web".parse().unwrap(),
        };
        let line: Vec<String> = line.iter().map(|&text| text.to_owned()).collect();
        Programs::new(directory.into()).command(&line, &Arc::new(context))
    }

    fn script(directory: &Path, name: &str, text: &str) {
        let path = directory.join(name);
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }
}
