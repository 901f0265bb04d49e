use std::{io, os::fd::AsFd, sync::Arc};

use nix::{
    errno::Errno,
    sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
};

use crate::{networks::Snapshot, stop::Waker};

/// The TAP queues that one lane reads.
pub(super) struct Poller {
    epoll: Epoll,
    pub(super) snapshot: Arc<Snapshot>,
    /// What each token means: network in the snapshot, queue of its TAP.
    pub(super) places: Vec<(usize, usize)>,
}

impl Poller {
    pub(super) fn new(
        lane: usize,
        lanes: usize,
        snapshot: Arc<Snapshot>,
        waker: &Waker,
    ) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(waker, EpollEvent::new(EpollFlags::EPOLLIN, WAKER as u64))?;
        let mut places = Vec::new();
        for (network, carried) in snapshot.all.iter().enumerate() {
            for (queue, file) in carried.tap.queues.iter().enumerate() {
                if queue % lanes == lane {
                    let event = EpollEvent::new(EpollFlags::EPOLLIN, places.len() as u64);
                    epoll.add(file.as_fd(), event)?;
                    places.push((network, queue));
                }
            }
        }
        Ok(Self { epoll, snapshot, places })
    }

    /// Waits until a queue has something, or somebody calls.
    pub(super) fn wait(&self, ready: &mut Vec<usize>) -> Result<(), Errno> {
        ready.clear();
        let mut events = [EpollEvent::empty(); MAX_READY];
        match self.epoll.wait(&mut events, EpollTimeout::NONE) {
            Ok(count) => ready.extend(events[..count].iter().map(|event| event.data() as usize)),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
        Ok(())
    }

    /// Reads a queue no more: its TAP has gone.
    pub(super) fn forget(&self, place: usize) {
        if let Some(&(network, queue)) = self.places.get(place) {
            let _ = self.epoll.delete(self.snapshot.all[network].tap.queues[queue].as_fd());
        }
    }

    pub(super) fn reads_the_same(&self, newest: &Snapshot) -> bool {
        let (old, new) = (&self.snapshot.all, &newest.all);
        old.len() == new.len()
            && old.iter().zip(new).all(|(old, new)| Arc::ptr_eq(&old.tap, &new.tap))
    }
}

/// The token of the waker among those of the queues.
pub(super) const WAKER: usize = usize::MAX;

pub(super) const MAX_READY: usize = 32;
