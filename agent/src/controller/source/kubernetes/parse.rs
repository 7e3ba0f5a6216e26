//! An object's JSON, as the API server has it, into what the mesh is made of.
//!
//! Enters: the raw text of one object. Leaves: an [`Object`] that holds nothing but what is used: of ten thousand pods, volumes,
//! environments and the server's own book-keeping would be most of the memory.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::core::v1::{
    Container, Namespace, Node, NodeSpec, Pod, PodSpec, PodStatus, Service, ServiceAccount, ServiceSpec,
};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

use crate::controller::source::{FieldError, Kind, Object};

/// What tells an object and its state from all others.
#[derive(Debug)]
pub(super) struct Head {
    namespace: String,
    name: String,
    pub(super) uid: Option<String>,
    pub(super) version: String,
}

/// The same in both versions of the API that are read, as far as it is read.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Slice {
    metadata: ObjectMeta,
    #[serde(default)]
    address_type: String,
    endpoints: Option<Vec<Endpoint>>,
    ports: Option<Vec<EndpointPort>>,
}

impl Head {
    pub(super) fn name(&self) -> (Box<str>, Box<str>) {
        (self.namespace.as_str().into(), self.name.as_str().into())
    }
}

/// Reads name, UID and version.
pub(super) fn head(raw: &RawValue) -> Result<Head, serde_json::Error> {
    #[derive(Deserialize)]
    struct Whole {
        metadata: Metadata,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Metadata {
        #[serde(default)]
        namespace: String,
        name: String,
        uid: Option<String>,
        #[serde(default)]
        resource_version: String,
    }
    let Metadata { namespace, name, uid, resource_version: version } = serde_json::from_str::<Whole>(raw.get())?.metadata;
    Ok(Head { namespace, name, uid, version })
}

/// Reads an object of a kind.
pub(super) fn object(kind: Kind, raw: &RawValue) -> Result<Object, FieldError> {
    Ok(match kind {
        Kind::Node => Object::Node(Box::new(trim_node(read(raw)?))),
        Kind::Namespace => {
            let namespace: Namespace = read(raw)?;
            let metadata = ObjectMeta { labels: namespace.metadata.labels.clone(), ..names(namespace.metadata) };
            Object::Namespace(Box::new(Namespace { metadata, spec: None, status: None }))
        }
        Kind::Pod => Object::Pod(Box::new(trim_pod(read(raw)?))),
        Kind::ServiceAccount => {
            let account: ServiceAccount = read(raw)?;
            Object::ServiceAccount(Box::new(ServiceAccount { metadata: names(account.metadata), ..ServiceAccount::default() }))
        }
        Kind::Service => Object::Service(Box::new(trim_service(read(raw)?))),
        Kind::EndpointSlice => Object::EndpointSlice(Box::new(trim_slice(read(raw)?))),
        Kind::PeerAuthentication => {
            let mut policy: Box<crate::policy::objects::PeerAuthenticationPolicy> = read(raw)?;
            policy.metadata = policy_metadata(policy.metadata);
            Object::PeerAuthentication(policy)
        }
        Kind::AuthorizationPolicy => {
            let mut policy: Box<crate::policy::objects::AuthorizationPolicy> = read(raw)?;
            policy.metadata = policy_metadata(policy.metadata);
            Object::AuthorizationPolicy(policy)
        }
    })
}

fn read<T: DeserializeOwned>(raw: &RawValue) -> Result<T, FieldError> {
    let mut deserializer = serde_json::Deserializer::from_str(raw.get());
    serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let path = error.path().to_string();
        let path = if path == "." { "object".to_owned() } else { path };
        FieldError { path, problem: error.into_inner().to_string() }
    })
}

fn names(metadata: ObjectMeta) -> ObjectMeta {
    let ObjectMeta { name, namespace, uid, .. } = metadata;
    ObjectMeta { name, namespace, uid, ..ObjectMeta::default() }
}

