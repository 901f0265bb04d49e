use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    time::Duration,
};

use anyhow::Context as _;

/// What is asked for (RFC 1035 §3.2.2, RFC 3596 §2.1).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Question {
    A,
    Aaaa,
}

/// What a resolver answered.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct DnsReply {
    /// 0 no error, 3 no such name (RFC 1035 §4.1.1).
    pub rcode: u8,
    pub addresses: Vec<IpAddr>,
}

/// Asks the resolver to which `socket` is connected, once; timings are those of the socket, with
/// no process started and no resolver library between.
///
/// # Errors
///
/// No answer within `patience`, or none that can be read.
pub fn query(
    socket: &UdpSocket,
    name: &str,
    question: Question,
    patience: Duration,
) -> anyhow::Result<DnsReply> {
    let resolver: SocketAddr = socket.peer_addr()?;
    socket.set_read_timeout(Some(patience))?;
    let id = socket.local_addr()?.port();
    socket.send(&message(id, name, question)).with_context(|| format!("cannot ask {resolver}"))?;
    let mut buffer = [0; 1500];
    loop {
        let length = socket.recv(&mut buffer).with_context(|| format!("{resolver} is silent"))?;
        let answer = &buffer[..length];
        // The answer to an earlier question may still be on its way.
        if answer.starts_with(&id.to_be_bytes()) && asks_for(answer, name) {
            return parse(answer).with_context(|| format!("{resolver} sent {answer:?}"));
        }
    }
}

fn message(id: u16, name: &str, question: Question) -> Vec<u8> {
    let mut bytes = id.to_be_bytes().to_vec();
    // Recursion desired, one question.
    bytes.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    bytes.extend(encoded(name));
    let kind: u16 = match question {
        Question::A => TYPE_A,
        Question::Aaaa => TYPE_AAAA,
    };
    bytes.extend(kind.to_be_bytes());
    bytes.extend([0, 1]);
    bytes
}

fn encoded(name: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for label in name.split('.') {
        bytes.push(u8::try_from(label.len()).expect("a label of a test fits"));
        bytes.extend(label.bytes());
    }
    bytes.push(0);
    bytes
}

fn asks_for(answer: &[u8], name: &str) -> bool {
    let name = encoded(name);
    answer.get(HEADER..HEADER + name.len()).is_some_and(|asked| asked.eq_ignore_ascii_case(&name))
}

fn parse(bytes: &[u8]) -> Option<DnsReply> {
    let word = |at: usize| Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]));
    let rcode = bytes.get(3)? & 0x0f;
    let (questions, answers) = (word(4)?, word(6)?);
    let mut at = HEADER;
    for _ in 0..questions {
        at = after_name(bytes, at)? + 4;
    }
    let mut addresses = Vec::new();
    for _ in 0..answers {
        at = after_name(bytes, at)?;
        let (kind, length) = (word(at)?, usize::from(word(at + 8)?));
        let data = bytes.get(at + 10..at + 10 + length)?;
        match kind {
            TYPE_A => addresses.push(Ipv4Addr::from(<[u8; 4]>::try_from(data).ok()?).into()),
            TYPE_AAAA => addresses.push(Ipv6Addr::from(<[u8; 16]>::try_from(data).ok()?).into()),
            _ => {}
        }
        at += 10 + length;
    }
    Some(DnsReply { rcode, addresses })
}

/// Where a name ends; a pointer ends it too (RFC 1035 §4.1.4).
fn after_name(bytes: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *bytes.get(at)? {
            0 => return Some(at + 1),
            pointer if pointer & 0xc0 == 0xc0 => return Some(at + 2),
            length => at += 1 + usize::from(length),
        }
    }
}

const HEADER: usize = 12;
const TYPE_A: u16 = 1;
const TYPE_AAAA: u16 = 28;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_with_a_pointer_is_read() {
        let mut answer = message(7, "web.app", Question::A);
        answer[2] = 0x85;
        answer[7] = 1;
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 5, 0, 4, 10, 32, 0, 9]);
        let reply = parse(&answer).unwrap();
        assert_eq!(reply, DnsReply { rcode: 0, addresses: vec![[10, 32, 0, 9].into()] });
        assert!(asks_for(&answer, "WEB.app") && !asks_for(&answer, "db.app"));
    }

    #[test]
    fn a_cut_answer_is_none() {
        let mut answer = message(7, "web", Question::A);
        answer[7] = 1;
        assert_eq!(parse(&answer), None);
    }
}
