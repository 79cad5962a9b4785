//! `hostctl detect`: every hypervisor interface of this machine, for people and as JSON.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::Write;

use pvbus::{Detection, Interface, Kind};

use crate::json::Json;
use crate::select::DEVICE_PREFIX;
use crate::sys::file;
use crate::transport::{fw_cfg, xen};

/// Names of features on a line of text.
const FEATURES_SHOWN: usize = 6;

/// The report for people: a line for each interface, its notes below.
#[must_use]
pub fn text(detection: &Detection) -> String {
    let mut out = String::new();
    if detection.interfaces.is_empty() {
        out.push_str(match detection.hypervisor {
            true => "a hypervisor that shows no interface\n",
            false => "no hypervisor (CPUID leaf 1, ECX bit 31)\n",
        });
    }
    for interface in &detection.interfaces {
        let device = minor(detection, interface).map_or_else(|| "-".into(), |minor| format!("{DEVICE_PREFIX}{minor}"));
        let version = interface.version.map(|version| format!(" {version}")).unwrap_or_default();
        let name = format!("{}{version}", interface.kind);
        let features = features(&interface.feature_names);
        // A String takes everything.
        let _ = writeln!(
            out,
            "{device:<12} {name:<14} leaves {:#x} to {:#x}  {:<22} {features}",
            interface.base,
            interface.max_leaf,
            store(interface.kind)
        );
        for note in &interface.notes {
            let _ = writeln!(out, "{:<12} {note}", "");
        }
    }
    if has_fw_cfg() {
        let _ = writeln!(out, "{:<12} {:<14} {}", "fw_cfg", fw_cfg::KIND.name(), fw_cfg::DIRECTORY);
    }
    out
}

/// The report for programs.
#[must_use]
pub fn json(detection: &Detection) -> Json {
    let interfaces = detection.interfaces.iter().map(|interface| {
        let device = minor(detection, interface).map(|minor| Json::String(format!("{DEVICE_PREFIX}{minor}")));
        let version = interface.version.map(|version| Json::String(format!("{version}.{}", version.build)));
        let store = Some(store(interface.kind)).filter(|store| !store.is_empty()).map(Json::text);
        Json::Object(
            [
                ("kind", Json::text(interface.kind)),
                ("device", device.into()),
                ("store", store.into()),
                ("base", Json::Number(interface.base.into())),
                ("max_leaf", Json::Number(interface.max_leaf.into())),
                ("trusted", Json::Bool(interface.trusted)),
                ("version", version.into()),
                ("features", Json::List(interface.feature_names.iter().map(Json::text).collect())),
                ("notes", Json::List(interface.notes.iter().map(Json::text).collect())),
            ]
            .into(),
        )
    });
    Json::Object(
        [
            ("hypervisor", Json::Bool(detection.hypervisor)),
            ("interfaces", Json::List(interfaces.collect())),
            ("fw_cfg", Json::Bool(has_fw_cfg())),
            ("xenbus", Json::Bool(file::exists(xen::device().as_bytes()))),
        ]
        .into(),
    )
}

fn minor(detection: &Detection, interface: &Interface) -> Option<usize> {
    detection.on_bus().into_iter().position(|other| other == interface)
}

/// What the store of a kind is called.
fn store(kind: Kind) -> &'static str {
    match kind {
        Kind::Vmware => "guestinfo",
        Kind::Xen => "XenStore",
        Kind::HyperV => "key/value pools",
        _ => "",
    }
}

fn has_fw_cfg() -> bool {
    file::exists(fw_cfg::DIRECTORY.as_bytes())
}

fn features(names: &[&str]) -> String {
    let shown = names.iter().take(FEATURES_SHOWN).copied().collect::<Vec<_>>().join(" ");
    match names.len().checked_sub(FEATURES_SHOWN) {
        Some(more @ 1..) => format!("{shown} and {more} more"),
        _ => shown,
    }
}

#[cfg(test)]
mod tests {
    use pvbus::hal::{Cpuid, Hal};
    use serde_json::{Value, json as value};

    use super::*;

    /// CPUID of a Linux host that shows Hyper-V before itself.
    struct Enlightened;

    impl Hal for Enlightened {
        fn cpuid(&self, leaf: u32, _: u32) -> Cpuid {
            let signature = |max, text: &[u8; 12]| {
                let word = |at: usize| u32::from_le_bytes([text[at], text[at + 1], text[at + 2], text[at + 3]]);
                Cpuid { eax: max, ebx: word(0), ecx: word(4), edx: word(8) }
            };
            match leaf {
                1 => Cpuid { ecx: 1 << 31, ..Cpuid::default() },
                0x4000_0000 => signature(0x4000_0005, b"Microsoft Hv"),
                0x4000_0002 => Cpuid { ebx: 10 << 16, ..Cpuid::default() },
                0x4000_0100 => signature(0x4000_0101, b"KVMKVMKVM\0\0\0"),
                0x4000_0101 => Cpuid { eax: 0b1011, ..Cpuid::default() },
                _ => Cpuid::default(),
            }
        }

        fn now(&self) -> pvbus::Nanos {
            0
        }
    }

    #[test]
    fn each_interface_has_its_line_with_the_device_by_openbsd_s_order() {
        let text = text(&pvbus::detect(&Enlightened));
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].starts_with("/dev/pvbus1  Hyper-V 10.0"), "{text}");
        assert!(lines.iter().any(|line| line.starts_with("/dev/pvbus0  KVM  ")), "{text}");
        assert!(text.contains("leaves 0x40000100 to 0x40000101"), "{text}");
    }

    #[test]
    fn json_has_all_there_is_to_know() {
        let value: Value = serde_json::from_str(&json(&pvbus::detect(&Enlightened)).to_string()).unwrap();
        let kvm = &value["interfaces"][1];
        assert_eq!((&kvm["kind"], &kvm["device"], &kvm["base"]), (&value!("KVM"), &value!("/dev/pvbus0"), &value!(0x4000_0100)));
        assert_eq!(kvm["store"], Value::Null);
        assert_eq!(value["interfaces"][0]["store"], "key/value pools");
        assert_eq!(value["hypervisor"], true);
    }

    #[test]
    fn bare_metal_is_said() {
        assert!(text(&Detection::default()).starts_with("no hypervisor"));
    }
}
