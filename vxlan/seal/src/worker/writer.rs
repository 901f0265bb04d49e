use std::{
    io::{self, IoSlice, Write},
    sync::Arc,
};

use crate::{
    DropReason, Offload,
    frame::{Accepts, Built, Checksum, GsoKind, Headers, Splitter, VNET_LEN, VnetHeader},
    networks::{Carried, Snapshot},
    shared::Shared,
};

/// What frames are put together by: the number of their network, and a number for the session.
pub(super) type Key = (u32, u32);

/// Writes opened frames to the TAPs of their networks.
pub(super) struct Writer {
    shared: Arc<Shared>,
    lane: usize,
    pub(super) networks: Arc<Snapshot>,
    accepts: Accepts,
}

impl Writer {
    pub(super) fn new(shared: Arc<Shared>, lane: usize) -> Self {
        let networks = shared.networks.snapshot().load_full();
        let mut writer = Self { shared, lane, networks, accepts: Accepts::default() };
        writer.note_offloads();
        writer
    }

    /// Which super-frames the TAPs take.
    pub(super) fn accepts(&self) -> Accepts {
        self.accepts
    }

    /// Takes the newest snapshot of the networks.
    pub(super) fn refresh(&mut self) {
        let newest = self.shared.networks.snapshot().load();
        if !Arc::ptr_eq(&newest, &self.networks) {
            self.networks = Arc::clone(&newest);
            drop(newest);
            self.note_offloads();
        }
    }

    pub(super) fn write(&mut self, built: &Built<'_, Key>) {
        let (number, _) = built.key;
        let Some(network) = self.networks.by_number.get(&number) else { return };
        let Err(error) = built.with_slices(|slices| self.put(network, slices)) else {
            if let Some(gso) = built.vnet.gso {
                self.shared.used(gso.kind.into()).opening[self.lane].add(1);
            }
            return;
        };
        match (error.raw_os_error(), built.vnet.gso) {
            (Some(libc::EINVAL), Some(gso)) => {
                let network = Arc::clone(network);
                self.write_singly(&network, built, gso.kind);
            }
            _ => self.lose(network, built.packets as u64, &error),
        }
    }

    /// The TAP refused a super-frame: some kernels misjudge those that are sound (Linux commit
    /// e269d79c, mended by 89add400). Its segments go one by one, and so does all that follows.
    #[cold]
    fn write_singly(&mut self, network: &Carried, built: &Built<'_, Key>, kind: GsoKind) {
        let offload = Offload::from(kind);
        let why = format!("writing a super-frame to {} gave EINVAL", network.tap.name);
        if self.shared.offloads.fell_back(offload, why.clone()) {
            tracing::warn!(%offload, "fell back to single frames: {why}");
        }
        self.note_offloads();

        let whole = built.to_vec();
        let lost = |packets| {
            let tallies = &network.ledger.opening[self.lane];
            tallies.dropped(DropReason::Malformed, packets);
        };
        let (Ok(vnet), Some(frame)) = (VnetHeader::parse(&whole), whole.get(VNET_LEN..)) else {
            return lost(built.packets as u64);
        };
        let splitter = Headers::parse(frame).and_then(|h| Splitter::new(frame, &h, vnet));
        let Ok(splitter) = splitter else { return lost(built.packets as u64) };
        let mut segment = vec![0; splitter.segment_len(0)];
        for index in 0..splitter.segments() {
            let len = splitter.write(index, &mut segment);
            let checksum =
                if splitter.part(index).partial { vnet.checksum } else { Checksum::Unchecked };
            let head = VnetHeader { checksum, ..VnetHeader::default() }.to_bytes();
            let slices = [IoSlice::new(&head), IoSlice::new(&segment[..len])];
            if let Err(error) = self.put(network, &slices) {
                self.lose(network, 1, &error);
            }
        }
    }

    fn put(&self, network: &Carried, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let queues = &network.tap.queues;
        let mut queue = &queues[self.lane % queues.len()];
        self.shared.syscalls.opening[self.lane].add(1);
        queue.write_vectored(slices)
    }

    fn lose(&self, network: &Carried, packets: u64, error: &io::Error) {
        network.ledger.opening[self.lane].dropped(DropReason::Queue, packets);
        if error.raw_os_error() == Some(libc::EBADFD) {
            self.shared.tap_failed(network, error);
        }
    }

    fn note_offloads(&mut self) {
        let works = |offload| self.shared.offloads.is_on(offload);
        let tcp = works(Offload::TapTso);
        self.accepts = Accepts { tcp4: tcp, tcp6: tcp, udp: works(Offload::TapUso) };
    }
}
