//! Kubernetes from the distribution's source package: one binary that is the API server, the controller manager, the scheduler, the
//! kubelet, kube-proxy and kubectl. Nothing is downloaded but that package, which has its dependencies with it. A build takes minutes, so
//! its result is kept in the user's cache directory under a name that changes with whatever goes into it.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use super::Cluster;
use super::guard::VARIABLE;
use super::runtime::Runtime;
use crate::run::{cache, root, run};
use crate::setup::{self, Scope};

/// What the binary is called, and its other names, each of which makes it that program.
const BINARY: &str = "kubernetes";
pub(super) const PROGRAMS: [&str; 6] =
    ["kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubectl"];
const GO: &str = "/usr/lib/go-1.19/bin/go";
/// Without the clouds' code and the kubelet's own Docker client.
const TAGS: &str = "providerless dockerless";
/// The version that the binary tells of itself: that of the sources.
const VERSION: [&str; 6] = [
    "gitVersion=v1.20.2",
    "gitMajor=1",
    "gitMinor=20",
    "gitCommit=distribution",
    "gitTreeState=clean",
    "buildDate=2021-01-13T00:00:00Z",
];
/// A library that comes with the sources and that this Go has outgrown: encoding a map that holds anything, as each custom resource is, reads
/// memory that is not there. The distribution's own package of it fits its Go.
const OUTGROWN: &str = "github.com/modern-go/reflect2";
const LIBRARIES: &str = "/usr/share/gocode/src";
const MAIN: &str = include_str!("../../../tests/cluster/kubernetes/main.go");

/// The directory of the programs, which are built, for this cluster, if they have not been.
pub(super) fn programs(cluster: &Cluster) -> Result<PathBuf> {
    let cache = cache()?;
    fs::create_dir_all(&cache).with_context(|| format!("making {}", cache.display()))?;
    let mut hasher = DefaultHasher::new();
    (MAIN, TAGS, VERSION, GO, OUTGROWN, fs::read_to_string("/etc/os-release").unwrap_or_default()).hash(&mut hasher);
    let built = cache.join(format!("kubernetes-{:016x}", hasher.finish()));
    let lock = File::create(cache.join("kubernetes.lock"))?;
    lock.lock().context("waiting for another build of Kubernetes")?;
    if !built.is_dir() {
        setup::ensure(Scope::Kubernetes)?;
        eprintln!("building Kubernetes into {}: some minutes, once a machine", built.display());
        let work = cache.join("kubernetes.work");
        if work.exists() {
            fs::remove_dir_all(&work).context("removing what an interrupted build left")?;
        }
        fs::create_dir_all(&work)?;
        let output = Build { cluster, tree: &source(&work)?, work: &work }.run()?;
        fs::rename(output, &built)?;
        remove(&work)?;
    }
    Ok(built)
}

/// The directory of programs that somebody else has built.
///
/// # Errors
/// When one that a cluster needs is missing.
pub(super) fn given(directory: &Path) -> Result<&Path> {
    let needed = PROGRAMS.iter().chain(Runtime::among(directory).needs());
    let missing: Vec<&str> = needed.copied().filter(|program| !directory.join(program).is_file()).collect();
    ensure!(
        missing.is_empty(),
        "{} lacks {}: give a directory that has Kubernetes' programs",
        directory.display(),
        missing.join(", ")
    );
    Ok(directory)
}

/// Gets and unpacks the source package, by lists of package sources of its own: the machine's say where, but rarely have sources.
fn source(work: &Path) -> Result<PathBuf> {
    let (parts, lists, package) = (work.join("apt/parts"), work.join("apt/lists"), work.join("package"));
    for directory in [&parts, &lists.join("partial"), &package] {
        fs::create_dir_all(directory)?;
    }
    let machine = "/etc/apt/sources.list.d/debian.sources";
    let sources = fs::read_to_string(machine).with_context(|| format!("reading {machine}: this build knows Debian's form"))?;
    fs::write(parts.join("source.sources"), sources.replace("Types: deb\n", "Types: deb-src\n"))?;
    let apt = || setup::apt_of(&work.join("apt"), "apt-get");
    run(apt().arg("update"))?;
    run(apt().args(["source", "--download-only", "kubernetes"]).current_dir(&package))?;
    let files: Vec<PathBuf> = fs::read_dir(&package)?.flatten().map(|entry| entry.path()).collect();
    let description = files.iter().find(|file| file.extension().is_some_and(|extension| extension == "dsc"));
    let description = description.context("the source package has no description")?;
    let tree = work.join("gopath/src/k8s.io/kubernetes");
    fs::create_dir_all(work.join("gopath/src/k8s.io"))?;
    run(Command::new("dpkg-source").args(["--no-check", "-x"]).arg(description).arg(&tree))?;
    Ok(tree)
}

/// A build of the binary.
struct Build<'a> {
    cluster: &'a Cluster,
    /// The sources.
    tree: &'a Path,
    /// Where all that is made goes.
    work: &'a Path,
}

