//! The sets and maps that the skeleton declares, and what is in them.

use std::{collections::BTreeMap, fmt, net::IpAddr};

use weft_model::{Family, MacAddr, Protocol};

use crate::{expression::number_of, shortcut};

/// A table of nftables.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Table {
    Inet,
    Bridge,
}

/// A set or map of one of the tables.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct Set {
    pub(crate) kind: Kind,
    pub(crate) family: Family,
}

/// What a set or map is for.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Kind {
    /// Address, protocol and port of a frontend that remembers its clients, to its chain.
    PortKeepers,
    /// Address and protocol, for a frontend of all ports.
    AddressKeepers,
    /// A frontend and a slot of its table to the backend, of all frontends that remember nobody: a
    /// part of them, by a hash of the frontend. Who reads a set begins at its beginning again for
    /// each 32 KiB, so that one of a million would take more than a minute.
    PortSlots(u8),
    AddressSlots(u8),
    /// Counts new connections, by frontend; packets from clients; packets to clients.
    PortConnections,
    AddressConnections,
    PortRequests,
    AddressRequests,
    PortAnswers,
    AddressAnswers,
    /// A backend's address twice: it is its own client.
    Hairpins,
    /// Backends of this host that see the gateway instead of clients from outside.
    Masked,
    /// What replies have to be translated, by source address, protocol and port.
    Replies,
    /// By source address and protocol, for services of all ports.
    AddressReplies,
    /// By source address and protocol, for what has no port: all fragments of a packet but the
    /// first.
    Fragments,
    /// The MACs of this host's stations that have sent anything to the gateway in the last days.
    Clients,
    /// Address, protocol and port of a frontend to its mark; counts packets from clients.
    PortMarks,
    /// Address and protocol of a frontend of all ports to its mark; counts packets from clients.
    AddressMarks,
    /// A frontend's mark to its address; counts packets to clients that pass the gateway by.
    Vips,
    /// A frontend's mark to its port.
    VipPorts,
    /// The backend of a connection, by client and mark; its port.
    PortWays,
    PortTargets,
    /// The backend of a connection to a frontend of all ports.
    AddressWays,
    /// The mark of a connection, by backend and client.
    AnswerWays,
    /// Connections to backends themselves, by client and backend.
    DirectWays,
    /// The MAC of the backend of a connection.
    PortStations,
    AddressStations,
}

/// Something in a set, or a key of a map.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct Element {
    pub(crate) set: Set,
    pub(crate) key: Vec<u8>,
    /// What a map of values has for the key; nothing in others.
    pub(crate) data: Vec<u8>,
}

impl Table {
    pub(crate) const NAME: &'static str = "weft-services";

    /// `NFPROTO_INET`, `NFPROTO_BRIDGE`.
    pub(crate) fn family(self) -> u8 {
        match self {
            Self::Inet => 1,
            Self::Bridge => 7,
        }
    }

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Inet => "inet weft-services",
            Self::Bridge => "bridge weft-services",
        }
    }
}

/// How a set's key is made.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Key {
    AddressProtocolPort,
    AddressProtocol,
    AddressProtocolPortSlot,
    AddressProtocolSlot,
    AddressAddress,
    Mac,
    Mark,
    PortWay,
    AddressWay,
    AnswerWay,
}

/// What the keys of a map lead to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Data {
    Chain,
    Slot,
    Mark,
    Address,
    Port,
    Mac,
}

/// How long a rule remembers what it writes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Lasting {
    Seconds(u32),
    Days(u32),
}

