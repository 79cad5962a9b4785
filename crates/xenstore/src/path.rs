//! Paths: what names a node, and what a watch may be on.
//!
//! A [`Path`] is always absolute and well formed, so nothing behind the edge checks again. A client may write it relative to its own home,
//! `/local/domain/<its domid>`. Rules: xen-project/xen `docs/misc/xenstore.txt`; the alphabet is `A-Z a-z 0-9 - _ @` and `/` between names.
//! Names have no limit of their own and neither has the depth, so nothing that walks a path may recurse.

use std::fmt;
use std::sync::Arc;

use abi::xen::xenstore::{ABS_PATH_MAX, DOMAINS, special};

use crate::domid::{DomId, decimal};
use crate::error::Error;

/// Absolute path of a node. Cheap to clone.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Path(Arc<str>);

impl Path {
    /// `/`.
    pub fn root() -> Path {
        Path("/".into())
    }

    /// `/local/domain/<domid>`.
    pub fn home(domain: DomId) -> Path {
        Path(format!("{DOMAINS}/{domain}").into())
    }

    /// Reads a path as a client of domain `home` writes it. `most` bounds its length, of which `/local/domain/<n>/` does not count; 0 leaves the
    /// protocol's limit only.
    ///
    /// # Errors
    /// [`Error::BadPath`].
    pub fn parse(text: &[u8], home: DomId, most: usize) -> Result<Path, Error> {
        let text = well_formed(text, most)?;
        match text.as_bytes().first() {
            Some(b'/') => Ok(Path(text.into())),
            Some(b'@') => Err(Error::BadPath),
            _ => within(format!("{DOMAINS}/{home}/{text}")).map(|text| Path(text.into())),
        }
    }

    /// The path of a node that exists, as [`Tree::visit`](crate::tree::Tree::visit) tells it.
    pub(crate) fn of_node(text: &str) -> Path {
        Path(text.into())
    }

    /// The text, starting with `/`.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The text, shared.
    pub(crate) fn shared(&self) -> &Arc<str> {
        &self.0
    }

    /// Whether this is `/`.
    pub fn is_root(&self) -> bool {
        self.as_str() == "/"
    }

    /// The names from the root to the node; none for the root.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        names(&self.0)
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a watch is on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Watched {
    /// A node, which need not exist, and all below it. The number is how many leading bytes of an event's path the client did not write and does
    /// not want to see: none, or those of its home.
    Node(Path, usize),
    /// `@...`. [`Special::of`] tells which of them ever happen.
    Special(Arc<str>),
}

impl Watched {
    /// Reads a path as WATCH takes it, with the rules of [`Path::parse`].
    ///
    /// # Errors
    /// [`Error::BadPath`].
    pub fn parse(text: &[u8], home: DomId, most: usize) -> Result<Watched, Error> {
        match text.first() {
            Some(b'@') => Ok(Watched::Special(well_formed(text, most)?.into())),
            Some(b'/') => Ok(Watched::Node(Path::parse(text, home, most)?, 0)),
            _ => {
                let path = Path::parse(text, home, most)?;
                let hidden = path.as_str().len() - text.len();
                Ok(Watched::Node(path, hidden))
            }
        }
    }

    /// The absolute path, or the special one.
    pub fn text(&self) -> &Arc<str> {
        match self {
            Watched::Node(path, _) => path.shared(),
            Watched::Special(text) => text,
        }
    }
}

/// What happens outside the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Special {
    /// A domain was introduced.
    IntroduceDomain,
    /// A domain shut down or is gone.
    ReleaseDomain,
    /// This domain shut down or is gone.
    ReleaseOne(DomId),
}

impl Special {
    /// What `text` names.
    pub fn of(text: &[u8]) -> Option<Special> {
        if text == special::INTRODUCE_DOMAIN.as_bytes() {
            return Some(Special::IntroduceDomain);
        }
        match text.strip_prefix(special::RELEASE_DOMAIN.as_bytes())? {
            [] => Some(Special::ReleaseDomain),
            rest => DomId::parse(rest.strip_prefix(b"/")?).map(Special::ReleaseOne),
        }
    }

    /// Its path.
    pub fn path(self) -> Arc<str> {
        match self {
            Special::IntroduceDomain => special::INTRODUCE_DOMAIN.into(),
            Special::ReleaseDomain => special::RELEASE_DOMAIN.into(),
            Special::ReleaseOne(domain) => format!("{}/{domain}", special::RELEASE_DOMAIN).into(),
        }
    }
}