fn policy_metadata(metadata: ObjectMeta) -> ObjectMeta {
    let (annotations, creation_timestamp) = (metadata.annotations.clone(), metadata.creation_timestamp.clone());
    let annotations = annotations.map(|all| {
        let used = |key: &String| crate::policy::compile::DRY_RUN_ANNOTATIONS.contains(&key.as_str());
        all.into_iter().filter(|(key, _)| used(key)).collect::<BTreeMap<_, _>>()
    });
    let generation = metadata.generation;
    ObjectMeta { annotations, creation_timestamp, generation, ..names(metadata) }
}

fn trim_node(node: Node) -> Node {
    let spec = node.spec.map(|NodeSpec { pod_cidr, pod_cidrs, .. }| NodeSpec { pod_cidr, pod_cidrs, ..NodeSpec::default() });
    Node { metadata: names(node.metadata), spec, status: None }
}

fn trim_pod(pod: Pod) -> Pod {
    let (labels, creation_timestamp) = (pod.metadata.labels.clone(), pod.metadata.creation_timestamp.clone());
    let owner_references = pod.metadata.owner_references.clone();
    let metadata = ObjectMeta { labels, creation_timestamp, owner_references, ..names(pod.metadata) };
    let spec = pod.spec.map(|spec| {
        let PodSpec { node_name, service_account_name, host_network, containers, init_containers, .. } = spec;
        let (containers, init_containers) = (trim_containers(containers), init_containers.map(trim_containers));
        PodSpec { node_name, service_account_name, host_network, containers, init_containers, ..PodSpec::default() }
    });
    let status = pod.status.map(|status| {
        let PodStatus { phase, pod_ip, pod_ips, mut conditions, .. } = status;
        if let Some(conditions) = &mut conditions {
            // One of others stays: conditions without this one are not the same as none.
            conditions.sort_by_key(|condition| condition.type_ != "Ready");
            conditions.truncate(1);
        }
        PodStatus { phase, pod_ip, pod_ips, conditions, ..PodStatus::default() }
    });
    Pod { metadata, spec, status }
}

/// The containers whose ports have names: services may point at those.
fn trim_containers(containers: Vec<Container>) -> Vec<Container> {
    let named = |container: &Container| container.ports.iter().flatten().any(|port| port.name.is_some());
    let trim = |Container { name, ports, .. }: Container| Container { name, ports, ..Container::default() };
    containers.into_iter().filter(named).map(trim).collect()
}

fn trim_service(service: Service) -> Service {
    let spec = service.spec.map(|spec| {
        let ServiceSpec { type_, selector, ports, cluster_ip, cluster_ips, ip_families, internal_traffic_policy, .. } = spec;
        let rest = ServiceSpec::default();
        ServiceSpec { type_, selector, ports, cluster_ip, cluster_ips, ip_families, internal_traffic_policy, ..rest }
    });
    Service { metadata: names(service.metadata), spec, status: None }
}

fn trim_slice(slice: Slice) -> EndpointSlice {
    const SERVICE: &str = "kubernetes.io/service-name";
    let service = slice.metadata.labels.as_ref().and_then(|labels| labels.get_key_value(SERVICE));
    let labels = service.map(|(key, value)| BTreeMap::from([(key.clone(), value.clone())]));
    let endpoints = slice.endpoints.map(|endpoints| endpoints.into_iter().map(trim_endpoint).collect());
    let metadata = ObjectMeta { labels, ..names(slice.metadata) };
    EndpointSlice { metadata, address_type: slice.address_type, endpoints, ports: slice.ports }
}

fn trim_endpoint(endpoint: Endpoint) -> Endpoint {
    let ready = endpoint.conditions.and_then(|conditions| conditions.ready);
    let target_ref = endpoint.target_ref.map(|ObjectReference { kind, namespace, name, .. }| ObjectReference {
        kind,
        namespace,
        name,
        ..ObjectReference::default()
    });
    Endpoint {
        addresses: endpoint.addresses,
        conditions: ready.map(|ready| EndpointConditions { ready: Some(ready), ..EndpointConditions::default() }),
        target_ref,
        ..Endpoint::default()
    }
}
