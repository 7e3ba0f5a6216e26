//! The wire's messages turned into the model's nouns.
//!
//! Enters: resources as the controller sent them. Leaves: whole objects of the model, or a [`DecodeError`] that names the resource,
//! the field and the value. Nothing is guessed: a value that is not understood refuses the resource.

mod extensions;
mod stand_in;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use prost::Message;

use super::shared::Shared;
use crate::model::spiffe_id::SpiffeIdError;
use crate::model::{
    Action, Authorization, Clause, IpBlock, Match, PodAddresses, PortMapping, Rule, Scope, ServedPorts, Service,
    ServiceAccountMatch, StringMatch, TelemetryNames, TextEnd, TrustDomain, TunnelProtocol, Workload, WorkloadType,
};
use crate::proto::discovery::Resource;
use crate::proto::{culvert, security, workload};

pub(super) use self::stand_in::stand_in;

/// The name of the one resource of mesh-wide settings.
const MESH_NAME: &str = "mesh";
/// How much of a foreign text an error repeats, in characters.
const QUOTE_LIMIT: usize = 128;

/// Why a resource was not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("resource `{resource}`, field `{field}`: {fault}")]
pub struct DecodeError {
    /// The resource's name, as the controller gives it.
    pub resource: String,
    /// The field, with its place in lists.
    pub field: String,
    /// What is wrong with it.
    pub fault: Fault,
}

/// What is wrong with a field.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The bytes are not the message that they should be.
    #[error("it is not the message it should be: {0}")]
    Proto(String),
    /// The message is of another type.
    #[error("it is of type `{is}`, expected was `{expected}`")]
    Type {
        /// Its type URL.
        is: String,
        /// The type URL of the subscription.
        expected: String,
    },
    /// It must not be empty.
    #[error("it is empty")]
    Missing,
    /// It does not agree with the resource's name.
    #[error("it gives `{is}`, which is not the resource's name")]
    OtherName {
        /// The name that follows from the content.
        is: String,
    },
    /// It is no address.
    #[error("an address has 4 or 16 bytes, this has {0}")]
    Address(usize),
    /// A pod has one address a family.
    #[error("a second address of the same family: `{0}`")]
    SecondAddress(IpAddr),
    /// It is no port.
    #[error("`{0}` is not a port: 1 to 65535")]
    Port(u32),
    /// It is no value of its enum.
    #[error("`{0}` is no value that this version knows")]
    Enum(i32),
    /// A prefix is longer than the address.
    #[error("a prefix of {length} bits, where `{address}` has fewer")]
    Prefix {
        /// The address.
        address: IpAddr,
        /// The length in bits.
        length: u32,
    },
    /// It is no address range.
    #[error("`{0}` is not an address range such as 10.0.0.0/8")]
    Range(String),
    /// It is no key.
    #[error("`{0}` is not of the form namespace/name")]
    Key(String),
    /// A policy may say less than what is understood of it.
    #[error("it has {0} additions that this version does not know, and may mean less than the rest of it says")]
    Extensions(usize),
    /// It is no part of an identity.
    #[error(transparent)]
    Identity(#[from] SpiffeIdError),
}

/// An object of the model, as one resource holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Decoded {
    Mesh(Mesh),
    /// `implicit_domain`: the resource leaves the trust domain to the mesh.
    Workload {
        workload: Box<Workload>,
        implicit_domain: bool,
    },
    Service(Service),
    Policy(Authorization),
}

/// Mesh-wide settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mesh {
    pub(super) trust_domain: TrustDomain,
    pub(super) default_deny: bool,
    pub(super) cluster_ranges: Arc<[IpNet]>,
}

/// A resource of [`crate::proto::MESH_TYPE`].
pub(super) fn mesh(resource: &Resource, type_url: &str) -> Result<Decoded, DecodeError> {
    let at = At { resource: &resource.name };
    let message: culvert::Mesh = at.message(resource, type_url)?;
    at.named(resource, MESH_NAME)?;
    let trust_domain = message.trust_domain.parse().map_err(|error| at.fault("trust_domain", Fault::Identity(error)))?;
    let ranges = message.cluster_ranges.iter().enumerate().map(|(place, text)| {
        text.parse::<IpNet>()
            .map_err(|_parse| at.fault(format!("cluster_ranges[{place}]"), Fault::Range(quote(text))))
            .map(|range| range.trunc())
    });
    let cluster_ranges = ranges.collect::<Result<_, _>>()?;
    Ok(Decoded::Mesh(Mesh { trust_domain, default_deny: message.default_deny, cluster_ranges }))
}

