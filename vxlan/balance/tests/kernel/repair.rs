use std::time::Duration;

use tokio::time::Instant;
use weft_model::Protocol;
use weft_vxlan::Namespace;

use crate::{
    lab::{Lab, Service, VIPS, eventually, in_lab, run},
    talk::{Conversation, ask, ask_often, serve},
};

/// Waits until clients are served as before, and tells how long it took.
async fn healed(lab: &Lab, repairs: u64) -> Duration {
    let since = Instant::now();
    eventually("it is repaired", async || {
        let status = lab.one.status();
        if status.repairs > repairs { Ok(()) } else { Err(format!("{status:?}")) }
    })
    .await;
    since.elapsed()
}

/// The map in which a frontend's table is, and one of its slots as nft prints it.
fn a_slot_of(inside: &Namespace, frontend: &str) -> (String, String) {
    let listing = run(inside, "nft list table inet weft-services");
    let mut map = "";
    for line in listing.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("map ") {
            map = name.trim_end_matches(" {");
        }
        let slots = line.split(['{', ',', '}']).map(str::trim);
        if let Some(slot) = slots.clone().find(|slot| slot.starts_with(&format!("{frontend} . "))) {
            return (map.to_owned(), slot.to_owned());
        }
    }
    panic!("{frontend} has no table: {listing}");
}

#[test]
fn what_others_do_to_our_tables_is_undone_when_it_is_done() {
    in_lab(&[1, 2, 3, 11], async |lab| {
        for station in [2, 3, 11] {
            serve(station, lab.sandbox(station), 8080);
        }
        let service = Service {
            affinity: Some(Duration::from_secs(600)),
            ..Service::new(80, 8080, &[2, 3, 11])
        };
        let mut balance = service.balance(1);
        balance.frontends.extend(Service::new(81, 8080, &[2, 3, 11]).balance(1).frontends);
        lab.serve(&balance).await;
        let inside = lab.one.network_namespace();
        let listing = || {
            let tables = ["inet", "bridge"].map(|family| {
                let table = run(&inside, &format!("nft -s list table {family} weft-services"));
                // What the kernel has noted by itself is not ours to put back.
                let noted = ["elements = { 10.1.0.1 }", "elements = { fd00:1::1 }"];
                let ours = table.lines().filter(|line| !noted.contains(&line.trim()));
                // Elements come in any order, several in a line.
                let words = ours.flat_map(|line| line.split(", ")).map(|word| {
                    let word = word.trim_matches(|c: char| c.is_whitespace() || "{},".contains(c));
                    word.trim_start_matches("elements = { ").to_owned()
                });
                let mut ours: Vec<_> = words.collect();
                ours.sort();
                ours
            });
            tables.concat()
        };
        let before = listing();
        let chain = before.iter().find_map(|line| line.strip_prefix("chain to-web"));
        let chain = format!("to-web{}", chain.unwrap());
        let (map, slot) = a_slot_of(&inside, "10.1.0.200 . tcp . 81");
        let (key, _) = slot.split_once(" : ").unwrap();
        let other = if map.ends_with('0') { "port-slots4-1" } else { "port-slots4-0" };
        let (map6, _) = a_slot_of(&inside, &format!("{} . tcp . 81", VIPS[1]));
        for edit in [
            "nft flush ruleset".into(),
            "nft delete table inet weft-services".into(),
            "nft delete table bridge weft-services".into(),
            "nft flush chain inet weft-services prerouting".into(),
            "nft insert rule inet weft-services prerouting counter accept".into(),
            "nft flush map inet weft-services port-keepers4".into(),
            format!("nft flush map inet weft-services {map6}"),
            format!("nft delete element inet weft-services {map} {{ {key} }}"),
            format!(
                "nft 'delete element inet weft-services {map} {{ {key} }}; \
                 add element inet weft-services {map} {{ {key} : 10.1.0.66 . 6666 }}'"
            ),
            format!("nft add element inet weft-services {other} {{ {slot} }}"),
            format!(
                "nft add element inet weft-services {map} \
                 {{ 10.1.0.77 . tcp . 80 . 7 : 10.1.0.66 . 6666 }}"
            ),
            format!(
                "nft add element inet weft-services {map} \
                 {{ 10.1.0.77 . sctp . 80 . 7 : 10.1.0.66 . 6666 }}"
            ),
            "nft flush set inet weft-services port-connections4".into(),
            "nft flush set bridge weft-services port-replies4".into(),
            "nft delete element bridge weft-services clients \
                { $(nft list set bridge weft-services clients | grep -o 02:[0-9a-f:]* | head -1) }"
                .into(),
            "nft add element inet weft-services port-keepers4 { 10.1.0.77 . tcp . 80 : goto refuse }"
                .into(),
            "nft add set inet weft-services mine '{ type ipv4_addr; }'".into(),
            "nft add chain inet weft-services mine '{ type filter hook forward priority 0; policy drop; }'"
                .into(),
            "nft add chain bridge weft-services mine".into(),
            format!("nft insert rule inet weft-services {chain} drop"),
            format!("nft flush chain inet weft-services {chain}"),
        ] {
            let repairs = lab.one.status().repairs;
            let edit: String = edit;
            run(&inside, &edit);
            let took = healed(&lab, repairs).await;
            // The next look without a reason is ten minutes away.
            assert!(took < Duration::from_secs(10), "{took:?} after `{edit}`");
            eventually(&format!("all is as it was before `{edit}`"), async || {
                let now = listing();
                let lacks = |a: &[String], b: &[String]| -> Vec<String> {
                    a.iter().filter(|line| !b.contains(line)).cloned().collect()
                };
                match now == before {
                    true => Ok(()),
                    false => Err(format!("-{:?}\n+{:?}", lacks(&before, &now), lacks(&now, &before))),
                }
            })
            .await;
            for (vip, port) in VIPS.into_iter().flat_map(|vip| [(vip, 80), (vip, 81)]) {
                for answer in ask_often(lab.sandbox(1), Protocol::Tcp, (vip, port), 5) {
                    answer.unwrap_or_else(|silence| panic!("{silence:?} after `{edit}`"));
                }
            }
        }
    });
}

