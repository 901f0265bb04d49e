use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering},
};

use arc_swap::ArcSwap;

use crate::frame::GsoKind;

/// Work that the kernel can take off the data path.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Offload {
    /// TCP super-frames from and to the TAP (`TUN_F_TSO4`, `TUN_F_TSO6`).
    TapTso,
    /// UDP super-frames from and to the TAP (`TUN_F_USO4`, `TUN_F_USO6`; Linux 6.2).
    TapUso,
    /// Runs of sealed packets by one send (`UDP_SEGMENT`; Linux 4.18).
    UdpSegment,
    /// Runs of sealed packets by one receive (`UDP_GRO`; Linux 5.0).
    UdpGro,
}

impl Offload {
    pub const ALL: [Self; 4] = [Self::TapTso, Self::TapUso, Self::UdpSegment, Self::UdpGro];

    /// The name in configuration, status and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::TapTso => "tap-tso",
            Self::TapUso => "tap-uso",
            Self::UdpSegment => "udp-segment",
            Self::UdpGro => "udp-gro",
        }
    }
}

impl From<GsoKind> for Offload {
    fn from(kind: GsoKind) -> Self {
        match kind {
            GsoKind::Tcp4 | GsoKind::Tcp6 => Self::TapTso,
            GsoKind::Udp => Self::TapUso,
        }
    }
}

impl fmt::Display for Offload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Which offloads may be used. All, unless somebody says otherwise.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct OffloadSwitches {
    pub tap_tso: bool,
    pub tap_uso: bool,
    pub udp_segment: bool,
    pub udp_gro: bool,
}

impl OffloadSwitches {
    pub const ALL_ON: Self =
        Self { tap_tso: true, tap_uso: true, udp_segment: true, udp_gro: true };
    pub const ALL_OFF: Self =
        Self { tap_tso: false, tap_uso: false, udp_segment: false, udp_gro: false };

    pub fn allows(&self, offload: Offload) -> bool {
        match offload {
            Offload::TapTso => self.tap_tso,
            Offload::TapUso => self.tap_uso,
            Offload::UdpSegment => self.udp_segment,
            Offload::UdpGro => self.udp_gro,
        }
    }
}

impl Default for OffloadSwitches {
    fn default() -> Self {
        Self::ALL_ON
    }
}

/// Whether an offload is in use and why not.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum OffloadState {
    On,
    /// By configuration.
    Off,
    /// The kernel refused it when it was asked for; the text has its error.
    Unsupported(String),
    /// It worked and then failed; the data path goes on without it until the agent restarts.
    FellBack(String),
    /// Nothing has asked for it yet: there is no TAP.
    Unused,
}

impl OffloadState {
    pub fn is_on(&self) -> bool {
        matches!(self, Self::On)
    }
}

impl fmt::Display for OffloadState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::On => f.write_str("on"),
            Self::Off => f.write_str("off by configuration"),
            Self::Unsupported(why) => write!(f, "not in this kernel: {why}"),
            Self::FellBack(why) => write!(f, "fell back: {why}"),
            Self::Unused => f.write_str("unused"),
        }
    }
}

/// One offload, as status and metrics show it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct OffloadStatus {
    pub offload: Offload,
    pub state: OffloadState,
    /// How often it was of use: carried several packets at once.
    pub used: u64,
    /// How often the kernel refused it in use.
    pub refused: u64,
}

/// The live state of all offloads of a tunnel.
#[derive(Debug)]
pub(crate) struct Offloads([Entry; Offload::ALL.len()]);

impl Offloads {
    pub(crate) fn new(switches: OffloadSwitches) -> Self {
        Self(Offload::ALL.map(|offload| {
            let state =
                if switches.allows(offload) { OffloadState::Unused } else { OffloadState::Off };
            Entry { state: ArcSwap::from_pointee(state), refused: AtomicU64::new(0) }
        }))
    }

    pub(crate) fn state(&self, offload: Offload) -> OffloadState {
        OffloadState::clone(&self.entry(offload).state.load())
    }

    pub(crate) fn is_on(&self, offload: Offload) -> bool {
        self.entry(offload).state.load().is_on()
    }

    /// Notes what asking the kernel for `offload` gave. What fell back stays so.
    pub(crate) fn probed(&self, offload: Offload, state: OffloadState) {
        let entry = self.entry(offload);
        if !matches!(**entry.state.load(), OffloadState::FellBack(_)) {
            entry.state.store(state.into());
        }
    }

    /// Notes that `offload` failed in use. True the first time: then somebody should say so.
    pub(crate) fn fell_back(&self, offload: Offload, why: String) -> bool {
        let entry = self.entry(offload);
        entry.refused.fetch_add(1, Ordering::Relaxed);
        let before = entry.state.swap(OffloadState::FellBack(why).into());
        !matches!(*before, OffloadState::FellBack(_))
    }

    pub(crate) fn refused(&self, offload: Offload) -> u64 {
        self.entry(offload).refused.load(Ordering::Relaxed)
    }

    pub(crate) fn status(&self, used: impl Fn(Offload) -> u64) -> Vec<OffloadStatus> {
        let status = |offload| OffloadStatus {
            offload,
            state: self.state(offload),
            used: used(offload),
            refused: self.refused(offload),
        };
        Offload::ALL.map(status).into()
    }

    fn entry(&self, offload: Offload) -> &Entry {
        &self.0[offload as usize]
    }
}

#[derive(Debug)]
struct Entry {
    state: ArcSwap<OffloadState>,
    refused: AtomicU64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_offload_that_fell_back_says_so_once_and_stays_off() {
        let offloads = Offloads::new(OffloadSwitches { udp_gro: false, ..Default::default() });
        assert_eq!(offloads.state(Offload::UdpGro), OffloadState::Off);

        offloads.probed(Offload::UdpSegment, OffloadState::On);
        assert!(offloads.fell_back(Offload::UdpSegment, "EIO".into()));
        assert!(!offloads.fell_back(Offload::UdpSegment, "EIO".into()));
        offloads.probed(Offload::UdpSegment, OffloadState::On);

        assert_eq!(offloads.state(Offload::UdpSegment), OffloadState::FellBack("EIO".into()));
        assert_eq!(offloads.refused(Offload::UdpSegment), 2);
    }
}
