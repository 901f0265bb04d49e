//! The bodies of Docker's plugin protocol: libnetwork's `drivers/remote/api` and `ipams/remote/api`,
//! the same from Docker 1.9 on.

use std::{collections::BTreeMap, fmt, net::IpAddr};

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use weft_model::MacAddr;

/// What Docker calls a network or an endpoint: 1 to 64 letters and digits, 64 hexadecimal ones
/// mostly.
#[derive(Clone, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(try_from = "String", into = "String")]
pub(super) struct EngineId(String);

impl EngineId {
    pub(super) fn as_str(&self) -> &str {
        &self.0
    }

    /// The first 12 characters, as Docker's tables show it.
    pub(super) fn short(&self) -> &str {
        self.0.get(..12).unwrap_or(&self.0)
    }
}

impl TryFrom<String> for EngineId {
    type Error = InvalidEngineId;

    fn try_from(text: String) -> Result<Self, InvalidEngineId> {
        let valid =
            (1..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric());
        if valid { Ok(Self(text)) } else { Err(InvalidEngineId(text)) }
    }
}

impl From<EngineId> for String {
    fn from(id: EngineId) -> Self {
        id.0
    }
}

impl fmt::Display for EngineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.short())
    }
}

#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no identifier of Docker's: 1 to 64 letters and digits")]
pub(super) struct InvalidEngineId(String);

/// `IpamDriver.RequestPool`
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct RequestPool {
    #[serde(deserialize_with = "optional")]
    pub(super) pool: Option<IpNet>,
    #[serde(default, deserialize_with = "optional")]
    pub(super) sub_pool: Option<IpNet>,
    #[serde(default, deserialize_with = "nullable")]
    pub(super) options: BTreeMap<String, String>,
    #[serde(default)]
    pub(super) v6: bool,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct PoolGiven {
    #[serde(rename = "PoolID")]
    pub(super) pool_id: String,
    pub(super) pool: IpNet,
    pub(super) data: BTreeMap<String, String>,
}

/// `IpamDriver.ReleasePool`
#[derive(Debug, Deserialize)]
pub(super) struct ReleasePool {
    #[serde(rename = "PoolID")]
    pub(super) pool_id: String,
}

/// `IpamDriver.RequestAddress`
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct RequestAddress {
    #[serde(rename = "PoolID")]
    pub(super) pool_id: String,
    #[serde(default, deserialize_with = "optional")]
    pub(super) address: Option<IpAddr>,
    #[serde(default, deserialize_with = "nullable")]
    pub(super) options: BTreeMap<String, String>,
}

impl RequestAddress {
    /// Whether it is the network's gateway that is asked for.
    pub(super) fn is_gateway(&self) -> bool {
        let kind = self.options.get("RequestAddressType");
        kind.is_some_and(|kind| kind == "com.docker.network.gateway")
    }
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct AddressGiven {
    pub(super) address: String,
    pub(super) data: BTreeMap<String, String>,
}

/// `IpamDriver.ReleaseAddress`
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct ReleaseAddress {
    #[serde(rename = "PoolID")]
    pub(super) pool_id: String,
    pub(super) address: IpAddr,
}

/// `NetworkDriver.CreateNetwork`
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct CreateNetwork {
    #[serde(rename = "NetworkID")]
    pub(super) network_id: EngineId,
    #[serde(default, deserialize_with = "nullable")]
    pub(super) options: BTreeMap<String, Value>,
    #[serde(rename = "IPv4Data", default, deserialize_with = "nullable")]
    pub(super) ipv4: Vec<IpamData>,
    #[serde(rename = "IPv6Data", default, deserialize_with = "nullable")]
    pub(super) ipv6: Vec<IpamData>,
}

/// What became of one pool of a network.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct IpamData {
    pub(super) address_space: String,
    pub(super) pool: IpNet,
    #[serde(default, deserialize_with = "optional")]
    pub(super) gateway: Option<IpNet>,
    #[serde(default, deserialize_with = "nullable")]
    pub(super) aux_addresses: BTreeMap<String, IpNet>,
}

/// `NetworkDriver.AllocateNetwork`, on a manager of a swarm: the options are what `-o` gave.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct AllocateNetwork {
    #[serde(rename = "NetworkID")]
    pub(super) network_id: EngineId,
    #[serde(default, deserialize_with = "nullable")]
    pub(super) options: BTreeMap<String, String>,
    #[serde(rename = "IPv4Data", default, deserialize_with = "nullable")]
    pub(super) ipv4: Vec<IpamData>,
    #[serde(rename = "IPv6Data", default, deserialize_with = "nullable")]
    pub(super) ipv6: Vec<IpamData>,
}

