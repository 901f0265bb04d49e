//! Commands of `weft run` that have no endpoint: on the host's network, on none, in the namespace of a
//! container. The agent does not know of them; each leaves a note beside the agent's socket, which is
//! worth something as long as its process lives.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use weft_model::Label;

/// One such command.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(super) struct Unattached {
    pub(super) name: Label,
    /// What stood after `--network`.
    pub(super) network: String,
    pub(super) pid: u32,
    /// When the process started, in clock ticks since the host did: pids are given out again.
    started: u64,
}

/// Why a command left no note.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoteError {
    #[error(
        "{} runs on this host already, with --network {} (process {}): take another name",
        other.name, other.network, other.pid
    )]
    Taken { other: Box<Unattached> },
    #[error("cannot note the command in {}", path.display())]
    Unwritable { path: PathBuf, source: io::Error },
}

impl Unattached {
    /// Notes that this process is the command called `name`.
    ///
    /// # Errors
    ///
    /// Another one of that name runs, or the note cannot be written.
    pub(super) fn note(dir: &Path, name: Label, network: String) -> Result<Self, NoteError> {
        let pid = std::process::id();
        let unwritable = |source| NoteError::Unwritable { path: dir.into(), source };
        let started = started(pid).ok_or_else(|| unwritable(io::ErrorKind::NotFound.into()))?;
        let own = Self { name, network, pid, started };
        let path = own.path(dir);
        let written = serde_json::to_vec(&own).expect("a note is plain data");
        let draft = dir.join(format!(".{pid}"));
        fs::create_dir_all(dir).map_err(unwritable)?;
        fs::write(&draft, written).map_err(unwritable)?;
        let noted = loop {
            // Fails where there is one.
            match fs::hard_link(&draft, &path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                other => break other.map_err(unwritable),
            }
            match read(&path).filter(Self::runs) {
                Some(other) => break Err(NoteError::Taken { other: Box::new(other) }),
                None => remove(&path).map_err(unwritable)?,
            }
        };
        remove(&draft).map_err(unwritable)?;
        noted.map(|()| own)
    }

    /// Takes the note back.
    pub(super) fn forget(&self, dir: &Path) -> Result<(), NoteError> {
        let path = self.path(dir);
        remove(&path).map_err(|source| NoteError::Unwritable { path, source })
    }

    /// Those that run, by name. Notes of others are removed where that is allowed.
    pub(super) fn all(dir: &Path) -> Vec<Self> {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        let paths = entries.map(|entry| entry.path()).filter(|path| {
            path.file_name().is_some_and(|name| !name.as_encoded_bytes().starts_with(b"."))
        });
        let mut running: Vec<Self> = paths
            .filter_map(|path| {
                let found = read(&path).filter(Self::runs);
                if found.is_none() {
                    let _ = remove(&path);
                }
                found
            })
            .collect();
        running.sort_by(|one, other| one.name.cmp(&other.name));
        running
    }

    fn runs(&self) -> bool {
        started(self.pid) == Some(self.started)
    }

    fn path(&self, dir: &Path) -> PathBuf {
        dir.join(self.name.as_str())
    }
}

fn read(path: &Path) -> Option<Unattached> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// When a process started; `None` if it has ended (proc_pid_stat(5), field 22).
fn started(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name of the program may hold blanks and parentheses.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    // Zombies wait for nothing but their parent.
    fields.nth(18)?.parse().ok().filter(|_| !matches!(state, "Z" | "X"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(dir: &Path, name: &str, network: &str) -> Result<Unattached, NoteError> {
        Unattached::note(dir, name.parse().unwrap(), network.into())
    }

    #[test]
    fn a_command_is_listed_under_its_name_while_its_process_lives() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("run");
        assert_eq!(Unattached::all(&dir), []);
        let tool = note(&dir, "tool", "host").unwrap();
        let batch = note(&dir, "batch", "none").unwrap();
        assert_eq!(Unattached::all(&dir), [batch.clone(), tool.clone()]);
        let taken = note(&dir, "tool", "none").unwrap_err().to_string();
        assert!(taken.contains("tool") && taken.contains("--network host"), "{taken}");

        // Another process has the pid now.
        let ended = Unattached { started: batch.started - 1, ..batch };
        fs::write(ended.path(&dir), serde_json::to_vec(&ended).unwrap()).unwrap();
        assert_eq!(Unattached::all(&dir), std::slice::from_ref(&tool));
        note(&dir, "batch", "host").unwrap().forget(&dir).unwrap();
        fs::write(dir.join("broken"), "{").unwrap();
        assert_eq!(Unattached::all(&dir), [tool]);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
    }

    #[test]
    fn a_process_that_has_ended_has_no_start() {
        assert!(started(std::process::id()).is_some());
        assert_eq!(started(u32::MAX), None);
    }
}
