//! The command line.

// Documentation comments here are help texts, whose brackets are no links.
#![allow(rustdoc::broken_intra_doc_links)]

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args, Parser, Subcommand};
use vmd::config::{BackendChoice, DialectList, DiskSpec, FwCfgSpec, Kernel, MachineConfig, NicSpec, SerialTarget, Size, Uuid};
use vmd::kv::{self, Assignment};
use vmd::power::Via;

const AFTER_HELP: &str = "\
vmctl without arguments boots a small guest that shows what it finds here. Others:
    vmctl run --kernel vmlinuz --initrd initrd.gz --cmdline \"console=ttyS0\"
    vmctl run --disk disk.qcow2
    vmctl host
In a running machine, Ctrl-A x quits and Ctrl-A h helps.";

/// Runs and controls virtual machines.
#[derive(Parser)]
#[command(name = "vmctl", version, about, after_help = AFTER_HELP)]
pub struct Arguments {
    /// What to do.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// The verbs.
#[derive(Subcommand)]
pub enum Command {
    /// Run one machine in the foreground, its serial port on this terminal.
    Run(Box<RunArguments>),
    /// Tell what this machine can do: hardware virtualization, backends, network.
    Host(HostArguments),
    /// Read, set, list, remove and watch the keys of a running machine.
    #[command(subcommand)]
    Kv(KvCommand),
    /// List, add and remove the disks of a running machine.
    #[command(subcommand)]
    Disk(DeviceCommand<DiskSpec>),
    /// List, add and remove the network cards of a running machine.
    #[command(subcommand)]
    Nic(DeviceCommand<NicSpec>),
    /// Ask the guest of a running machine to shut down or reboot, or pull its plug.
    Stop(StopArguments),
    /// Tell how a running machine is.
    Status(StatusArguments),
    /// Ask the guest of a running machine to take the host's time of day.
    Sync(SyncArguments),
    /// Bring the file systems of a running machine to rest, so that its disks can be copied as they are.
    Freeze(RestArguments),
    /// Let the file systems of a running machine go on.
    Thaw(RestArguments),
}

/// Which machine.
#[derive(Args)]
pub struct MachineArguments {
    /// The machine's control socket, as given to vmctl run --control.
    #[arg(long, value_name = "SOCKET")]
    pub control: PathBuf,
}

/// What `vmctl kv` does.
#[derive(Subcommand)]
#[command(after_help = KEYS_HELP)]
pub enum KvCommand {
    /// Print a key's value as it is; on a terminal with a newline at its end.
    Get {
        #[command(flatten)]
        machine: MachineArguments,
        /// Never add a newline.
        #[arg(short)]
        no_newline: bool,
        /// As a JSON string, or {"base64": "..."} where it is not text.
        #[arg(long, conflicts_with = "no_newline")]
        json: bool,
        /// The key.
        #[arg(value_parser = kv::parse_key)]
        key: String,
    },
    /// Set a key.
    Set {
        #[command(flatten)]
        machine: MachineArguments,
        /// Take the value from a file.
        #[arg(short, value_name = "FILE", conflicts_with = "value", required_unless_present = "value")]
        input: Option<PathBuf>,
        /// The key.
        #[arg(value_parser = kv::parse_key)]
        key: String,
        /// Its value; - reads standard input.
        #[arg(allow_hyphen_values = true)]
        value: Option<OsString>,
    },
    /// List the keys at a path, by default of the whole machine.
    Ls {
        #[command(flatten)]
        machine: MachineArguments,
        /// Everything below it too, by full paths.
        #[arg(short = 'R', long)]
        recursive: bool,
        /// As a JSON array of names; with -R as an object of paths and values.
        #[arg(long)]
        json: bool,
        /// The key or path.
        #[arg(value_parser = kv::parse_key)]
        path: Option<String>,
    },
    /// Remove a key and all keys below it.
    Rm {
        #[command(flatten)]
        machine: MachineArguments,
        /// The key.
        #[arg(value_parser = kv::parse_key)]
        key: String,
    },
    /// Print each change of keys at or below some paths, one line each.
    Watch {
        #[command(flatten)]
        machine: MachineArguments,
        /// End after so many changes.
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
        count: Option<u64>,
        /// End after so many seconds; with status 4 when --count was not reached.
        #[arg(long, value_name = "SECONDS", value_parser = seconds, allow_hyphen_values = true)]
        timeout: Option<Duration>,
        /// As JSON objects: {"path": ..., "value": ...}, null for a key that is gone.
        #[arg(long)]
        json: bool,
        /// The keys or paths.
        #[arg(value_parser = kv::parse_key, required = true)]
        paths: Vec<String>,
    },
}

const KEYS_HELP: &str = "\
Keys: a name such as hostname, or VMware's guestinfo.hostname, is the key for guests vm-data/hostname, where each dot is a slash;
a path with a slash belongs to the machine, at its end too (data/); one that begins with a slash is a path of the whole store.
Exit status: 0, 1 for errors, 2 when there is no such key, 4 when the time ran out.";

/// What `vmctl disk` and `vmctl nic` do; devices are asked for by `S`.
#[derive(Subcommand)]
#[command(after_help = "\
Exit status: 0, 1 for errors, 2 when there is no such device, 4 when the guest has not let go of it in time.")]
pub enum DeviceCommand<S>
where
    S: std::str::FromStr<Err = String> + Clone + Send + Sync + 'static,
{
    /// Plug one in; prints its name.
    Add {
        #[command(flatten)]
        machine: MachineArguments,
        /// As for vmctl run --disk and --nic, with bus=xen.
        device: S,
    },
    /// Ask the guest to let go of one, and wait until it has.
    Rm {
        #[command(flatten)]
        machine: MachineArguments,
        /// Wait so many seconds for the guest; 10 by default.
        #[arg(long, value_name = "SECONDS", value_parser = seconds, allow_hyphen_values = true)]
        wait: Option<Duration>,
        /// Do not ask: take it from the guest. With --wait, only when the guest did not let go in time.
        #[arg(long)]
        force: bool,
        /// Its name.
        name: String,
    },
    /// List them.
    Ls {
        #[command(flatten)]
        machine: MachineArguments,
        /// As a JSON array.
        #[arg(long)]
        json: bool,
    },
}

/// Options of `vmctl stop`.
#[derive(Args)]
#[command(after_help = "\
Exit status: 0 when the guest was asked and, with --wait, has obeyed; 1 for errors; 4 when the time ran out.")]
pub struct StopArguments {
    #[command(flatten)]
    pub machine: MachineArguments,
    /// Who asks the guest: auto, acpi, vmware, openbsd, xen or hyperv.
    #[arg(long, value_name = "WAY", default_value = "auto")]
    pub via: Via,
    /// Reboot instead of shutting down.
    #[arg(long)]
    pub reboot: bool,
    /// Do not ask: pull the plug, or press the reset button. With --wait, only when the guest did not obey in time.
    #[arg(long)]
    pub force: bool,
    /// Wait so many seconds for the guest to listen, and to obey.
    #[arg(long, value_name = "SECONDS", value_parser = seconds, allow_hyphen_values = true)]
    pub wait: Option<Duration>,
}

/// Options of `vmctl status`.
#[derive(Args)]
pub struct StatusArguments {
    #[command(flatten)]
    pub machine: MachineArguments,
    /// Answer in JSON.
    #[arg(long)]
    pub json: bool,
}

/// Options of `vmctl sync`.
#[derive(Args)]
pub struct SyncArguments {
    #[command(flatten)]
    pub machine: MachineArguments,
    /// Who asks the guest: auto, vmware, openbsd or hyperv.
    #[arg(long, value_name = "WAY", default_value = "auto")]
    pub via: Via,
}

/// Options of `vmctl freeze` and `vmctl thaw`.
#[derive(Args)]
#[command(after_help = "\
Exit status: 0 when it is done, 1 for errors, 4 when the time ran out.")]
pub struct RestArguments {
    #[command(flatten)]
    pub machine: MachineArguments,
    /// Wait so many seconds at most for the guest to do it.
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = seconds, allow_hyphen_values = true)]
    pub wait: Duration,
}

