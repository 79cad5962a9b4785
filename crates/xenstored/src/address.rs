//! A socket's place in the file system: made for its owner alone, found again, and removed. The store's, and the control sockets of machines.
//!
//! A socket that is left over from a program that was killed is replaced; one at which somebody listens, and a file that is no socket, are
//! not touched. The mode is set before the socket has a name, so that there is no moment at which others could connect: Linux gives a
//! socket's file the mode of the descriptor (unix(7), `unix_bind`).

use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Longest path that a socket can have: `sun_path` without its final zero (unix(7)).
const MAX_PATH: usize = 107;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// Why there is no socket, or nobody at it.
#[derive(Debug, thiserror::Error)]
pub enum AddressError {
    /// It does not fit.
    #[error("{}: a socket's path has at most {MAX_PATH} bytes", .0.display())]
    TooLong(PathBuf),
    /// Something else has that name.
    #[error("{}: exists and is not a socket", .0.display())]
    NotASocket(PathBuf),
    /// Somebody listens there.
    #[error("{}: in use by a running program", .0.display())]
    InUse(PathBuf),
    /// A socket without a program.
    #[error("{}: nobody listens there; the program that made it has ended", .0.display())]
    Abandoned(PathBuf),
    /// No socket.
    #[error("{}: there is no such socket", .0.display())]
    Missing(PathBuf),
    /// The host's answer.
    #[error("{}: {source}", path.display())]
    Host {
        /// Where.
        path: PathBuf,
        /// What.
        source: std::io::Error,
    },
}

/// A listening socket; its name goes with it.
pub struct Listener {
    socket: UnixListener,
    path: PathBuf,
    /// Device and inode, by which the name is known to be ours still.
    identity: (u64, u64),
}

impl Listener {
    /// Listens at `path`.
    ///
    /// # Errors
    /// [`AddressError`].
    pub fn bind(path: &Path) -> Result<Listener, AddressError> {
        check(path)?;
        let host = |source: std::io::Error| AddressError::Host { path: path.into(), source };
        let address = SocketAddrUnix::new(path).map_err(|error| host(error.into()))?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(|error| host(error.into()))?;
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(|error| host(error.into()))?;
        match rustix::net::bind(&socket, &address) {
            Err(rustix::io::Errno::ADDRINUSE) => {
                make_room(path)?;
                rustix::net::bind(&socket, &address)
            }
            done => done,
        }
        .map_err(|error| host(error.into()))?;
        rustix::net::listen(&socket, BACKLOG).map_err(|error| host(error.into()))?;
        let identity = identity(path).map_err(host)?;
        Ok(Listener { socket: socket.into(), path: path.into(), identity })
    }

    /// Goes on with a listening socket that another program made at `path`, see [`Listener::identity`].
    ///
    /// # Errors
    /// When it is no listening socket.
    pub fn adopt(socket: OwnedFd, path: PathBuf, identity: (u64, u64)) -> std::io::Result<Listener> {
        if !rustix::net::sockopt::socket_acceptconn(&socket)? {
            return Err(rustix::io::Errno::INVAL.into());
        }
        Ok(Listener { socket: socket.into(), path, identity })
    }

    /// Its name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Device and inode of its name.
    pub fn identity(&self) -> (u64, u64) {
        self.identity
    }

    /// The socket, which does not block.
    pub fn socket(&self) -> &UnixListener {
        &self.socket
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|now| now == self.identity) {
            // One that cannot be removed is found abandoned the next time.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Connects to who listens at `path`.
///
/// # Errors
/// [`AddressError`].
pub fn connect(path: &Path) -> Result<UnixStream, AddressError> {
    use std::io::ErrorKind;
    check(path)?;
    UnixStream::connect(path).map_err(|source| match source.kind() {
        ErrorKind::NotFound => AddressError::Missing(path.into()),
        ErrorKind::ConnectionRefused if is_socket(path) => AddressError::Abandoned(path.into()),
        ErrorKind::ConnectionRefused => AddressError::NotASocket(path.into()),
        _ => AddressError::Host { path: path.into(), source },
    })
}

/// Removes a socket at which nobody listens.
fn make_room(path: &Path) -> Result<(), AddressError> {
    if !is_socket(path) {
        return Err(AddressError::NotASocket(path.into()));
    }
    match connect(path) {
        Ok(_) => Err(AddressError::InUse(path.into())),
        Err(AddressError::Abandoned(_)) => std::fs::remove_file(path).map_err(|source| AddressError::Host { path: path.into(), source }),
        Err(AddressError::Missing(_)) => Ok(()),
        Err(error) => Err(error),
    }
}

fn check(path: &Path) -> Result<(), AddressError> {
    if path.as_os_str().len() > MAX_PATH { Err(AddressError::TooLong(path.into())) } else { Ok(()) }
}

fn is_socket(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|metadata| metadata.file_type().is_socket())
}

fn identity(path: &Path) -> std::io::Result<(u64, u64)> {
    let metadata = path.symlink_metadata()?;
    Ok((metadata.dev(), metadata.ino()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn socket_is_its_owners_alone_and_goes_with_the_listener() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = Listener::bind(&path).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert!(connect(&path).is_ok());
        drop(listener);
        assert!(!path.exists());
        assert!(matches!(connect(&path), Err(AddressError::Missing(_))));
    }

    #[test]
    fn socket_in_use_and_other_files_are_not_touched() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let _listener = Listener::bind(&path).unwrap();
        assert!(matches!(Listener::bind(&path), Err(AddressError::InUse(_))));
        assert!(connect(&path).is_ok());
        let file = directory.path().join("file");
        std::fs::write(&file, "precious").unwrap();
        assert!(matches!(Listener::bind(&file), Err(AddressError::NotASocket(_))));
        assert!(matches!(connect(&file), Err(AddressError::NotASocket(_))));
        assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    }

    #[test]
    fn socket_of_a_killed_program_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        assert!(matches!(connect(&path), Err(AddressError::Abandoned(_))));
        let _listener = Listener::bind(&path).unwrap();
        assert!(connect(&path).is_ok());
    }

    #[test]
    fn name_that_became_anothers_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let first = Listener::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let _second = Listener::bind(&path).unwrap();
        drop(first);
        assert!(connect(&path).is_ok());
    }

    #[test]
    fn paths_that_cannot_be_are_explained() {
        let long = PathBuf::from("/tmp").join("x".repeat(MAX_PATH));
        assert!(matches!(Listener::bind(&long), Err(AddressError::TooLong(_))));
        assert!(matches!(Listener::bind(Path::new("/nonexistent/socket")), Err(AddressError::Host { .. })));
    }
}
