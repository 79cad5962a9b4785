//! Takes the ELF kernel out of a bzImage whose payload is LZ4's legacy format, as Debian's is.
//!
//! Linux `Documentation/arch/x86/boot.rst`, payload_offset and payload_length; LZ4 `doc/lz4_Frame_format.md`, "Legacy frame", and
//! `doc/lz4_Block_format.md`.

/// First word of a legacy frame.
const MAGIC: u32 = 0x184c_2102;

/// The kernel inside `image`.
pub fn unpack(image: &[u8]) -> Vec<u8> {
    let word = |at: usize| u32::from_le_bytes(image[at..at + 4].try_into().unwrap()) as usize;
    let start = (usize::from(image[0x1f1]) + 1) * 512 + word(0x248);
    let end = start + word(0x24c);
    assert_eq!(word(start) as u32, MAGIC, "the kernel's payload is not LZ4");
    let mut kernel = Vec::new();
    let mut at = start + 4;
    // After the blocks comes the unpacked size, which is no block: it would reach beyond the payload.
    while at + 4 < end && at + 4 + word(at) <= end {
        let block = at + 4..at + 4 + word(at);
        at = block.end;
        unpack_block(&image[block], &mut kernel);
    }
    kernel
}

/// A block: literals, then a copy of earlier output, again and again; the last has literals only.
fn unpack_block(mut block: &[u8], output: &mut Vec<u8>) {
    while let Some(&token) = block.first() {
        block = &block[1..];
        let literals = length(token >> 4, &mut block);
        output.extend_from_slice(&block[..literals]);
        block = &block[literals..];
        if block.is_empty() {
            return;
        }
        let distance = usize::from(u16::from_le_bytes([block[0], block[1]]));
        block = &block[2..];
        let count = length(token & 15, &mut block) + 4;
        // The copy may overlap what it makes.
        for _ in 0..count {
            output.push(output[output.len() - distance]);
        }
    }
}

/// A length of four bits; 15 goes on in bytes until one is not 255.
fn length(nibble: u8, block: &mut &[u8]) -> usize {
    let mut length = usize::from(nibble);
    let mut more = nibble == 15;
    while more {
        length += usize::from(block[0]);
        more = block[0] == 255;
        *block = &block[1..];
    }
    length
}
