//! What this host can do: the report of `vmctl host`.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::boot;
use crate::config::Size;
use crate::machine;

/// Everything that decides what machines can run here.
#[derive(Debug, Serialize)]
pub struct HostReport {
    /// Model name of the processor.
    pub processor: String,
    /// Processors of the host.
    pub processors: usize,
    /// Memory of the host, in bytes.
    pub memory: u64,
    /// `VMX/EPT`, `SVM/RVI`, or what is missing of them.
    pub virtualization: String,
    /// Speed of supervisor code under KVM in million instructions a second, when it runs at all.
    pub kvm_mips: Option<f64>,
    /// Why KVM does not run, when it does not.
    pub kvm_problem: Option<String>,
    /// Whether programs in a guest reach VMware's backdoor under KVM ([`kvm::probe::vmware_backdoor`]).
    pub kvm_vmware_backdoor: Option<bool>,
    /// What `--backend auto` takes.
    pub backend: &'static str,
    /// And why.
    pub reason: String,
    /// Where passt is, which `--nic user` needs.
    pub passt: Option<PathBuf>,
    /// Whether the host has /dev/net/tun, which `--nic tap:NAME` needs.
    pub tap: bool,
    /// The BIOS that boots disks.
    pub bios: Option<PathBuf>,
}

/// Looks at the host; takes about a tenth of a second for KVM's measurement.
pub fn inspect() -> HostReport {
    let abilities = kvm::probe();
    let (backend, reason) = match abilities.choose() {
        Ok(reason) => ("kvm", reason),
        Err(reason) => ("soft", reason),
    };
    HostReport {
        processor: model_name(&std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default()),
        processors: std::thread::available_parallelism().map_or(1, usize::from),
        memory: machine::host_memory(),
        virtualization: abilities.processor,
        kvm_mips: abilities.kvm.as_ref().ok().map(|speed| speed.mips),
        kvm_problem: abilities.kvm.err(),
        kvm_vmware_backdoor: kvm::probe::vmware_backdoor(),
        backend,
        reason,
        passt: in_path("passt"),
        tap: Path::new("/dev/net/tun").exists(),
        bios: boot::find_bios().ok().map(|image| image.path().to_owned()),
    }
}

fn model_name(cpuinfo: &str) -> String {
    let line = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    line.map_or_else(|| "unknown".into(), |(_, name)| name.trim().into())
}

fn in_path(program: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).map(|directory| directory.join(program)).find(|path| path.is_file())
}

impl fmt::Display for HostReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let found = |path: &Option<PathBuf>, package: &str| match path {
            Some(path) => path.display().to_string(),
            None => format!("not found; install the package `{package}`"),
        };
        writeln!(f, "processor       {} x {}, {} of memory", self.processors, self.processor, Size(self.memory))?;
        writeln!(f, "virtualization  {}", self.virtualization)?;
        match (&self.kvm_mips, &self.kvm_problem) {
            (Some(mips), _) => writeln!(f, "/dev/kvm        supervisor code at {mips:.0} million instructions a second")?,
            (None, problem) => writeln!(f, "/dev/kvm        {}", problem.as_deref().unwrap_or("unknown"))?,
        }
        match self.kvm_vmware_backdoor {
            Some(true) => writeln!(f, "VMware tools    work on KVM, too")?,
            Some(false) => writeln!(f, "VMware tools    on KVM only for root, by ioperm(2): kvm.enable_vmware_backdoor is off")?,
            None => {}
        }
        writeln!(f, "software CPU    vmm0 at mainbus0: soft")?;
        writeln!(f, "--backend auto  {} ({})", self.backend, self.reason)?;
        writeln!(f, "--nic user      {}", found(&self.passt, "passt"))?;
        writeln!(f, "--nic tap:NAME  {}", if self.tap { "/dev/net/tun" } else { "no /dev/net/tun" })?;
        writeln!(f, "BIOS            {}", found(&self.bios, "seabios"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn model_name_is_found_or_unknown() {
        assert_eq!(model_name("processor\t: 0\nmodel name\t: A CPU @ 3\n"), "A CPU @ 3");
        assert_eq!(model_name(""), "unknown");
    }
}
