//! Runs `nft` inside a namespace.

use std::{
    io::{self, Write},
    process::{Command, Output, Stdio},
};

use crate::{namespace::Namespace, table::KernelError};

/// Has `nft` load `script` in `namespace` as one transaction: all of it, or nothing.
///
/// # Errors
///
/// `nft` is not installed, or refuses.
pub fn load(namespace: &Namespace, script: &str) -> Result<(), KernelError> {
    let output = namespace.run(|| run(&["-f", "-"], script))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(KernelError::NftRefused { message: complaint(&output) }),
    }
}

/// Prints `tables` without their counters; `None` if one of them is missing.
///
/// # Errors
///
/// `nft` is not installed, or refuses.
pub fn list(namespace: &Namespace, tables: &[&str]) -> Result<Option<String>, KernelError> {
    // One at a time: nft 1.0 finds only the first of two families in one batch.
    let listings = tables.iter().map(|table| print(namespace, &format!("table {table}")));
    listings.collect()
}

/// Prints a chain, whoever made it; `None` if it is missing.
pub(crate) fn list_chain(
    namespace: &Namespace,
    family: &str,
    table: &str,
    chain: &str,
) -> Result<Option<String>, KernelError> {
    print(namespace, &format!("chain {family} {table} {chain}"))
}

fn print(namespace: &Namespace, object: &str) -> Result<Option<String>, KernelError> {
    let output = namespace.run(|| run(&["-s", "-f", "-"], &format!("list {object}\n")))?;
    if output.status.success() {
        return Ok(Some(String::from_utf8_lossy(&output.stdout).into_owned()));
    }
    let message = complaint(&output);
    // nft has no exit status of its own for it.
    match message.contains("No such file or directory") {
        true => Ok(None),
        false => Err(KernelError::NftRefused { message }),
    }
}

/// The version that `nft` gives of itself.
pub(crate) fn version() -> Result<String, KernelError> {
    let output = run(&["--version"], "")?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn run(arguments: &[&str], input: &str) -> Result<Output, KernelError> {
    let missing = |source| KernelError::NftMissing { source };
    let mut child = Command::new("nft")
        .args(arguments)
        // The messages that we look at.
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(missing)?;
    let mut stdin = child.stdin.take().expect("stdin was asked for");
    match stdin.write_all(input.as_bytes()) {
        // It gave up early; its message says why.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(missing(error)),
        _ => drop(stdin),
    }
    child.wait_with_output().map_err(missing)
}

fn complaint(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).trim().to_owned()
}
