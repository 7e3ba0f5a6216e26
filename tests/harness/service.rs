//! Services and their endpoints, as manifests.

use std::fmt::Write as _;
use std::net::IpAddr;

use crate::Mesh;

/// A service in the namespace `shop`.
#[derive(Clone, Copy, Debug)]
pub struct Service<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its virtual addresses; none for a headless service.
    pub addresses: &'a [IpAddr],
    /// The port that clients dial.
    pub port: u16,
    /// The port behind it: a number or a name.
    pub target: &'a str,
    /// More fields of its `spec`, in YAML's flow form.
    pub more: &'a str,
}

/// One endpoint of a service.
#[derive(Clone, Copy, Debug)]
pub struct Endpoint {
    /// Its address.
    pub address: IpAddr,
    /// The port that its application listens on.
    pub port: u16,
    /// Whether it is ready.
    pub ready: bool,
}

impl Endpoint {
    /// One that is ready.
    #[must_use]
    pub fn ready(address: IpAddr, port: u16) -> Self {
        Self { address, port, ready: true }
    }
}

impl Mesh {
    /// Writes a service and, as the cluster does, one slice of endpoints for each address family and port.
    pub fn serve(&self, service: Service<'_>, endpoints: &[Endpoint]) {
        let Service { name, addresses, port, target, more } = service;
        let quoted: Vec<_> = addresses.iter().map(|address| format!("\"{address}\"")).collect();
        let (first, all) = match quoted.first() {
            Some(first) => (first.clone(), quoted.join(", ")),
            None => ("None".to_owned(), "None".to_owned()),
        };
        let comma = if more.is_empty() { "" } else { ", " };
        let mut text = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\n\
             spec: {{clusterIP: {first}, clusterIPs: [{all}], ports: [{{name: main, port: {port}, targetPort: {target}}}]{comma}{more}}}\n"
        );
        for (number, endpoint) in endpoints.iter().enumerate() {
            let Endpoint { address, port, ready } = endpoint;
            let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
            // A string takes what is written.
            let _written = write!(
                text,
                "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
                 metadata: {{name: {name}-{number}, namespace: shop, labels: {{kubernetes.io/service-name: {name}}}}}\n\
                 addressType: {family}\nendpoints: [{{addresses: [\"{address}\"], conditions: {{ready: {ready}}}}}]\n\
                 ports: [{{name: main, port: {port}, protocol: TCP}}]\n"
            );
        }
        self.apply(&format!("service-{name}"), &text);
    }
}
