//! A room for one test: namespaces that end with it, commands in them, and the wait for what becomes
//! true. The tests of the balancer have it too.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use tokio::{runtime::Builder, time::Instant};
use weft_vxlan::{Namespace, NamespaceError};

/// Runs `test` in a runtime of `builder`, on a thread with network and mount namespaces of its own.
/// What it makes in them goes with them, as does the directory that it is given.
pub(crate) fn in_room(mut builder: Builder, test: impl AsyncFnOnce(PathBuf) + Send + 'static) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_owned();
    let outcome = thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("run the tests as root");
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        mount(Some("tmpfs"), &path, Some("tmpfs"), MsFlags::empty(), none).unwrap();
        builder.enable_all().build().unwrap().block_on(test(path));
    })
    .join();
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic);
    }
}

/// A bare namespace, mounted under `dir`.
pub(crate) fn namespace(dir: &Path, name: &str) -> Namespace {
    let path = dir.join(name);
    File::create(&path).unwrap();
    thread::scope(|scope| {
        let made = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let none = None::<&str>;
            mount(Some("/proc/thread-self/ns/net"), &path, none, MsFlags::MS_BIND, none).unwrap();
        });
        made.join().unwrap();
    });
    let namespace = Namespace::open(path).unwrap();
    run(&namespace, "ip link set lo up");
    namespace
}

/// Runs a command line in `namespace`; its output, if it succeeds.
pub(crate) fn attempt(namespace: &Namespace, command: &str) -> Result<String, String> {
    let output = namespace
        .run(|| {
            let output = Command::new("sh").args(["-c", command]).output();
            Ok::<_, NamespaceError>(output.unwrap())
        })
        .unwrap();
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    if output.status.success() { Ok(text) } else { Err(text) }
}

/// As [`attempt`], for a command that must succeed.
pub(crate) fn run(namespace: &Namespace, command: &str) -> String {
    attempt(namespace, command).unwrap_or_else(|output| panic!("`{command}` failed: {output}"))
}

/// How a command of iproute2 names `namespace`.
pub(crate) fn at(namespace: &Namespace) -> String {
    // Given as a path: none of the tests' namespaces is under /run/netns.
    namespace.path().display().to_string()
}

/// Waits until `condition` holds; prints the last state it told of if that takes too long.
pub(crate) async fn eventually(what: &str, condition: impl AsyncFn() -> Result<(), String>) {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let state = match condition().await {
            Ok(()) => return,
            Err(state) => state,
        };
        assert!(Instant::now() < deadline, "not in time: {what}\n{state}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
