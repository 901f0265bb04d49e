use std::net::IpAddr;

use crate::{Namespace, NetlinkError, netlink::Netlink};

/// Leads the default routes of `sandbox` through its interface `ifname`, by `gateways`, one a family.
///
/// A default route by one of `displaced` is replaced, without a moment in which there is none. One by
/// any other gateway is somebody else's and stays, and so does that of a family without a gateway.
///
/// # Errors
///
/// The sandbox or the interface has gone, or a gateway is not on its subnet.
pub fn lead_out(
    sandbox: &Namespace,
    ifname: &str,
    gateways: &[IpAddr],
    displaced: &[IpAddr],
) -> Result<(), NetlinkError> {
    let mut netlink = Netlink::open(sandbox)?;
    let index = netlink.index(ifname)?;
    let routes = netlink.default_routes()?;
    for &gateway in gateways {
        let existing = routes.iter().find(|(ip, _)| ip.is_ipv4() == gateway.is_ipv4());
        match existing {
            None => netlink.add_default_route(index, gateway, false)?,
            Some((ip, by)) if (*ip, *by) != (gateway, index) && displaced.contains(ip) => {
                netlink.add_default_route(index, gateway, true)?;
            }
            Some(_) => {}
        }
    }
    Ok(())
}
