//! Debian's XenStore clients, each on a socket that is given: `xenstore-*`, `test-xenstore` and pyxs.
//!
//! `tests/common/xenstore/make` unpacks them; `./test` calls it.

// Each test program uses a part of this. Helpers of tests are outside of what clippy takes for one.
#![allow(dead_code, clippy::unwrap_used)]

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What pyxs does: values, lists, permissions, events, a transaction.
const PYXS: &str = r#"
import os, pyxs
with pyxs.Client(unix_socket_path=os.environ["XENSTORED_PATH"]) as client:
    client[b"/py/x"] = b"1"
    assert client[b"/py/x"] == b"1" and client.list(b"/py") == [b"x"]
    with client.monitor() as monitor:
        monitor.watch(b"/py", b"token")
        events = monitor.wait()
        assert next(events) == (b"/py", b"token")
        client.set_perms(b"/py/x", [b"r0"])
        assert next(events) == (b"/py/x", b"token")
    client.transaction()
    client.write(b"/py/y", b"2")
    client.commit()
    assert client.read(b"/py/y") == b"2"
    client.delete(b"/py")
    assert not client.exists(b"/py/y")
"#;

/// The directory that they are in, and the servers to compare with.
#[track_caller]
pub fn tree() -> PathBuf {
    let default = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/guest");
    let tree = std::env::var_os("PVBUS_GUEST").map_or_else(default, PathBuf::from).join("xenstore");
    assert!(tree.exists(), "{} is missing; make it with: tests/common/xenstore/make target/guest", tree.display());
    tree
}

/// A program of [`tree`] with its libraries.
pub fn program(name: &str) -> Command {
    let tree = tree();
    let mut command = Command::new(tree.join(name));
    command.env("LD_LIBRARY_PATH", tree.join("usr/lib/x86_64-linux-gnu"));
    command
}

/// All of them on one server's socket.
pub struct Clients {
    /// Where.
    pub socket: PathBuf,
}

impl Clients {
    /// One of the `xenstore-` programs.
    pub fn command(&self, name: &str, arguments: &[&str]) -> Command {
        let mut command = program(&format!("usr/bin/xenstore-{name}"));
        command.env("XENSTORED_PATH", &self.socket).args(arguments);
        command
    }

    /// What one of the `xenstore-` programs prints.
    #[track_caller]
    pub fn tool(&self, name: &str, arguments: &[&str]) -> String {
        let output = self.command(name, arguments).output().unwrap();
        assert!(output.status.success(), "{name} {arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Each of the `xenstore-` programs does what it is for, below `/tool`.
    pub fn write_read_list_and_remove(&self) {
        self.tool("write", &["/tool/a", "one", "/tool/b/c", "two"]);
        assert_eq!(self.tool("read", &["/tool/a", "/tool/b/c"]), "one\ntwo\n");
        assert_eq!(self.tool("list", &["/tool"]), "a\nb\n");
        self.tool("chmod", &["/tool/a", "n0", "r3"]);
        assert_eq!(self.tool("ls", &["-pf", "/tool"]), "/tool/a = \"one\"   (n0,r3)\n/tool/b = \"\"   (n0)\n/tool/b/c = \"two\"   (n0)\n");
        self.tool("exists", &["/tool/a"]);
        self.tool("rm", &["/tool/b"]);
        assert_eq!(self.command("exists", &["/tool/b"]).status().unwrap().code(), Some(1));
        let unread = self.command("read", &["/tool/b"]).output().unwrap();
        assert!(!unread.status.success() && String::from_utf8(unread.stderr).unwrap().contains("couldn't read path /tool/b"));
    }

    /// `xenstore-watch` hears of what happens below its path, and of nothing else.
    pub fn watch(&self) {
        let mut watch = self.command("watch", &["-n", "3", "/watched"]).stdout(Stdio::piped()).spawn().unwrap();
        // Its first event is the watch itself. Then it listens.
        let mut output = watch.stdout.take().unwrap();
        let mut first = [0; 9];
        output.read_exact(&mut first).unwrap();
        self.tool("write", &["/watched/a", "1"]);
        self.tool("write", &["/elsewhere", "1"]);
        self.tool("rm", &["/watched"]);
        let mut rest = String::new();
        output.read_to_string(&mut rest).unwrap();
        assert_eq!((&first, rest.as_str()), (b"/watched\n", "/watched/a\n/watched\n"));
        assert!(watch.wait().unwrap().success());
    }

    /// Xen's own suite: all of its twelve tests.
    pub fn test_xenstore(&self) {
        let output = program("usr/lib/xen-4.17/bin/test-xenstore").env("XENSTORED_PATH", &self.socket).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(text.lines().filter(|line| line.ends_with(" ns")).count(), 12, "{text}");
    }

    /// A client that has its own idea of the protocol.
    pub fn pyxs(&self) {
        let mut python = Command::new("python3");
        python.arg("-c").arg(PYXS).env("PYTHONPATH", tree().join("usr/lib/python3/dist-packages"));
        let output = python.env("XENSTORED_PATH", &self.socket).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}
