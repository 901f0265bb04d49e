//! The control groups that engines leave: they are of the machine, not of a host of the lab.

use std::{fs, path::Path};

use anyhow::Context as _;

/// Removes what the daemons of labs whose process has died left of control groups.
pub(super) fn sweep() {
    let _ = remove(|name| {
        let pid = name.strip_prefix("weft-lab-").and_then(|rest| rest.split('-').next());
        pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists())
    });
}

/// Removes the top control groups that `chosen` names, in every hierarchy.
pub(super) fn remove(chosen: impl Fn(&str) -> bool) -> anyhow::Result<()> {
    let root = Path::new("/sys/fs/cgroup");
    let hierarchies = fs::read_dir(root)?.flatten().map(|entry| entry.path());
    for hierarchy in [root.to_owned()].into_iter().chain(hierarchies) {
        for entry in fs::read_dir(&hierarchy).into_iter().flatten().flatten() {
            if entry.file_name().to_str().is_some_and(&chosen) {
                remove_group(&entry.path())?;
            }
        }
    }
    Ok(())
}

/// Only directories can be removed in it, the inner ones first.
fn remove_group(path: &Path) -> anyhow::Result<()> {
    for entry in fs::read_dir(path)?.flatten() {
        if entry.file_type()?.is_dir() {
            remove_group(&entry.path())?;
        }
    }
    fs::remove_dir(path).with_context(|| format!("cannot remove {}", path.display()))
}