#[test]
fn what_others_do_while_very_much_is_put_back_is_undone_as_well() {
    in_lab(&[1, 2, 3], async |lab| {
        for station in [2, 3] {
            serve(station, lab.sandbox(station), 8080);
        }
        let mut balance = Service::new(80, 8080, &[2, 3]).balance(1);
        for port in 1000..1500 {
            balance.frontends.extend(Service::new(port, 8080, &[2, 3]).balance(1).frontends);
        }
        lab.one.serve(&balance).await;
        let inside = lab.one.network_namespace();
        let repairs = lab.one.status().repairs;
        let (map, slot) = a_slot_of(&inside, "10.1.0.200 . tcp . 80");
        let (key, _) = slot.split_once(" : ").unwrap();
        // As soon as it is there, which is long before the last one is.
        let delete = format!("nft delete element inet weft-services {map} '{{ {key} }}'");
        run(&inside, &format!("nft flush ruleset; until {delete} 2>&1; do :; done"));
        healed(&lab, repairs).await;
        eventually("the slot is there again", async || {
            let listing = run(&inside, &format!("nft list map inet weft-services {map}"));
            if listing.contains(&slot) { Ok(()) } else { Err(format!("{slot} is missing")) }
        })
        .await;
        for answer in ask_often(lab.sandbox(1), Protocol::Tcp, (VIPS[0], 1499), 5) {
            answer.unwrap();
        }
    });
}

#[test]
fn rules_of_others_are_left_alone() {
    in_lab(&[1, 2], async |lab| {
        serve(2, lab.sandbox(2), 8080);
        let service = Service::new(80, 8080, &[2]);
        lab.serve(&service.balance(1)).await;
        let inside = lab.one.network_namespace();
        run(&inside, "nft add rule inet weft-user forward ip daddr 10.9.9.9 drop");
        run(&inside, "nft add table inet mine; nft add chain inet mine input");
        let (repairs, changes) = (lab.one.status().repairs, lab.one.status().changes);
        run(&inside, "nft delete table bridge weft-services");
        healed(&lab, repairs).await;
        assert!(run(&inside, "nft list table inet weft-user").contains("10.9.9.9"));
        assert!(run(&inside, "nft list table inet mine").contains("input"));
        assert_eq!(lab.one.status().changes, changes);
        lab.one.withdraw();
        eventually("our tables have gone", async || {
            let tables = run(&inside, "nft list tables");
            if tables.contains("weft-services") { Err(tables) } else { Ok(()) }
        })
        .await;
        assert!(run(&inside, "nft list table inet weft-user").contains("10.9.9.9"));
    });
}

#[test]
fn a_restarted_agent_adopts_what_is_there_and_writes_what_differs() {
    in_lab(&[1, 2, 3, 11], async |mut lab| {
        for station in [2, 3, 11] {
            serve(station, lab.sandbox(station), 8080);
        }
        let service = Service::new(80, 8080, &[2, 11]).balance(1);
        lab.serve(&service).await;
        let mut old = Conversation::start(lab.sandbox(1), (VIPS[0], 80)).unwrap();
        let one = lab.one;
        let inside = one.network_namespace();
        let generation = || {
            let listing = run(&inside, "nft -a list table inet weft-services");
            listing.lines().filter(|line| line.contains("handle")).count()
        };
        let (handles, listing) =
            (generation(), run(&inside, "nft -sa list table inet weft-services"));
        lab.one = one.restart(&service).await;
        lab.one.serves(&service).await;
        assert_eq!(lab.one.status().changes, 0, "{:?}", lab.one.status());
        assert_eq!(generation(), handles);
        assert_eq!(run(&inside, "nft -sa list table inet weft-services"), listing);
        old.goes_on().unwrap();

        // One that finds another state desired changes what differs, and breaks nothing.
        let other = Service::new(80, 8080, &[3]).balance(1);
        let one = lab.one;
        lab.one = one.restart(&other).await;
        lab.one.serves(&other).await;
        assert_eq!(lab.one.status().changes, 1, "{:?}", lab.one.status());
        old.goes_on().unwrap();
        assert_eq!(ask(lab.sandbox(1), Protocol::Tcp, (VIPS[0], 80)).unwrap().station, 3);

        // One that finds none removes them.
        let one = lab.one;
        lab.one = one.restart(&other).await;
        lab.one.withdraw();
        eventually("our tables have gone", async || {
            let tables = run(&inside, "nft list tables");
            if tables.contains("weft-services") { Err(tables) } else { Ok(()) }
        })
        .await;
    });
}
