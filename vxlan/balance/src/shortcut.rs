//! The way past the gateway of connections that have lasted (TCP over IPv4), by pure functions.
//!
//! The gateway's way costs a connection about a tenth of its throughput: a second pass through the
//! bridge, the routes and the connection table. What the gateway does to its packets is always the
//! same, so the bridge can learn it and do it itself:
//!
//! 1. The bridge gives a request for a frontend the frontend's *mark*.
//! 2. The gateway translates the request and sends it out by the bridge again. There it takes the
//!    mark away, unless the connection has lasted and its destination is all that is translated.
//! 3. Where a packet leaves the gateway with a mark, the bridge sees what became of it, and notes
//!    the *ways* of this connection's requests and of the answers to them.
//! 4. Requests and answers that have a way are translated and forwarded by the bridge.
//!
//! Connections to backends themselves, which have to be lifted to the gateway as well, are let pass
//! in the same manner: what is learnt of them is that nothing is translated.
//!
//! Ways are forgotten after [`WAYS_LAST`], so that the connection table sees a packet of each
//! connection that often and keeps it; and at a packet that begins or ends a connection, because
//! the next one of the same ports may have another backend. What comes after the first that ends it
//! goes by the gateway. The connection table does not see what passes by: it must take any sequence
//! number, and the network's namespace is set up so. It cannot tell whether a reset is a good one
//! then, and drops the connection 10 s later.
//!
//! Keys of IPv6 do not fit into the one register (16 bytes) that nft 1.0 uses for what it updates;
//! it ends with a failed assertion.

use sha2::{Digest as _, Sha256};
use weft_model::{Family, Protocol};

use crate::{
    Frontend,
    set::{Element, Kind, Lasting, Table, octets},
    skeleton::Chain,
};

/// Less than half of the shortest time that the connection table keeps a connection which has not
/// ended on both sides (`LAST_ACK`, 30 s).
pub(crate) const WAYS_LAST: Lasting = Lasting::Seconds(12);
/// What ways lead to is known for longer than they are.
pub(crate) const TARGETS_LAST: Lasting = Lasting::Seconds(20);

/// The mark of a frontend whose connections may pass the gateway by. Of 10,000 frontends a few may
/// have the same one as another has.
pub(crate) fn mark(frontend: Frontend) -> Option<u32> {
    let Frontend { ip, protocol, port } = frontend;
    if Family::of(ip) == Family::V6 || protocol == Protocol::Udp {
        return None;
    }
    let [a, b, c, d, ..]: [u8; 32] = Sha256::digest(frontend.to_string()).into();
    let every_port = if port.is_none() { EVERY_PORT } else { 0 };
    let mark = OURS | every_port | u32::from_be_bytes([a, b, c, d]) & (EVERY_PORT - 1);
    (mark != DIRECT).then_some(mark)
}

/// What a frontend with that mark has in maps.
pub(crate) fn elements(Frontend { ip, protocol, port }: Frontend, mark: u32) -> Vec<Element> {
    let marked =
        |kind, port| Element::new(kind, ip, protocol, port).with(mark.to_ne_bytes().to_vec());
    let mut elements = vec![Element::of_mark(Kind::Vips, mark, octets(ip))];
    match port {
        None => elements.push(marked(Kind::AddressMarks, 0)),
        Some(port) => {
            elements.push(marked(Kind::PortMarks, port));
            let bytes = port.to_be_bytes().to_vec();
            elements.push(Element::of_mark(Kind::VipPorts, mark, bytes));
        }
    }
    elements
}

/// The chain of frames to the gateway, in the bridge.
pub(crate) const REQUESTS: &str = "to-gateway";
/// The rule for frames to stations that have asked the gateway before, in the bridge.
pub(crate) fn answered() -> String {
    format!("{WHOLE} jump short-answers")
}
/// The rules for what stations send to backends themselves, in the bridge.
pub(crate) fn direct() -> [String; 3] {
    [
        format!("{WHOLE} {GOES_ON} {REQUEST} @direct-ways accept"),
        format!("{BEGINS_OR_ENDS} delete @direct-ways {{ {REQUEST} }}"),
        format!("{WHOLE} meta mark set {DIRECT:#x}"),
    ]
}

/// The rule for what the bridge has counted, where the gateway counts requests.
pub(crate) const IS_COUNTED: &str = "meta mark & 0xc0000000 == 0x80000000 return";

