//! As much of HTTP/1.0 (RFC 1945) as it takes to fetch a page: where it is, the question, and the answer as it comes.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

/// Longest head of an answer that is read.
const HEAD_MAX: usize = 16 << 10;
/// As much of a page as is kept.
const BODY_MAX: usize = 64 << 10;
/// The end of a head.
const HEAD_END: &[u8] = b"\r\n\r\n";

/// Where a page is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Url<'a> {
    /// Name or address of the host.
    pub host: &'a str,
    /// TCP port.
    pub port: u16,
    /// Path, with the slash that it begins with.
    pub path: &'a str,
}

impl<'a> Url<'a> {
    /// `[http://]host[:port][/path]`.
    #[must_use]
    pub fn parse(text: &'a str) -> Option<Url<'a>> {
        let rest = text.strip_prefix("http://").unwrap_or(text);
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let (host, port) = match authority.split_once(':') {
            Some((host, port)) => (host, port.parse().ok()?),
            None => (authority, 80),
        };
        let is_plain = |text: &str| text.bytes().all(|byte| byte.is_ascii_graphic());
        let path = if path.is_empty() { "/" } else { path };
        (!host.is_empty() && is_plain(host) && is_plain(path)).then_some(Url { host, port, path })
    }

    /// The question for the page.
    #[must_use]
    pub fn request(&self) -> String {
        let Url { host, port, path } = self;
        format!("GET {path} HTTP/1.0\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n")
    }
}

/// An answer, as far as it has come.
#[derive(Debug, Default)]
pub struct Answer {
    head: Vec<u8>,
    body: Vec<u8>,
    length: u64,
    is_in_body: bool,
}

impl Answer {
    /// Takes the next bytes; `false` when this is no answer, and more need not come.
    pub fn take(&mut self, bytes: &[u8]) -> bool {
        let mut rest = bytes;
        if !self.is_in_body {
            let seen = self.head.len();
            self.head.extend_from_slice(bytes);
            let from = seen.saturating_sub(HEAD_END.len());
            let end = self.head.get(from..).and_then(|tail| tail.windows(HEAD_END.len()).position(|window| window == HEAD_END));
            let Some(end) = end.map(|at| from + at + HEAD_END.len()) else { return self.head.len() <= HEAD_MAX };
            rest = bytes.get(end - seen..).unwrap_or_default();
            self.head.truncate(end);
            self.is_in_body = true;
        }
        self.length += rest.len() as u64;
        let room = BODY_MAX - self.body.len();
        self.body.extend_from_slice(rest.get(..room).unwrap_or(rest));
        self.status().is_some()
    }

    /// Status and reason, when the head has come: `200 OK`.
    #[must_use]
    pub fn status(&self) -> Option<&str> {
        let line = self.head.split(|byte| *byte == b'\r').next().filter(|_| self.is_in_body)?;
        core::str::from_utf8(line).ok()?.strip_prefix("HTTP/1.")?.split_once(' ').map(|(_, status)| status)
    }

    /// Bytes of the page so far.
    #[must_use]
    pub const fn length(&self) -> u64 {
        self.length
    }

    /// The page's beginning.
    #[must_use]
    pub fn body(&self) -> &[u8] {
        &self.body
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_have_a_host_and_may_have_a_port_and_a_path() {
        assert_eq!(Url::parse("http://10.0.0.1:8080/a/b?c"), Some(Url { host: "10.0.0.1", port: 8080, path: "/a/b?c" }));
        assert_eq!(Url::parse("gateway"), Some(Url { host: "gateway", port: 80, path: "/" }));
        for bad in ["", "http://", "http:///x", "h:99999/", "h:/", "https://h/", "h/a b", "h/\r\nX: y"] {
            assert_eq!(Url::parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn answers_cut_anywhere_are_the_same() {
        let whole = b"HTTP/1.0 404 Not Found\r\nA: b\r\n\r\nbody\r\n\r\nmore";
        for first in 0..=whole.len() {
            let mut answer = Answer::default();
            for piece in [&whole[..first], &whole[first..]] {
                assert!(answer.take(piece), "{first}");
            }
            assert_eq!((answer.status(), answer.body(), answer.length()), (Some("404 Not Found"), &b"body\r\n\r\nmore"[..], 12), "{first}");
        }
    }

    #[test]
    fn what_is_no_answer_and_heads_without_an_end_are_not_read_on() {
        assert!(!Answer::default().take(b"SSH-2.0\r\n\r\n"));
        let mut answer = Answer::default();
        let pieces = (0..100).take_while(|_| answer.take(&[b'x'; 1024]));
        assert_eq!(pieces.count(), 16);
    }

    #[test]
    fn long_page_is_counted_and_its_beginning_kept() {
        let mut answer = Answer::default();
        answer.take(b"HTTP/1.1 200 OK\r\n\r\n");
        (0..200).for_each(|_| assert!(answer.take(&[b'x'; 1000])));
        assert_eq!((answer.length(), answer.body().len()), (200_000, BODY_MAX));
    }
}
