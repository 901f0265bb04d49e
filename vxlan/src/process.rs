#![expect(unsafe_code, reason = "no library that we have wraps pidfd_open")]

use std::{
    io,
    os::fd::{FromRawFd, OwnedFd, RawFd},
};

use tokio::io::unix::AsyncFd;

/// A process, whose end can be waited for (`pidfd_open(2)`, Linux 5.3). Its number may be given to
/// another one meanwhile.
#[derive(Debug)]
pub struct Process(AsyncFd<OwnedFd>);

impl Process {
    /// Must be called inside a tokio runtime.
    ///
    /// # Errors
    ///
    /// There is no such process, or the kernel is too old.
    pub fn open(pid: u32) -> io::Result<Self> {
        // SAFETY: it takes two numbers and returns a descriptor or -1.
        let returned = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        if returned < 0 {
            return Err(io::Error::last_os_error());
        }
        let fd = RawFd::try_from(returned).map_err(io::Error::other)?;
        // SAFETY: the kernel has just made it, and nobody else has it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: an `OwnedFd` names the same open descriptor until it is dropped.
        Ok(Self(unsafe { AsyncFd::register(fd) }?))
    }

    /// Waits until it has ended. Cancel-safe.
    pub async fn ended(&self) {
        // Without a runtime there is nothing to wait for either.
        let _ = self.0.readable().await;
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[tokio::test]
    async fn a_process_is_there_until_it_ends() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let process = Process::open(child.id()).unwrap();
        let early = tokio::time::timeout(std::time::Duration::from_millis(50), process.ended());
        assert!(early.await.is_err());
        child.kill().unwrap();
        process.ended().await;
        child.wait().unwrap();
        assert!(Process::open(child.id()).is_err());
    }
}
