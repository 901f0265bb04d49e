//! What an operator gets to hear: refusals, joins, removals.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use weft_testbed::{Host, Lab, NetworkView, Stop, api_call, eventually, holds_for};

const SOON: Duration = Duration::from_secs(20);

#[test]
fn wrong_arguments_are_refused_by_value_and_change_nothing() -> anyhow::Result<()> {
    let lab = Lab::cluster(1)?;
    let host = lab.host(1);
    lab.create_network(
        "app --subnet 10.40.0.0/24 --subnet fd00:40::/64 --aux-address nas=10.40.0.5",
    )?;
    let web = host.container("web")?;
    web.attach("app", "--ip 10.40.0.20 --alias www --mac 02:00:00:00:00:20")?;
    let free = host.container("free")?;
    let pid = free.pid().to_string();
    let before = state(host)?;

    let long = "a".repeat(64);
    let attach = format!("attach {pid} --network app --name free");
    let usage: &[(&str, &[&str])] = &[
        ("", &["Usage"]),
        ("frobnicate", &["frobnicate"]),
        ("network create -bad", &["-b"]),
        ("network create under_", &["under_"]),
        (&format!("network create {long}"), &[&long]),
        ("network create x --subnet 10.50.0.0/33", &["10.50.0.0/33", "--subnet"]),
        ("network create x --subnet 10.50.0.0/31", &["10.50.0.0/31", "--subnet"]),
        ("network create x --subnet 127.0.0.0/24", &["127.0.0.0/24", "--subnet"]),
        ("network create x --subnet 224.0.0.0/24", &["224.0.0.0/24", "--subnet"]),
        ("network create x --subnet nonsense", &["nonsense", "--subnet"]),
        ("network create x --gateway 10.50.0", &["10.50.0", "--gateway"]),
        ("network create x --ip-range 10.50.0.0/40", &["10.50.0.0/40", "--ip-range"]),
        ("network create x --aux-address 10.50.0.4", &["10.50.0.4", "NAME=IP"]),
        ("network create x --aux-address a=b", &["a=b"]),
        ("network create x --label novalue", &["novalue", "KEY=VALUE"]),
        ("network create x --opt mtu", &["mtu", "KEY=VALUE"]),
        ("attach --network app --name x", &["PID|NETNS"]),
        (&format!("attach {pid} --network app"), &["--name"]),
        (&format!("attach {pid} --name x"), &["--network"]),
        (&format!("attach {pid} --network app --name b@d"), &["b@d"]),
        (&format!("{attach} --ip 10.40.0.300"), &["10.40.0.300", "--ip"]),
        (&format!("{attach} --ip6 fd00::g"), &["fd00::g", "--ip6"]),
        (&format!("{attach} --mac 02:00:00"), &["02:00:00", "--mac"]),
        (&format!("{attach} --mac 01:00:5e:00:00:01"), &["01:00:5e:00:00:01", "--mac"]),
        (&format!("{attach} --alias a..b"), &["a..b", "--alias"]),
        ("token create --ttl soon", &["soon", "--ttl"]),
        ("token create --uses 0", &["0", "--uses"]),
        ("token create --uses many", &["many", "--uses"]),
        ("ps --format yaml", &["yaml", "--format"]),
        ("agent --metrics nine", &["nine", "--metrics"]),
        ("completion tcsh2", &["tcsh2"]),
        ("join nonsense", &["nonsense", "weft token create"]),
    ];
    let refusals: &[(&str, &[&str])] = &[
        ("network create app", &["app", "exists"]),
        (
            "network create x --subnet 10.50.0.0/24 --subnet 10.51.0.0/24",
            &["10.50.0.0/24", "10.51.0.0/24"],
        ),
        (
            "network create x --subnet 10.50.0.0/24 --gateway 10.51.0.1",
            &["10.51.0.1", "10.50.0.0/24"],
        ),
        ("network create x --subnet 10.50.0.0/24 --gateway 10.50.0.255", &["10.50.0.255"]),
        ("network create x --subnet 10.50.0.0/24 --ip-range 10.51.0.0/25", &["10.51.0.0/25"]),
        ("network create x --subnet 10.50.0.0/24 --aux-address a=10.51.0.9", &["10.51.0.9"]),
        ("network create x --subnet 10.50.0.0/24 --aux-address a=10.50.0.1", &["10.50.0.1"]),
        ("network create x --opt mtu=12", &["mtu", "12"]),
        ("network create x --opt mtu=lots", &["mtu", "lots"]),
        ("network create x --opt multicast=perhaps", &["multicast", "perhaps"]),
        ("network create x --opt colour=red", &["colour"]),
        ("network create x --opt mtu=1400 --opt mtu=1300", &["mtu", "twice"]),
        ("network create x --subnet 10.99.0.0/24", &["10.99.0.0/24", "h1"]),
        ("network inspect nowhere", &["nowhere"]),
        ("network rm nowhere", &["nowhere"]),
        ("network rm app", &["app", "web", "h1", "--force"]),
        ("attach 4000000 --network app --name x", &["4000000"]),
        ("attach /run/netns/nowhere --network app --name x", &["/run/netns/nowhere"]),
        ("attach /etc/passwd --network app --name x", &["/etc/passwd"]),
        (&format!("attach {pid} --network nowhere --name x"), &["nowhere"]),
        (&format!("attach {pid} --network app --name web"), &["web"]),
        (&format!("{attach} --ip 10.41.0.9"), &["10.41.0.9", "10.40.0.0/24"]),
        (&format!("{attach} --ip 10.40.0.1"), &["10.40.0.1"]),
        (&format!("{attach} --ip 10.40.0.5"), &["10.40.0.5"]),
        (&format!("{attach} --ip 10.40.0.0"), &["10.40.0.0"]),
        (&format!("{attach} --ip 10.40.0.255"), &["10.40.0.255"]),
        (&format!("{attach} --ip 10.40.0.20"), &["10.40.0.20", "web", "h1"]),
        (&format!("{attach} --ip6 fd00:41::9"), &["fd00:41::9"]),
        (&format!("{attach} --mac 02:00:00:00:00:20"), &["02:00:00:00:00:20"]),
        (&format!("{attach} --ifname a/b"), &["a/b"]),
        (&format!("{attach} --ifname abcdefghijklmnop"), &["abcdefghijklmnop"]),
        (&format!("{attach} --ifname lo"), &["lo"]),
        ("detach nobody", &["nobody"]),
        ("detach web --network nowhere", &["nowhere"]),
        ("resolve nobody --network app", &["nobody"]),
        ("token rm 00000000", &["00000000"]),
        ("init --name other", &["/var/lib/weft"]),
        ("agent --config /nowhere", &["/nowhere"]),
        ("run --network nowhere --name x -- true", &["nowhere"]),
        ("run --network app --name x -- /no/such/command", &["/no/such/command"]),
    ];
    let unreachable: &[(&str, &[&str])] =
        &[("--socket /run/nowhere.sock ps", &["/run/nowhere.sock", "weft agent"])];
    let wrong: Vec<String> = [(2, usage), (1, refusals), (3, unreachable)]
        .into_iter()
        .flat_map(|(code, cases)| cases.iter().map(move |(args, words)| (code, args, words)))
        .filter_map(|(code, args, words)| {
            let refused = host.weft(args).and_then(|ran| ran.refused(code, words));
            refused.err().map(|error| format!("{error:#}"))
        })
        .collect();
    ensure!(wrong.is_empty(), "{} answers are wrong:\n{}", wrong.len(), wrong.join("\n"));

    host.weft_args(&["network", "create", ""])?.refused(2, &["name"])?;
    ensure!(state(host)? == before, "a refused command changed something");
    ensure!(free.sh("ls /sys/class/net >/dev/null; ip -o link | wc -l")? == "1", "a link is left");
    lab.finish();
    Ok(())
}

