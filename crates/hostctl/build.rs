//! With the feature `bare`, links the program without a C library and its start-up code, at a fixed address: nothing is relocated when it
//! starts.

fn main() {
    if std::env::var_os("CARGO_FEATURE_BARE").is_some() {
        for argument in ["-nostartfiles", "-nostdlib", "-static", "-no-pie"] {
            println!("cargo:rustc-link-arg-bins={argument}");
        }
    }
    println!("cargo:rerun-if-changed=build.rs");
}