/// `NetworkDriver.DeleteNetwork`, `FreeNetwork`
#[derive(Debug, Deserialize)]
pub(super) struct DeleteNetwork {
    #[serde(rename = "NetworkID")]
    pub(super) network_id: EngineId,
}

/// `NetworkDriver.CreateEndpoint`
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct CreateEndpoint {
    #[serde(rename = "NetworkID")]
    pub(super) network_id: EngineId,
    #[serde(rename = "EndpointID")]
    pub(super) endpoint_id: EngineId,
    #[serde(default, deserialize_with = "nullable")]
    pub(super) interface: Interface,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub(super) struct Interface {
    #[serde(deserialize_with = "optional")]
    pub(super) address: Option<IpNet>,
    #[serde(rename = "AddressIPv6", deserialize_with = "optional")]
    pub(super) address_v6: Option<IpNet>,
    #[serde(deserialize_with = "optional")]
    pub(super) mac_address: Option<MacAddr>,
}

/// Fields that Docker has filled must not be answered again.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct EndpointCreated {
    pub(super) interface: InterfaceGiven,
}

#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct InterfaceGiven {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) mac_address: Option<MacAddr>,
}

/// `NetworkDriver.DeleteEndpoint`, `Leave`, `EndpointOperInfo`, `RevokeExternalConnectivity`
#[derive(Debug, Deserialize)]
pub(super) struct EndpointNamed {
    #[serde(rename = "EndpointID")]
    pub(super) endpoint_id: EngineId,
}

/// `NetworkDriver.Join`
#[derive(Debug, Deserialize)]
pub(super) struct Join {
    #[serde(rename = "NetworkID")]
    pub(super) network_id: EngineId,
    #[serde(rename = "EndpointID")]
    pub(super) endpoint_id: EngineId,
    #[serde(rename = "SandboxKey")]
    pub(super) sandbox_key: String,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Joined {
    pub(super) interface_name: InterfaceName,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) gateway: Option<String>,
    #[serde(rename = "GatewayIPv6", skip_serializing_if = "Option::is_none")]
    pub(super) gateway_v6: Option<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct InterfaceName {
    pub(super) src_name: String,
    pub(super) dst_prefix: String,
}

/// `NetworkDriver.ProgramExternalConnectivity`
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct ProgramExternalConnectivity {
    #[serde(rename = "NetworkID")]
    pub(super) network_id: EngineId,
    #[serde(rename = "EndpointID")]
    pub(super) endpoint_id: EngineId,
    #[serde(default, deserialize_with = "nullable")]
    pub(super) options: BTreeMap<String, Value>,
}

/// One of `com.docker.network.portmap`, a port that the user published: libnetwork's
/// `types.PortBinding`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct PortBinding {
    /// As in the IP header.
    pub(super) proto: u8,
    /// The container's.
    pub(super) port: u16,
    #[serde(rename = "HostIP", default, deserialize_with = "optional")]
    pub(super) host_ip: Option<IpAddr>,
    /// Zero where any will do.
    #[serde(default)]
    pub(super) host_port: u16,
    /// The last one that will do; zero, or the first, where there is but one.
    #[serde(default)]
    pub(super) host_port_end: u16,
}

/// Reads an empty text, or null, as nothing.
fn optional<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: std::str::FromStr,
    T::Err: fmt::Display,
{
    match Option::<String>::deserialize(deserializer)?.as_deref() {
        None | Some("") => Ok(None),
        Some(text) => text
            .parse()
            .map(Some)
            .map_err(|error| serde::de::Error::custom(format!("{text:?}: {error}"))),
    }
}

/// Reads null as the default: Go writes an empty map so.
fn nullable<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Option::<T>::deserialize(deserializer).map(Option::unwrap_or_default)
}
