//! Good inputs, of which fuzzing makes bad ones.

/// For each target, by its name, what it begins with.
pub fn seeds() -> Vec<(&'static str, Vec<Vec<u8>>)> {
    let mut frames = vec![arp(), solicitation()];
    let mut supers = Vec::new();
    let mut runs = Vec::new();
    for (v6, tcp) in [(false, true), (false, false), (true, true), (true, false)] {
        frames.push(packet(v6, tcp, 0, 100));
        frames.push(packet(v6, tcp, 0, 1400));
        let (start, offset) = (if v6 { 54 } else { 34 }, if tcp { 16 } else { 6 });
        for (kind, len) in [
            (
                if !tcp {
                    5
                } else if v6 {
                    4
                } else {
                    1
                },
                900u16,
            ),
            (0, 100),
        ] {
            let mut bytes = vec![1, kind];
            for word in [0, if kind == 0 { 0 } else { 200 }, start, offset] {
                bytes.extend(u16::to_ne_bytes(word));
            }
            bytes.extend(packet(v6, tcp, 0, len));
            supers.push(bytes);
        }
        let mut run = Vec::new();
        for index in 0..4u8 {
            let bytes = packet(v6, tcp, index, 100);
            run.extend([bytes.len() as u8, 0, 2, 0, index]);
            run.extend(bytes);
        }
        runs.push(run);
    }
    let tagged = |frame: &Vec<u8>| [&frame[..12], &[0x81, 0, 0, 1], &frame[12..]].concat();
    frames.extend(frames.clone().iter().map(tagged));
    let frames: Vec<Vec<u8>> =
        frames.into_iter().map(|frame| [&[97][..], &frame].concat()).collect();
    let packets = frames.iter().map(|frame| [&[0, 0, 0, 0][..], frame].concat()).collect();
    vec![("frames", frames), ("split", supers), ("coalesce", runs), ("packets", packets)]
}

fn packet(v6: bool, tcp: bool, index: u8, payload: u16) -> Vec<u8> {
    let transport = payload + if tcp { 20 } else { 8 };
    let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
    let protocol = if tcp { 6 } else { 17 };
    if v6 {
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        frame.extend(transport.to_be_bytes());
        frame.extend([protocol, 64]);
        frame.extend([0xfd; 31]);
        frame.push(2);
    } else {
        frame.extend([8, 0, 0x45, 0]);
        frame.extend((transport + 20).to_be_bytes());
        frame.extend([0, index, 0x00, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        let checksum = !ones(&frame[14..34]);
        frame[24..26].copy_from_slice(&checksum.to_be_bytes());
    }
    frame.extend([1, 2, 3, 4]);
    if tcp {
        frame.extend((u32::from(index) * u32::from(payload)).to_be_bytes());
        frame.extend([0, 0, 0, 9, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
    } else {
        frame.extend(transport.to_be_bytes());
        frame.extend([0, 0]);
    }
    frame.extend(vec![7; payload.into()]);
    frame
}

fn arp() -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, 0, 1, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend([2, 0, 0, 0, 0, 1, 10, 0, 0, 1, 0, 0, 0, 0, 0, 0, 10, 0, 0, 2]);
    frame
}

fn solicitation() -> Vec<u8> {
    let mut frame = vec![0x33, 0x33, 0xff, 0xfd, 0xfd, 2, 2, 0, 0, 0, 0, 1, 0x86, 0xdd];
    frame.extend([0x60, 0, 0, 0, 0, 24, 58, 255]);
    frame.extend([0xfd; 16]);
    frame.extend([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, 0xfd, 0xfd, 2]);
    let mut message = vec![135, 0, 0, 0, 0, 0, 0, 0];
    message.extend([0xfd; 15]);
    message.push(2);
    let covered = [&frame[22..], &[0, 0, 0, 24, 0, 0, 0, 58], &message].concat();
    message[2..4].copy_from_slice(&(!ones(&covered)).to_be_bytes());
    frame.extend(message);
    frame
}

/// The one's complement sum of big-endian words.
pub(crate) fn ones(bytes: &[u8]) -> u16 {
    let mut sum: u64 = bytes
        .chunks(2)
        .map(|word| u64::from(word[0]) << 8 | u64::from(word.get(1).copied().unwrap_or(0)))
        .sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}
