//! From the bytes of a query to the bytes of its answer.
//!
//! Nothing here waits or fails: whatever arrives, the result is an answer, a query to send on, or
//! silence. Names that nobody may resolve from an `internal` network get NXDOMAIN rather than
//! REFUSED or SERVFAIL: musl ignores the latter two until its timeout, glibc reports them as a
//! passing fault that programs retry. That NXDOMAIN has no SOA record, so nobody caches it
//! (RFC 2308 §5).

use std::{collections::BTreeMap, net::IpAddr, time::Duration};

use domain::{
    base::{
        Message, MessageBuilder, Name, ParsedName, Question, Rtype, Serial, StaticCompressor, Ttl,
        header::HeaderSection,
        iana::{Class, Opcode, OptRcode, Rcode},
        message_builder::{AdditionalBuilder, AnswerBuilder, PushError},
        opt::{Opt, OptRecord},
        rdata::ComposeRecordData,
        record::ComposeRecord,
    },
    rdata::{A, Aaaa, Ptr, Soa, Srv},
};
use rand::Rng;
use weft_model::{DnsName, NetworkId};

use crate::{
    key::Key,
    zone::{self, Directory, Finding, View},
};

/// How a query came, and its answer goes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Transport {
    Udp,
    Tcp,
}

/// Where a query came from.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Asker {
    /// The network whose listener was asked.
    pub network: NetworkId,
    pub address: IpAddr,
    pub transport: Transport,
    /// Whether it has a resolver of its own for names that are not ours. That one decides what an
    /// internal network may ask.
    pub falls_through: bool,
}

/// What to do about a query.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Reply {
    Answer {
        message: Vec<u8>,
        outcome: Outcome,
        truncated: bool,
    },
    Forward(Forward),
    /// Too short for a header, or itself a response: to answer could start a loop.
    Drop,
}

/// A query for the upstream resolvers.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Forward {
    /// As the client sent it, except that it offers no more than [`UDP_PAYLOAD`] bytes.
    pub query: Vec<u8>,
    /// Bytes that the client takes in one answer.
    pub limit: usize,
    /// Whether the name may be one of ours that is not known yet: nobody else may say that there is
    /// none.
    pub doubtful: bool,
}

/// What became of a query that was answered at once.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Outcome {
    Answered,
    NoData,
    NxDomain,
    /// FORMERR, NOTIMP, BADVERS or REFUSED.
    Refused,
    /// SERVFAIL: the directory does not know the listener's network yet, or not all names.
    Failed,
}

/// The largest UDP answer that is sent, in bytes, however much the client offers: it fits every
/// overlay's MTU (dnsflagday.net 2020).
pub const UDP_PAYLOAD: u16 = 1232;

/// Decides about one query. `ttl` is that of all records, and how long a negative answer holds.
pub fn answer(
    packet: &[u8],
    asker: &Asker,
    directory: &Directory,
    ttl: Duration,
    rng: &mut impl Rng,
) -> Reply {
    let query = match Query::parse(packet) {
        Ok(query) => query,
        Err(Rejection::Silent) => return Reply::Drop,
        Err(Rejection::Rcode(rcode)) => {
            return Reply::Answer {
                message: bare(packet, rcode),
                outcome: Outcome::Refused,
                truncated: false,
            };
        }
    };
    let view = directory.view(asker.network, asker.address);
    let forwards = asker.falls_through || view.as_ref().is_some_and(View::forwards);
    let draft = Draft { query: &query, forwards, limit: query.limit(asker.transport), ttl };

    if let Some(rcode) = query.refusal() {
        return draft.empty(rcode, Outcome::Refused);
    }
    let Some(view) = view else {
        if asker.falls_through {
            return Reply::Forward(query.forward(asker.transport, true));
        }
        return draft.empty(OptRcode::SERVFAIL, Outcome::Failed);
    };
    let name = query.key();
    let found = match query.question.qtype() {
        Rtype::SRV => view.find_backends(&name, rng),
        _ => view.find(&name, rng),
    };
    match found {
        Finding::Foreign if forwards => {
            Reply::Forward(query.forward(asker.transport, view.is_doubtful(&name)))
        }
        Finding::Foreign if view.is_doubtful(&name) => {
            draft.empty(OptRcode::SERVFAIL, Outcome::Failed)
        }
        Finding::Missing { .. } | Finding::Empty { .. } if view.is_incomplete() => {
            draft.empty(OptRcode::SERVFAIL, Outcome::Failed)
        }
        Finding::Foreign => draft.empty(OptRcode::NXDOMAIN, Outcome::NxDomain),
        finding => draft.found(finding, view.domain(), asker.transport),
    }
}

