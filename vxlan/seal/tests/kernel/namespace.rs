use std::{
    fs::File,
    os::fd::AsRawFd,
    process::{self, Command, Output},
    thread,
};

use nix::sched::{CloneFlags, setns, unshare};

/// A network namespace without a name: it ends with its last user.
pub(crate) struct Namespace(File);

impl Namespace {
    pub(crate) fn new() -> Self {
        let file = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("run the tests as root");
            File::open("/proc/thread-self/ns/net").unwrap()
        });
        let namespace = Self(file.join().unwrap());
        namespace.ip("link set lo up");
        namespace
    }

    /// Runs `f` inside, on a thread of its own. What it opens stays there.
    pub(crate) fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                setns(&self.0, CloneFlags::CLONE_NEWNET).unwrap();
                f()
            });
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Where `ip` finds it.
    pub(crate) fn path(&self) -> String {
        format!("/proc/{}/fd/{}", process::id(), self.0.as_raw_fd())
    }

    pub(crate) fn ip(&self, arguments: &str) {
        self.succeed("ip", arguments);
    }

    pub(crate) fn succeed(&self, program: &str, arguments: &str) {
        let output = self.command(program, arguments);
        assert!(output.status.success(), "{program} {arguments}: {output:?}");
    }

    pub(crate) fn command(&self, program: &str, arguments: &str) -> Output {
        self.run(|| Command::new(program).args(arguments.split(' ')).output().unwrap())
    }

    pub(crate) fn nft(&self, rules: &str) {
        let output = self.run(|| Command::new("nft").arg(rules).output().unwrap());
        assert!(output.status.success(), "{rules}: {output:?}");
    }

    /// Whether an echo request with `bytes` of data is answered; never fragmented.
    pub(crate) fn pings(&self, address: &str, bytes: usize) -> bool {
        self.ping(address, bytes).status.success()
    }

    pub(crate) fn ping(&self, address: &str, bytes: usize) -> Output {
        self.command("ping", &format!("-c 1 -W 2 -M do -s {bytes} {address}"))
    }
}
