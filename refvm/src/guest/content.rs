//! The required content of a workload page: a function of the VM's seed, the page's number and its generation.
//!
//! Word 0 is the page number, and word 1 the generation. The other 510 words are a linear congruential sequence with folded
//! halves. So the page does not compress, and a byte of another page, generation or VM shows. The guest's code (`payload`) computes the same; a test compares the two.

/// 64-bit words of a page.
pub const WORDS: usize = 512;
/// Multiplies the page number into the sequence's start.
pub const PAGE_FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;
/// Multiplies the generation into the sequence's start.
pub const GENERATION_FACTOR: u64 = 0xc2b2_ae3d_27d4_eb4f;
/// Multiplier of the sequence (Knuth, MMIX).
pub const STEP_FACTOR: u64 = 6_364_136_223_846_793_005;
/// Increment of the sequence (Knuth, MMIX).
pub const STEP_INCREMENT: u64 = 1_442_695_040_888_963_407;

/// The words of a page, in order.
pub fn words(seed: u64, page: u64, generation: u32) -> impl Iterator<Item = u64> {
    let start = seed ^ page.wrapping_mul(PAGE_FACTOR) ^ u64::from(generation).wrapping_mul(GENERATION_FACTOR);
    let rest = std::iter::successors(Some(step(start)), |x| Some(step(*x))).map(|x| x ^ (x >> 32));
    [page, u64::from(generation)].into_iter().chain(rest).take(WORDS)
}

fn step(x: u64) -> u64 {
    x.wrapping_mul(STEP_FACTOR).wrapping_add(STEP_INCREMENT)
}

/// Writes the content of a page.
pub fn fill(seed: u64, page: u64, generation: u32, into: &mut [u64; WORDS]) {
    for (slot, word) in into.iter_mut().zip(words(seed, page, generation)) {
        *slot = word;
    }
}

/// Counts the wrong bytes among a page's 4096.
pub fn wrong_bytes(seed: u64, page: u64, generation: u32, found: &[u64; WORDS]) -> u64 {
    let differing = |a: u64, b: u64| (a ^ b).to_le_bytes().into_iter().filter(|byte| *byte != 0).count() as u64;
    found.iter().zip(words(seed, page, generation)).map(|(a, b)| differing(*a, b)).sum()
}

#[cfg(test)]
mod tests;