/// SERVFAIL to `query`, which was to be forwarded.
pub(crate) fn servfail(query: &[u8]) -> Vec<u8> {
    without_records(query, OptRcode::SERVFAIL, false)
}

/// An answer to `query` that says no more than that the client should come again by TCP.
pub(crate) fn truncated(query: &[u8]) -> Vec<u8> {
    without_records(query, OptRcode::NOERROR, true)
}

/// Whether it says that there is no such name.
pub(crate) fn denies(reply: &[u8]) -> bool {
    Message::from_slice(reply).is_ok_and(|message| message.header().rcode() == Rcode::NXDOMAIN)
}

/// Whether the TC bit is set.
pub(crate) fn is_truncated(reply: &[u8]) -> bool {
    Message::from_slice(reply).is_ok_and(|message| message.header().tc())
}

fn without_records(packet: &[u8], rcode: OptRcode, truncated: bool) -> Vec<u8> {
    let Ok(query) = Query::parse(packet) else {
        return bare(packet, Rcode::FORMERR);
    };
    let limit = usize::from(UDP_PAYLOAD);
    let draft = Draft { query: &query, forwards: true, limit, ttl: Duration::ZERO };
    let mut answer = draft.start(rcode);
    answer.header_mut().set_tc(truncated);
    draft.finish(answer.additional(), rcode)
}

/// A header alone: the answer to what could not be read further.
fn bare(packet: &[u8], rcode: Rcode) -> Vec<u8> {
    let mut section = HeaderSection::new();
    if let Ok(message) = Message::from_slice(packet) {
        let (asked, header) = (message.header(), section.header_mut());
        header.set_id(asked.id());
        header.set_opcode(asked.opcode());
        header.set_rd(asked.rd());
    }
    section.header_mut().set_qr(true);
    section.header_mut().set_rcode(rcode);
    section.as_slice().to_vec()
}

/// A query that was read to its end.
struct Query<'a> {
    message: &'a Message<[u8]>,
    question: Question<ParsedName<&'a [u8]>>,
    edns: Option<Edns>,
}

/// The sender's OPT record (RFC 6891 §6.1).
#[derive(Clone, Copy, Debug)]
struct Edns {
    /// Where in the packet the record starts.
    offset: usize,
    payload: u16,
    version: u8,
    dnssec_ok: bool,
}

enum Rejection {
    Silent,
    Rcode(Rcode),
}

impl<'a> Query<'a> {
    fn parse(packet: &'a [u8]) -> Result<Self, Rejection> {
        let message = Message::from_slice(packet).map_err(|_| Rejection::Silent)?;
        if message.header().qr() {
            return Err(Rejection::Silent);
        }
        if message.header().opcode() != Opcode::QUERY {
            return Err(Rejection::Rcode(Rcode::NOTIMP));
        }
        Self::parse_sections(message).ok_or(Rejection::Rcode(Rcode::FORMERR))
    }

    fn parse_sections(message: &'a Message<[u8]>) -> Option<Self> {
        let counts = message.header_counts();
        if (counts.qdcount(), counts.ancount(), counts.nscount()) != (1, 0, 0) {
            return None;
        }
        let question = message.sole_question().ok()?;
        // There is nothing before the question that its name could point to.
        if question.qname().is_compressed() {
            return None;
        }

        let mut edns = None;
        let mut additional = message.additional().ok()?;
        let mut offset = additional.pos();
        while let Some(record) = additional.next() {
            let record = record.ok()?;
            if record.rtype() == Rtype::OPT {
                if edns.is_some() || !record.owner().is_root() {
                    return None;
                }
                let opt = OptRecord::from_record(record.to_record::<Opt<_>>().ok()??);
                edns = Some(Edns {
                    offset,
                    payload: opt.udp_payload_size(),
                    version: opt.version(),
                    dnssec_ok: opt.dnssec_ok(),
                });
            }
            offset = additional.pos();
        }
        (offset == message.as_slice().len()).then_some(Self { message, question, edns })
    }

    fn key(&self) -> Key {
        let labels: Vec<&[u8]> = self
            .question
            .qname()
            .iter()
            .map(|label| label.as_slice())
            .filter(|label| !label.is_empty())
            .collect();
        Key::of_wire(labels.into_iter())
    }

