//! `vmctl host`: what this machine can do.

use crate::args::HostArguments;

/// Prints the report on standard output.
///
/// # Errors
/// None at present; the form is that of the other verbs.
pub fn host(arguments: &HostArguments) -> anyhow::Result<u8> {
    let report = vmd::host::inspect();
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{report}");
    }
    Ok(0)
}