impl Set {
    /// All of them.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        let both = |kind| [Family::V4, Family::V6].map(|family| Self { kind, family });
        let one = |kind: &Kind| Self { kind: *kind, family: Family::V4 };
        let slots = (0..PARTS).flat_map(|part| [Kind::PortSlots(part), Kind::AddressSlots(part)]);
        KINDS.iter().copied().chain(slots).flat_map(both).chain(SINGLE.iter().map(one))
    }

    /// Those of a table, by their names.
    pub(crate) fn named(table: Table) -> BTreeMap<String, Self> {
        let sets = Self::all().filter(|set| set.table() == table);
        sets.map(|set| (set.to_string(), set)).collect()
    }

    pub(crate) fn table(self) -> Table {
        match self.kind {
            Kind::Replies | Kind::AddressReplies | Kind::Fragments => Table::Bridge,
            kind if SINGLE.contains(&kind) => Table::Bridge,
            _ => Table::Inet,
        }
    }

    /// What its keys lead to, if it is a map.
    pub(crate) fn data(self) -> Option<Data> {
        match self.kind {
            Kind::PortKeepers | Kind::AddressKeepers => Some(Data::Chain),
            Kind::PortSlots(_) | Kind::AddressSlots(_) => Some(Data::Slot),
            Kind::PortMarks | Kind::AddressMarks | Kind::AnswerWays => Some(Data::Mark),
            Kind::Vips | Kind::PortWays | Kind::AddressWays => Some(Data::Address),
            Kind::VipPorts | Kind::PortTargets => Some(Data::Port),
            Kind::PortStations | Kind::AddressStations => Some(Data::Mac),
            _ => None,
        }
    }

    /// How long what rules write to it stays, if they do.
    pub(crate) fn learnt(self) -> Option<Lasting> {
        match self.kind {
            // Longer than the kernel tracks a connection in which nothing happens (five days).
            Kind::Clients => Some(Lasting::Days(6)),
            Kind::PortWays | Kind::AddressWays | Kind::AnswerWays | Kind::DirectWays => {
                Some(shortcut::WAYS_LAST)
            }
            Kind::PortTargets | Kind::PortStations | Kind::AddressStations => {
                Some(shortcut::TARGETS_LAST)
            }
            _ => None,
        }
    }

    /// Whether it has the tables of frontends.
    pub(crate) fn has_slots(self) -> bool {
        self.data() == Some(Data::Slot)
    }

    /// Whether new connections to frontends are looked for in it first.
    pub(crate) fn is_head(self) -> bool {
        matches!(self.kind, Kind::PortConnections | Kind::AddressConnections)
    }

    pub(crate) fn is_counted(self) -> bool {
        matches!(
            self.kind,
            Kind::PortConnections
                | Kind::AddressConnections
                | Kind::PortRequests
                | Kind::AddressRequests
                | Kind::PortAnswers
                | Kind::AddressAnswers
                | Kind::PortMarks
                | Kind::AddressMarks
                | Kind::Vips
        )
    }

    /// Whether connections that were made before may need what is in it still.
    pub(crate) fn lingers(self) -> bool {
        matches!(self.kind, Kind::Replies | Kind::AddressReplies | Kind::Fragments)
    }

    pub(crate) fn key(self) -> Key {
        match self.kind {
            Kind::PortKeepers
            | Kind::PortConnections
            | Kind::PortRequests
            | Kind::PortAnswers
            | Kind::Masked
            | Kind::Replies
            | Kind::PortMarks => Key::AddressProtocolPort,
            Kind::AddressKeepers
            | Kind::AddressConnections
            | Kind::AddressRequests
            | Kind::AddressAnswers
            | Kind::AddressReplies
            | Kind::Fragments
            | Kind::AddressMarks => Key::AddressProtocol,
            Kind::PortSlots(_) => Key::AddressProtocolPortSlot,
            Kind::AddressSlots(_) => Key::AddressProtocolSlot,
            Kind::Hairpins => Key::AddressAddress,
            Kind::Clients => Key::Mac,
            Kind::Vips | Kind::VipPorts => Key::Mark,
            Kind::PortWays | Kind::PortTargets | Kind::PortStations => Key::PortWay,
            Kind::AddressWays | Kind::AddressStations => Key::AddressWay,
            Kind::AnswerWays | Kind::DirectWays => Key::AnswerWay,
        }
    }
}

