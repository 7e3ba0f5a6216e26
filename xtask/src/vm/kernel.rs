//! Debian's kernels, taken from its packages without being installed. What a guest needs of one is kept in the user's cache directory.

use std::collections::HashMap;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use crate::run::{cache, run};
use crate::setup;

/// The newest kernel of a suite.
const PACKAGE: &str = "linux-image-amd64";
/// What a guest needs that may be a module, in the order of need: its files come from this machine by 9p, nodes and pods are joined by
/// bridges and pairs of interfaces, and the agent ends connections by `sock_diag`.
const MODULES: [&str; 6] = ["virtio_pci", "9pnet_virtio", "9p", "bridge", "veth", "tcp_diag"];
/// Debian's keys, where apt is not told of them by itself.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// A kernel, ready to boot.
#[derive(Debug)]
pub(super) struct Kernel {
    /// Its version, as it names it.
    pub(super) release: String,
    /// What is booted.
    pub(super) image: PathBuf,
    /// The directory of its modules, whose names sort in the order in which they are to be loaded.
    pub(super) modules: PathBuf,
}

/// A kernel of `series`, which is downloaded if it has not been, from the first of `suites` that has it.
pub(super) fn get(series: &str, suites: &[&str]) -> Result<Kernel> {
    let cache = cache()?;
    fs::create_dir_all(&cache).with_context(|| format!("making {}", cache.display()))?;
    let mut hasher = DefaultHasher::new();
    (MODULES, suites).hash(&mut hasher);
    let kept = cache.join(format!("linux-{series}-{:016x}", hasher.finish()));
    let lock = File::create(cache.join("linux.lock"))?;
    lock.lock().context("waiting for another download of kernels")?;
    if !kept.is_dir() {
        let work = cache.join("linux.work");
        if work.exists() {
            fs::remove_dir_all(&work).context("removing what an interrupted download left")?;
        }
        unpack(&download(series, suites, &work)?, &work)?;
        fs::rename(work.join("kept"), &kept)?;
        fs::remove_dir_all(&work)?;
    }
    let release = fs::read_to_string(kept.join("release"))?;
    Ok(Kernel { release, image: kept.join("image"), modules: kept.join("modules") })
}

/// Downloads the package, and says where it is.
fn download(series: &str, suites: &[&str], work: &Path) -> Result<PathBuf> {
    let mirrors = mirrors()?;
    let trusted = if Path::new(KEYRING).is_file() { format!(" signed-by={KEYRING}") } else { String::new() };
    let wanted = format!("linux-image-{series}.");
    for (number, (suite, mirror)) in suites.iter().flat_map(|suite| mirrors.iter().map(move |mirror| (suite, mirror))).enumerate()
    {
        let place = work.join(number.to_string());
        let apt = |program| setup::apt_of(&place, program);
        fs::create_dir_all(place.join("parts"))?;
        fs::create_dir_all(place.join("lists/partial"))?;
        fs::write(place.join("parts/kernels.list"), format!("deb [arch=amd64{trusted}] {mirror} {suite} main\n"))?;
        if run(apt("apt-get").args(["update", "--error-on=any"])).is_err() {
            continue;
        }
        let depends = apt("apt-cache").args(["depends", PACKAGE]).output().context("starting apt-cache")?;
        let depends = String::from_utf8_lossy(&depends.stdout).into_owned();
        let Some(package) = depends.split_whitespace().find(|word| word.starts_with(&wanted)) else { continue };
        run(apt("apt-get").args(["download", package]).current_dir(&place))?;
        let files = fs::read_dir(&place)?.flatten().map(|entry| entry.path());
        let package = files.into_iter().find(|file| file.extension().is_some_and(|extension| extension == "deb"));
        return package.context("apt-get has downloaded no package");
    }
    bail!(
        "Linux {series} was looked for as {PACKAGE} in Debian's {} at {}, and is not there",
        suites.join(" and "),
        mirrors.join(" and ")
    )
}

/// Where this machine takes Debian's packages from.
fn mirrors() -> Result<Vec<String>> {
    let output = Command::new("apt-get")
        .args(["indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Label: Debian"])
        .output()
        .context("asking apt-get for this machine's package sources")?;
    let mut mirrors: Vec<String> = String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect();
    mirrors.sort_unstable();
    mirrors.dedup();
    ensure!(
        !mirrors.is_empty(),
        "apt-get knows no mirror of Debian, whose kernels the tests take; name one in /etc/apt/sources.list.d and run `apt-get update`"
    );
    Ok(mirrors)
}

