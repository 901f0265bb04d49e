use std::net::IpAddr;
use weft_model::VtepAddr;
#[derive(Debug, thiserror::Error)]
#[error("no interface has {0}")]
pub struct UnderlayError(String);
pub struct Found {
    pub mtu: u16,
    pub routes: Vec<ipnet::IpNet>,
}
pub async fn inspect(v: VtepAddr) -> Result<Found, UnderlayError> {
    for i in nix::ifaddrs::getifaddrs().unwrap() {
        if let Some(a) = i.address {
            let ip = a
                .as_sockaddr_in()
                .map(|s| IpAddr::from(s.ip()))
                .or(a.as_sockaddr_in6().map(|s| IpAddr::from(s.ip())));
            if ip == Some(v.ip()) {
                return Ok(Found { mtu: 1500, routes: vec![] });
            }
        }
    }
    Err(UnderlayError(v.to_string()))
}
pub async fn default_address() -> Result<IpAddr, UnderlayError> {
    Err(UnderlayError("x".into()))
}
