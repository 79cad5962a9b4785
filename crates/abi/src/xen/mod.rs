//! Xen's words. Sources are the public headers of xen-project/xen, cited by their path below `xen/include/public`.

pub mod xenstore;