/// A resource of [`crate::proto::ADDRESS_TYPE`]. `trust_domain` is that of workloads that do not name their own.
pub(super) fn address(
    resource: &Resource,
    type_url: &str,
    trust_domain: &TrustDomain,
    shared: &mut Shared,
) -> Result<Decoded, DecodeError> {
    let at = At { resource: &resource.name };
    let message: workload::Address = at.message(resource, type_url)?;
    match message.r#type {
        Some(workload::address::Type::Workload(message)) => {
            at.named(resource, &message.uid)?;
            let implicit_domain = message.trust_domain.is_empty();
            Ok(Decoded::Workload { workload: Box::new(at.workload(message, trust_domain, shared)?), implicit_domain })
        }
        Some(workload::address::Type::Service(message)) => {
            let service = at.service(message, shared)?;
            at.named(resource, &service.key())?;
            Ok(Decoded::Service(service))
        }
        None => Err(at.fault("type", Fault::Missing)),
    }
}

/// A resource of [`crate::proto::AUTHORIZATION_TYPE`].
pub(super) fn authorization(resource: &Resource, type_url: &str) -> Result<Decoded, DecodeError> {
    let at = At { resource: &resource.name };
    let message: security::Authorization = at.message(resource, type_url)?;
    let policy = at.policy(message)?;
    at.named(resource, &policy.key())?;
    Ok(Decoded::Policy(policy))
}

/// Reads one resource; knows its name for errors.
struct At<'a> {
    resource: &'a str,
}

