//! Promise: what pods accept is what `PeerAuthentication` says, as Istio's users write it, and of several the narrowest counts.

use std::time::Duration;

use harness::cluster::{ENROLLED, PodSpec, Refusal};
use harness::{Cluster, eventually_within};

/// The manifests are Istio's own, but for the namespaces and the port:
/// <https://istio.io/latest/docs/tasks/security/authentication/authn-policy/>.
const NAMESPACE: &str = "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata:
  name: \"default\"
  namespace: \"modes-foo\"
spec:
  mtls:
    mode: PERMISSIVE
";
const WORKLOAD: &str = "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata:
  name: \"httpbin\"
  namespace: \"modes-foo\"
spec:
  selector:
    matchLabels:
      app: httpbin
  mtls:
    mode: STRICT
";
const PORT: &str = "
apiVersion: security.istio.io/v1beta1
kind: PeerAuthentication
metadata:
  name: \"httpbin\"
  namespace: \"modes-foo\"
spec:
  selector:
    matchLabels:
      app: httpbin
  mtls:
    mode: STRICT
  portLevelMtls:
    8081:
      mode: DISABLE
";
const FOO: &str = "modes-foo";
const BAR: &str = "modes-bar";
const LEGACY: &str = "modes-legacy";
/// An HTTP server is asked, an echo server says it back.
const SAY: &str = r"GET / HTTP/1.1\r\n\r\n";

#[test]
fn modes_of_mesh_namespace_workload_and_port_count_and_the_narrowest_wins() {
    let cluster = Cluster;
    let nodes = cluster.nodes();
    let _namespaces = [cluster.namespace(FOO, &[ENROLLED]), cluster.namespace(BAR, &[ENROLLED]), cluster.namespace(LEGACY, &[])];
    let addresses = cluster.pods(&[
        PodSpec::new(FOO, "httpbin", &nodes[1]),
        PodSpec::new(FOO, "sleep", &nodes[0]),
        PodSpec::new(BAR, "httpbin", &nodes[0]),
        PodSpec::new(LEGACY, "sleep", &nodes[0]),
    ]);
    // The workload of the narrower manifests on both ports, its neighbour, and its like in another namespace.
    let servers = [(&addresses[0], 8080), (&addresses[0], 8081), (&addresses[1], 8080), (&addresses[2], 8080)]
        .map(|(address, port)| format!("{address}:{port}"));
    let is_open = |server: &String| match cluster.converse(LEGACY, "sleep", server, SAY) {
        Ok(_) => true,
        Err(refusal) => {
            assert_eq!(refusal, Refusal("ConnectionRefused".to_owned()), "{server}");
            false
        }
    };
    let check = |what: &str, wanted: [bool; 4]| {
        eventually_within(Duration::from_secs(20), what, || servers.each_ref().map(is_open) == wanted);
        for server in &servers {
            cluster.converse(FOO, "sleep", server, SAY).unwrap_or_else(|refusal| panic!("{what}: {refusal:?} in the mesh"));
        }
    };
    let delete = |name: &str| cluster.kubectl(&["--namespace", FOO, "delete", "peerauthentication", name]);
    check("all is open", [true, true, true, true]);
    let strict = cluster.strict_mesh();
    check("the mesh is closed", [false, false, false, false]);
    cluster.apply_text(NAMESPACE);
    check("one namespace is open", [true, true, true, false]);
    cluster.apply_text(WORKLOAD);
    check("but for one workload in it", [false, false, true, false]);
    cluster.apply_text(PORT);
    check("which is open on one port", [false, true, true, false]);
    delete("httpbin");
    check("the workload is as its namespace", [true, true, true, false]);
    delete("default");
    check("the namespace is as the mesh", [false, false, false, false]);
    drop(strict);
    check("all is open again", [true, true, true, true]);
}