/// Takes from a package what is kept.
fn unpack(package: &Path, work: &Path) -> Result<()> {
    let (tree, kept) = (work.join("tree"), work.join("kept"));
    run(Command::new("dpkg-deb").arg("-x").arg(package).arg(&tree))?;
    // Since Debian 13 they are below usr.
    let places = ["lib/modules", "usr/lib/modules"].map(|place| tree.join(place));
    let mut trees = places.iter().filter_map(|place| fs::read_dir(place).ok()).flatten().flatten();
    let modules = trees.next().context("the package has no modules")?.path();
    let release = modules.file_name().context("a directory has a name")?.to_string_lossy().into_owned();
    fs::create_dir_all(kept.join("modules"))?;
    fs::write(kept.join("release"), &release)?;
    fs::copy(tree.join(format!("boot/vmlinuz-{release}")), kept.join("image")).context("taking the kernel's image")?;
    let mut found = Modules::in_tree(&modules)?;
    for name in MODULES {
        found.need(name)?;
    }
    for (number, (name, module)) in found.needed.iter().enumerate() {
        fs::write(kept.join(format!("modules/{number:02}-{name}.ko")), module)?;
    }
    Ok(())
}

/// The modules of a kernel.
struct Modules {
    files: HashMap<String, PathBuf>,
    /// The names of those that are part of the kernel's image.
    built_in: Vec<String>,
    /// Those that are to be loaded, in order, uncompressed.
    needed: Vec<(String, Vec<u8>)>,
}

impl Modules {
    fn in_tree(tree: &Path) -> Result<Self> {
        let built_in = fs::read_to_string(tree.join("modules.builtin")).context("reading which modules are built in")?;
        let built_in = built_in.lines().map(|line| name_of(Path::new(line))).collect();
        let (mut files, mut directories) = (HashMap::new(), vec![tree.join("kernel")]);
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(&directory)? {
                let path = entry?.path();
                if path.is_dir() {
                    directories.push(path);
                } else {
                    files.insert(name_of(&path), path);
                }
            }
        }
        Ok(Self { files, built_in, needed: Vec::new() })
    }

    /// Adds a module, after those that it depends on.
    fn need(&mut self, name: &str) -> Result<()> {
        if self.built_in.iter().any(|there| there == name) || self.needed.iter().any(|(there, _)| there == name) {
            return Ok(());
        }
        let file = self.files.get(name).with_context(|| format!("the package has no module {name}"))?;
        let module = read(file)?;
        for dependency in dependencies(&module) {
            self.need(&dependency)?;
        }
        self.needed.push((name.to_owned(), module));
        Ok(())
    }
}

/// The name of a module by its file's: kernels write `_` where files may have `-`.
fn name_of(file: &Path) -> String {
    let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    name.split('.').next().unwrap_or_default().replace('-', "_")
}

fn read(file: &Path) -> Result<Vec<u8>> {
    let program = match file.extension().and_then(|extension| extension.to_str()) {
        Some("ko") => return fs::read(file).with_context(|| format!("reading {}", file.display())),
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => bail!("{}: modules are known plain or packed by xz or zstd", file.display()),
    };
    let output = Command::new(program).arg("-dc").arg(file).output().with_context(|| format!("starting {program}"))?;
    ensure!(output.status.success(), "{program} does not unpack {}", file.display());
    Ok(output.stdout)
}

/// What a module says that it depends on: names between zero bytes, in its section `.modinfo`.
fn dependencies(module: &[u8]) -> Vec<String> {
    let said = module.split(|byte| *byte == 0).find_map(|text| text.strip_prefix(b"depends="));
    let said = String::from_utf8_lossy(said.unwrap_or_default()).into_owned();
    said.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_loaded_after_what_they_depend_on_and_once() {
        let tree = tempfile::tempdir().expect("a directory");
        let kernel = tree.path().join("kernel/net");
        fs::create_dir_all(&kernel).expect("a directory");
        fs::write(tree.path().join("modules.builtin"), "kernel/lib/built-in.ko\n").expect("a file");
        let module = |name: &str, depends: &str| {
            fs::write(kernel.join(format!("{name}.ko")), format!("\x7fELF\0license=GPL\0depends={depends}\0name={name}\0"))
        };
        module("bridge", "stp,llc,built-in").expect("a file");
        module("stp", "llc").expect("a file");
        module("llc", "").expect("a file");
        module("broken", "gone").expect("a file");
        let mut modules = Modules::in_tree(tree.path()).expect("a tree");
        for name in ["bridge", "stp", "built_in"] {
            modules.need(name).expect("all are there");
        }
        let names: Vec<_> = modules.needed.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["llc", "stp", "bridge"]);
        let error = modules.need("broken").expect_err("what it depends on is nowhere");
        assert!(error.to_string().contains("no module gone"), "{error}");
    }
}
