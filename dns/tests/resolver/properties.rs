use std::sync::OnceLock;

use domain::{
    base::{Message, Rtype, iana::Opcode},
    rdata::AllRecordData,
};
use proptest::{
    collection::vec,
    prelude::*,
    sample::{select, subsequence},
};
use weft_dns::{Asker, Directory, Reply, Transport, answer};

use crate::lab::*;

fn shared_directory() -> &'static Directory {
    static DIRECTORY: OnceLock<Directory> = OnceLock::new();
    DIRECTORY.get_or_init(directory)
}

fn any_transport() -> impl Strategy<Value = Transport> {
    select(vec![Transport::Udp, Transport::Tcp])
}

fn any_asker() -> impl Strategy<Value = Asker> {
    let at = select(vec![
        (APP, "10.32.0.2"),
        (APP, "10.32.0.3"),
        (BACK, "10.33.0.7"),
        (VAULT, "10.34.0.2"),
        (VAULT, "10.34.0.3"),
        (APP, "192.0.2.1"),
    ]);
    (at, any_transport()).prop_map(|((at, address), transport)| Asker {
        network: network(at),
        address: ip(address),
        transport,
        falls_through: false,
    })
}

/// Names made of the labels that matter.
fn any_name() -> impl Strategy<Value = String> {
    let label = select(vec![
        "web1",
        "web",
        "db",
        "cache",
        "hidden",
        "safe",
        "tasks",
        "app",
        "back",
        "dark",
        "vault",
        "weft",
        "internal",
        "_http",
        "_tcp",
        "in-addr",
        "ip6",
        "arpa",
        "2",
        "9",
        "0",
        "32",
        "33",
        "35",
        "10",
        "d",
        "f",
        "3",
        "WEB",
        "corp",
        "example",
        "424242424242",
        "\\000",
        "\\.",
        "x",
    ]);
    vec(label, 1..8).prop_map(|labels| labels.join("."))
}

fn any_type() -> impl Strategy<Value = Rtype> {
    prop_oneof![
        select(vec![Rtype::A, Rtype::AAAA, Rtype::PTR, Rtype::ANY, Rtype::SOA, Rtype::SRV]),
        any::<u16>().prop_map(Rtype::from_int),
    ]
}

/// Checks what holds for each answer to whatever was asked.
fn check(packet: &[u8], asker: &Asker, reply: &Reply) -> Result<(), TestCaseError> {
    let Reply::Answer { message, truncated, .. } = reply else {
        return Ok(());
    };
    prop_assert!(message.len() <= 65_535);
    prop_assert!(asker.transport == Transport::Tcp || message.len() <= 1232);
    let parsed = Message::from_slice(message).unwrap();
    prop_assert_eq!(&message[..2], &packet[..2]);
    prop_assert!(parsed.header().qr());
    prop_assert_eq!(parsed.header().tc(), *truncated);
    for (record, _) in parsed.iter().flat_map(Result::ok) {
        let data = record.to_any_record::<AllRecordData<_, _>>();
        prop_assert!(data.is_ok(), "{:?}", data);
    }
    let read = parsed.iter().count();
    let counts = parsed.header_counts();
    let said = counts.ancount() + counts.nscount() + counts.arcount();
    prop_assert_eq!(read, usize::from(said));
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn no_bytes_make_it_panic_and_every_answer_parses(
        packet in vec(any::<u8>(), 0..300),
        asker in any_asker(),
    ) {
        let reply = answer(&packet, &asker, shared_directory(), TTL, &mut rand::rng());
        check(&packet, &asker, &reply)?;
    }

    #[test]
    fn no_damaged_query_makes_it_panic_and_every_answer_parses(
        name in any_name(),
        rtype in any_type(),
        edns in any::<Option<u16>>(),
        damage in vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        cut in any::<prop::sample::Index>(),
        cuts in any::<bool>(),
        asker in any_asker(),
    ) {
        let mut packet = match edns {
            None => query(&name, rtype),
            Some(payload) => query_with_edns(&name, rtype, payload, 0),
        };
        for (at, byte) in damage {
            let at = at.index(packet.len());
            packet[at] = byte;
        }
        if cuts {
            packet.truncate(cut.index(packet.len()));
        }
        let reply = answer(&packet, &asker, shared_directory(), TTL, &mut rand::rng());
        check(&packet, &asker, &reply)?;
    }

    #[test]
    fn nothing_of_a_network_that_the_asker_is_not_on_is_ever_told(
        name in any_name(),
        rtype in any_type(),
        at in select(vec![APP, BACK, VAULT, DARK]),
        attached in subsequence(vec![APP, BACK, VAULT, DARK], 0..=4).prop_shuffle(),
    ) {
        let mut directory = directory();
        let asker =
            Asker { network: network(at), address: ip("192.0.2.9"), transport: Transport::Tcp, falls_through: false };
        let ids = attached.iter().map(|number| network(*number)).collect();
        directory.askers.insert((asker.network, asker.address), ids);

        let seen = if attached.is_empty() { vec![at] } else { attached };
        let reply = answer(&query(&name, rtype), &asker, &directory, TTL, &mut rand::rng());
        let Reply::Answer { message, .. } = &reply else {
            return Ok(());
        };
        for data in records(message) {
            for (number, marks) in [
                (APP, ["10.32.", "fd00:32:", ".app."]),
                (BACK, ["10.33.", "cache", ".back."]),
                (VAULT, ["10.34.", "safe", ".vault."]),
                (DARK, ["10.35.", "hidden", ".dark."]),
            ] {
                let told = marks.iter().any(|mark| data.contains(mark));
                prop_assert!(!told || seen.contains(&number), "{} tells {}", data, number);
            }
        }
    }

    #[test]
    fn a_well_formed_query_gets_its_own_question_back(
        name in any_name(),
        rtype in select(vec![Rtype::A, Rtype::AAAA, Rtype::PTR, Rtype::SRV]),
        asker in any_asker(),
    ) {
        let packet = query(&name, rtype);
        let reply = answer(&packet, &asker, shared_directory(), TTL, &mut rand::rng());
        if let Reply::Answer { message, .. } = reply {
            prop_assert_eq!(&message[12..packet.len()], &packet[12..]);
            prop_assert_eq!(Message::from_slice(&message).unwrap().header().opcode(), Opcode::QUERY);
        }
    }
}
