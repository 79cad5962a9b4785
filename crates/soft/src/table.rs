//! Tables of a processor, which are too large for a thread's stack.

/// A table of equal entries, made where it stays: pages of a stack that were once used are never given back.
pub(crate) fn filled<T: Clone, const N: usize>(entry: T) -> Box<[T; N]> {
    match Box::try_from(vec![entry; N]) {
        Ok(table) => table,
        Err(_) => unreachable!("there are N of them"),
    }
}