#[test]
fn wrong_api_fields_are_refused_by_name_and_change_nothing() -> anyhow::Result<()> {
    let lab = Lab::cluster(1)?;
    let host = lab.host(1);
    lab.create_network("app --subnet 10.40.0.0/24")?;
    let before = state(host)?;
    let free = host.container("free")?;
    let pid = free.pid();

    let attach =
        |rest: &str| format!(r#"{{"network":"app","name":"x","sandbox":{{"pid":{pid}}}{rest}}}"#);
    let cases: &[(&str, &str, String, &[u16], &str)] = &[
        ("GET", "/v1/nothing", String::new(), &[404], ""),
        ("PUT", "/v1/networks", String::new(), &[405], "method"),
        ("POST", "/v1/networks", "not json".into(), &[400, 422], ""),
        ("POST", "/v1/networks", "{}".into(), &[400, 422], "name"),
        ("POST", "/v1/networks", r#"{"name":""}"#.into(), &[400, 422], "name"),
        ("POST", "/v1/networks", r#"{"name":"x","colour":1}"#.into(), &[400, 422], "colour"),
        (
            "POST",
            "/v1/networks",
            r#"{"name":"x","subnets":["10.0.0.0/99"]}"#.into(),
            &[400, 422],
            "10.0.0.0/99",
        ),
        (
            "POST",
            "/v1/networks",
            r#"{"name":"x","subnets":"10.0.0.0/8"}"#.into(),
            &[400, 422],
            "subnets",
        ),
        (
            "POST",
            "/v1/networks",
            r#"{"name":"x","internal":"yes"}"#.into(),
            &[400, 422],
            "internal",
        ),
        (
            "POST",
            "/v1/networks",
            r#"{"name":"x","gateways":["::g"]}"#.into(),
            &[400, 422],
            "gateways",
        ),
        (
            "POST",
            "/v1/networks",
            r#"{"name":"x","options":{"mtu":"9"}}"#.into(),
            &[400, 422],
            "mtu",
        ),
        ("POST", "/v1/networks", r#"{"name":"app"}"#.into(), &[409], "name"),
        ("POST", "/v1/endpoints", "{}".into(), &[400, 422], "network"),
        ("POST", "/v1/endpoints", attach(r#","mac":"ff:ff:ff:ff:ff:ff""#), &[400, 422], "mac"),
        (
            "POST",
            "/v1/endpoints",
            attach(r#","addresses":["10.40.0.1"]"#),
            &[400, 409, 422],
            "10.40.0.1",
        ),
        ("POST", "/v1/endpoints", attach(r#","ifname":"""#), &[400, 422], "ifname"),
        ("POST", "/v1/endpoints", attach(r#","colour":"red""#), &[400, 422], "colour"),
        ("DELETE", "/v1/endpoints/nobody", String::new(), &[404], "nobody"),
        ("DELETE", "/v1/networks/nowhere", String::new(), &[404], "nowhere"),
        ("GET", "/v1/networks/nowhere", String::new(), &[404], "nowhere"),
        ("POST", "/v1/tokens", r#"{"ttl_seconds":0,"uses":1}"#.into(), &[400, 422], "ttl"),
        ("POST", "/v1/tokens", r#"{"ttl_seconds":60,"uses":0}"#.into(), &[400, 422], "uses"),
        ("POST", "/v1/tokens", r#"{"ttl_seconds":-5,"uses":1}"#.into(), &[400, 422], "-5"),
    ];
    let mut wrong = Vec::new();
    for (method, path, body, statuses, word) in cases {
        let answer = api_call(host, method, path, body)?;
        let text = answer.body.to_string();
        let has_error = answer.body.get("error").is_some_and(serde_json::Value::is_string);
        if !statuses.contains(&answer.status) || !has_error || !text.contains(word) {
            wrong.push(format!(
                "{method} {path} {body}: {} {text}, wanted {statuses:?} with {word:?}",
                answer.status
            ));
        }
    }
    ensure!(wrong.is_empty(), "{} answers are wrong:\n{}", wrong.len(), wrong.join("\n"));
    ensure!(state(host)? == before, "a refused request changed something");
    lab.finish();
    Ok(())
}

#[test]
fn a_token_that_is_used_expired_or_foreign_lets_nobody_in() -> anyhow::Result<()> {
    let lab = Lab::builder().hosts(3).build()?;
    let (first, second, third) = (lab.host(1), lab.host(2), lab.host(3));
    let join = |host: &Host, token: &str| {
        host.weft(&format!("join {token} --name {} --advertise {}", host.name(), host.address()))
    };
    first.weft("init --name h1 --advertise 10.99.0.11")?.ok()?;
    first.start_agent()?;

    let once = first.weft("token create")?.ok()?;
    join(second, &once)?.ok()?;
    join(third, &once)?.refused(1, &["used"])?;
    nothing_half_joined(third)?;

    let short = first.weft("token create --ttl 1s")?.ok()?;
    eventually(SOON, "a token of one second expires", || {
        let listed = first.weft("token ls --format json")?.ok()?;
        ensure!(listed.trim() == "[]", "{listed}");
        Ok(())
    })?;
    join(third, &short)?.refused(1, &["expired"])?;
    nothing_half_joined(third)?;

    let removed = first.weft("token create")?.ok()?;
    let listed = first.weft_json("token ls")?;
    let id = listed[0]["id"].as_str().context("a token has an id")?.to_owned();
    first.weft(&format!("token rm {id}"))?.ok()?;
    join(third, &removed)?.refused(1, &[])?;
    nothing_half_joined(third)?;

    // A token of the right form for a cluster whose agent is out of reach.
    let token = first.weft("token create")?.ok()?;
    lab.cut(1)?;
    let unreachable = join(third, &token)?;
    ensure!(unreachable.took < Duration::from_secs(60), "{unreachable}");
    unreachable.refused(1, &["10.99.0.11"])?;
    // Nobody answered, so the token may be used up: the key that can fetch the answer stays.
    let files = third.sh("find /var/lib/weft -type f")?;
    let key = files.strip_prefix("/var/lib/weft/.join-").context(files.clone())?;
    ensure!(key.ends_with(".key") && key.lines().count() == 1, "a join cut short left {files}");
    lab.mend(1)?;

    // One character is wrong: the token's own check finds it before anybody is asked.
    let mut forged = token.clone().into_bytes();
    let last = forged.last_mut().context("a token has characters")?;
    *last = if *last == b'A' { b'B' } else { b'A' };
    join(third, &String::from_utf8(forged)?)?.refused(2, &["token"])?;
    ensure!(third.sh("find /var/lib/weft -type f")? == files, "a forged token changed something");

    join(third, &token)?.ok()?;
    let keys = third.sh("find /var/lib/weft -name '.join-*'")?;
    ensure!(keys.is_empty(), "a join that succeeded left {keys}");
    join(third, &token)?.refused(1, &["/var/lib/weft"])?;
    second.start_agent()?;
    third.start_agent()?;
    lab.wait_all_alive(Duration::from_secs(60))?;
    lab.finish();
    Ok(())
}

#[test]
fn a_second_node_of_the_same_name_is_refused() -> anyhow::Result<()> {
    let lab = Lab::builder().hosts(2).build()?;
    let (first, second) = (lab.host(1), lab.host(2));
    first.weft("init --name twin --advertise 10.99.0.11")?.ok()?;
    first.start_agent()?;
    let token = first.weft("token create")?.ok()?;
    let join = second.weft(&format!("join {token} --name twin --advertise 10.99.0.12"))?;
    join.refused(1, &["twin"])?;
    nothing_half_joined(second)?;
    // The refusal did not use the token up.
    second.weft(&format!("join {token} --name other --advertise 10.99.0.12"))?.ok()?;
    lab.finish();
    Ok(())
}

#[test]
fn a_network_in_use_is_removed_only_by_force_and_then_everywhere() -> anyhow::Result<()> {
    let lab = Lab::cluster(3)?;
    let app = lab.create_network("app --subnet 10.40.0.0/24")?;
    let one = lab.host(1).container("c1")?;
    let two = lab.host(2).container("c2")?;
    one.attach("app", "")?;
    two.attach("app", "")?;
    one.reaches("c2", SOON)?;

    lab.host(3).weft("network rm app")?.refused(1, &["app", "c1", "h1", "c2", "h2", "--force"])?;
    one.reaches("c2", SOON)?;

    lab.host(3).weft("network rm --force app")?.ok()?;
    for host in lab.hosts() {
        eventually(SOON, &format!("app is gone from {}", host.name()), || {
            let listed = host.weft_json("network ls")?;
            // Those that are predefined have none.
            ensure!(!listed.to_string().contains("\"id\""), "{listed}");
            let namespaces = host.sh("ip netns list")?;
            ensure!(!namespaces.contains(&app.namespace()), "{namespaces}");
            let links = host.sh("ip -o link show")?;
            ensure!(links.lines().count() == 2, "more than lo and eth0: {links}");
            Ok(())
        })?;
    }
    for container in [&one, &two] {
        let links = container.sh("ip -o link show")?;
        ensure!(links.lines().count() == 1, "more than lo: {links}");
    }

    // The name is free again.
    lab.create_network("app --subnet 10.44.0.0/24")?;
    one.attach("app", "")?;
    two.attach("app", "")?;
    one.reaches("c2", SOON)?;
    lab.finish();
    Ok(())
}

#[test]
fn a_subnet_that_a_host_routes_or_asks_for_names_is_refused_or_avoided() -> anyhow::Result<()> {
    let lab = Lab::builder().hosts(2).build()?;
    let second = lab.host(2);
    second
        .sh("ip route add 10.50.0.0/16 via 10.99.0.1; ip route add 10.32.0.0/16 via 10.99.0.1")?;
    std::fs::write(second.dir().join("resolv.conf"), "nameserver 10.51.0.53\n")?;
    lab.form_cluster()?;

    let first = lab.host(1);
    let create = |subnet: &str| first.weft(&format!("network create x --subnet {subnet}"));
    create("10.50.3.0/24")?.refused(1, &["10.50.3.0/24", "10.50.0.0/16", "h2"])?;
    create("10.51.0.0/24")?.refused(1, &["10.51.0.0/24", "10.51.0.53", "h2"])?;
    create("10.99.0.0/16")?.refused(1, &["10.99.0.0/16", "10.99.0.0/24"])?;

    let picked = lab.create_network("x")?;
    ensure!(!picked.subnets[0].starts_with("10.32."), "the route of h2 is avoided: {picked:?}");
    lab.finish();
    Ok(())
}

#[test]
fn an_agent_that_stops_keeps_its_containers_connected_and_without_any_says_good_bye()
-> anyhow::Result<()> {
    let lab = Lab::cluster(3)?;
    lab.create_network("app --subnet 10.40.0.0/24")?;
    let one = lab.host(1).container("c1")?;
    let two = lab.host(2).container("c2")?;
    one.attach("app", "")?;
    let far = two.attach("app", "")?.ip4.context("no IPv4")?.to_string();
    one.reaches("c2", SOON)?;

    lab.host(3).stop_agent(Stop::Gracefully)?;
    eventually(SOON, "h1 heard the good-bye of h3", || {
        let states = lab.node_states(1)?;
        ensure!(states.get("h3").is_none_or(|state| state == "left"), "{states:?}");
        Ok(())
    })?;

    lab.host(2).stop_agent(Stop::Gracefully)?;
    holds_for(Duration::from_secs(3), "c2 goes on without an agent", || {
        one.ping(&far)?;
        two.ping("10.40.0.1").map(drop)
    })?;
    lab.host(2).start_agent()?;
    lab.host(3).start_agent()?;
    lab.wait_all_alive(SOON)?;
    one.reaches("c2", SOON)?;
    lab.finish();
    Ok(())
}

#[test]
fn metrics_are_served_and_count_what_is_there() -> anyhow::Result<()> {
    let lab = Lab::cluster(1)?;
    let host = lab.host(1);
    lab.create_network("app --subnet 10.40.0.0/24")?;
    let web = host.container("web")?;
    web.attach("app", "")?;
    web.resolve("web")?;
    let scrape = "exec 3<>/dev/tcp/127.0.0.1/9480
        printf 'GET /metrics HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3";
    let text = host.exec(&["bash", "-ec", scrape])?.ok()?;
    ensure!(text.contains(" 200 "), "{text}");
    for name in [
        "weft_build_info{",
        "weft_gossip_nodes{",
        "weft_networks{",
        "weft_endpoints{",
        "weft_reconcile_ops_total{",
        "weft_reconcile_drift_total{",
        "weft_reconcile_lag_seconds{",
        "weft_gossip_bytes_total{",
        "weft_gossip_rounds_total{",
        "weft_dns_queries_total{",
        "weft_ipam_owned_addresses{",
        "weft_ipam_free_addresses{",
    ] {
        ensure!(text.contains(name), "no {name} in {text}");
    }
    lab.finish();
    Ok(())
}

/// What no refused command may change.
fn state(host: &Host) -> anyhow::Result<[String; 4]> {
    Ok([
        host.weft("network ls")?.ok()?,
        host.weft("ps")?.ok()?,
        host.weft("token ls")?.ok()?,
        host.sh("ip -o link show | cut -d: -f2; ip netns list | cut -d' ' -f1 | sort")?,
    ])
}

fn nothing_half_joined(host: &Host) -> anyhow::Result<()> {
    let files = host.sh("find /var/lib/weft -type f")?;
    ensure!(files.is_empty(), "a refused join left {files}");
    Ok(())
}

#[test]
fn a_network_is_known_by_its_id_too() -> anyhow::Result<()> {
    let lab = Lab::cluster(1)?;
    let app = lab.create_network("app --subnet 10.40.0.0/24")?;
    let by_id = NetworkView::read(lab.host(1), &app.id)?;
    ensure!(by_id.vni == app.vni, "{by_id:?}");
    lab.host(1).weft(&format!("network rm {}", app.id))?.ok()?;
    lab.finish();
    Ok(())
}
