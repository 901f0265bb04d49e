use proptest::prelude::*;
use weft_model::{HoldRecord, LoanRecord, NetworkId, WantRecord};

use super::*;

#[test]
fn values_are_encoded_as_they_always_were() {
    for (key, ver, text) in corpus() {
        let Content::Record(record) = decode(key, text) else { panic!("{text}") };
        assert_eq!(encode(key, &record, ver).unwrap(), text);
        assert_eq!(peek_ver(text), ver);
    }
    assert_eq!(withdrawal(3), r#"{"v":1,"ver":3}"#);
}

/// Values as the first version wrote them. Only added to, never changed: agents of all versions
/// run in one cluster.
fn corpus() -> Vec<(Key, u64, &'static str)> {
    let network = NetworkId::from([0x11; 16]);
    let bucket = "22".parse().unwrap();
    vec![
        (
            Key::Node,
            1 << 32 | 1,
            r#"{"v":1,"ver":4294967297,"record":{"name":"alpha","vtep":"192.0.2.1","address":"192.0.2.1:4790","version":"0.1.0","state":"up","underlay_mtu":1500}}"#,
        ),
        (
            Key::Node,
            2,
            r#"{"v":1,"ver":2,"record":{"name":"b","vtep":"2001:db8::2","address":"[2001:db8::2]:4790","version":"0.1.0","state":"leaving","underlay_mtu":9000,"routes":["10.0.0.0/8"],"resolvers":["192.0.2.53"]}}"#,
        ),
        (Key::Network(network), 3, r#"{"v":1,"ver":3,"record":"removed"}"#),
        (
            Key::Network(network),
            4,
            r#"{"v":1,"ver":4,"record":{"defined":{"id":"11111111111111111111111111111111","name":"app","vni":5000,"pools":[{"subnet":"10.32.0.0/24","gateway":"10.32.0.1"}],"internal":false,"options":{"multicast":false},"creator":"01010101010101010101010101010101","lenders":["01010101010101010101010101010101"],"created":1700000000}}}"#,
        ),
        (
            Key::Endpoints(network, bucket),
            5,
            r#"{"v":1,"ver":5,"record":[{"id":"22222222222222222222222222222222","network":"11111111111111111111111111111111","name":"web","mac":"02:00:00:00:00:07","addresses":[{"ip":"10.32.0.7","unit":{"block":["v4",0]},"seq":1}],"sandbox":"s1","seq":2,"service":"shop","labels":{"tier":"front"}}]}"#,
        ),
        (Key::Endpoints(network, bucket), 6, r#"{"v":1,"ver":6,"record":[]}"#),
        (
            Key::Loan(network),
            7,
            r#"{"v":1,"ver":7,"record":{"loans":[[{"block":["v4",3]},{"to":"01010101010101010101010101010101","seq":1}]]}}"#,
        ),
        (
            Key::Hold(network),
            8,
            r#"{"v":1,"ver":8,"record":{"held":[[{"address":"10.32.0.9"},{"seq":1}]],"released":[[{"block":["v6",2]},4]]}}"#,
        ),
        (
            Key::Want(network),
            9,
            r#"{"v":1,"ver":9,"record":{"blocks":[[["01010101010101010101010101010101","v4"],2]],"addresses":["10.32.0.9"]}}"#,
        ),
    ]
}

#[test]
fn a_long_record_is_compressed_and_a_compressed_one_is_always_readable() {
    let key = Key::Want(NetworkId::from([0x11; 16]));
    let record = wants(500);
    let value = encode(key, &record, 77).unwrap();
    assert!(value.len() < serde_json::to_string(&record).unwrap().len() / 2, "{}", value.len());
    assert_eq!(decode(key, &value), Content::Record(Box::new(record)));
    assert_eq!(peek_ver(&value), 77);

    let golden =
        r#"{"v":1,"ver":1,"z":"KLUv/SAhCQEAeyJibG9ja3MiOltdLCJhZGRyZXNzZXMiOltdfSAgICAg"}"#;
    assert_eq!(decode(key, golden), Content::Record(Box::new(Record::Want(WantRecord::default()))));
}

#[test]
fn a_newer_agents_fields_are_ignored_and_its_formats_counted() {
    let key = Key::Hold(NetworkId::from([0x11; 16]));
    let empty = Content::Record(Box::new(Record::Hold(HoldRecord::default())));
    for (text, content) in [
        (r#"{"v":1,"ver":1,"sig":"AAAA","when":5,"record":{"mood":"new"}}"#, empty),
        (r#"{"v":1,"ver":1,"record":null}"#, Content::Withdrawn),
        (r#"{"v":1,"ver":1,"sig":{"by":1}}"#, Content::Withdrawn),
        (r#"{"v":2,"ver":1,"record":{}}"#, Content::Undecodable),
        (r#"{"v":1,"ver":1,"record":5}"#, Content::Undecodable),
        (r#"{"v":1,"ver":-1,"record":{}}"#, Content::Undecodable),
        (r#"{"v":1,"record":{}}"#, Content::Undecodable),
        (r#"{"v":1,"ver":1,"z":"%"}"#, Content::Undecodable),
        ("", Content::Undecodable),
    ] {
        assert_eq!(decode(key, text), content, "{text}");
    }
}

#[test]
fn a_record_under_another_networks_key_is_neither_written_nor_read() {
    let (ours, theirs) = (NetworkId::from([0x11; 16]), NetworkId::from([0x12; 16]));
    let (_, ver, text) = corpus().remove(4);
    let here = Key::Endpoints(ours, "22".parse().unwrap());
    let there = Key::Endpoints(theirs, "22".parse().unwrap());
    let Content::Record(record) = decode(here, text) else { panic!("{text}") };
    assert_eq!(decode(there, text), Content::Undecodable);
    assert!(matches!(encode(there, &record, ver), Err(EncodeError::Mismatch { .. })));
    assert!(matches!(encode(Key::Node, &record, ver), Err(EncodeError::Mismatch { .. })));
}

#[test]
fn a_record_that_is_too_long_is_refused_with_its_key_and_the_limit() {
    let key = Key::Want(NetworkId::from([0x11; 16]));
    let error = encode(key, &wants(60_000), 1).unwrap_err().to_string();
    assert!(error.contains("want/1111") && error.contains("262144"), "{error}");

    // Random addresses do not compress.
    let mut record = WantRecord::default();
    for n in 0u128..4000 {
        let id = NetworkId::from(n.to_be_bytes()).digest(b"ip");
        let [a, b] =
            [&id[..16], &id[16..]].map(|half| u128::from_be_bytes(half.try_into().unwrap()));
        record.addresses.extend(
            [std::net::Ipv6Addr::from(a).into(), std::net::Ipv6Addr::from(b).into()]
                .map(|ip: std::net::IpAddr| ip),
        );
    }
    let refused = encode(key, &Record::Want(record), 1);
    assert!(matches!(refused, Err(EncodeError::TooLong { .. })), "{refused:?}");
}

#[test]
fn a_bomb_inside_a_value_is_undecodable() {
    let bomb = BASE64.encode(frame::compress(&vec![b' '; 8 << 20]));
    let text = format!(r#"{{"v":1,"ver":1,"z":"{bomb}"}}"#);
    assert!(text.len() < 4096);
    assert_eq!(decode(Key::Node, &text), Content::Undecodable);
}

proptest! {
    #[test]
    fn a_fit_value_fits_under_every_number(count in 0usize..3000, small in any::<u16>(), large in any::<u64>()) {
        let key = Key::Want(NetworkId::from([0x11; 16]));
        let record = wants(count);
        let small = encode(key, &record, small.into());
        prop_assert_eq!(small.is_ok(), encode(key, &record, large).is_ok());
    }

    #[test]
    fn no_text_breaks_the_value_parser(
        kind in 0u8..6,
        text in r#"\{"v":[0-3],"ver":[0-9]{1,21}(,"(record|z|sig)":(".{0,20}"|[0-9]|\[\]|\{\}|\[\[.{0,9}\]\])){0,3}\}|.*"#,
    ) {
        let network = NetworkId::from([0x11; 16]);
        let key = [
            Key::Node,
            Key::Network(network),
            Key::Endpoints(network, "00".parse().unwrap()),
            Key::Loan(network),
            Key::Hold(network),
            Key::Want(network),
        ][usize::from(kind)];
        if let Content::Record(record) = decode(key, &text) {
            let again = encode(key, &record, peek_ver(&text)).unwrap();
            prop_assert_eq!(decode(key, &again), Content::Record(record));
        }
    }

    #[test]
    fn every_register_comes_out_as_it_went_in(
        units in prop::collection::btree_map(any::<u32>(), (any::<[u8; 16]>(), any::<u64>()), 0..60),
        ver in any::<u64>(),
    ) {
        let mut loans = LoanRecord::default();
        let mut holds = HoldRecord::default();
        for (index, (to, seq)) in units {
            let unit = weft_model::Unit::Block(weft_model::Family::V6, index);
            let loan = weft_model::Loan { to: to.into(), seq, except: [].into() };
            loans.loans.insert(unit, loan);
            holds.released.insert(unit, seq);
        }
        let network = NetworkId::from([0x11; 16]);
        for (key, record) in
            [(Key::Loan(network), Record::Loan(loans)), (Key::Hold(network), Record::Hold(holds))]
        {
            let value = encode(key, &record, ver).unwrap();
            prop_assert_eq!(peek_ver(&value), ver);
            prop_assert_eq!(decode(key, &value), Content::Record(Box::new(record)));
        }
    }
}

fn wants(count: usize) -> Record {
    let mut record = WantRecord::default();
    let first = u32::from(std::net::Ipv4Addr::new(10, 32, 0, 0));
    for ip in (first..).take(count) {
        record.addresses.insert(std::net::Ipv4Addr::from(ip).into());
    }
    Record::Want(record)
}