/// The chains of the bridge, and the one of the gateway.
pub(crate) fn chains() -> Vec<Chain> {
    let mut chains = requests();
    chains.extend(answers());
    chains.push(sift());
    chains.extend(learn());
    chains
}

fn requests() -> Vec<Chain> {
    // What is noted of another connection would not be replaced.
    let end_port_way = [
        format!("delete @port-ways {{ {PORT_WAY} : ip daddr }}"),
        format!("delete @port-targets {{ {PORT_WAY} : tcp dport }}"),
        format!("delete @port-stations {{ {PORT_WAY} : ether daddr }}"),
    ];
    let end_address_way = [
        format!("delete @address-ways {{ {ADDRESS_WAY} : ip daddr }}"),
        format!("delete @address-stations {{ {ADDRESS_WAY} : ether daddr }}"),
    ];
    vec![
        chain("end-port-way", end_port_way),
        chain("end-address-way", end_address_way),
        chain(
            "port-request",
            [
                format!("{BEGINS_OR_ENDS} goto end-port-way"),
                // Whoever has the first has all of them.
                format!(
                    "ip daddr set {PORT_WAY} map @port-ways \
                     ether daddr set {PORT_WAY} map @port-stations \
                     tcp dport set {PORT_WAY} map @port-targets meta mark set 0 accept"
                ),
            ],
        ),
        chain(
            "address-request",
            [
                format!("{BEGINS_OR_ENDS} goto end-address-way"),
                format!(
                    "ip daddr set {ADDRESS_WAY} map @address-ways \
                     ether daddr set {ADDRESS_WAY} map @address-stations meta mark set 0 accept"
                ),
            ],
        ),
        chain(
            "short-requests",
            [
                "meta mark set ip daddr . meta l4proto . th dport map @port-marks \
                 goto port-request",
                "meta mark set ip daddr . meta l4proto map @address-marks goto address-request",
            ],
        ),
        chain(
            REQUESTS,
            [
                // What comes from other hosts is for routers.
                ELSEWHERE,
                &format!("{WHOLE} jump short-requests"),
                // Whoever is sent something by a service has sent something to the gateway before.
                "update @clients { ether saddr }",
            ],
        ),
    ]
}

fn answers() -> Vec<Chain> {
    let way = REQUEST;
    let port_way = "ip daddr . tcp dport . meta mark";
    // Where every port is a frontend's, it is the backend's, too.
    let address_way = "ip daddr . tcp dport . meta mark . tcp sport";
    vec![
        chain(
            "end-answer-way",
            [
                format!("meta mark set {way} map @answer-ways"),
                format!("delete @port-ways {{ {port_way} : ip saddr }}"),
                format!("delete @port-targets {{ {port_way} : tcp sport }}"),
                format!("delete @port-stations {{ {port_way} : ether saddr }}"),
                format!("delete @address-ways {{ {address_way} : ip saddr }}"),
                format!("delete @address-stations {{ {address_way} : ether saddr }}"),
                format!("delete @answer-ways {{ {way} : meta mark }}"),
                format!("delete @direct-ways {{ {ANSWERED} }}"),
                "meta mark set 0".into(),
            ],
        ),
        chain("answered", ["tcp sport set meta mark map @vip-ports", "meta mark set 0 accept"]),
        chain(
            "short-answer",
            [
                "ip saddr set meta mark map @vips goto answered",
                // The frontend has gone; the gateway knows its connections still.
                "meta mark set 0",
            ],
        ),
        chain(
            "short-answers",
            [
                format!("{BEGINS_OR_ENDS} goto end-answer-way"),
                format!("meta mark set {way} map @answer-ways goto short-answer"),
                format!("{ANSWERED} @direct-ways accept"),
            ],
        ),
    ]
}

/// Takes the mark from packets of which the bridge shall not learn.
fn sift() -> Chain {
    let rules = [
        // From then on the connection table has to see everything. What comes by routers has no ways,
        // and its mark is not ours.
        "tcp flags & (fin | rst) != 0 ct mark & 0x40000000 == 0 iifname \"br0\" oifname \"br0\" \
         ct mark set ct mark | 0x80000000"
            .to_owned(),
        NOT_OURS.into(),
        format!("{GOES_ON} ct mark & 0x80000000 != 0 meta mark set 0"),
        format!("ct packets < {LASTED} meta mark set 0"),
        "oifname != \"br0\" meta mark set 0".into(),
        format!("meta mark {DIRECT:#x} ct status & (snat | dnat) == 0 accept"),
        format!("meta mark {DIRECT:#x} meta mark set 0"),
        "ct status & (snat | dnat) != dnat meta mark set 0".into(),
    ];
    let hook = "type filter hook postrouting priority 200; policy accept;";
    Chain { table: Table::Inet, name: "sift".into(), hook: Some(hook), rules: rules.into() }
}

