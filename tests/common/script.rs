//! Commands in a guest: a shell script that runs them, and a comparison of what they printed.

// Helpers of tests are outside of what clippy takes for one.
#![allow(clippy::unwrap_used)]

use crate::common::Run;

/// What [`script`] prints before and after the output of a command, each on a line of its own; the status follows the second.
const BEGIN: &str = "@begin";
const END: &str = "@end ";

/// What each command of a [`script`] printed, and how it ended.
fn results(run: &Run) -> Vec<(String, i32)> {
    let mut results = Vec::new();
    for part in run.output.replace('\r', "").split(&format!("\n{BEGIN}\n")).skip(1) {
        let Some((text, rest)) = part.split_once(&format!("\n{END}")) else { continue };
        let status = rest.lines().next().unwrap_or_default().trim();
        results.push((text.to_owned(), status.parse().unwrap_or_else(|_| panic!("status «{status}»"))));
    }
    results
}

/// A shell script that runs `commands`, and marks where the output of each begins and how it ended.
pub fn script(commands: &[&str]) -> String {
    let marked =
        commands.iter().map(|command| format!("echo; echo {BEGIN}; {{ {command}\n}} 2>&1; status=$?; echo; echo \"{END}$status\"\n"));
    marked.collect()
}

/// Compares what `commands` print and their status with what is wanted.
#[track_caller]
pub fn expect(run: &Run, wanted: &[(&str, &str, i32)]) {
    let results = results(run);
    assert_eq!(results.len(), wanted.len(), "not all commands have run:\n{run}");
    for ((command, text, status), (said, ended)) in wanted.iter().zip(results) {
        assert_eq!((said.trim_end(), ended), (*text, *status), "{command}\n\n{run}");
    }
}
