//! The hash by which nftables draws numbers (`include/linux/jhash.h`; Bob Jenkins, lookup3).

/// What `jhash … mod modulus seed seed` makes of `key`.
pub(crate) fn jhash(key: &[u8], modulus: u32, seed: u32) -> u32 {
    let scaled = u64::from(hash(key, seed)) * u64::from(modulus);
    (scaled >> 32) as u32
}

fn hash(mut key: &[u8], seed: u32) -> u32 {
    let start = 0xdead_beef_u32.wrapping_add(key.len() as u32).wrapping_add(seed);
    let [mut a, mut b, mut c] = [start; 3];
    while key.len() > 12 {
        let (words, rest) = key.split_at(12);
        let word = |at: usize| u32::from_ne_bytes(words[at..at + 4].try_into().expect("four"));
        (a, b, c) = mix(a.wrapping_add(word(0)), b.wrapping_add(word(4)), c.wrapping_add(word(8)));
        key = rest;
    }
    if key.is_empty() {
        return c;
    }
    // Byte by byte in the kernel: the order is the same on all processors.
    let mut last = [0; 12];
    last[..key.len()].copy_from_slice(key);
    let word = |at: usize| u32::from_le_bytes(last[at..at + 4].try_into().expect("four"));
    finish(a.wrapping_add(word(0)), b.wrapping_add(word(4)), c.wrapping_add(word(8)))
}

fn mix(mut a: u32, mut b: u32, mut c: u32) -> (u32, u32, u32) {
    for bits in [4, 6, 8, 16, 19, 4] {
        a = a.wrapping_sub(c) ^ c.rotate_left(bits);
        c = c.wrapping_add(b);
        (a, b, c) = (b, c, a);
    }
    (a, b, c)
}

fn finish(mut a: u32, mut b: u32, mut c: u32) -> u32 {
    c = (c ^ b).wrapping_sub(b.rotate_left(14));
    a = (a ^ c).wrapping_sub(c.rotate_left(11));
    b = (b ^ a).wrapping_sub(a.rotate_left(25));
    c = (c ^ b).wrapping_sub(b.rotate_left(16));
    a = (a ^ c).wrapping_sub(c.rotate_left(4));
    b = (b ^ a).wrapping_sub(a.rotate_left(14));
    (c ^ b).wrapping_sub(b.rotate_left(24))
}
