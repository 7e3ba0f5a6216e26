//! The options that not every Kubernetes has: a program is given those that it says it knows, whatever its version.

use std::collections::HashSet;
use std::process::Command;

use anyhow::{Context as _, Result};

use super::Cluster;

/// What kubelet has to be told where it can be: of containerd, before there was nothing else; and to run where cgroups are of the first
/// version.
const KUBELET: [&str; 2] = ["--container-runtime=remote", "--fail-cgroupv1=false"];
/// What a user may turn on whose pods are to read the mesh's roots as a volume.
const FEATURES: [&str; 2] = ["ClusterTrustBundle", "ClusterTrustBundleProjection"];
/// The version of the API that has these.
const VERSION: &str = "--runtime-config=certificates.k8s.io/v1beta1=true";

/// Those of kubelet.
///
/// # Errors
/// When it does not say what options it has.
pub(super) fn kubelet(cluster: &Cluster) -> Result<Vec<String>> {
    let known = Known::ask(cluster, "kubelet")?;
    let mut options: Vec<String> = KUBELET.into_iter().filter(|option| known.has_option(option)).map(str::to_owned).collect();
    options.extend(known.features());
    Ok(options)
}

/// Those of the API server.
///
/// # Errors
/// When it does not say what options it has.
pub(super) fn api_server(cluster: &Cluster) -> Result<Vec<String>> {
    let mut options: Vec<String> = Known::ask(cluster, "kube-apiserver")?.features().into_iter().collect();
    if !options.is_empty() {
        options.push(VERSION.to_owned());
    }
    Ok(options)
}

/// The words of a program's help: its options are among them, and the features that it can be told to have.
struct Known(HashSet<String>);

impl Known {
    fn ask(cluster: &Cluster, program: &str) -> Result<Self> {
        let output = Command::new(cluster.path("bin").join(program)).arg("--help").output();
        let output = output.with_context(|| format!("asking {program} for its options"))?;
        Ok(Self::read(&String::from_utf8_lossy(&[output.stdout, output.stderr].concat())))
    }

    /// A feature may be named with the component that has it before a colon.
    fn read(help: &str) -> Self {
        Self(help.split_whitespace().filter_map(|word| word.rsplit(':').next()).map(str::to_owned).collect())
    }

    fn has_option(&self, option: &str) -> bool {
        self.0.contains(option.split('=').next().unwrap_or(option))
    }

    /// The option for those of our features that it knows.
    fn features(&self) -> Option<String> {
        let known = FEATURES.into_iter().filter(|feature| self.0.contains(&format!("{feature}=true|false")));
        let known: Vec<String> = known.map(|feature| format!("{feature}=true")).collect();
        (!known.is_empty()).then(|| format!("--feature-gates={}", known.join(",")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_option_is_known_by_its_whole_name_and_a_feature_that_can_be_turned_on() {
        let known = Known::read(
            "      --container-runtime-endpoint string   The endpoint\n      --fail-cgroupv1   Prevent\n\
             AllBeta=true|false (BETA - default=false)\n ClusterTrustBundle=true|false (BETA - default=false)\n",
        );
        assert!(known.has_option("--fail-cgroupv1=false"));
        assert!(!known.has_option("--container-runtime=remote"));
        assert_eq!(known.features().as_deref(), Some("--feature-gates=ClusterTrustBundle=true"));
        assert_eq!(Known::read("--container-runtime string").features(), None);
        let of_component = Known::read("kube:ClusterTrustBundleProjection=true|false (ALPHA - default=false)");
        assert_eq!(of_component.features().as_deref(), Some("--feature-gates=ClusterTrustBundleProjection=true"));
    }
}
