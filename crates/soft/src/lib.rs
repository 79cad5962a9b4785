//! Backend: an x86-64 processor in software, for x86-64 hosts.
//!
//! It needs nothing from the host but an ordinary process, so it runs machines where `/dev/kvm` is missing or useless. Real,
//! protected, compatibility and long mode; several processors on host threads, guest atomics on host atomics (both are x86, the
//! memory order is the same). Guest instructions are decoded once into [`op::Op`]s, kept in blocks by physical address, and
//! executed by small handlers that call each other in tail position; blocks that are executed often become host code, which is one
//! more handler.
//!
//! ```text
//!   run (loop) -> block (decode, cache) -> lower: integer | system | native -> Op handlers
//!                        |                                                      |     ^
//!                        +-> translator -> host code ---------------------------|-----+
//!                                              |                                |
//!                    mmu (TLB, walks, host loads and stores) <------------------+
//! ```
//!
//! `integer` holds the general-purpose instructions, `system` everything privileged, segmented or event-like, `native` the
//! x87/MMX/SSE and other instructions that the host's own processor executes in small thunks.

mod attention;
mod block;
mod cpu;
mod flags;
mod flush;
mod integer;
mod mmu;
mod native;
mod op;
mod run;
mod system;
mod table;
mod translator;
mod vm;

pub use vm::Soft;
