//! Wide accesses to devices whose registers are single bytes: the chip set splits them into byte accesses, lowest port first.

/// IN of `size` bytes at `port` as byte reads.
pub(crate) fn read_bytes(port: u16, size: u8, mut read: impl FnMut(u16) -> u8) -> u32 {
    (0..u16::from(size.min(4))).fold(0, |value, n| value | u32::from(read(port.wrapping_add(n))) << (8 * n))
}

/// OUT of `size` bytes at `port` as byte writes.
pub(crate) fn write_bytes(port: u16, size: u8, value: u32, mut write: impl FnMut(u16, u8)) {
    for (n, byte) in (0u16..).zip(value.to_le_bytes()).take(usize::from(size)) {
        write(port.wrapping_add(n), byte);
    }
}
