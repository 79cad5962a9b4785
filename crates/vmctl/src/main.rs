//! `vmctl`: runs and controls virtual machines from the command line.
fn main() {}
