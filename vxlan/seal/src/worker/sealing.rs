use std::{
    io::{self, Read},
    sync::Arc,
};

use super::{
    carrier::{Carrier, READ_ROOM},
    poller::{MAX_READY, Poller, WAKER},
};
use crate::{shared::Shared, stop::Waker};

/// Seals the frames that one lane's TAP queues say, and sends them to whom they are for.
pub(super) struct Sealing {
    shared: Arc<Shared>,
    lane: usize,
    poller: Poller,
    read: Box<[u8]>,
    carrier: Carrier,
}

impl Sealing {
    pub(super) fn new(shared: Arc<Shared>, lane: usize) -> io::Result<Self> {
        let snapshot = shared.networks.snapshot().load_full();
        let poller = Poller::new(lane, shared.sockets.len(), snapshot, &shared.stop.sealing[lane])?;
        let carrier = Carrier::new(Arc::clone(&shared), lane);
        Ok(Self { shared, lane, poller, read: vec![0; READ_ROOM].into(), carrier })
    }

    pub(super) fn run(mut self) {
        let mut ready = Vec::with_capacity(MAX_READY);
        while !self.shared.stop.is_set() {
            if let Err(error) = self.poller.wait(&mut ready) {
                self.shared.worker_failed("seal-out", &format!("epoll: {error}"));
                self.waker().wait(1);
                continue;
            }
            self.refresh(&mut ready);
            self.carrier.begin();
            for &place in &ready {
                self.drain(place);
            }
            self.carrier.finish();
        }
    }

    fn waker(&self) -> &Waker {
        &self.shared.stop.sealing[self.lane]
    }

    /// Takes the newest snapshot of the networks; reads other queues if the TAPs are others.
    fn refresh(&mut self, ready: &mut Vec<usize>) {
        if ready.contains(&WAKER) {
            self.waker().clear();
            ready.retain(|place| *place != WAKER);
        }
        let newest = self.shared.networks.snapshot().load();
        if Arc::ptr_eq(&newest, &self.poller.snapshot) {
            return;
        }
        let newest = Arc::clone(&newest);
        if self.poller.reads_the_same(&newest) {
            self.poller.snapshot = newest;
            return;
        }
        ready.clear();
        match Poller::new(self.lane, self.shared.sockets.len(), newest, self.waker()) {
            Ok(poller) => self.poller = poller,
            Err(error) => self.shared.worker_failed("seal-out", &format!("epoll: {error}")),
        }
    }

    /// Reads what a queue has, up to a budget, so that others get their turn.
    fn drain(&mut self, place: usize) {
        let Some(&(network, queue)) = self.poller.places.get(place) else { return };
        let network = Arc::clone(&self.poller.snapshot.all[network]);
        let routes = Arc::clone(self.carrier.routes());
        let tallies = &network.ledger.sealing[self.lane];
        for _ in 0..BUDGET {
            self.carrier.syscall();
            match (&network.tap.queues[queue]).read(&mut self.read) {
                Ok(len) => {
                    let read = &mut self.read[..len];
                    if let Err(reason) = self.carrier.carry(&network, &routes, read) {
                        tallies.dropped(reason, 1);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.poller.forget(place);
                    return self.shared.tap_failed(&network, &error);
                }
            }
            if self.carrier.has_much() {
                self.carrier.send(tallies);
            }
        }
        self.carrier.send(tallies);
    }
}

/// Frames that one queue may have at a time.
const BUDGET: usize = 64;
