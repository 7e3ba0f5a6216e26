//! What the mesh needs to know of a service, and how its ports find a pod's.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::endpoints::Slice;
use super::pod::PodRecord;
use super::{ObjectName, Resource, resource};
use crate::proto::workload::load_balancing::HealthPolicy;
use crate::proto::workload::{IpFamilies, LoadBalancing, NetworkAddress, Port, Service as WireService, load_balancing};

/// A service, reduced to what the mesh needs.
#[derive(Clone, Debug)]
pub(super) struct ServiceRecord {
    pub(super) hostname: Arc<str>,
    pub(super) selector: BTreeMap<String, String>,
    addresses: Vec<IpAddr>,
    ports: Vec<ServicePort>,
    node_local: bool,
    unready_too: bool,
    families: IpFamilies,
}

#[derive(Clone, Debug)]
struct ServicePort {
    name: String,
    port: u16,
    target: TargetPort,
}

#[derive(Clone, Debug)]
enum TargetPort {
    Number(u16),
    Name(String),
}

impl ServiceRecord {
    /// The record of a service; none for one that only is another name for something outside.
    pub(super) fn of(service: &Service, name: &ObjectName, cluster_domain: &str) -> Option<Self> {
        let spec = service.spec.clone().unwrap_or_default();
        if spec.type_.as_deref() == Some("ExternalName") {
            return None;
        }
        let ports = spec.ports.iter().flatten().filter(|port| port.protocol.as_deref().unwrap_or("TCP") == "TCP");
        let ports = ports.filter_map(|port| {
            let number = u16::try_from(port.port).ok()?;
            let target = match &port.target_port {
                Some(IntOrString::Int(target)) => TargetPort::Number(u16::try_from(*target).ok()?),
                Some(IntOrString::String(name)) => match name.parse() {
                    Ok(number) => TargetPort::Number(number),
                    Err(_) => TargetPort::Name(name.clone()),
                },
                None => TargetPort::Number(number),
            };
            Some(ServicePort { name: port.name.clone().unwrap_or_default(), port: number, target })
        });
        let mut addresses: Vec<IpAddr> = Vec::new();
        for text in spec.cluster_ips.iter().flatten().chain(&spec.cluster_ip) {
            // `None`, the mark of a headless service, is no address.
            if let Ok(address) = text.parse::<IpAddr>().map(|address| address.to_canonical())
                && !addresses.contains(&address)
            {
                addresses.push(address);
            }
        }
        Some(Self {
            hostname: hostname(name, cluster_domain),
            selector: spec.selector.clone().unwrap_or_default(),
            ports: ports.collect(),
            node_local: spec.internal_traffic_policy.as_deref() == Some("Local"),
            unready_too: spec.publish_not_ready_addresses.unwrap_or(false),
            families: families(spec.ip_families.as_deref(), &addresses),
            addresses,
        })
    }

    /// The service as agents hear of it.
    pub(super) fn resource(&self, name: &ObjectName) -> Resource {
        let network_address = |address: &IpAddr| NetworkAddress { network: String::new(), address: resource::octets(*address) };
        let port = |port: &ServicePort| Port {
            service_port: port.port.into(),
            target_port: match port.target {
                TargetPort::Number(number) => number.into(),
                // Each pod's own ports say what the name stands for.
                TargetPort::Name(_) => 0,
            },
        };
        let (scopes, mode) = match self.node_local {
            true => (vec![load_balancing::Scope::Node.into()], load_balancing::Mode::Strict),
            false => (Vec::new(), load_balancing::Mode::UnspecifiedMode),
        };
        let health = if self.unready_too { HealthPolicy::AllowAll } else { HealthPolicy::OnlyHealthy };
        let balancing = LoadBalancing { routing_preference: scopes, mode: mode.into(), health_policy: health.into() };
        let wire = WireService {
            name: name.name.to_string(),
            namespace: name.namespace.to_string(),
            hostname: self.hostname.to_string(),
            addresses: self.addresses.iter().map(network_address).collect(),
            ports: self.ports.iter().map(port).collect(),
            subject_alt_names: Vec::new(),
            load_balancing: (self.node_local || self.unready_too).then_some(balancing),
            ip_families: self.families.into(),
        };
        resource::service(format!("{}/{}", name.namespace, self.hostname).into(), &self.addresses, wire)
    }

    /// The pod's ports behind the service's, by the service's own target ports.
    pub(super) fn selected_ports(&self, pod: &PodRecord) -> Vec<Port> {
        self.own_ports(Some(pod))
    }

    fn own_ports(&self, pod: Option<&PodRecord>) -> Vec<Port> {
        self.ports.iter().filter_map(|port| port.mapped(port.target_in(pod)?)).collect()
    }

    /// The ports behind the service's, as a slice has them. Where the slice does not say, a pod's own do.
    pub(super) fn slice_ports(&self, slice: &Slice, pod: Option<&PodRecord>) -> Vec<Port> {
        let Some(slice_ports) = &slice.ports else { return self.own_ports(pod) };
        let pairs = self.ports.iter().filter_map(|port| {
            let named = slice_ports.iter().find(|(name, _)| *name == port.name);
            // One port on each side can only mean each other.
            let only = || (self.ports.len() == 1 && slice_ports.len() == 1).then(|| slice_ports.first()).flatten();
            let (_, number) = named.or_else(only)?;
            port.mapped(number.or_else(|| port.target_in(pod))?)
        });
        pairs.collect()
    }
}

impl ServicePort {
    fn target_in(&self, pod: Option<&PodRecord>) -> Option<u16> {
        match &self.target {
            TargetPort::Number(number) => Some(*number),
            TargetPort::Name(name) => pod?.ports.get(name).copied(),
        }
    }

    fn mapped(&self, target: u16) -> Option<Port> {
        Some(Port { service_port: self.port.into(), target_port: target.into() })
    }
}

/// The name that a service is resolved by.
pub(super) fn hostname(name: &ObjectName, cluster_domain: &str) -> Arc<str> {
    format!("{}.{}.svc.{cluster_domain}", name.name, name.namespace).into()
}

/// Whether `selector` selects something with these labels. An empty one selects all.
pub(super) fn selects(selector: &BTreeMap<String, String>, labels: &BTreeMap<String, String>) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

fn families(named: Option<&[String]>, addresses: &[IpAddr]) -> IpFamilies {
    let has = |family: &str, v4: bool| match named {
        Some(names) if !names.is_empty() => names.iter().any(|name| name == family),
        _ => addresses.iter().any(|address| address.is_ipv4() == v4),
    };
    match (has("IPv4", true), has("IPv6", false)) {
        (true, true) => IpFamilies::Dual,
        (true, false) => IpFamilies::Ipv4Only,
        (false, true) => IpFamilies::Ipv6Only,
        (false, false) => IpFamilies::Automatic,
    }
}
