//! Writes what each fuzz target begins with to `fuzz/corpus/`; `make fuzz` runs it.

use std::{fs, io, path::Path};

#[expect(unreachable_pub, reason = "a file of the library of the fuzz targets")]
#[path = "../fuzz/src/seeds.rs"]
mod seeds;

fn main() -> io::Result<()> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    for (target, seeds) in seeds::seeds() {
        fs::create_dir_all(corpus.join(target))?;
        for (index, seed) in seeds.iter().enumerate() {
            fs::write(corpus.join(target).join(format!("seed-{index}")), seed)?;
        }
    }
    Ok(())
}
