//! What a figure was measured on: it means nothing without.

use crate::clock::unix_ms;
use crate::config::Config;
use crate::doctor::Probe;
use crate::error::{Context, Result};
use crate::logs::printable;
use crate::paths::Paths;
use crate::supervisor::machine::artifact_paths;
use crate::vm::Settings;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Host and guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Environment {
    /// This program's version.
    pub lighter: String,
    /// When it was measured, milliseconds since 1970.
    pub unix_ms: u64,
    /// The host's processor, by its own name.
    pub processor: String,
    /// How many of them this program may use.
    pub processors: usize,
    /// The host's memory, MiB.
    pub memory_mib: u64,
    /// The host's kernel.
    pub host_kernel: String,
    /// What its KVM is.
    pub kvm: String,
    /// Whether the host's file cache was dropped before each boot.
    pub caches_dropped: bool,
    /// The guest's kernel.
    pub kernel: PathBuf,
    /// The guest's root file system.
    pub image: PathBuf,
    /// vCPUs.
    pub guest_cpus: u16,
    /// Guest memory, MiB.
    pub guest_memory_mib: u64,
}

impl Environment {
    /// Of this host, and of guests of `settings`.
    ///
    /// # Errors
    /// When KVM cannot be probed, or a path cannot be made absolute.
    pub fn of(paths: &Paths, config: &Config, settings: &Settings, caches_dropped: bool) -> Result<Self> {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let uname = rustix::system::uname();
        let sysinfo = rustix::system::sysinfo();
        let [kernel, image] = artifact_paths(paths, &settings.kernel, &settings.image, config);
        let absolute = |path: PathBuf| {
            std::path::absolute(&path).context(|| format!("cannot use the path {}", path.display()))
        };
        Ok(Self {
            lighter: env!("CARGO_PKG_VERSION").into(),
            unix_ms: unix_ms(),
            processor: processor(&cpuinfo),
            processors: std::thread::available_parallelism().map_or(1, Into::into),
            memory_mib: (sysinfo.totalram as u64).saturating_mul(sysinfo.mem_unit.into()) >> 20,
            host_kernel: format!(
                "{} {}",
                uname.sysname().to_string_lossy(),
                uname.release().to_string_lossy()
            ),
            kvm: kvm(&Probe::run()?, &cpuinfo),
            caches_dropped,
            kernel: absolute(kernel)?,
            image: absolute(image)?,
            guest_cpus: settings.cpus,
            guest_memory_mib: settings.memory.mib(),
        })
    }

    /// For people: what, and which.
    pub fn lines(&self) -> Vec<(&'static str, String)> {
        let caches = match self.caches_dropped {
            true => "dropped before each boot",
            false => "as the boots before left it",
        };
        vec![
            ("Lighter", self.lighter.clone()),
            ("processor", format!("{} × {}", self.processors, self.processor)),
            ("memory", format!("{} MiB", self.memory_mib)),
            ("kernel", self.host_kernel.clone()),
            ("KVM", self.kvm.clone()),
            ("file cache", caches.into()),
            (
                "guest",
                format!("{} vCPU, {} MiB", self.guest_cpus, self.guest_memory_mib),
            ),
            ("guest kernel", self.kernel.display().to_string()),
            ("guest image", self.image.display().to_string()),
        ]
    }
}

fn field<'a>(cpuinfo: &'a str, name: &str) -> Option<&'a str> {
    let (_, value) = cpuinfo
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| key.trim() == name)?;
    Some(value.trim())
}

fn processor(cpuinfo: &str) -> String {
    printable(field(cpuinfo, "model name").unwrap_or("unknown"))
}

/// Bare, nested or emulated: as the probe and the processor say.
fn kvm(probe: &Probe, cpuinfo: &str) -> String {
    let flags = field(cpuinfo, "flags").unwrap_or_default();
    let has = |flag: &str| flags.split_ascii_whitespace().any(|word| word == flag);
    let kind = if !probe.runs_linux {
        "emulated: this host's KVM interprets guests"
    } else if has("hypervisor") {
        "nested: this host is a VM itself"
    } else {
        "bare: on the hardware"
    };
    format!("{kind}; {}", probe.found())
}

#[cfg(test)]
pub mod tests {
    use super::*;

    fn probe(runs_linux: bool) -> Probe {
        let json =
            format!(r#"{{"runs_linux":{runs_linux},"instructions_per_second":3000000000,"missing":[]}}"#);
        serde_json::from_str(&json).unwrap()
    }

    #[test]
    fn what_kvm_is_follows_from_probe_and_flags() {
        let kind = |runs_linux, flags: &str| {
            let cpuinfo = format!("model name\t: X\nflags\t\t: fpu {flags} sse\n");
            kvm(&probe(runs_linux), &cpuinfo)
        };
        assert!(kind(true, "svm").starts_with("bare"));
        assert!(kind(true, "vmx hypervisor").starts_with("nested"));
        assert!(kind(false, "vmx").starts_with("emulated"));
        assert!(kind(true, "svm").ends_with("3000 million ring-0 instructions a second"));
    }

    #[test]
    fn the_processor_has_its_name() {
        assert_eq!(processor("processor : 0\nmodel name\t: EPYC : 9\n"), "EPYC : 9");
        assert_eq!(processor(""), "unknown");
    }

    /// Some machine.
    pub fn somewhere() -> Environment {
        Environment {
            lighter: "0.1.0".into(),
            unix_ms: 1_769_860_800_000,
            processor: "Example <processor> & more".into(),
            processors: 8,
            memory_mib: 32_000,
            host_kernel: "Linux 6.12.0".into(),
            kvm: "bare: on the hardware; 3000 million ring-0 instructions a second".into(),
            caches_dropped: false,
            kernel: "/usr/share/lighter/vmlinux".into(),
            image: "/usr/share/lighter/a/quite/long/path/to/the/folder/of/images/rootfs.erofs".into(),
            guest_cpus: 2,
            guest_memory_mib: 2048,
        }
    }
}
