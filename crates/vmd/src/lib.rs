//! vmd
