//! netvsc.

mod control;
mod packet;
#[cfg(test)]
mod tests;
