//! The options of a network.

use weft_model::{Driver, InterfaceName, Macvlan, MacvlanMode, NetworkOptions};

use crate::{
    api::types::CreateNetwork,
    refusal::{Refusal, refuse},
};

/// What `options` and the fields that mean the same ask for.
pub(super) struct Chosen {
    pub(super) encrypted: bool,
    pub(super) options: NetworkOptions,
}

/// Reads what `request` asks for.
///
/// # Errors
///
/// An option that there is not, or that does not fit its value or the driver.
pub(super) fn options(request: &CreateNetwork) -> Result<Chosen, Refusal> {
    let mut encrypted = request.encrypted;
    let mut options = NetworkOptions {
        macvlan: (request.driver == Driver::Macvlan).then(Macvlan::default),
        ..NetworkOptions::default()
    };
    for (key, value) in &request.options {
        match key.as_str() {
            "mtu" => {
                let mtu = value.parse().ok().filter(|mtu| MTU_RANGE.contains(mtu));
                let (least, most) = (MTU_RANGE.start(), MTU_RANGE.end());
                let Some(mtu) = mtu else {
                    return refuse(
                        "options",
                        format!("mtu={value} is no usable MTU: give {least} to {most} bytes"),
                    );
                };
                options.mtu = Some(mtu);
            }
            "multicast" => {
                options.multicast = switch(key, value)?;
                if request.driver.is_local() && options.multicast {
                    return refuse(
                        "options",
                        format!(
                            "multicast is for networks of several hosts, and {} is of this one alone: leave it out",
                            request.name
                        ),
                    );
                }
            }
            "icc" | DOCKER_ICC => {
                options.isolated = !switch(key, value)?;
                if request.driver != Driver::Bridge && options.isolated {
                    return refuse(
                        "options",
                        format!(
                            "{key}={value} needs driver bridge: create {} with -d bridge",
                            request.name
                        ),
                    );
                }
            }
            "parent" | "macvlan_mode" => {
                let Some(macvlan) = &mut options.macvlan else {
                    return refuse(
                        "options",
                        format!(
                            "{key}={value} needs driver macvlan: create {} with -d macvlan",
                            request.name
                        ),
                    );
                };
                match key.as_str() {
                    "parent" => macvlan.parent = Some(parent(value)?),
                    _ => macvlan.mode = mode(value)?,
                }
            }
            "encrypted" => {
                encrypted = switch(key, value)?;
                if request.encrypted && !encrypted {
                    return refuse(
                        "options",
                        format!("encrypted={value} contradicts encrypted: give one of them"),
                    );
                }
            }
            _ => {
                return refuse(
                    "options",
                    format!(
                        "{key} is no option of network {}: there are mtu, multicast, encrypted, icc, parent and macvlan_mode",
                        request.name
                    ),
                );
            }
        }
    }
    if request.driver.is_local() && encrypted {
        return refuse(
            "encrypted",
            format!(
                "nothing of {} goes between hosts, so there is nothing to encrypt: leave it out, or take driver overlay",
                request.name
            ),
        );
    }
    Ok(Chosen { encrypted, options })
}

fn parent(name: &str) -> Result<InterfaceName, Refusal> {
    name.parse().map_err(|error| Refusal::field("options", format!("parent={name}: {error}")))
}

fn mode(name: &str) -> Result<MacvlanMode, Refusal> {
    let found = MacvlanMode::ALL.into_iter().find(|mode| mode.as_str() == name);
    found.ok_or_else(|| {
        let all = MacvlanMode::ALL.map(MacvlanMode::as_str).join(", ");
        Refusal::field("options", format!("macvlan_mode={name}: there are {all}"))
    })
}

/// Docker's own name for `icc`.
const DOCKER_ICC: &str = "com.docker.network.bridge.enable_icc";

/// Reads an option that is on or off. Its name alone switches it on, as in Docker.
fn switch(key: &str, value: &str) -> Result<bool, Refusal> {
    match value {
        "" | "true" => Ok(true),
        "false" => Ok(false),
        _ => refuse("options", format!("{key}={value}: give true or false")),
    }
}

/// Bytes: the least that IPv6 needs (RFC 8200 §5), and the most that a VXLAN packet can carry.
const MTU_RANGE: std::ops::RangeInclusive<u16> = 1280..=65_450;