/// The names in `path`, which is `/` or `/name/name...`.
pub(crate) fn names(path: &str) -> impl Iterator<Item = &str> {
    path.split('/').filter(|name| !name.is_empty())
}

/// Checks everything but the meaning of the first character.
fn well_formed(text: &[u8], most: usize) -> Result<&str, Error> {
    let Ok(text) = std::str::from_utf8(text) else { return Err(Error::BadPath) };
    let allowed = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'/' | b'_' | b'@');
    let bytes = text.as_bytes();
    let trailing = bytes.ends_with(b"/") && bytes.len() > 1;
    if bytes.is_empty() || trailing || !bytes.iter().all(allowed) || text.contains("//") {
        return Err(Error::BadPath);
    }
    if most > 0 && bytes.len() - home_length(text) > most { Err(Error::BadPath) } else { within(text) }
}

/// Holds the protocol's limit on absolute paths.
fn within<T: AsRef<str>>(text: T) -> Result<T, Error> {
    if text.as_ref().len() > ABS_PATH_MAX { Err(Error::BadPath) } else { Ok(text) }
}

/// Bytes of a leading `/local/domain/<n>/`, which do not count against `path-max`.
fn home_length(text: &str) -> usize {
    let rest = text.strip_prefix(DOMAINS).and_then(|rest| rest.strip_prefix('/'));
    let Some((number, below)) = rest.and_then(|rest| rest.split_once('/')) else { return 0 };
    if number.len() <= 5 && decimal::<u32>(number.as_bytes()).is_some() { text.len() - below.len() } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<String, Error> {
        Path::parse(text.as_bytes(), DomId(7), 2048).map(|path| path.to_string())
    }

    #[test]
    fn relative_paths_start_at_home() {
        assert_eq!(parse("data/x"), Ok("/local/domain/7/data/x".into()));
        assert_eq!(parse("/data/x"), Ok("/data/x".into()));
        assert_eq!(parse("/"), Ok("/".into()));
    }

    #[test]
    fn malformed_paths_are_refused() {
        for bad in ["", "//", "/a//b", "/a/", "a/", "/a b", "/a.b", "/ä", "/a\0b", "@releaseDomain", "/local/domain/", "/a\n"] {
            assert_eq!(parse(bad), Err(Error::BadPath), "{bad:?}");
        }
        assert!(Path::parse(b"/\xff", DomId(0), 0).is_err());
    }

    #[test]
    fn length_counts_from_the_home_and_never_beyond_the_protocol() {
        let name = |length| "x".repeat(length);
        assert!(parse(&format!("/{}", name(2047))).is_ok());
        assert!(parse(&format!("/{}", name(2048))).is_err());
        assert!(parse(&name(2048)).is_ok());
        assert!(parse(&name(2049)).is_err());
        assert!(parse(&format!("/local/domain/12345/{}", name(2048))).is_ok());
        assert!(parse(&format!("/local/domain/12345/{}", name(2049))).is_err());
        assert!(parse(&format!("/local/domain/123456/{}", name(2048))).is_err());
        assert!(Path::parse(format!("/{}", name(3071)).as_bytes(), DomId(7), 0).is_ok());
        assert!(Path::parse(format!("/{}", name(3072)).as_bytes(), DomId(7), 0).is_err());
        assert!(Path::parse(name(3072).as_bytes(), DomId(7), 0).is_err());
    }

    #[test]
    fn watched_paths_know_what_their_client_wrote() {
        assert_eq!(Watched::parse(b"data", DomId(7), 0), Ok(Watched::Node(Path("/local/domain/7/data".into()), 16)));
        assert_eq!(Watched::parse(b"/data", DomId(7), 0), Ok(Watched::Node(Path("/data".into()), 0)));
        assert_eq!(Watched::parse(b"@any", DomId(7), 0), Ok(Watched::Special("@any".into())));
        assert_eq!(Watched::parse(b"@any/", DomId(7), 0), Err(Error::BadPath));
    }

    #[test]
    fn special_paths_are_three() {
        assert_eq!(Special::of(b"@introduceDomain"), Some(Special::IntroduceDomain));
        assert_eq!(Special::of(b"@releaseDomain"), Some(Special::ReleaseDomain));
        assert_eq!(Special::of(b"@releaseDomain/5"), Some(Special::ReleaseOne(DomId(5))));
        for other in ["@releaseDomain/x", "@releaseDomain5", "@introduceDomain/5", "@", "@x"] {
            assert_eq!(Special::of(other.as_bytes()), None, "{other}");
        }
    }
}
