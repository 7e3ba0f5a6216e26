//! The images that a cluster has beside those it is given: the pause image of the pods' sandboxes, and the tests' application with a
//! shell's tools. There is no registry to pull from.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use crate::image::Arch;
use crate::run::{cargo, root, run};

/// The sandboxes' image.
pub(super) const PAUSE: &str = "localhost/culvert-test-pause:1";
/// The application's. Its tag is not `latest`, so that kubelet does not try to pull it.
const APPLICATION: &str = "localhost/culvert-test-app:1";
const BUSYBOX: &str = "/bin/busybox";

/// The docker-archive tars of a directory.
pub(super) fn archives(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(directory).with_context(|| format!("reading {}", directory.display()))?;
    let mut archives: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    archives.retain(|path| path.extension().is_some_and(|extension| extension == "tar"));
    archives.sort();
    ensure!(!archives.is_empty(), "{} has no docker-archive tar", directory.display());
    Ok(archives)
}

/// The name of the image in a docker-archive tar.
pub(super) fn name(archive: &Path) -> Result<String> {
    let output = Command::new("tar").args(["--extract", "--to-stdout", "--file"]).arg(archive).arg("manifest.json").output()?;
    let manifest: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let name = manifest[0]["RepoTags"][0].as_str();
    name.map(str::to_owned).with_context(|| format!("{} is no docker-archive of an image with a name", archive.display()))
}

/// Makes the images.
pub(super) fn own(directory: &Path) -> Result<Vec<PathBuf>> {
    let application = build_application()?;
    fs::create_dir_all(directory)?;
    let work = directory.join("work");
    let root = work.join("root");
    fs::create_dir_all(&root)?;
    fs::copy(&application, root.join("app"))?;
    let mut archives = vec![archive(&work, PAUSE, &["/app", "pause"], &directory.join("pause.tar"))?];
    add_shell(&root)?;
    archives.push(archive(&work, APPLICATION, &["/app"], &directory.join("app.tar"))?);
    fs::remove_dir_all(&work)?;
    Ok(archives)
}

/// Builds the application with all of the C library in it: its image has nothing else. Only its own crate is told so, so that what it rests on
/// is what the tests rest on, which has been compiled.
fn build_application() -> Result<PathBuf> {
    let mut command = cargo();
    command.args(["rustc", "--package", "culvert-cluster-app", "--"]);
    command.args(["-C", "target-feature=+crt-static", "-C", "strip=symbols"]);
    run(&mut command)?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    Ok(target.join("debug/culvert-cluster-app"))
}

fn add_shell(root: &Path) -> Result<()> {
    let bin = root.join("bin");
    for directory in [&bin, &root.join("tmp"), &root.join("etc")] {
        fs::create_dir_all(directory)?;
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/:/bin/sh\n")?;
    fs::copy(BUSYBOX, bin.join("busybox")).with_context(|| format!("copying {BUSYBOX}"))?;
    let list = Command::new(BUSYBOX).arg("--list").output().with_context(|| format!("starting {BUSYBOX}"))?;
    for applet in String::from_utf8(list.stdout)?.lines().filter(|applet| *applet != "busybox") {
        std::os::unix::fs::symlink("busybox", bin.join(applet))?;
    }
    Ok(())
}

/// Writes the tree `root` below `work` as an image of one layer.
fn archive(work: &Path, name: &str, entrypoint: &[&str], output: &Path) -> Result<PathBuf> {
    let layer = work.join("layer.tar");
    let mut tar = Command::new("tar");
    tar.args(["--sort=name", "--mtime=@0", "--owner=0", "--group=0", "--numeric-owner", "--create", "--file"]).arg(&layer);
    ensure!(tar.arg("--directory").arg(work.join("root")).arg(".").status()?.success(), "packing {name} failed");
    let digest = Command::new("sha256sum").arg("--binary").stdin(fs::File::open(&layer)?).output()?;
    let digest = String::from_utf8(digest.stdout)?;
    let digest = digest.split(' ').next().unwrap_or_default();
    let config = json!({
        "architecture": Arch::host()?.name(),
        "os": "linux",
        "config": {"Entrypoint": entrypoint, "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{digest}")]},
    });
    let manifest = json!([{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]);
    fs::File::create(work.join("config.json"))?.write_all(config.to_string().as_bytes())?;
    fs::File::create(work.join("manifest.json"))?.write_all(manifest.to_string().as_bytes())?;
    let mut tar = Command::new("tar");
    tar.arg("--create").arg("--file").arg(output).arg("--directory").arg(work).args([
        "manifest.json",
        "config.json",
        "layer.tar",
    ]);
    ensure!(tar.stdin(Stdio::null()).status()?.success(), "packing {name} failed");
    Ok(output.to_owned())
}