impl Build<'_> {
    /// Builds the binary, and gives the directory that it is in, with its names beside it.
    fn run(&self) -> Result<PathBuf> {
        let Self { tree, work, .. } = self;
        replace_outgrown(tree)?;
        self.generate_openapi()?;
        let main = tree.join("cmd/culvert-cluster");
        fs::create_dir_all(&main)?;
        fs::write(main.join("main.go"), MAIN)?;
        let mut flags = "-s -w".to_owned();
        for package in ["component-base/version", "client-go/pkg/version"] {
            for version in VERSION {
                flags += &format!(" -X k8s.io/kubernetes/vendor/k8s.io/{package}.{version}");
            }
        }
        let output = work.join("programs");
        let binary = output.join(BINARY);
        let mut command = self.go();
        command.args(["build", "-trimpath", "-tags", TAGS, "-ldflags", &flags, "-o"]).arg(&binary).arg("./cmd/culvert-cluster");
        run(&mut command)?;
        for program in PROGRAMS {
            std::os::unix::fs::symlink(BINARY, output.join(program))?;
        }
        Ok(output)
    }

    /// Makes the one generated file that the source package lacks.
    fn generate_openapi(&self) -> Result<()> {
        let Self { tree, work, .. } = self;
        let file = "pkg/generated/openapi/zz_generated.openapi.go";
        if tree.join(file).exists() {
            return Ok(());
        }
        let generator = work.join("openapi-gen");
        run(self.go().args(["build", "-o"]).arg(&generator).arg("./vendor/k8s.io/kube-openapi/cmd/openapi-gen"))?;
        let mut packages = BTreeSet::new();
        for (directory, name) in [("pkg", "pkg"), ("cmd", "cmd"), ("staging/src/k8s.io", "vendor/k8s.io")] {
            packages_with_types(&tree.join(directory), &format!("k8s.io/kubernetes/{name}"), &mut packages)?;
        }
        ensure!(!packages.is_empty(), "no package of {} asks for OpenAPI definitions", tree.display());
        let packages: Vec<String> = packages.into_iter().collect();
        let made = work.join("openapi");
        let mut command = Command::new(generator);
        command.args([
            "--logtostderr",
            "--input-dirs",
            &packages.join(","),
            "--output-package",
            "k8s.io/kubernetes/pkg/generated/openapi",
        ]);
        command.args([
            "--output-file-base",
            "zz_generated.openapi",
            "--go-header-file",
            "hack/boilerplate/boilerplate.generatego.txt",
        ]);
        command.arg("--report-filename").arg(work.join("openapi-violations")).arg("--output-base").arg(&made);
        self.environment(&mut command);
        ensure!(command.output().context("starting openapi-gen")?.status.success(), "openapi-gen failed");
        fs::copy(made.join("k8s.io/kubernetes").join(file), tree.join(file)).context("the generated OpenAPI definitions")?;
        Ok(())
    }

    fn go(&self) -> Command {
        let mut command = Command::new("nice");
        command.args(["-n", "19", GO]);
        self.environment(&mut command);
        command
    }

    fn environment(&self, command: &mut Command) {
        let Self { cluster, tree, work } = self;
        command.current_dir(tree).env("PWD", tree).env("GOPATH", work.join("gopath")).env("GOCACHE", work.join("gocache"));
        command.env("GO111MODULE", "off").env("GOPROXY", "off").env("GOFLAGS", "").env("CGO_ENABLED", "0");
        command.env(
            "PATH",
            format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", Path::new(GO).parent().unwrap_or(root().as_path()).display()),
        );
        // A build ends with the user of the cluster that it is for: what is left of it would be in the way of the next.
        command.env(VARIABLE, &cluster.name);
    }
}

/// Puts the distribution's package of a library in the place of the one that came with the sources.
fn replace_outgrown(tree: &Path) -> Result<()> {
    let (ours, place) = (Path::new(LIBRARIES).join(OUTGROWN), tree.join("vendor").join(OUTGROWN));
    fs::remove_dir_all(&place).with_context(|| format!("removing {}", place.display()))?;
    fs::create_dir_all(&place)?;
    for entry in fs::read_dir(&ours).with_context(|| format!("reading {}", ours.display()))? {
        let entry = entry?;
        let name = entry.file_name();
        if entry.file_type()?.is_file() && !name.to_string_lossy().ends_with("_test.go") {
            fs::copy(entry.path(), place.join(name))?;
        }
    }
    Ok(())
}

/// The Go packages below a directory whose files ask for OpenAPI definitions.
fn packages_with_types(directory: &Path, name: &str, packages: &mut BTreeSet<String>) -> Result<()> {
    for entry in fs::read_dir(directory).with_context(|| format!("reading {}", directory.display()))? {
        let entry = entry?;
        let file = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type()?.is_dir() && file != "sample-apiserver" && file != "_examples" {
            packages_with_types(&entry.path(), &format!("{name}/{file}"), packages)?;
        } else if file.ends_with(".go") {
            let text = fs::read_to_string(entry.path())?;
            if text.lines().any(|line| line.starts_with("// +k8s:openapi-gen=")) {
                packages.insert(name.to_owned());
            }
        }
    }
    Ok(())
}

fn remove(work: &Path) -> Result<()> {
    fs::remove_dir_all(work).with_context(|| format!("removing {}", work.display()))
}
