//! A virtual machine that boots a kernel, runs a script in this machine's files, and ends.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};

use super::kernel::Kernel;
use crate::setup;

/// How long a guest may take, in seconds: on a processor of its own, and emulated on a machine that is busy.
const PATIENCE: u32 = 600;
const PATIENCE_EMULATED: u32 = 2400;
/// By how much the tests' own patience is longer where instructions are emulated.
const SLOWNESS_EMULATED: u32 = 6;
/// How `timeout` ends when it had to end the other.
const TIMED_OUT: i32 = 124;
/// Where the guest has the directory of what was built.
const TARGET: &str = "/run/target";
/// What the guest says last, before the status of its script.
const ENDED: &str = "guest-ended-with";

/// The first process. The script's output goes to the second serial port, where the kernel writes nothing.
const INIT: &str = include_str!("init.sh");

/// A virtual machine to be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Guest<'a> {
    pub(super) kernel: &'a Kernel,
    /// The agent, in the directory of what was built.
    pub(super) binary: &'a Path,
    /// Whether the processor runs it.
    pub(super) accelerated: bool,
}

/// How a script has ended.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) status: i32,
    /// What it has printed.
    pub(super) output: String,
}

/// Whether the processor runs guests itself. A device alone says little: where this machine is a guest, the other may not have let it.
pub(super) fn has_virtualisation() -> bool {
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let there = flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm");
    there && fs::File::options().read(true).write(true).open("/dev/kvm").is_ok()
}

impl Guest<'_> {
    /// Where the guest has a file of the directory of what was built.
    pub(super) fn path(&self, file: &Path) -> Result<String> {
        let below =
            file.strip_prefix(self.target()?).with_context(|| format!("{} is elsewhere than the binary", file.display()))?;
        Ok(format!("{TARGET}/{}", below.display()))
    }

    /// The directory of what was built: cargo's, with a directory of each profile.
    fn target(&self) -> Result<&Path> {
        self.binary.ancestors().nth(2).context("the binary is in a profile's directory")
    }

    /// Boots, and runs the script as root until it ends.
    ///
    /// # Errors
    /// When the guest does not boot, or does not end in time: with what it said until then.
    pub(super) fn run(&self, script: &str) -> Result<Ended> {
        let target = self.target()?;
        let work = target.join("vm").join(&self.kernel.release);
        if work.exists() {
            fs::remove_dir_all(&work)?;
        }
        fs::create_dir_all(&work)?;
        let (console, output) = (work.join("console"), work.join("output"));
        let initramfs = self.initramfs(&work, script)?;
        let patience = if self.accelerated { PATIENCE } else { PATIENCE_EMULATED };
        let mut qemu = Command::new("timeout");
        qemu.args(["--foreground", "--kill-after=10", &patience.to_string(), "qemu-system-x86_64"]);
        qemu.args(["-accel", if self.accelerated { "kvm" } else { "tcg" }, "-cpu", "max", "-smp", "2", "-m", "2048"]);
        qemu.args(["-nodefaults", "-display", "none", "-monitor", "none", "-no-reboot"]);
        qemu.arg("-kernel").arg(&self.kernel.image).arg("-initrd").arg(&initramfs);
        qemu.args(["-append", "console=ttyS0 panic=-1"]);
        qemu.arg("-serial").arg(format!("file:{}", console.display()));
        qemu.arg("-serial").arg(format!("file:{}", output.display()));
        for (tag, path) in [("root", Path::new("/")), ("target", target)] {
            let path = path.to_string_lossy().replace(',', ",,");
            qemu.args(["-virtfs", &format!("local,path={path},mount_tag={tag},security_model=none,readonly=on,multidevs=remap")]);
        }
        eprintln!("booting Linux {}, for up to {} minutes", self.kernel.release, patience / 60);
        let status = qemu.stdin(Stdio::null()).status().context("starting qemu")?;
        let said = |file: &Path| String::from_utf8_lossy(&fs::read(file).unwrap_or_default()).replace('\r', "");
        let output = said(&output);
        let Some(ended) = parse(&output) else {
            let why = match status.code() {
                Some(TIMED_OUT) => format!("the guest has not ended within {} minutes", patience / 60),
                _ => format!("the guest has stopped early ({status})"),
            };
            bail!("{why}; its console said\n{}\nand its script\n{output}", tail(&said(&console), 40));
        };
        Ok(ended)
    }

    /// Makes the first file system: a shell, the modules and the first process, which takes this machine's files for all else.
    fn initramfs(&self, work: &Path, script: &str) -> Result<PathBuf> {
        let root = work.join("root");
        for directory in ["bin", "dev", "root", "modules"] {
            fs::create_dir_all(root.join(directory))?;
        }
        let busybox = setup::find("busybox").context("busybox is not installed")?;
        fs::copy(&busybox, root.join("bin/busybox"))?;
        for module in fs::read_dir(&self.kernel.modules)?.flatten() {
            fs::copy(module.path(), root.join("modules").join(module.file_name()))?;
        }
        let slowness = if self.accelerated { 1 } else { SLOWNESS_EMULATED };
        let environment = format!("export NO_COLOR=1 CULVERT_BIN={} CULVERT_SLOWNESS={slowness}\n", self.path(self.binary)?);
        fs::write(root.join("script"), format!("{environment}{script}\n"))?;
        let init = root.join("init");
        fs::write(&init, INIT.replace("@TARGET@", TARGET).replace("@ENDED@", ENDED))?;
        fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
        let packed = work.join("initramfs");
        let pack = "busybox find . | busybox cpio -o -H newc >../initramfs";
        let output = Command::new("sh").args(["-c", pack]).current_dir(&root).output().context("starting sh")?;
        ensure!(output.status.success(), "packing the initramfs: {}", String::from_utf8_lossy(&output.stderr));
        Ok(packed)
    }
}

/// How the script has ended, by the last line of what the guest said. None: it has not.
fn parse(said: &str) -> Option<Ended> {
    let (output, last) = said.trim_end().rsplit_once('\n').unwrap_or(("", said.trim_end()));
    let status = last.strip_prefix(ENDED)?.trim().parse().ok()?;
    Some(Ended { status, output: output.to_owned() })
}

fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_line_says_how_a_script_has_ended() {
        let ended = parse("one\nguest-ended-with 0\ntwo\nguest-ended-with 101\n").expect("it has");
        assert_eq!((ended.status, ended.output.as_str()), (101, "one\nguest-ended-with 0\ntwo"));
        assert_eq!(parse("guest-ended-with 0\n").map(|ended| ended.status), Some(0));
        for unfinished in ["", "one", "guest-ended-with 0\none", "guest-ended-with"] {
            assert!(parse(unfinished).is_none(), "{unfinished}");
        }
    }

    #[test]
    fn of_a_long_console_the_end_is_shown() {
        assert_eq!(tail("1\n2\n3", 2), "2\n3");
        assert_eq!(tail("1", 2), "1");
    }
}
