//! BIOS: a ROM that ends at 4 GiB, whose last part is below 1 MiB too, and the processor's own reset state.
//!
//! The BIOS is SeaBIOS as Debian's package `seabios` has it. On a PC the chipset shows 128 KiB of the ROM below 1 MiB, and
//! SeaBIOS copies the rest there when it has found a chipset whose shadow RAM it can unlock (`src/fw/shadow.c`). Here that
//! memory is plain RAM, and all of it up to 256 KiB is there from the start.

use std::path::Path;

use vm_memory::{Bytes, GuestAddress};
use vmm::{GuestMemory, Registers};

use super::memory_map::{EXTENDED_START, ROM_END};
use super::{BootConfig, BootError, Contents, Image, Loaded, recognise};

/// Where hosts keep SeaBIOS.
const PATHS: [&str; 4] =
    ["/usr/share/seabios/bios-256k.bin", "/usr/share/seabios/bios.bin", "/usr/share/qemu/bios-256k.bin", "/etc/firmware/vmm-bios"];

/// ROM sizes are whole 64 KiB blocks, up to 16 MiB as chipsets decode it.
const BLOCK: usize = 0x1_0000;
const SIZE_MAX: usize = 16 << 20;
/// Bytes of the ROM that are below 1 MiB too.
const SHADOW: usize = 0x4_0000;
/// The reset vector, counted from the end.
const RESET_VECTOR: usize = 16;
/// Jumps that a reset vector begins with: far, near, short (Intel SDM vol. 2, JMP).
const JUMPS: [u8; 3] = [0xea, 0xe9, 0xeb];

/// Whether `data` looks like a BIOS: the size of a ROM, with a jump at the reset vector.
pub(super) fn is_image(data: &[u8]) -> bool {
    !data.is_empty()
        && data.len() <= SIZE_MAX
        && data.len().is_multiple_of(BLOCK)
        && data.get(data.len() - RESET_VECTOR).is_some_and(|first| JUMPS.contains(first))
}

/// The host's SeaBIOS.
///
/// # Errors
/// [`BootError::NoBios`] where there is none, naming where it was looked for.
pub fn find() -> Result<Image, BootError> {
    match PATHS.iter().map(Path::new).find(|path| path.is_file()) {
        Some(path) => recognise(path),
        None => Err(BootError::NoBios { tried: PATHS.join(", ") }),
    }
}

/// Loads the ROM. `memory` has to have room for it below 4 GiB, see [`super::layout`].
pub(super) fn load(file: &Contents, memory: &GuestMemory, config: &BootConfig) -> Result<Loaded, BootError> {
    let refused = |option: &str| Err(BootError::NotTaken { format: "a BIOS", option: option.into() });
    if !config.modules.is_empty() {
        return refused("--initrd (it boots from a disk)");
    }
    if !config.cmdline.is_empty() {
        return refused("--cmdline (it boots from a disk)");
    }
    let shadow = &file.data[file.data.len() - file.data.len().min(SHADOW)..];
    for (end, bytes) in [(ROM_END, file.data.as_ref()), (EXTENDED_START, shadow)] {
        let start = end - bytes.len() as u64;
        memory.write_slice(bytes, GuestAddress(start)).map_err(|_| BootError::NoRoom {
            what: "the BIOS".into(),
            start,
            end,
            ram: "no ROM there".into(),
        })?;
    }
    let description = format!("BIOS {} ({} KiB), from the reset vector", file.path.display(), file.data.len() / 1024);
    Ok(Loaded { registers: Registers::reset(), description })
}