    /// Why this query gets no answer, whatever its name is.
    fn refusal(&self) -> Option<OptRcode> {
        let (class, rtype) = (self.question.qclass(), self.question.qtype());
        match (class, rtype) {
            _ if self.edns.is_some_and(|edns| edns.version > 0) => Some(OptRcode::BADVERS),
            (_, Rtype::OPT) => Some(OptRcode::FORMERR),
            (_, Rtype::AXFR | Rtype::IXFR) => Some(OptRcode::REFUSED),
            (_, Rtype::ANY) if matches!(class, Class::IN | Class::ANY) => None,
            // The rest of the range is for meta-types (RFC 6895 §3.1).
            (_, meta) if (128..=255).contains(&meta.to_int()) => Some(OptRcode::NOTIMP),
            (Class::IN | Class::ANY, _) => None,
            _ => Some(OptRcode::REFUSED),
        }
    }

    fn limit(&self, transport: Transport) -> usize {
        match (transport, self.edns) {
            (Transport::Tcp, _) => usize::from(u16::MAX),
            (Transport::Udp, None) => MIN_UDP_PAYLOAD,
            (Transport::Udp, Some(edns)) => {
                usize::from(edns.payload.min(UDP_PAYLOAD)).max(MIN_UDP_PAYLOAD)
            }
        }
    }

    fn forward(&self, transport: Transport, doubtful: bool) -> Forward {
        let mut query = self.message.as_slice().to_vec();
        if let Some(edns) = self.edns.filter(|edns| edns.payload > UDP_PAYLOAD) {
            // The payload size lies behind the root's one byte and the type's two.
            let at = edns.offset + 3;
            query[at..at + 2].copy_from_slice(&UDP_PAYLOAD.to_be_bytes());
        }
        Forward { query, limit: self.limit(transport), doubtful }
    }

    /// The rightmost `labels` labels of the name that was asked for.
    fn zone(&self, labels: usize) -> ParsedName<&'a [u8]> {
        let qname = self.question.qname();
        let skipped = qname.label_count().saturating_sub(labels + 1);
        qname.iter_suffixes().nth(skipped).unwrap_or(*qname)
    }
}

type Target = StaticCompressor<Vec<u8>>;

/// An answer in the making.
struct Draft<'a> {
    query: &'a Query<'a>,
    forwards: bool,
    limit: usize,
    ttl: Duration,
}

