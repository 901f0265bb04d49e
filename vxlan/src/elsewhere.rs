//! Links of other namespaces, by the numbers that a namespace gives to others
//! (`net/core/net_namespace.c`). By such a number the kernel lets a link be read and deleted,
//! whatever leads into its namespace, but not be changed.

use std::{collections::BTreeMap, os::fd::AsRawFd};

use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{LinkAttribute, LinkMessage},
    nsid::{NsidAttribute, NsidMessage},
};

use crate::{
    link::Link,
    namespace::Namespace,
    netlink::{Netlink, NetlinkError, ignore_existing, ignore_missing},
};

impl Netlink {
    /// All links of the namespace that this one numbers `nsid`.
    pub(crate) fn links_elsewhere(
        &mut self,
        nsid: i32,
    ) -> Result<BTreeMap<String, Link>, NetlinkError> {
        let mut all = LinkMessage::default();
        all.attributes.push(LinkAttribute::IfNetnsId(nsid));
        self.links_of(all)
    }

    /// The link with `index` in the namespace that this one numbers `nsid`; in this one itself if
    /// there is no number.
    pub(crate) fn link_elsewhere(
        &mut self,
        nsid: Option<i32>,
        index: u32,
    ) -> Result<Link, NetlinkError> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes.extend(nsid.map(LinkAttribute::IfNetnsId));
        match self.get(RouteNetlinkMessage::GetLink(message))? {
            RouteNetlinkMessage::NewLink(message) => Ok(Link::read(message)),
            _ => Err(NetlinkError::NoInterface { name: index.to_string() }),
        }
    }

    /// The number that this namespace has given to `other`, if it has.
    pub(crate) fn nsid(&mut self, other: &Namespace) -> Result<Option<i32>, NetlinkError> {
        let mut message = NsidMessage::default();
        message.attributes.push(NsidAttribute::Fd(other.file().as_raw_fd().cast_unsigned()));
        let answer = self.get(RouteNetlinkMessage::GetNsId(message))?;
        let RouteNetlinkMessage::NewNsId(answer) = answer else { return Ok(None) };
        Ok(answer.attributes.iter().find_map(|attribute| match attribute {
            NsidAttribute::Id(nsid) if *nsid >= 0 => Some(*nsid),
            _ => None,
        }))
    }

    /// The number that this namespace gives to `other` for as long as both are there.
    pub(crate) fn number(&mut self, other: &Namespace) -> Result<i32, NetlinkError> {
        let mut message = NsidMessage::default();
        // Any that is free (`alloc_netid()`).
        message.attributes.push(NsidAttribute::Id(-1));
        message.attributes.push(NsidAttribute::Fd(other.file().as_raw_fd().cast_unsigned()));
        ignore_existing(self.request(RouteNetlinkMessage::NewNsId(message), 0))?;
        let number = self.nsid(other)?;
        number.ok_or_else(|| NetlinkError::NoInterface { name: other.path().display().to_string() })
    }

    /// The numbers that this namespace has given to others.
    pub(crate) fn numbers(&mut self) -> Result<Vec<i32>, NetlinkError> {
        let all = RouteNetlinkMessage::GetNsId(NsidMessage::default());
        let found = self.dump(&all)?.into_iter().filter_map(|message| match message {
            RouteNetlinkMessage::NewNsId(message) => {
                message.attributes.into_iter().find_map(|attribute| match attribute {
                    NsidAttribute::Id(nsid) if nsid >= 0 => Some(nsid),
                    _ => None,
                })
            }
            _ => None,
        });
        Ok(found.collect())
    }

    /// Deletes the link with `index` in the namespace that this one numbers `nsid`. Succeeds if it
    /// has gone already.
    pub(crate) fn delete_link_elsewhere(
        &mut self,
        nsid: i32,
        index: u32,
    ) -> Result<(), NetlinkError> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes.push(LinkAttribute::IfNetnsId(nsid));
        ignore_missing(self.request(RouteNetlinkMessage::DelLink(message), 0))
    }
}
