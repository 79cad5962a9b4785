//! `xenstored` beside Debian's two servers.

fn main() {}
