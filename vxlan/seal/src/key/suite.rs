use weft_model::Suite;

/// The suites that a node can open, the one it likes best first.
///
/// `aes` says whether the CPU has instructions for AES and carry-less multiplication: without them
/// ChaCha20 is several times as fast.
pub fn offer(aes: bool) -> Vec<Suite> {
    match aes {
        true => vec![Suite::Aes128Gcm, Suite::Aes256Gcm, Suite::Chacha20Poly1305],
        false => vec![Suite::Chacha20Poly1305, Suite::Aes128Gcm, Suite::Aes256Gcm],
    }
}

/// The suite that a node seals with, of what it offers itself and what its peer offers.
///
/// A node that likes ChaCha20 best has no AES instructions: it gets ChaCha20 if the other one
/// offers it at all. Otherwise the sender's order decides. `None` if they share no suite.
pub fn choose(own: &[Suite], peer: &[Suite]) -> Option<Suite> {
    let chacha = Suite::Chacha20Poly1305;
    let weak = [own, peer].iter().any(|offer| offer.first() == Some(&chacha));
    let mut shared = own.iter().copied().filter(|suite| peer.contains(suite));

    match weak && own.contains(&chacha) && peer.contains(&chacha) {
        true => Some(chacha),
        false => shared.next(),
    }
}

#[cfg(test)]
mod tests {
    use Suite::{Aes128Gcm, Aes256Gcm, Chacha20Poly1305};

    use super::*;

    #[test]
    fn the_sender_chooses_unless_one_of_both_has_no_aes() {
        let (strong, weak) = (offer(true), offer(false));
        assert_eq!(choose(&strong, &strong), Some(Aes128Gcm));
        assert_eq!(choose(&[Aes256Gcm, Aes128Gcm], &strong), Some(Aes256Gcm));
        assert_eq!(choose(&strong, &weak), Some(Chacha20Poly1305));
        assert_eq!(choose(&weak, &strong), Some(Chacha20Poly1305));
        assert_eq!(choose(&weak, &[Aes256Gcm]), Some(Aes256Gcm));
        assert_eq!(choose(&[Aes128Gcm], &[Aes256Gcm]), None);
        assert_eq!(choose(&[], &strong), None);
    }
}
