//! Output that cannot play tricks on a terminal: the encoding of OpenBSD's vis(3) with `VIS_SAFE | VIS_CSTYLE`, as its hostctl(8) prints values.
//!
//! Printable ASCII, space, tab, newline, bell, backspace and carriage return stay; a backslash is doubled; other control
//! characters become C escapes or `\^X`, bytes above 0x7f `\M-x` or `\M^X`, and a byte that would show as a space its octal number.

use alloc::vec::Vec;

/// What `bytes` look like.
pub fn encode(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len());
    for (at, &byte) in bytes.iter().enumerate() {
        one(byte, bytes.get(at + 1).copied(), &mut out);
    }
    out
}

fn one(byte: u8, next: Option<u8>, out: &mut Vec<u8>) {
    match byte {
        b'\\' => out.extend(br"\\"),
        b' '..=b'~' | b'\t' | b'\n' | b'\r' | 0x07 | 0x08 => out.push(byte),
        0x0b => out.extend(br"\v"),
        0x0c => out.extend(br"\f"),
        // Three digits where the next character would be taken for a part of the number.
        0 if matches!(next, Some(b'0'..=b'7')) => out.extend(br"\000"),
        0 => out.extend(br"\0"),
        0xa0 => out.extend(br"\240"),
        _ => {
            out.push(b'\\');
            if byte & 0x80 != 0 {
                out.push(b'M');
            }
            match byte & 0x7f {
                0x7f => out.extend(b"^?"),
                low @ 0..0x20 => out.extend([b'^', low + b'@']),
                low => out.extend([b'-', low]),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::encode;

    fn text(bytes: &[u8]) -> String {
        String::from_utf8(encode(bytes)).unwrap()
    }

    #[test]
    fn plain_text_stays() {
        assert_eq!(text(b"a b\tc\nd\r"), "a b\tc\nd\r");
    }

    #[test]
    fn backslash_is_doubled() {
        assert_eq!(text(br"C:\x"), r"C:\\x");
    }

    #[test]
    fn escape_sequences_lose_their_power() {
        assert_eq!(text(b"\x1b[2J"), r"\^[[2J");
        assert_eq!(text(b"\x7f\x0b\x0c"), r"\^?\v\f");
    }

    #[test]
    fn high_bytes_are_meta_characters() {
        assert_eq!(text("é".as_bytes()), r"\M-C\M-)");
        assert_eq!(text(b"\xa0\x81\xff"), r"\240\M^A\M^?");
    }

    #[test]
    fn zero_before_a_digit_has_three_digits() {
        assert_eq!(text(b"\0a\x007"), r"\0a\0007");
    }
}