impl fmt::Display for Set {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.kind {
            Kind::PortKeepers => "port-keepers",
            Kind::AddressKeepers => "address-keepers",
            Kind::PortSlots(_) => "port-slots",
            Kind::AddressSlots(_) => "address-slots",
            Kind::PortConnections => "port-connections",
            Kind::AddressConnections => "address-connections",
            Kind::PortRequests => "port-requests",
            Kind::AddressRequests => "address-requests",
            Kind::PortAnswers => "port-answers",
            Kind::AddressAnswers => "address-answers",
            Kind::Hairpins => "hairpins",
            Kind::Masked => "masked",
            Kind::Replies => "port-replies",
            Kind::AddressReplies => "address-replies",
            Kind::Fragments => "fragments",
            Kind::Clients => "clients",
            Kind::PortMarks => "port-marks",
            Kind::AddressMarks => "address-marks",
            Kind::Vips => "vips",
            Kind::VipPorts => "vip-ports",
            Kind::PortWays => "port-ways",
            Kind::PortTargets => "port-targets",
            Kind::AddressWays => "address-ways",
            Kind::AnswerWays => "answer-ways",
            Kind::DirectWays => "direct-ways",
            Kind::PortStations => "port-stations",
            Kind::AddressStations => "address-stations",
        };
        match self.family {
            _ if SINGLE.contains(&self.kind) => f.write_str(name)?,
            Family::V4 => write!(f, "{name}4")?,
            Family::V6 => write!(f, "{name}6")?,
        }
        match self.kind {
            Kind::PortSlots(part) | Kind::AddressSlots(part) => write!(f, "-{part}"),
            _ => Ok(()),
        }
    }
}

impl Element {
    /// An element that is made of an address, a protocol, and a port if the kind has one; of a table,
    /// what all its slots' keys begin with.
    pub(crate) fn new(kind: Kind, ip: IpAddr, protocol: Protocol, port: u16) -> Self {
        let set = Set { kind, family: Family::of(ip) };
        let mut key = octets(ip);
        match set.key() {
            Key::AddressProtocolPort | Key::AddressProtocolPortSlot => {
                key.extend([number_of(protocol), 0, 0, 0]);
                key.extend(port.to_be_bytes());
                key.extend([0, 0]);
            }
            Key::AddressProtocol | Key::AddressProtocolSlot => {
                key.extend([number_of(protocol), 0, 0, 0]);
            }
            Key::AddressAddress => key.extend(octets(ip)),
            Key::Mac | Key::Mark => {}
            Key::PortWay | Key::AddressWay | Key::AnswerWay => {}
        }
        Self { set, key, data: Vec::new() }
    }

    /// An element of a map whose keys are marks.
    pub(crate) fn of_mark(kind: Kind, mark: u32, data: Vec<u8>) -> Self {
        let set = Set { kind, family: Family::V4 };
        // As the kernel keeps it.
        Self { set, key: mark.to_ne_bytes().to_vec(), data }
    }

    pub(crate) fn with(self, data: Vec<u8>) -> Self {
        Self { data, ..self }
    }

    pub(crate) fn client(mac: MacAddr) -> Self {
        let set = Set { kind: Kind::Clients, family: Family::V4 };
        Self { set, key: mac.octets().to_vec(), data: Vec::new() }
    }
}

pub(crate) fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// How many parts the tables of frontends are in.
pub(crate) const PARTS: u8 = 8;
/// Those that are there for each family, but the tables.
const KINDS: &[Kind] = &[
    Kind::PortKeepers,
    Kind::AddressKeepers,
    Kind::PortConnections,
    Kind::AddressConnections,
    Kind::PortRequests,
    Kind::AddressRequests,
    Kind::PortAnswers,
    Kind::AddressAnswers,
    Kind::Hairpins,
    Kind::Masked,
    Kind::Replies,
    Kind::AddressReplies,
    Kind::Fragments,
];

/// Those that are there once.
const SINGLE: &[Kind] = &[
    Kind::Clients,
    Kind::PortMarks,
    Kind::AddressMarks,
    Kind::Vips,
    Kind::VipPorts,
    Kind::PortWays,
    Kind::PortTargets,
    Kind::AddressWays,
    Kind::AnswerWays,
    Kind::DirectWays,
    Kind::PortStations,
    Kind::AddressStations,
];
