//! What `traffic` writes where: known to both sides of a test.

/// Bytes of a block.
pub const BLOCK: usize = 4096;

/// What block `n` holds: no two blocks are alike, nor two places of one.
pub fn block(n: u64) -> [u8; BLOCK] {
    let mut bytes = [0; BLOCK];
    for (place, word) in bytes.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&mix(n << 9 | place as u64).to_le_bytes());
    }
    bytes
}

/// Where the `n`th of `blocks` blocks goes: all over the disk, each place once.
pub fn place(n: u64, blocks: u64) -> u64 {
    /// A prime, so that no disk of a sensible size has it for a factor.
    const STEP: u64 = 7_368_787;
    n % blocks * (STEP % blocks) % blocks
}

/// Splitmix64's finalizer.
fn mix(mut word: u64) -> u64 {
    word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ word >> 31
}
