//! Writes an initrd: a cpio archive in the "newc" format (kernel: Documentation/driver-api/early-userspace/buffer-format.rst).

/// An archive under construction.
#[derive(Default)]
pub struct Initrd {
    bytes: Vec<u8>,
    inode: u32,
    script: String,
}

/// File types of `st_mode`.
const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;

impl Initrd {
    /// Adds a directory.
    pub fn directory(&mut self, name: &str) {
        self.entry(name, DIRECTORY | 0o755, &[]);
    }

    /// Adds a file.
    pub fn file(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entry(name, FILE | mode, content);
    }

    /// Adds lines to `/init`, a busybox shell script.
    pub fn script(&mut self, lines: &str) {
        self.script.push_str(lines);
        self.script.push('\n');
    }

    /// The archive, with an `/init` that powers off at its end.
    pub fn finish(&self) -> Vec<u8> {
        let mut whole = Initrd { bytes: self.bytes.clone(), inode: self.inode, script: String::new() };
        let script = format!("#!/bin/busybox sh\n{}\n/bin/busybox poweroff -f\n", self.script);
        whole.file("init", 0o755, script.as_bytes());
        whole.archive()
    }

    /// The files alone, as an archive that another one can follow.
    pub fn archive(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.inode += 1;
        let name_size = name.len() + 1;
        // Inode, mode, uid, gid, links, mtime, size, device major and minor, the same for special files, name size, checksum.
        let fields = [self.inode, mode, 0, 0, 1, 0, content.len() as u32, 0, 0, 0, 0, name_size as u32, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(content);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}