impl At<'_> {
    fn fault(&self, field: impl Into<String>, fault: Fault) -> DecodeError {
        DecodeError { resource: quote(self.resource), field: field.into(), fault }
    }

    fn message<M: Message + Default>(&self, resource: &Resource, expected: &str) -> Result<M, DecodeError> {
        let any = resource.resource.as_ref().ok_or_else(|| self.fault("resource", Fault::Missing))?;
        if any.type_url != expected {
            let fault = Fault::Type { is: quote(&any.type_url), expected: expected.to_owned() };
            return Err(self.fault("resource.type_url", fault));
        }
        M::decode(&*any.value).map_err(|error| self.fault("resource.value", Fault::Proto(error.to_string())))
    }

    fn named(&self, resource: &Resource, is: &str) -> Result<(), DecodeError> {
        if is.is_empty() {
            return Err(self.fault("uid", Fault::Missing));
        }
        if resource.name != is {
            return Err(self.fault("name", Fault::OtherName { is: quote(is) }));
        }
        Ok(())
    }

    fn workload(
        &self,
        message: workload::Workload,
        mesh_domain: &TrustDomain,
        shared: &mut Shared,
    ) -> Result<Workload, DecodeError> {
        let trust_domain = match &*message.trust_domain {
            "" => mesh_domain.clone(),
            domain => domain.parse().map_err(|error| self.fault("trust_domain", Fault::Identity(error)))?,
        };
        let service_account = if message.service_account.is_empty() { "default" } else { &message.service_account };
        let identity = shared
            .identity(trust_domain, &message.namespace, service_account)
            .map_err(|error| self.fault("namespace, service_account", Fault::Identity(error)))?;
        let policies = message.authorization_policies.iter().enumerate();
        let authorization_policies = policies
            .map(|(place, key)| self.key(|| format!("authorization_policies[{place}]"), key, shared))
            .collect::<Result<Vec<_>, _>>()?;
        let mut own = |text: &str, other: &str| (text != other).then(|| shared.texts.text(text));
        let telemetry = TelemetryNames {
            canonical_name: own(&message.canonical_name, &message.workload_name),
            workload: own(&message.workload_name, &message.name),
            workload_type: match self.value("workload_type", message.workload_type)? {
                workload::WorkloadType::Deployment => WorkloadType::Deployment,
                workload::WorkloadType::Cronjob => WorkloadType::CronJob,
                workload::WorkloadType::Pod => WorkloadType::Pod,
                workload::WorkloadType::Job => WorkloadType::Job,
            },
            canonical_revision: shared.texts.text(&message.canonical_revision),
        };
        let uid = message.uid.into();
        Ok(Workload {
            identity,
            addresses: self.workload_addresses(&message.addresses)?,
            protocol: match self.value("tunnel_protocol", message.tunnel_protocol)? {
                workload::TunnelProtocol::None => TunnelProtocol::None,
                workload::TunnelProtocol::Hbone => TunnelProtocol::Hbone,
            },
            host_network: match self.value("network_mode", message.network_mode)? {
                workload::NetworkMode::Standard => false,
                workload::NetworkMode::HostNetwork => true,
            },
            healthy: match self.value("status", message.status)? {
                workload::WorkloadStatus::Healthy => true,
                workload::WorkloadStatus::Unhealthy => false,
            },
            services: self.workload_services(&message.services, shared)?,
            peer_authentication: shared.modes.one(self.peer_authentication(&message.extensions)?),
            same_node: self.same_node(&message.extensions)?,
            pod: self.pod(&message.extensions)?.map(Arc::new),
            authorization_policies: shared.policies.one(authorization_policies),
            name: TextEnd::of(&uid, &message.name),
            uid,
            node: shared.texts.text(&message.node),
            telemetry: shared.telemetry.one(telemetry),
        })
    }

    fn workload_addresses(&self, addresses: &[impl AsRef<[u8]>]) -> Result<PodAddresses, DecodeError> {
        let mut found = PodAddresses::default();
        for (place, bytes) in addresses.iter().enumerate() {
            let field = || format!("addresses[{place}]");
            let address = self.ip(field, bytes.as_ref())?.to_canonical();
            found.add(address).map_err(|second| self.fault(field(), Fault::SecondAddress(second)))?;
        }
        Ok(found)
    }

    fn workload_services(
        &self,
        services: &HashMap<String, workload::PortList>,
        shared: &mut Shared,
    ) -> Result<Arc<ServedPorts>, DecodeError> {
        let one = |(key, list): (&String, &workload::PortList)| {
            let field = || format!("services[{}]", quote(key));
            let mappings = list.ports.iter().enumerate().map(|(place, port)| {
                Ok(PortMapping {
                    service_port: self.port(|| format!("{}.ports[{place}].service_port", field()), port.service_port)?,
                    target_port: self.port(|| format!("{}.ports[{place}].target_port", field()), port.target_port)?,
                })
            });
            Ok((self.key(field, key, shared)?, mappings.collect::<Result<_, DecodeError>>()?))
        };
        let services: ServedPorts = services.iter().map(one).collect::<Result<_, DecodeError>>()?;
        Ok(shared.services.one(services))
    }

    fn service(&self, message: workload::Service, shared: &mut Shared) -> Result<Service, DecodeError> {
        for (field, text) in [("namespace", &message.namespace), ("hostname", &message.hostname)] {
            if text.is_empty() {
                return Err(self.fault(field, Fault::Missing));
            }
        }
        let addresses = message.addresses.iter().enumerate().map(|(place, address)| {
            self.ip(|| format!("addresses[{place}]"), &address.address).map(|address| address.to_canonical())
        });
        let ports = message.ports.iter().enumerate().map(|(place, port)| {
            let service_port = self.port(|| format!("ports[{place}].service_port"), port.service_port)?;
            // A named target port differs from pod to pod: then it is 0 here, and each workload tells its own.
            let target_port = u16::try_from(port.target_port)
                .map_err(|_range| self.fault(format!("ports[{place}].target_port"), Fault::Port(port.target_port)))?;
            Ok(PortMapping { service_port, target_port: if target_port == 0 { service_port } else { target_port } })
        });
        Ok(Service {
            addresses: addresses.collect::<Result<_, _>>()?,
            ports: ports.collect::<Result<_, DecodeError>>()?,
            node_local: self.node_local(message.load_balancing.as_ref())?,
            unready_too: self.unready_too(message.load_balancing.as_ref())?,
            name: shared.texts.text(&message.name),
            namespace: shared.texts.text(&message.namespace),
            hostname: message.hostname.into(),
        })
    }

    fn node_local(&self, load_balancing: Option<&workload::LoadBalancing>) -> Result<bool, DecodeError> {
        use workload::load_balancing::{Mode, Scope};

        let Some(message) = load_balancing else { return Ok(false) };
        let strict = match self.value("load_balancing.mode", message.mode)? {
            Mode::Strict => true,
            Mode::UnspecifiedMode | Mode::Failover | Mode::Passthrough => false,
        };
        Ok(strict && message.routing_preference.contains(&(Scope::Node as i32)))
    }

    fn unready_too(&self, load_balancing: Option<&workload::LoadBalancing>) -> Result<bool, DecodeError> {
        use workload::load_balancing::HealthPolicy;

        let Some(message) = load_balancing else { return Ok(false) };
        Ok(match self.value("load_balancing.health_policy", message.health_policy)? {
            HealthPolicy::OnlyHealthy => false,
            HealthPolicy::AllowAll => true,
        })
    }

    fn policy(&self, message: security::Authorization) -> Result<Authorization, DecodeError> {
        if message.name.is_empty() {
            return Err(self.fault("name", Fault::Missing));
        }
        self.no_extensions("extensions", &message.extensions)?;
        let rules = message.rules.iter().enumerate().map(|(rule_at, rule)| {
            let clauses = rule.clauses.iter().enumerate().map(|(clause_at, clause)| {
                let matches = clause.matches.iter().enumerate().map(|(match_at, one)| {
                    self.one_match(&format!("rules[{rule_at}].clauses[{clause_at}].matches[{match_at}]"), one)
                });
                Ok(Clause { matches: matches.collect::<Result<_, _>>()? })
            });
            Ok(Rule { clauses: clauses.collect::<Result<_, DecodeError>>()? })
        });
        Ok(Authorization {
            scope: match self.value("scope", message.scope)? {
                security::Scope::Global => Scope::Global,
                security::Scope::Namespace => Scope::Namespace,
                security::Scope::WorkloadSelector => Scope::WorkloadSelector,
            },
            action: match self.value("action", message.action)? {
                security::Action::Allow => Action::Allow,
                security::Action::Deny => Action::Deny,
                security::Action::Audit => Action::Audit,
            },
            dry_run: message.dry_run,
            rules: rules.collect::<Result<_, DecodeError>>()?,
            namespace: message.namespace.into(),
            name: message.name.into(),
        })
    }

    /// What is not understood may say that less is matched.
    fn no_extensions(&self, field: &str, extensions: &[Vec<u8>]) -> Result<(), DecodeError> {
        if extensions.is_empty() { Ok(()) } else { Err(self.fault(field, Fault::Extensions(extensions.len()))) }
    }

    fn one_match(&self, path: &str, message: &security::Match) -> Result<Match, DecodeError> {
        self.no_extensions(&format!("{path}.extensions"), &message.extensions)?;
        Ok(Match {
            namespaces: self.texts(path, "namespaces", &message.namespaces)?,
            not_namespaces: self.texts(path, "not_namespaces", &message.not_namespaces)?,
            service_accounts: self.accounts(path, "service_accounts", &message.service_accounts)?,
            not_service_accounts: self.accounts(path, "not_service_accounts", &message.not_service_accounts)?,
            principals: self.texts(path, "principals", &message.principals)?,
            not_principals: self.texts(path, "not_principals", &message.not_principals)?,
            source_ips: self.blocks(path, "source_ips", &message.source_ips)?,
            not_source_ips: self.blocks(path, "not_source_ips", &message.not_source_ips)?,
            destination_ips: self.blocks(path, "destination_ips", &message.destination_ips)?,
            not_destination_ips: self.blocks(path, "not_destination_ips", &message.not_destination_ips)?,
            destination_ports: self.ports(path, "destination_ports", &message.destination_ports)?,
            not_destination_ports: self.ports(path, "not_destination_ports", &message.not_destination_ports)?,
        })
    }

    fn texts(&self, path: &str, field: &str, messages: &[security::StringMatch]) -> Result<Vec<StringMatch>, DecodeError> {
        use security::string_match::MatchType;

        let one = |(place, message): (usize, &security::StringMatch)| match &message.match_type {
            Some(MatchType::Exact(text)) => Ok(StringMatch::Exact(text.as_str().into())),
            Some(MatchType::Prefix(text)) => Ok(StringMatch::Prefix(text.as_str().into())),
            Some(MatchType::Suffix(text)) => Ok(StringMatch::Suffix(text.as_str().into())),
            Some(MatchType::Presence(())) => Ok(StringMatch::Presence),
            None => Err(self.fault(format!("{path}.{field}[{place}]"), Fault::Missing)),
        };
        messages.iter().enumerate().map(one).collect()
    }

    fn accounts(
        &self,
        path: &str,
        field: &str,
        messages: &[security::ServiceAccountMatch],
    ) -> Result<Vec<ServiceAccountMatch>, DecodeError> {
        let one = |(place, message): (usize, &security::ServiceAccountMatch)| {
            if message.namespace.is_empty() || message.service_account.is_empty() {
                return Err(self.fault(format!("{path}.{field}[{place}]"), Fault::Missing));
            }
            Ok(ServiceAccountMatch {
                namespace: message.namespace.as_str().into(),
                service_account: message.service_account.as_str().into(),
            })
        };
        messages.iter().enumerate().map(one).collect()
    }

    fn blocks(&self, path: &str, field: &str, messages: &[security::Address]) -> Result<Vec<IpBlock>, DecodeError> {
        let one = |(place, message): (usize, &security::Address)| {
            let field = || format!("{path}.{field}[{place}]");
            let address = self.ip(field, &message.address)?;
            block(address, message.length).ok_or_else(|| self.fault(field(), Fault::Prefix { address, length: message.length }))
        };
        messages.iter().enumerate().map(one).collect()
    }

    fn ports(&self, path: &str, field: &str, ports: &[u32]) -> Result<Vec<u16>, DecodeError> {
        let ports = ports.iter().enumerate();
        ports.map(|(place, port)| self.port(|| format!("{path}.{field}[{place}]"), *port)).collect()
    }

    fn ip(&self, field: impl Fn() -> String, bytes: &[u8]) -> Result<IpAddr, DecodeError> {
        if let Ok(bytes) = <[u8; 4]>::try_from(bytes) {
            return Ok(bytes.into());
        }
        match <[u8; 16]>::try_from(bytes) {
            Ok(bytes) => Ok(bytes.into()),
            Err(_length) => Err(self.fault(field(), Fault::Address(bytes.len()))),
        }
    }

    fn port(&self, field: impl Fn() -> String, port: u32) -> Result<u16, DecodeError> {
        u16::try_from(port).ok().filter(|port| *port != 0).ok_or_else(|| self.fault(field(), Fault::Port(port)))
    }

    fn key(&self, field: impl Fn() -> String, key: &str, shared: &mut Shared) -> Result<Arc<str>, DecodeError> {
        match key.split_once('/') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
                Ok(shared.texts.text(key))
            }
            Some(_) | None => Err(self.fault(field(), Fault::Key(quote(key)))),
        }
    }

    fn value<E: TryFrom<i32>>(&self, field: impl Into<String>, value: i32) -> Result<E, DecodeError> {
        E::try_from(value).map_err(|_unknown| self.fault(field, Fault::Enum(value)))
    }
}

/// A block of IPv4-mapped addresses becomes the IPv4 block that it stands for.
fn block(address: IpAddr, length: u32) -> Option<IpBlock> {
    let length = u8::try_from(length).ok()?;
    match address {
        IpAddr::V4(_) => (length <= 32).then_some(IpBlock { address, length }),
        IpAddr::V6(wide) => match (wide.to_ipv4_mapped(), length) {
            (Some(narrow), 96..=128) => Some(IpBlock { address: narrow.into(), length: length - 96 }),
            (_, 0..=128) => Some(IpBlock { address, length }),
            _ => None,
        },
    }
}

/// A foreign text, cut to a length that a log line bears, with control characters made visible.
pub(super) fn quote(text: &str) -> String {
    text.chars().take(QUOTE_LIMIT).map(|letter| if letter.is_control() { char::REPLACEMENT_CHARACTER } else { letter }).collect()
}

#[cfg(test)]
mod published;
#[cfg(test)]
mod tests;
