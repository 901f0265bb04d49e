//! The internet checksum (RFC 1071), as sums that can be put together from parts.

/// The folded one's complement sum of `bytes` as 16-bit big-endian words; an odd last byte counts
/// as the high half of a word, so only the last of several parts may have odd length.
pub(super) fn sum(bytes: &[u8]) -> u16 {
    // The sum does not depend on byte order but for a swap at the end (RFC 1071 §2 B), so it runs
    // over native words; four lanes let the compiler use vectors.
    let mut lanes = [0u64; 4];
    let mut blocks = bytes.chunks_exact(16);
    for block in &mut blocks {
        for (lane, word) in lanes.iter_mut().zip(block.chunks_exact(4)) {
            *lane += u64::from(u32::from_ne_bytes(word.try_into().expect("chunks of four")));
        }
    }
    let mut total = lanes.iter().sum::<u64>();
    let mut words = blocks.remainder().chunks_exact(2);
    for word in &mut words {
        total += u64::from(u16::from_ne_bytes(word.try_into().expect("chunks of two")));
    }
    if let [last] = words.remainder() {
        total += u64::from(u16::from_ne_bytes([*last, 0]));
    }
    u16::from_be(fold(total))
}

/// Folds a sum of words to 16 bits, carries around.
pub(super) fn fold(mut total: u64) -> u16 {
    while total >> 16 != 0 {
        total = (total & 0xffff) + (total >> 16);
    }
    total as u16
}

/// The sum without `part`, which it has in it (RFC 1624).
pub(super) fn without(total: u16, part: u16) -> u16 {
    fold(u64::from(total) + u64::from(!part))
}

/// The sum of the pseudo-header of TCP and UDP: `addresses` are source and destination as they lie
/// in the packet, of IPv4 (RFC 9293 §3.1) or IPv6 (RFC 8200 §8.1); `length` is that of the
/// transport header and its payload.
pub(super) fn pseudo_header(addresses: &[u8], protocol: u8, length: usize) -> u16 {
    let length = length as u64;
    fold(u64::from(sum(addresses)) + u64::from(protocol) + (length >> 16) + (length & 0xffff))
}

/// What a checksum field has to hold for a sum over all that it covers. Zero is written as its
/// other form, which in UDP does not mean "no checksum" (RFC 768) and elsewhere means the same.
pub(super) fn complete(total: u16) -> u16 {
    match !total {
        0 => 0xffff,
        checksum => checksum,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_sum_is_that_of_the_words_one_by_one(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            prop_assert_eq!(sum(&bytes), naive(&bytes));
        }

        #[test]
        fn parts_of_even_length_add_up(bytes in prop::collection::vec(any::<u8>(), 0..300), cut in 0usize..150) {
            let cut = (cut * 2).min(bytes.len() & !1);
            let (head, tail) = bytes.split_at(cut);
            prop_assert_eq!(
                fold(u64::from(sum(head)) + u64::from(sum(tail))) % 0xffff,
                sum(&bytes) % 0xffff
            );
        }

        #[test]
        fn a_part_taken_out_leaves_the_rest(rest: u16, part: u16) {
            let both = fold(u64::from(rest) + u64::from(part));
            prop_assert_eq!(without(both, part) % 0xffff, rest % 0xffff);
        }
    }

    #[test]
    fn sixty_four_kibibytes_of_ones_do_not_overflow() {
        assert_eq!(sum(&vec![0xff; 65536]), 0xffff);
    }

    #[test]
    fn the_example_of_rfc_1071_holds() {
        assert_eq!(sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), 0xddf2);
    }

    fn naive(bytes: &[u8]) -> u16 {
        let mut total = 0u32;
        for pair in bytes.chunks(2) {
            total += u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
            total = (total & 0xffff) + (total >> 16);
        }
        total as u16
    }
}