fn learn() -> [Chain; 3] {
    let answer = format!("{ANSWERED} : meta mark");
    // What leads to something comes after it; nothing comes after what fails.
    let note = format!("{GOES_ON} update @answer-ways {{ {answer} }}");
    let rules = [
        NOT_OURS.to_owned(),
        format!("meta mark {DIRECT:#x} goto learn-direct"),
        format!(
            "meta mark & {EVERY_PORT:#x} == 0 {note} \
             update @port-targets {{ {PORT_WAY} : tcp dport }} \
             update @port-stations {{ {PORT_WAY} : ether daddr }} \
             update @port-ways {{ {PORT_WAY} : ip daddr }}"
        ),
        format!(
            "meta mark & {EVERY_PORT:#x} != 0 {note} \
             update @address-stations {{ {ADDRESS_WAY} : ether daddr }} \
             update @address-ways {{ {ADDRESS_WAY} : ip daddr }}"
        ),
        format!("{BEGINS_OR_ENDS} jump end-ways"),
        "meta mark set 0".to_owned(),
    ];
    let hook = "type filter hook output priority 0; policy accept;";
    let direct =
        [format!("{GOES_ON} update @direct-ways {{ {REQUEST} }}"), "meta mark set 0".to_owned()];
    [
        chain("learn-direct", direct),
        chain("end-ways", [format!("delete @answer-ways {{ {answer} }}")]),
        Chain { hook: Some(hook), ..chain("learn", rules) },
    ]
}

fn chain<const N: usize>(name: &'static str, rules: [impl Into<String>; N]) -> Chain {
    Chain {
        table: Table::Bridge,
        name: name.into(),
        hook: None,
        rules: rules.map(Into::into).into(),
    }
}

const ELSEWHERE: &str = "iifname { \"vx0\", \"tap0\" } accept";
/// What a mark of ours has; routers have another bit (`weft_vxlan`).
const OURS: u32 = 0x8000_0000;
/// The mark of connections to backends themselves.
const DIRECT: u32 = 0xbfff_ffff;
const NOT_OURS: &str = "meta mark & 0xc0000000 != 0x80000000 accept";
/// What the mark of a frontend of every port has: one port of a client may have connections to
/// several ports there.
const EVERY_PORT: u32 = 0x2000_0000;
const PORT_WAY: &str = "ip saddr . tcp sport . meta mark";
const ADDRESS_WAY: &str = "ip saddr . tcp sport . meta mark . tcp dport";
const REQUEST: &str = "ip saddr . tcp sport . ip daddr . tcp dport";
/// The request that a packet answers.
const ANSWERED: &str = "ip daddr . tcp dport . ip saddr . tcp sport";
/// The rest of a packet's fragments goes by the gateway, and so must the first.
const WHOLE: &str = "ip protocol tcp ip frag-off & 0x3fff == 0";
const GOES_ON: &str = "tcp flags & (fin | syn | rst) == 0";
const BEGINS_OR_ENDS: &str = "tcp flags & (fin | syn | rst) != 0";
/// Connections of fewer packets, of both directions together, are not worth a way.
const LASTED: u32 = 32;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_tells_frontends_of_every_port_and_is_no_routers() {
        let frontend =
            |ip: [u8; 4], port| Frontend { ip: ip.into(), protocol: Protocol::Tcp, port };
        let marks = |port| (0..200).map(move |n| mark(frontend([10, 1, 0, n], port)).unwrap());
        assert!(marks(None).all(|mark| mark & 0xe000_0000 == 0xa000_0000));
        assert!(marks(Some(80)).all(|mark| mark & 0xe000_0000 == 0x8000_0000));
        let different: std::collections::BTreeSet<_> = marks(None).chain(marks(Some(80))).collect();
        assert_eq!(different.len(), 400);
    }

    #[test]
    fn udp_and_ipv6_go_by_the_gateway() {
        let udp = Frontend { ip: [10, 1, 0, 1].into(), protocol: Protocol::Udp, port: Some(53) };
        let v6 = Frontend { ip: [0; 16].into(), protocol: Protocol::Tcp, port: Some(53) };
        assert_eq!([udp, v6].map(mark), [None; 2]);
    }
}