/// A time from 0 to a year, with fractions.
fn seconds(text: &str) -> Result<Duration, String> {
    const YEAR: f64 = 366.0 * 86400.0;
    match text.parse() {
        Ok(seconds) if (0.0..=YEAR).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err("not a number of seconds".into()),
    }
}

/// Options of `vmctl host`.
#[derive(Args)]
pub struct HostArguments {
    /// Answer in JSON.
    #[arg(long)]
    pub json: bool,
}

/// Options of `vmctl run`.
#[derive(Args)]
#[command(after_help = "\
Exit status: 0 when the guest powers off, or resets under --no-reboot; 1 for errors of vmctl;
3 for a guest that died (triple fault); (value << 1) | 1 under --debug-exit.
On a terminal the serial port is raw: Ctrl-A x quits, Ctrl-A h helps, Ctrl-A Ctrl-A sends Ctrl-A.")]
pub struct RunArguments {
    /// Kernel: Linux bzImage, ELF with PVH note, multiboot, or OpenBSD's. Without kernel, disk and firmware an embedded guest boots.
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk; for multiboot a module, with arguments after the file name. Repeatable.
    #[arg(long, value_name = "FILE", action = ArgAction::Append)]
    pub initrd: Vec<String>,
    /// Kernel command line.
    #[arg(long, value_name = "STR", default_value = "", hide_default_value = true, allow_hyphen_values = true)]
    pub cmdline: String,
    /// Firmware to start instead of a kernel; the host's SeaBIOS when there is a disk and no kernel.
    #[arg(long, value_name = "FILE")]
    pub bios: Option<PathBuf>,
    /// Memory, with suffix K, M, G or T (none means M).
    #[arg(long, value_name = "SIZE", default_value = "512M", allow_hyphen_values = true)]
    pub memory: Size,
    /// Processors, 1 to 64.
    #[arg(long, value_name = "N", default_value_t = 1, allow_hyphen_values = true)]
    pub cpus: u32,
    /// Disk: FILE[,ro][,format=raw|qcow2][,backing=on|off][,bus=virtio|xen|hyperv][,dvd][,persistent-grants]. Repeatable.
    #[arg(long, value_name = "DISK", action = ArgAction::Append)]
    pub disk: Vec<DiskSpec>,
    /// Network card: user|tap:NAME|none[,mac=XX:XX:XX:XX:XX:XX][,bus=virtio|xen|hyperv][,forward=tcp|udp:HOSTPORT:GUESTPORT]. Repeatable.
    #[arg(long, value_name = "NIC", action = ArgAction::Append)]
    pub nic: Vec<NicSpec>,
    /// What executes the processors: auto, kvm or soft.
    #[arg(long, value_name = "BACKEND", default_value = "auto")]
    pub backend: BackendChoice,
    /// Paravirtual dialects the guest finds, first CPUID base first, of kvm, vmware, openbsd, xen, hyperv;
    /// or a layout: none, kvm, vmware, vmware+kvmclock, openbsd, xen, hyperv, hyperv+vmware, all.
    /// The default is kvm, and all for the embedded guest.
    #[arg(long, value_name = "LIST")]
    pub dialect: Option<DialectList>,
    /// What the machine tells as its UUID; a new one for each run by default.
    #[arg(long, value_name = "UUID")]
    pub uuid: Option<Uuid>,
    /// A key for the guest, before it starts: KEY=VALUE or KEY=@FILE (KEY=@@VALUE for a value that begins with @). Repeatable.
    #[arg(long, value_name = "KEY=VALUE", action = ArgAction::Append)]
    pub kv: Vec<Assignment>,
    /// When the machine has ended, write all its keys into FILE as one JSON object.
    #[arg(long, value_name = "FILE")]
    pub kv_out: Option<PathBuf>,
    /// A socket for vmctl kv, disk, nic, stop, status, sync, freeze and thaw.
    #[arg(long, value_name = "SOCKET")]
    pub control: Option<PathBuf>,
    /// A socket at which the machine's store is offered to XenStore's own clients.
    #[arg(long, value_name = "SOCKET")]
    pub xenstore: Option<PathBuf>,
    /// A file in the firmware configuration device: name=opt/NAME,file=FILE or name=opt/NAME,string=TEXT. Repeatable.
    #[arg(long, value_name = "FILE", action = ArgAction::Append)]
    pub fw_cfg: Vec<FwCfgSpec>,
    /// The first serial port: stdio, null or file:PATH.
    #[arg(long, value_name = "TARGET", default_value = "stdio")]
    pub serial: SerialTarget,
    /// A virtio console (hvc0) as well: stdio, null or file:PATH.
    #[arg(long, value_name = "TARGET")]
    pub console: Option<SerialTarget>,
    /// A reset ends the machine instead of starting it again.
    #[arg(long)]
    pub no_reboot: bool,
    /// A write to port 0xf4 ends the machine with status (value << 1) | 1.
    #[arg(long)]
    pub debug_exit: bool,
    /// The ports of QEMU's pc-testdev, and with Hyper-V's dialect of hyperv-testdev.
    #[arg(long)]
    pub testdev: bool,
    /// At the end, print exits by kind, instructions and speed.
    #[arg(long)]
    pub stats: bool,
    /// Time follows the instruction count, so that equal runs are equal (software CPU, one processor).
    #[arg(long)]
    pub deterministic: bool,
}