impl Draft<'_> {
    fn empty(&self, rcode: OptRcode, outcome: Outcome) -> Reply {
        let message = self.finish(self.start(rcode).additional(), rcode);
        Reply::Answer { message, outcome, truncated: false }
    }

    fn found(&self, finding: Finding, domain: &DnsName, transport: Transport) -> Reply {
        let rtype = self.query.question.qtype();
        let any = rtype == Rtype::ANY;
        let mut answer = self.start(OptRcode::NOERROR);
        answer.header_mut().set_aa(true);
        let pushed = match &finding {
            Finding::Addresses { ips, .. } => {
                let family = match rtype {
                    Rtype::A => Some(true),
                    Rtype::AAAA => Some(false),
                    // One record set is enough for ANY (RFC 8482 §4.1).
                    Rtype::ANY => Some(ips.iter().any(IpAddr::is_ipv4)),
                    _ => None,
                };
                let mut chosen = ips.iter().filter(|ip| Some(ip.is_ipv4()) == family);
                chosen.try_for_each(|ip| self.push_address(&mut answer, *ip))
            }
            Finding::Pointers { names, .. } if any || rtype == Rtype::PTR => names
                .iter()
                .try_for_each(|name| self.push(&mut answer, Ptr::new(wire(name.as_str())))),
            Finding::Targets { targets, .. } => {
                targets.iter().try_for_each(|target| self.push(&mut answer, srv(target)))
            }
            Finding::Apex { zone } if any || rtype == Rtype::SOA => {
                answer.push(self.soa(*zone, domain))
            }
            _ => Ok(()),
        };
        if pushed.is_ok() && answer.counts().ancount() == 0 {
            return self.negative(&finding, domain);
        }
        // By TCP there is no larger answer to come back for: what fits 64 KiB is all there is.
        let truncated = pushed.is_err() && transport == Transport::Udp;
        answer.header_mut().set_tc(truncated);
        let mut additional = answer.additional();
        if let (Finding::Targets { targets, .. }, false) = (&finding, truncated) {
            self.push_addresses(&mut additional, targets);
        }
        let message = self.finish(additional, OptRcode::NOERROR);
        Reply::Answer { message, outcome: Outcome::Answered, truncated }
    }

    /// Adds the addresses of `targets`. What does not fit is left out: it was not asked for
    /// (RFC 2181 §9).
    fn push_addresses(&self, additional: &mut AdditionalBuilder<Target>, targets: &[zone::Target]) {
        let named: BTreeMap<&DnsName, &[IpAddr]> =
            targets.iter().map(|target| (&target.name, target.addresses.as_slice())).collect();
        for (name, ip) in
            named.into_iter().flat_map(|(name, ips)| ips.iter().map(move |ip| (name, ip)))
        {
            let owner = wire(name.as_str());
            let pushed = match *ip {
                IpAddr::V4(ip) => additional.push((owner, Class::IN, self.ttl(), A::new(ip))),
                IpAddr::V6(ip) => additional.push((owner, Class::IN, self.ttl(), Aaaa::new(ip))),
            };
            if pushed.is_err() {
                return;
            }
        }
    }

    /// NXDOMAIN, or NOERROR without records, and how long that holds (RFC 2308 §2).
    fn negative(&self, finding: &Finding, domain: &DnsName) -> Reply {
        let (zone, rcode, outcome) = match finding {
            Finding::Addresses { zone, .. }
            | Finding::Pointers { zone, .. }
            | Finding::Targets { zone, .. }
            | Finding::Apex { zone }
            | Finding::Empty { zone } => (*zone, OptRcode::NOERROR, Outcome::NoData),
            Finding::Missing { zone } => (*zone, OptRcode::NXDOMAIN, Outcome::NxDomain),
            Finding::Foreign => return self.empty(OptRcode::NXDOMAIN, Outcome::NxDomain),
        };
        let mut authority = self.start(rcode).authority();
        authority.header_mut().set_aa(true);
        // Where it does not fit, the answer is as right without it, but is not cached.
        let _ = authority.push(self.soa(zone, domain));
        let message = self.finish(authority.additional(), rcode);
        Reply::Answer { message, outcome, truncated: false }
    }

    /// Begins an answer, leaving room for the OPT record.
    fn start(&self, rcode: OptRcode) -> AnswerBuilder<Target> {
        let target = StaticCompressor::new(Vec::with_capacity(512));
        let builder = MessageBuilder::from_target(target).expect("a vector grows as needed");
        let mut answer = builder
            .start_answer(self.query.message, rcode.rcode())
            .expect("a question is at most 259 bytes and no limit is set yet");
        answer.header_mut().set_ra(self.forwards);
        answer.header_mut().set_cd(self.query.message.header().cd());
        let reserved = if self.query.edns.is_some() { OPT_LEN } else { 0 };
        // The builder's limit is the first length that is too long.
        answer.set_push_limit(self.limit - reserved + 1);
        answer
    }

    fn finish(&self, mut additional: AdditionalBuilder<Target>, rcode: OptRcode) -> Vec<u8> {
        if let Some(edns) = self.query.edns {
            additional.clear_push_limit();
            additional
                .opt(|opt| {
                    opt.set_udp_payload_size(UDP_PAYLOAD);
                    opt.set_dnssec_ok(edns.dnssec_ok);
                    opt.set_rcode(rcode);
                    Ok(())
                })
                .expect("one record more is no overflow");
        }
        additional.finish().into_target()
    }

    fn push_address(
        &self,
        answer: &mut AnswerBuilder<Target>,
        ip: IpAddr,
    ) -> Result<(), PushError> {
        match ip {
            IpAddr::V4(ip) => self.push(answer, A::new(ip)),
            IpAddr::V6(ip) => self.push(answer, Aaaa::new(ip)),
        }
    }

    fn push(
        &self,
        answer: &mut AnswerBuilder<Target>,
        data: impl ComposeRecordData,
    ) -> Result<(), PushError> {
        answer.push((self.query.question.qname(), Class::IN, self.ttl(), data))
    }

    /// The start of authority of the rightmost `labels` labels of the name that was asked for.
    fn soa(&self, labels: usize, domain: &DnsName) -> impl ComposeRecord {
        let ttl = self.ttl();
        let (mname, rname) = (wire(domain.as_str()), wire("nobody.invalid"));
        let soa = Soa::new(mname, rname, Serial(1), ttl, ttl, ttl, ttl);
        (self.query.zone(labels), Class::IN, ttl, soa)
    }

    fn ttl(&self) -> Ttl {
        Ttl::from_secs(u32::try_from(self.ttl.as_secs()).unwrap_or(u32::MAX >> 1))
    }
}

fn srv(target: &zone::Target) -> Srv<Name<Vec<u8>>> {
    Srv::new(0, target.weight, target.port, wire(target.name.as_str()))
}

fn wire(name: &str) -> Name<Vec<u8>> {
    Name::vec_from_str(name).expect("a checked name fits the wire")
}

/// An OPT record without options, in bytes.
const OPT_LEN: usize = 11;
/// What every client takes by UDP, in bytes (RFC 1035 §4.2.1).
const MIN_UDP_PAYLOAD: usize = 512;
