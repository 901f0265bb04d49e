//! What Docker was asked to publish for a container. Pure.

use std::collections::BTreeMap;

use serde::Deserialize as _;
use serde_json::Value;
use weft_model::Protocol;

use super::protocol::PortBinding;
use crate::{
    api::types::PortRequest,
    refusal::{Refusal, refuse},
};

/// Where they are among the options of a container.
const PORT_MAP: &str = "com.docker.network.portmap";

/// Reads the ports that shall lead to a container: first those of one number, then those of a few,
/// so that none is given away that another needs. Docker has no order of its own.
///
/// # Errors
///
/// They are none of Docker's making, or of a protocol that weft does not publish.
pub(super) fn requests(options: &BTreeMap<String, Value>) -> Result<Vec<PortRequest>, Refusal> {
    let Some(value) = options.get(PORT_MAP) else { return Ok(Vec::new()) };
    let bindings = Option::<Vec<PortBinding>>::deserialize(value).map_err(|error| {
        Refusal::field("options", format!("{PORT_MAP}={value} does not fit: {error}"))
    })?;
    let requests = bindings.unwrap_or_default();
    let mut requests = requests.iter().map(request).collect::<Result<Vec<_>, _>>()?;
    requests.sort_by_key(choice);
    Ok(requests)
}

/// How many ports of the host beside the first will do.
fn choice(request: &PortRequest) -> u16 {
    match request.host_port {
        Some(first) => request.host_port_last.unwrap_or(first).saturating_sub(first),
        None => u16::MAX,
    }
}

fn request(binding: &PortBinding) -> Result<PortRequest, Refusal> {
    let PortBinding { proto, port, host_ip, host_port, host_port_end } = *binding;
    // Numbers of IANA's.
    let protocol = match proto {
        6 => Protocol::Tcp,
        17 => Protocol::Udp,
        other => {
            let name = if other == 132 { "sctp".into() } else { format!("protocol {other}") };
            return refuse(
                "ports",
                format!("port {port}/{name} cannot be published: weft publishes tcp and udp"),
            );
        }
    };
    let some = |port: u16| (port != 0).then_some(port);
    Ok(PortRequest {
        host_ip,
        host_port: some(host_port),
        host_port_last: some(host_port).and_then(|_| some(host_port_end)),
        container_port: port,
        protocol,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(map: Value) -> Result<Vec<PortRequest>, Refusal> {
        requests(&BTreeMap::from([(PORT_MAP.to_owned(), map)]))
    }

    #[test]
    fn what_docker_sends_for_ports_is_read_with_those_first_that_leave_no_choice() {
        let asked = read(json!([
            {"Proto": 6, "IP": "", "Port": 80, "HostIP": "", "HostPort": 8090, "HostPortEnd": 8090},
            {"Proto": 17, "IP": "", "Port": 53, "HostIP": "127.0.0.1", "HostPort": 0, "HostPortEnd": 0},
            {"Proto": 6, "IP": "", "Port": 81, "HostIP": "", "HostPort": 9000, "HostPortEnd": 9009},
        ]))
        .unwrap();
        let [fixed, range, any] = &asked[..] else { panic!("{asked:?}") };
        assert_eq!((fixed.host_ip, fixed.host_port, fixed.container_port), (None, Some(8090), 80));
        assert_eq!((any.host_ip, any.host_port), (Some([127, 0, 0, 1].into()), None));
        assert_eq!((any.protocol, any.host_port_last), (Protocol::Udp, None));
        assert_eq!((range.host_port, range.host_port_last), (Some(9000), Some(9009)));
    }

    #[test]
    fn a_container_without_ports_has_none() {
        assert!(requests(&BTreeMap::new()).unwrap().is_empty());
        assert!(read(json!([])).unwrap().is_empty());
        assert!(read(Value::Null).unwrap().is_empty());
    }

    #[test]
    fn what_weft_does_not_publish_is_refused_by_name() {
        let refusal = read(json!([{"Proto": 132, "Port": 38412}])).unwrap_err();
        assert!(refusal.message.contains("38412/sctp"), "{refusal}");
        assert!(read(json!([{"Proto": 6}])).is_err());
        assert!(read(json!("8080:80")).is_err());
    }
}