/// `vmctl run` alone.
#[derive(Parser)]
struct Defaults {
    #[command(flatten)]
    run: RunArguments,
}

impl RunArguments {
    /// Those of `vmctl run` without any option.
    pub fn defaults() -> Box<RunArguments> {
        Box::new(Defaults::parse_from(["vmctl"]).run)
    }

    /// The machine these options ask for.
    pub fn into_config(self) -> MachineConfig {
        MachineConfig {
            kernel: self.kernel.map(Kernel::File),
            initrds: self.initrd,
            cmdline: self.cmdline,
            bios: self.bios,
            memory: self.memory,
            cpus: self.cpus,
            disks: self.disk,
            nics: self.nic,
            backend: self.backend,
            dialects: self.dialect.unwrap_or_default(),
            xenstore: self.xenstore,
            uuid: self.uuid,
            fw_cfg: self.fw_cfg,
            serial: self.serial,
            console: self.console,
            reboot: !self.no_reboot,
            debug_exit: self.debug_exit,
            testdev: self.testdev,
            deterministic: self.deterministic,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn command_line_is_well_formed() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn run_takes_every_option() {
        let line = "vmctl run --kernel k --initrd a --initrd b --cmdline -x --memory 1G --cpus 2 --disk d,ro --nic user --backend soft \
                    --dialect none --serial null --no-reboot --debug-exit --testdev --stats";
        let Some(Command::Run(run)) = Arguments::try_parse_from(line.split_whitespace()).unwrap().command else { panic!("not run") };
        let config = run.into_config();
        assert_eq!((config.cpus, config.initrds.len(), config.disks.len(), config.reboot), (2, 2, 1, false));
    }
}
