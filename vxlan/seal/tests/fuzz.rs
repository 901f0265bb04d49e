//! The fuzz targets on a stable compiler: a fixed number of seeded changes of good inputs. What
//! libFuzzer finds by coverage, `make fuzz` looks for.

#[expect(unreachable_pub, reason = "the library of the fuzz targets, whose public items these are")]
#[path = "../fuzz/src/lib.rs"]
mod targets;

/// So many changed inputs each target gets here; `FUZZ_INPUTS` gives more of them.
const INPUTS: u64 = 20_000;

#[test]
fn any_frame_is_read_or_refused() {
    fuzz("frames", targets::frames);
}

#[test]
fn any_super_frame_is_cut_to_good_frames() {
    fuzz("split", targets::split);
}

#[test]
fn any_packets_come_together_to_what_can_be_cut_to_the_same() {
    fuzz("coalesce", targets::coalesce);
}

#[test]
fn any_packet_is_opened_once_or_refused() {
    fuzz("packets", targets::packets);
}

fn fuzz(name: &str, target: fn(&[u8])) {
    let seeds = targets::seeds();
    let (_, seeds) = seeds.iter().find(|(target, _)| *target == name).expect("it has seeds");
    for seed in seeds {
        target(seed);
    }
    let inputs =
        std::env::var("FUZZ_INPUTS").map_or(INPUTS, |inputs| inputs.parse().expect("a number"));
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for _ in 0..inputs {
        target(&changed(seeds, &mut random));
    }
}

/// A seed with a few changes: bytes, bits, a cut, a piece doubled, a piece of another seed.
fn changed(seeds: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut bytes = seeds[random.below(seeds.len())].clone();
    for _ in 0..=random.below(6) {
        let at = random.below(bytes.len() + 1);
        // Most of what matters is in front.
        let near = random.below(bytes.len().min(100) + 1);
        match random.below(7) {
            0..=1 => bytes.get_mut(near).into_iter().for_each(|byte| *byte = random.next() as u8),
            2 => bytes.get_mut(near).into_iter().for_each(|byte| *byte ^= 1 << random.below(8)),
            3 => bytes.get_mut(at).into_iter().for_each(|byte| *byte = random.next() as u8),
            4 => bytes.truncate(at),
            5 => bytes.extend_from_within(near..at.max(near)),
            _ => {
                let other = &seeds[random.below(seeds.len())];
                let from = random.below(other.len());
                bytes.truncate(at);
                bytes.extend(&other[from..]);
            }
        }
    }
    bytes
}

/// Marsaglia's xorshift: the same numbers in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }
}
