use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::atomic::{AtomicBool, Ordering},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
};

/// Tells threads that block in the kernel to look up: there is news, or it is time to end.
#[derive(Debug)]
pub(crate) struct Stop {
    set: AtomicBool,
    /// Of the threads that seal, one a lane.
    pub(crate) sealing: Vec<Waker>,
    /// Of the threads that open, one a lane.
    pub(crate) opening: Vec<Waker>,
}

impl Stop {
    /// # Errors
    ///
    /// There are too many open files.
    pub(crate) fn new(lanes: usize) -> io::Result<Self> {
        let wakers = || (0..lanes).map(|_| Waker::new()).collect::<io::Result<_>>();
        Ok(Self { set: AtomicBool::new(false), sealing: wakers()?, opening: wakers()? })
    }

    pub(crate) fn is_set(&self) -> bool {
        self.set.load(Ordering::Relaxed)
    }

    /// Ends all threads.
    pub(crate) fn set(&self) {
        self.set.store(true, Ordering::Relaxed);
        self.wake_all();
    }

    pub(crate) fn wake_all(&self) {
        for waker in self.sealing.iter().chain(&self.opening) {
            waker.wake();
        }
    }
}

/// A descriptor that becomes readable when somebody calls.
#[derive(Debug)]
pub(crate) struct Waker(EventFd);

impl Waker {
    fn new() -> io::Result<Self> {
        Ok(Self(EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?))
    }

    pub(crate) fn wake(&self) {
        // Fails only if nobody has looked for 2^64 calls: then it is readable all the same.
        let _ = self.0.write(1);
    }

    /// Forgets all calls so far.
    pub(crate) fn clear(&self) {
        let _ = self.0.read();
    }

    /// Waits for a call, at most so long.
    pub(crate) fn wait(&self, milliseconds: u16) {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        let _ = poll(&mut fds, PollTimeout::from(milliseconds));
        self.clear();
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
